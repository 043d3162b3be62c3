"""An index per shard: where each sample's members lie in its tar.

A shard is read by position: a sample is one seek away, and a run resumes in the middle of an epoch without reading
what came before. Scanning a tar's headers takes seconds for each 100,000 members, so the result is kept, as
`shard-000000.tar.index` beside the shard (`mmrl pack` and `mmrl check --index` write it there) or else in the cache
folder, where it is put on first sight. It is a safetensors file: arrays and JSON, nothing that could run.
"""

import contextlib
import hashlib
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmrl.data import draws
from mmrl.data.stores import Store, cache_name, is_remote
from mmrl.errors import InputError

SUFFIX = ".index"
_FORMAT = "mmrl-index-1"
_BLOCK = 512
# So many headers, spread over the tar, tell whether an index is of this tar.
_PROBES = 6
_THREADS = 8


@dataclass(frozen=True)
class Problem:
    """Something of a shard that cannot be used, as it will stand in bad_samples.jsonl."""

    shard: str
    key: str
    reason: str

    @property
    def kind(self) -> str:
        """What such problems are counted by: a reason is "KIND: details", or a kind alone."""
        return self.reason.partition(":")[0]


class NotATar(InputError):
    """A file that is no shard; `reason` tells why, without its name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"shards: {path} is {reason}.")
        self.reason = reason


def account(count_of_kind: Counter[str], most: int = 3) -> str:
    """The commonest kinds of problems and how many of each: "12 damaged picture, 3 no caption and 2 others"."""
    shown = [f"{count:,} {kind}" for kind, count in count_of_kind.most_common(most)]
    rest = count_of_kind.total() - sum(count for _, count in count_of_kind.most_common(most))
    return ", ".join(shown) + (f" and {rest:,} others" if rest else "")


@dataclass(frozen=True)
class TarMark:
    """What tells a tar from another one without reading it whole: its size, and some of its headers, which hold names,
    sizes and times."""

    size: int
    headers: list[int]
    """Where they begin."""
    digest: str

    @classmethod
    def of(cls, path: Path, headers: list[int]) -> "TarMark":
        """The mark of a tar as it is now."""
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb", buffering=0) as raw:
            for offset in headers:
                digest.update(os.pread(raw.fileno(), _BLOCK, offset))
            return cls(os.fstat(raw.fileno()).st_size, headers, digest.hexdigest())

    def fits(self, path: Path) -> bool:
        """Whether that file is this tar."""
        return TarMark.of(path, self.headers) == self


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample's members lie in one tar; arrays alone, so that worker processes share their memory.

    Sample i has the members first[i] … first[i+1]-1; member m has extension extensions[kind[m]] and the bytes
    offset[m] … offset[m]+size[m]-1.
    """

    key_bytes: np.ndarray
    key_end: np.ndarray
    first: np.ndarray
    kind: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extensions: list[str]
    tar: "TarMark"
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of what cannot be used."""

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, row: int) -> str:
        """The key of sample `row`."""
        start = int(self.key_end[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_end[row])].tobytes().decode(errors="surrogateescape")

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of sample `row`."""
        span = range(self.first[row], self.first[row + 1])
        return {self.extensions[self.kind[m]]: (int(self.offset[m]), int(self.size[m])) for m in span}


@dataclass(frozen=True)
class Shard:
    """A shard of which the index is at hand."""

    location: str
    samples: int
    extensions: list[str]
    problems: list[Problem]
    stored: Path | None
    """The index's file."""
    index: ShardIndex | None = None
    """The index itself, where it could be written nowhere."""

    def load(self) -> ShardIndex:
        """The index.

        Raises:
            OSError: its file has gone.
        """
        if self.index is not None:
            return self.index
        assert self.stored is not None
        return load_index(self.stored)


