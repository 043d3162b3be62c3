"""Which dim and precision do I need? The smallest within a budget, how sure that is, and what it saves.

A budget is how much recall may be lost against the full vector in float32, such as `recall_drop=1%` (a hundredth of
what the full vector finds) or `recall_drop=0.5pp` (percentage points).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import InputError
from mmrl.evaluate.compression import Option, bytes_of
from mmrl.evaluate.intervals import Bootstrap, Interval
from mmrl.evaluate.task import DIRECTIONS

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Budget:
    """How much may be lost, of which score."""

    drop: float = 0.01
    relative: bool = True
    k: int = 10
    direction: str = "text_to_image"

    @property
    def words(self) -> str:
        """For headlines: "1 % of R@10, text→image"."""
        amount = f"{100 * self.drop:g} %" if self.relative else f"{100 * self.drop:g} points"
        return f"{amount} of R@{self.k}, {DIRECTIONS[self.direction]}"

    def lost(self, bootstrap: Bootstrap, full_Q: Tensor, other_QS: Tensor) -> list[Interval]:
        """How much of the score each column of ranks loses against the full vector's, in the budget's own unit."""
        return bootstrap.differences(full_Q[:, None] <= self.k, other_QS <= self.k, relative=self.relative)


def parse_budget(text: str) -> Budget:
    """`recall_drop=1%[,metric=R@5][,direction=image_to_text]`.

    Raises:
        InputError: anything else.
    """
    allowed = "recall_drop=1%, or recall_drop=0.5pp, with metric=R@K and direction=text_to_image after commas"
    given = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in ("recall_drop", "metric", "direction") or key in given:
            raise InputError(f"budget: {part.strip()!r} is not understood; write it as {allowed}.")
        given[key] = value.strip()
    if "recall_drop" not in given:
        raise InputError(f"budget: recall_drop is missing from {text!r}; write it as {allowed}.")
    amount = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%|pp)", given["recall_drop"])
    if not amount or not 0 <= float(amount[1]) <= 100:
        raise InputError(f"budget: recall_drop={given['recall_drop']!r} is no share such as 1% or 0.5pp, up to 100.")
    metric = re.fullmatch(r"R@([1-9]\d*)", given.get("metric", "R@10"))
    if not metric:
        raise InputError(f"budget: metric={given['metric']!r}: only recall has a budget; write metric=R@10.")
    direction = given.get("direction", "text_to_image")
    if direction not in DIRECTIONS:
        raise InputError(f"budget: direction={direction!r}; allowed are {', '.join(DIRECTIONS)}.")
    return Budget(float(amount[1]) / 100, amount[2] == "%", int(metric[1]), direction)


def parse_count(text: str) -> int:
    """100M, 2.5B, 80K, 1_000_000 or 1000000 -> a number of vectors.

    Raises:
        InputError: anything else, or less than one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?)([KMBG]?)", text.strip().upper().replace("_", ""))
    count = round(float(match[1]) * _SUFFIXES[match[2]]) if match else 0
    if count < 1:
        raise InputError(f"vectors: {text!r} is no number of vectors such as 100M, 2.5B or 80000.")
    return count


def short_count(count: int) -> str:
    """100_000_000 -> 100M."""
    for suffix, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{suffix}"
    return str(count)


def size_words(count: float) -> str:
    """A number of bytes in decimal units: 204.8 GB."""
    step = 0
    while count >= 1000 and step < len(_UNITS) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.3g} {_UNITS[step]}" if count < 1000 else f"{count:,.0f} {_UNITS[step]}"


def advise(options: Sequence[Option], budget: Budget, bootstrap: Bootstrap, vectors: int) -> dict[str, Any]:
    """What the page's headline says, as JSON.

    Returns: "dim": the smallest dim in float32; "smallest": the smallest dim and precision in one search; "sure": the
        smallest of those whose whole interval is within the budget, or None; "two_stage": the least memory where the
        full vector reranks a short list, or None. Each with its bytes, recall, what is lost with its interval, and what
        `vectors` of it take. The full vector in float32 is among the options, so the first two always exist.
    """
    full_dim = max(option.dim for option in options)
    full = next(o for o in options if (o.dim, o.precision, o.candidates) == (full_dim, "fp32", 0))
    rank_QS = torch.stack([option.rank_Q for option in options], dim=1)
    judged = list(zip(options, budget.lost(bootstrap, full.rank_Q, rank_QS), strict=True))
    single = [(o, lost) for o, lost in judged if not o.candidates]

    def least(found: Sequence[tuple[Option, Interval]], within: Callable[[Interval], bool]) -> dict[str, Any] | None:
        inside = [(o, lost) for o, lost in found if within(lost)]
        if not inside:
            return None
        option, lost = min(inside, key=lambda pair: (pair[0].bytes, pair[0].candidates, pair[1].value))
        return _as_json(option, lost, full, budget, bootstrap, vectors)

    slack = 1e-9
    by_estimate: Callable[[Interval], bool] = lambda lost: lost.value <= budget.drop + slack  # noqa: E731
    surely: Callable[[Interval], bool] = lambda lost: lost.high <= budget.drop + slack  # noqa: E731
    return {
        "budget": {
            "recall_drop": budget.drop,
            "relative": budget.relative,
            "metric": f"R@{budget.k}",
            "direction": budget.direction,
        },
        "vectors": vectors,
        "queries": len(full.rank_Q),
        "full": _as_json(full, Interval(0.0, 0.0, 0.0), full, budget, bootstrap, vectors),
        "dim": least([(o, lost) for o, lost in single if o.precision == "fp32"], by_estimate),
        "smallest": least(single, by_estimate),
        "sure": least([(o, lost) for o, lost in single if o is not full], surely),
        "two_stage": least([(o, lost) for o, lost in judged if o.candidates], by_estimate),
    }


def _as_json(
    option: Option, lost: Interval, full: Option, budget: Budget, bootstrap: Bootstrap, vectors: int
) -> dict[str, Any]:
    recall = bootstrap.intervals((option.rank_Q <= budget.k).double()[:, None])[0]
    return {
        "dim": option.dim,
        "precision": option.precision,
        "candidates": option.candidates,
        "bytes": option.bytes,
        "rerank_bytes": option.rerank_bytes,
        "recall": recall.as_json(),
        "lost": lost.as_json(),
        "within_budget_surely": lost.high <= budget.drop + 1e-9,
        "memory": option.bytes * vectors,
        "saved": (full.bytes - option.bytes) * vectors,
        "times_smaller": full.bytes / option.bytes,
    }


def queries_to_be_sure(lost: Interval, budget: Budget, queries: int) -> int | None:
    """About how many queries would put the whole interval within the budget, if the estimate is right; None where
    none would."""
    room, half = budget.drop - lost.value, lost.high - lost.value
    return None if room <= 0 else math.ceil(queries * (half / room) ** 2)


def full_bytes(dim: int) -> int:
    """Of the full vector in float32."""
    return bytes_of(dim, "fp32")
