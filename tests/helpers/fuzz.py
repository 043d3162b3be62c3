"""A harness for fuzzers: runs seeded attempts with a time limit each and counts what becomes of them."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmrl.errors import InputError, RunStopped

Attempt = Callable[[random.Random], bool]
"""One try with damage drawn from a generator. True: it did no harm; False: something was lost without a word. Refusals
are raised."""


class _Hang(BaseException):
    """Raised in an attempt that takes too long; no `except Exception` catches it."""


@dataclass
class Counts:
    """What became of the attempts."""

    tried: int = 0
    refused: int = 0
    harmless: int = 0
    tracebacks: int = 0
    hangs: int = 0
    silent: int = 0
    found: list[str] = field(default_factory=list)
    """The first attempts with a traceback, a hang or a silent loss."""

    def row(self, name: str) -> str:
        """A row of the table in tests/faults/README.md."""
        numbers = (self.tried, self.refused, self.harmless, self.tracebacks, self.hangs, self.silent)
        return f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |"


@contextmanager
def _time_limit(seconds: float) -> Any:
    def interrupt(*_: object) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    attempt: Attempt,
    count: int,
    refusals: tuple[type[Exception], ...] = (InputError, RunStopped),
    limit_s: float = 30.0,
    *,
    until_found: bool = False,
) -> Counts:
    """Runs `count` attempts, each with a generator of its own seed, or fewer: until one finds something.

    A refusal counts as one only if it is a sentence: one line, of at most 2,000 characters, that is not empty.
    """
    counts = Counts()
    for seed in range(count):
        counts.tried += 1
        began, problem = time.monotonic(), ""
        try:
            with _time_limit(limit_s):
                harmless = attempt(random.Random(seed))
            counts.harmless += harmless
            counts.silent += not harmless
            problem = "" if harmless else "silent loss"
        except refusals as error:
            if 0 < len(str(error)) <= 2000 and "\n" not in str(error):
                counts.refused += 1
            else:
                counts.tracebacks, problem = counts.tracebacks + 1, f"no sentence: {error!r:.200}"
        except _Hang:
            counts.hangs, problem = counts.hangs + 1, f"a hang of {time.monotonic() - began:.0f} s"
        except AssertionError as error:
            counts.silent, problem = counts.silent + 1, f"silent loss: {error!r:.200}"
        except Exception as error:
            counts.tracebacks, problem = counts.tracebacks + 1, repr(error)[:300]
        if problem and len(counts.found) < 20:
            counts.found.append(f"seed {seed}: {problem}")
        if problem and until_found:
            break
    return counts


def damage(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one kind of damage: flipped bits, a cut, zeros, a repeated or removed part, other content."""
    changed, kind = bytearray(data), draw.randrange(7)
    at = draw.randrange(len(data)) if data else 0
    length = draw.choice([1, 8, 100, 1000, len(data)])
    if kind == 0 and data:
        for _ in range(draw.choice([1, 1, 1, 3, 30])):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == 3:
        del changed[at : at + length]
    elif kind == 4:
        changed[at:at] = changed[at : at + length]
    elif kind == 5:
        changed[at : at + length] = draw.randbytes(min(length, 10_000))
    else:
        changed[:] = draw.choice([b"", b"{}", b"[" * 50_000, b"null", b'{"a": 1e999}', b"\xff\xfe\0\0", b"[1, 2]"])
    return bytes(changed)


ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 100_000, 10**9, 10**30, 1.5, float("nan"), "", "x", "../x", "\0", "x" * 3000, "\ud800",
    [], {}, [1], {"a": 1},
)  # fmt: skip


def alter(values: dict[str, Any], draw: random.Random) -> None:
    """Deletes one value of a JSON object, at any depth, or puts an odd one in its place."""
    node: Any = values
    while True:
        key = draw.choice([*node] if isinstance(node, dict) else range(len(node)))
        if not (isinstance(node[key], dict | list) and node[key] and draw.random() < 0.7):
            break
        node = node[key]
    if isinstance(node, dict) and draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(ODD_VALUES)