def open_shards(locations: Sequence[str], store: Store) -> list[Shard]:
    """Finds the index of each shard, or makes it. Several processes that do so at once divide the work.

    Raises:
        InputError: a shard is out of reach or no tar, or holds no sample.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda location: _find(location, store), locations))
    # Each process begins elsewhere, and looks again whether another one has been there.
    missing = [i for i, shard in enumerate(found) if shard is None]
    start = int(draws.bits(os.getpid()) % np.uint64(len(missing))) if missing else 0
    for i in _shown(missing[start:] + missing[:start]):
        found[i] = _find(locations[i], store) or _make(locations[i], store)
    shards = [shard for shard in found if shard is not None]
    for shard in shards:
        if not shard.samples:
            raise InputError(
                f"shards: {shard.location} holds no sample (KEY.jpg + KEY.txt …); remove it from the list."
            )
    return shards


def _shown(missing: list[int]) -> Iterator[int]:
    """Under a progress bar, where somebody looks: a million samples take a minute."""
    console = Console(stderr=True)
    is_seen = console.is_terminal and os.environ.get("RANK", "0") == "0"
    columns = (TextColumn("indexing shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_seen) as progress:
        yield from progress.track(missing)


def _find(location: str, store: Store) -> Shard | None:
    kept = _kept(location, store)
    if is_remote(location):
        return _opened(location, kept, None) or _from_beside(location, kept, store)
    tar = Path(location)
    beside = tar.with_name(tar.name + SUFFIX)
    return _opened(location, beside, tar) or _opened(location, kept, tar)


def _kept(location: str, store: Store) -> Path:
    return store.folder.parent / "index" / (cache_name(location) + SUFFIX)


def _from_beside(location: str, kept: Path, store: Store) -> Shard | None:
    """The index that lies beside a remote shard, kept from now on."""
    data = store.small(location + SUFFIX)
    if data is None:
        return None
    with contextlib.suppress(OSError):
        _write(kept, data)
    return _opened(location, kept, None)


def _opened(location: str, stored: Path, tar: Path | None) -> Shard | None:
    """The shard by an index file; None where that is absent, damaged or of another tar than this one."""
    try:
        if not stored.exists():
            return None
        with _facts(stored) as (facts, _):
            if tar is not None and not TarMark(**facts["tar"]).fits(tar):
                return None
            problems = [Problem(location, key, reason) for key, reason in facts["problems"]]
            return Shard(location, facts["samples"], facts["extensions"], problems, stored)
    except (OSError, ValueError):
        return None


def _make(location: str, store: Store) -> Shard:
    try:
        index = index_shard(store.local(location))
    except OSError as error:
        raise InputError(f"shards: {location} cannot be read ({error}).") from None
    kept = _kept(location, store)
    problems = [Problem(location, key, reason) for key, reason in index.problems]
    try:
        save_index(index, kept)
    except OSError:  # a full or read-only disk: it stays in memory
        return Shard(location, len(index), index.extensions, problems, None, index)
    return Shard(location, len(index), index.extensions, problems, kept)


def keep_index(index: ShardIndex, location: str, store: Store, beside: bool = False) -> None:
    """Stores the index of a shard where training looks for it: beside the shard, if it is to be there and the shard is
    a local one; else in the cache folder.

    Raises:
        OSError: it cannot be written there.
    """
    own_place = beside and not is_remote(location)
    save_index(index, Path(location + SUFFIX) if own_place else _kept(location, store))


def index_shard(path: Path) -> ShardIndex:
    """Reads a tar's headers. Members that follow each other under one key (the name up to its first dot, as
    WebDataset has it) are one sample. Where the tar is cut short or damaged, what is whole before is kept and the
    loss is recorded among the problems.

    Raises:
        NotATar: the file is no plain tar at all.
    """
    builder, length, cut, end = _IndexBuilder(), path.stat().st_size, None, 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    cut = f"truncated tar: the file ends inside {member.name}"
                    break
                builder.add(member.name, member.offset_data, member.size)
                end = member.offset_data + member.size
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else tarfile keeps them all
            else:
                cut = None if _ends_properly(path, tar.offset) else "truncated tar: no end-of-archive mark"
    except OSError:
        raise
    except Exception as error:  # damaged headers make tarfile raise many kinds
        if not builder.has_members:
            hint = "; decompress it first" if _is_gzip(path) else ""
            raise NotATar(path, f"not a plain tar file: {error}{hint}") from error
        cut = f"damaged tar: {error}; its last {length - end:,} bytes cannot be read"
    if cut:
        builder.problem("", cut)
    return builder.finish(path)


def _ends_properly(path: Path, offset: int) -> bool:
    """A whole archive ends in blocks of zeros; a cut at the edge of a member raises nothing in any reader."""
    with path.open("rb") as raw:
        raw.seek(offset)
        return raw.read(_BLOCK) == bytes(_BLOCK)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as raw:
        return raw.read(2) == b"\x1f\x8b"


class _IndexBuilder:
    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []
        self._keys: list[bytes] = []
        self._seen: set[str] = set()
        self._first: list[int] = [0]
        self._members: list[tuple[int, int, int]] = []
        self._kinds: dict[str, int] = {}
        self._key: str | None = None
        self._skipping = False

    def add(self, name: str, offset: int, size: int) -> None:
        folder, _, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:
            return  # not a sample's member: README, hidden files
        key = f"{folder}/{stem}" if folder else stem
        if key != self._key:
            self._close()
            self._key = key
            self._skipping = key in self._seen
            if self._skipping:
                self.problem(key, "duplicate key: it stands in this shard before; the first is used")
            self._seen.add(key)
        if self._skipping:
            return
        kind = self._kinds.setdefault(extension.lower(), len(self._kinds))
        if kind in (k for k, _, _ in self._members[self._first[-1] :]):
            self.problem(key, f"two members of one extension: .{extension}; the first is used")
            return
        self._members.append((kind, offset, size))

    @property
    def has_members(self) -> bool:
        return bool(self._members)

    def problem(self, key: str, reason: str) -> None:
        self.problems.append((key, reason))

    def _close(self) -> None:
        if self._key is not None and not self._skipping:
            self._keys.append(self._key.encode(errors="surrogateescape"))
            self._first.append(len(self._members))

    def finish(self, path: Path) -> ShardIndex:
        self._close()
        kind, offset, size = np.array(self._members, np.int64).reshape(-1, 3).T
        probes = np.unique(np.linspace(0, len(offset) - 1, _PROBES).astype(int)) if len(offset) else []
        return ShardIndex(
            key_bytes=np.frombuffer(b"".join(self._keys), np.uint8),
            key_end=np.array([*itertools.accumulate(map(len, self._keys))], np.int64),
            first=np.array(self._first, np.int64),
            kind=kind.astype(np.int32),
            offset=np.ascontiguousarray(offset),
            size=np.ascontiguousarray(size),
            extensions=list(self._kinds),
            tar=TarMark.of(path, [int(offset[m]) - _BLOCK for m in probes]),
            problems=self.problems,
        )


_ARRAYS = ("key_bytes", "key_end", "first", "kind", "offset", "size")


def save_index(index: ShardIndex, path: Path) -> None:
    """Writes an index, whole or not at all.

    Raises:
        OSError: it cannot be written there.
    """
    facts = {
        "samples": len(index),
        "extensions": index.extensions,
        "problems": index.problems,
        "tar": asdict(index.tar),
    }
    # One entry: several would come in another order each time.
    _write(path, save({name: getattr(index, name) for name in _ARRAYS}, {_FORMAT: json.dumps(facts)}))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.write_bytes(data)
    beside.replace(path)


def load_index(path: Path) -> ShardIndex:
    """The index that `save_index` wrote.

    Raises:
        OSError: it is not there.
        ValueError: it is damaged, or of another version.
    """
    with _facts(path) as (facts, file):
        return ShardIndex(
            **{name: file.get_tensor(name) for name in _ARRAYS},
            extensions=facts["extensions"],
            tar=TarMark(**facts["tar"]),
            problems=[(key, reason) for key, reason in facts["problems"]],
        )


@contextlib.contextmanager
def _facts(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """What an index says of itself, and its arrays, unread.

    Raises:
        OSError, ValueError: as load_index.
    """
    try:
        with safe_open(path, "numpy") as file:
            facts = (file.metadata() or {}).get(_FORMAT)
            if facts is None:
                raise ValueError(f"{path} is no index of this version")
            yield json.loads(facts), file
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is a damaged index ({error})") from None
