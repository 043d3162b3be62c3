"""Shards: what a shard list names, what each tar holds, and the order of an epoch.

A shard is read by position: its index gives every member's offset, so a sample is one seek away and a run resumes in
the middle of an epoch without reading what came before.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import braceexpand
import numpy as np

from mmrl.data import draws, starter
from mmrl.errors import InputError

_REMOTE = re.compile(r"^[a-z0-9]+:(//|\S)", re.IGNORECASE)


def expand(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """The shard files that a spec names: a tar, a brace pattern, a folder, a list file (`@shards.txt`), the shipped
    set (`starter:train`), or a list of these.

    Raises:
        InputError: a named file is missing or no tar, a pattern matches fewer files than it names, nothing is named.
    """
    specs = [shards] if isinstance(shards, str | Path) else list(shards)
    paths = [path for spec in specs for path in _expand_one(str(spec))]
    if not paths:
        raise InputError(f"shards: {shards!r} names no file; give a tar, a pattern, a folder or @list.txt.")
    most_named, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise InputError(f"shards: {most_named} is named twice; each shard is read once an epoch.")
    return paths


def _expand_one(spec: str) -> list[Path]:
    if spec.startswith("starter:"):
        return starter.shards(spec.removeprefix("starter:"))
    if spec.startswith("@"):
        listing = Path(spec[1:])
        if not listing.is_file():
            raise InputError(f"shards: the list file {listing} does not exist.")
        lines = [line.strip() for line in listing.read_text().splitlines()]
        return [path for line in lines if line and not line.startswith("#") for path in _expand_one(line)]
    if _REMOTE.match(spec):
        raise InputError(f"shards: {spec!r} is not a local path; copy the shards to this machine first.")
    if Path(spec).is_dir():
        paths = sorted(Path(spec).rglob("*.tar"))
        if not paths:
            raise InputError(f"shards: the folder {spec} holds no .tar file.")
        return paths
    paths = [Path(name) for name in braceexpand.braceexpand(spec)]
    missing = [path for path in paths if not path.is_file()]
    if missing and len(paths) == 1:
        raise InputError(f"shards: {missing[0]} does not exist.")
    if missing:
        raise InputError(
            f"shards: {spec!r} names {len(paths)} files and {len(missing)} of them do not exist, such as {missing[0]}; "
            "correct the pattern or restore the files."
        )
    return paths


@dataclass(frozen=True)
class Problem:
    """Something of a shard that cannot be used, as it will stand in bad_samples.jsonl."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample's members lie in one tar. Compact: a set of 10 million samples must fit in memory.

    Sample i has the members first[i] … first[i+1]-1; member m has extension extensions[kind[m]] and the bytes
    offset[m] … offset[m]+size[m]-1.
    """

    path: Path
    keys: list[str]
    first: np.ndarray
    kind: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extensions: list[str]
    problems: list[Problem] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of sample `row`."""
        span = range(self.first[row], self.first[row + 1])
        return {self.extensions[self.kind[m]]: (int(self.offset[m]), int(self.size[m])) for m in span}


def index_shard(path: Path) -> ShardIndex:
    """Reads a tar's headers. Members that follow each other under one key (the name up to its first dot, as
    WebDataset has it) are one sample. Where the tar is cut short, what is whole before the cut is kept and the cut
    is recorded among the problems.

    Raises:
        InputError: the file is no plain tar at all.
    """
    builder, length, cut = _IndexBuilder(path), path.stat().st_size, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    cut = f"the file ends inside {member.name}"
                    break
                builder.add(member.name, member.offset_data, member.size)
            else:
                cut = None if _ends_properly(path, tar.offset) else "no end-of-archive mark"
    except tarfile.ReadError as error:
        if not builder.has_members:
            hint = "; decompress it first" if _is_gzip(path) else ""
            raise InputError(f"shards: {path} is not a plain tar file ({error}){hint}.") from error
        cut = str(error)
    if cut:
        builder.problem("", f"truncated tar: {cut}")
    return builder.finish()


def _ends_properly(path: Path, offset: int) -> bool:
    """A whole archive ends in blocks of zeros; a cut at the edge of a member raises nothing in any reader."""
    with path.open("rb") as raw:
        raw.seek(offset)
        return raw.read(512) == bytes(512)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as raw:
        return raw.read(2) == b"\x1f\x8b"


class _IndexBuilder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys: list[str] = []
        self.problems: list[Problem] = []
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
                self.problem(key, "duplicate key in this shard")
            self._seen.add(key)
        if self._skipping:
            return
        kind = self._kinds.setdefault(extension.lower(), len(self._kinds))
        if kind in (k for k, _, _ in self._members[self._first[-1] :]):
            self.problem(key, f"two members .{extension}; the first is used")
            return
        self._members.append((kind, offset, size))

    @property
    def has_members(self) -> bool:
        return bool(self._members)

    def problem(self, key: str, reason: str) -> None:
        self.problems.append(Problem(str(self.path), key, reason))

    def _close(self) -> None:
        if self._key is not None and not self._skipping:
            self.keys.append(self._key)
            self._first.append(len(self._members))

    def finish(self) -> ShardIndex:
        self._close()
        kind, offset, size = np.array(self._members, np.int64).reshape(-1, 3).T
        return ShardIndex(
            path=self.path,
            keys=self.keys,
            first=np.array(self._first),
            kind=kind.astype(np.int16),
            offset=offset,
            size=size,
            extensions=list(self._kinds),
            problems=self.problems,
        )


def index_shards(paths: Sequence[Path]) -> list[ShardIndex]:
    """The index of each shard, in the given order.

    Raises:
        InputError: a shard is no tar, or no shard holds a sample.
    """
    indexes = [index_shard(path) for path in paths]
    for index in indexes:
        if not len(index):
            raise InputError(f"shards: {index.path} holds no sample (KEY.jpg + KEY.txt …); remove it from the list.")
    return indexes


class EpochOrder:
    """The order of one epoch, as a pure function of (seed, epoch): position -> sample.

    The shards are permuted, laid end to end and shuffled in windows of `window` samples; the whole is then turned by
    a random start, so that window edges and the tail that fills no batch fall elsewhere each epoch. Any position is
    found at once, which is what makes resuming, and dividing the work otherwise, free.

    Samples are numbered in the order of the shard list (`sample`), their places in the epoch 0 … N-1 (`position`).
    """

    def __init__(self, samples_of_shard: Sequence[int], seed: int, epoch: int, window: int) -> None:
        counts = np.asarray(samples_of_shard, np.int64)
        order = draws.permutation(len(counts), seed, epoch, 1)
        self.length = int(counts.sum())
        self._first_of_shard = (np.cumsum(counts) - counts)[order]
        self._start_of_shard = np.cumsum(counts[order]) - counts[order]
        self._turn = int(draws.bits(seed, epoch, 2) % np.uint64(self.length))
        self._window = window
        self._names = (seed, epoch, 3)
        # Batches walk through a window; the ones that straddle an edge need two.
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions; positions beyond the end go on at the beginning."""
        places = (positions + self._turn) % self.length
        for window in np.unique(places // self._window):
            inside = places // self._window == window
            first = window * self._window
            places[inside] = first + self._shuffled(int(window))[places[inside] - first]
        shard = np.searchsorted(self._start_of_shard, places, side="right") - 1
        return places - self._start_of_shard[shard] + self._first_of_shard[shard]

    def _shuffle(self, window: int) -> np.ndarray:
        length = min(self._window, self.length - window * self._window)
        return draws.permutation(length, *self._names, window)
