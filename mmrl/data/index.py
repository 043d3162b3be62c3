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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmrl.errors import InputError

SUFFIX = ".index"
BAD_SAMPLES = "bad_samples.jsonl"
"""The file that lists the problems of a run, a pack or an embedding."""
_FORMAT = "mmrl-index-1"
BLOCK = 512
# So many headers, spread over the tar, tell whether an index is of this tar.
_PROBES = 6
_PIECE = 1 << 20


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


def header_size(header: bytes) -> int | None:
    """The size of a member by its header; -1 where it is none, None where the header tells it in another way."""
    field = header[124:136]
    if field[0] & 0x80:
        return None
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


@dataclass(frozen=True)
class TarMark:
    """What tells a tar from another one without reading it whole: its size, and some of its headers, which hold names,
    sizes and times."""

    size: int
    headers: list[int]
    """Where they begin."""
    digest: str

    @classmethod
    def of(cls, file: int, headers: list[int]) -> "TarMark":
        """The mark of a tar, open for reading, as it is now."""
        digest = hashlib.blake2b(digest_size=16)
        for offset in headers:
            digest.update(os.pread(file, BLOCK, offset))
        return cls(os.fstat(file).st_size, headers, digest.hexdigest())

    def fits(self, file: int) -> bool:
        """Whether that open file is this tar."""
        return TarMark.of(file, self.headers) == self


@dataclass(frozen=True)
class ShardIndex:
    """Where each sample's members lie in one tar, as arrays, some 90 bytes a sample.

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


def index_shard(path: Path, opened: IO[bytes] | None = None) -> ShardIndex:
    """Reads a tar's headers. Members that follow each other under one key (the name up to its first dot, as
    WebDataset has it) are one sample. Where the tar is cut short or damaged, the samples that are whole before that
    are kept, and the loss is recorded among the problems.

    Args:
        opened: the file, where it is open already; `path` is then its name alone.

    Raises:
        NotATar: the file is no plain tar at all.
    """
    with contextlib.nullcontext(opened) if opened else path.open("rb") as raw:
        return _index(path, raw)


def _index(path: Path, raw: IO[bytes]) -> ShardIndex:
    builder, length, cut, end = _IndexBuilder(), os.fstat(raw.fileno()).st_size, None, 0
    try:
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # which tarfile would step back by, for ever
                    raise tarfile.ReadError(f"{member.name} has a size below 0")
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    cut = f"truncated tar: the file ends inside {member.name}"
                    builder.drop_unfinished(member.name)
                    break
                builder.add(member.name, member.offset_data, member.size)
                end = member.offset_data + member.size
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else tarfile keeps them all
            else:
                cut = _cut_at(raw, tar.offset)
                if cut and not cut.startswith(_BEYOND):
                    builder.drop_unfinished()
    except OSError:
        raise
    except Exception as error:  # damaged headers make tarfile raise many kinds
        if not builder.has_members:
            hint = "; decompress it first" if _is_gzip(raw) else ""
            raise NotATar(path, f"not a plain tar file: {error}{hint}") from error
        cut = f"damaged tar: {error}; its last {length - end:,} bytes cannot be read"
        builder.drop_unfinished()
    if cut:
        builder.problem("", cut)
    return builder.finish(raw.fileno())


_BEYOND = "data beyond the end of the tar"


def _cut_at(raw: IO[bytes], offset: int) -> str | None:
    """What is wrong with the end of a tar of which tarfile read no further than `offset`. A whole one ends there in
    blocks of zeros; a cut at the edge of a member, or a damaged header, raises nothing in any reader."""
    raw.seek(offset)
    rest = os.fstat(raw.fileno()).st_size - offset
    block = raw.read(BLOCK)
    if len(block) < BLOCK:
        return "truncated tar: no end-of-archive mark"
    if any(block):
        return f"damaged tar: no header at byte {offset:,}; its last {rest:,} bytes cannot be read"
    while piece := raw.read(_PIECE):
        if any(piece):
            return f"{_BEYOND}: its last {rest:,} bytes are not read; tars are not joined by cat"
    return None


def _is_gzip(raw: IO[bytes]) -> bool:
    raw.seek(0)
    return raw.read(2) == b"\x1f\x8b"


def _key_of(name: str) -> tuple[str, str]:
    """A member's key and extension; ('', '') where it is no sample's."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return "", ""
    return (f"{folder}/{stem}" if folder else stem), extension


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
        key, extension = _key_of(name)
        if not key:
            return  # not a sample's member: README, hidden files
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

    def drop_unfinished(self, next_name: str | None = None) -> None:
        """Leaves out the sample that was being read, unless a member of another one is known to follow it."""
        if self._key is None or (next_name is not None and _key_of(next_name)[0] != self._key):
            return
        if not self._skipping:
            del self._members[self._first[-1] :]
            self.problem(self._key, "cut sample: the tar ends or is damaged within it or right behind it")
        self._key = None

    @property
    def has_members(self) -> bool:
        return bool(self._members)

    def problem(self, key: str, reason: str) -> None:
        self.problems.append((key, reason))

    def _close(self) -> None:
        if self._key is not None and not self._skipping:
            self._keys.append(self._key.encode(errors="surrogateescape"))
            self._first.append(len(self._members))

    def finish(self, file: int) -> ShardIndex:
        """The index of that open file."""
        self._close()
        kind, offset, size = np.array(self._members, np.int64).reshape(-1, 3).T
        probes = np.unique(np.linspace(0, len(offset) - 1, _PROBES).astype(int)) if len(offset) else []
        mark = TarMark.of(file, [int(offset[m]) - BLOCK for m in probes])
        return ShardIndex(
            key_bytes=np.frombuffer(b"".join(self._keys), np.uint8),
            key_end=np.array([*itertools.accumulate(map(len, self._keys))], np.int64),
            first=np.array(self._first, np.int64),
            kind=kind.astype(np.int32),
            offset=np.ascontiguousarray(offset),
            size=np.ascontiguousarray(size),
            extensions=list(self._kinds),
            tar=mark,
            problems=self.problems,
        )


_ARRAYS = ("key_bytes", "key_end", "first", "kind", "offset", "size")


def save_index(index: ShardIndex, path: Path, modified: int | None = None) -> None:
    """Writes an index, whole or not at all; `modified` is the tar's time, where that tells it from a later one.

    Raises:
        OSError: it cannot be written there.
    """
    facts = {
        "samples": len(index),
        "extensions": index.extensions,
        "problems": index.problems,
        "tar": asdict(index.tar),
        "modified": modified,
    }
    # One entry: several would come in another order each time.
    write_whole(path, save({name: getattr(index, name) for name in _ARRAYS}, {_FORMAT: json.dumps(facts)}))


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all; its folder is made."""
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
    with index_facts(path) as (facts, file):
        index = ShardIndex(
            **{name: file.get_tensor(name) for name in _ARRAYS},
            extensions=facts["extensions"],
            tar=TarMark(**facts["tar"]),
            problems=[(key, reason) for key, reason in facts["problems"]],
        )
    if not _is_sound(index) or len(index) != facts["samples"]:
        raise ValueError(f"{path} is a damaged index (its parts do not fit each other)")
    return index


def _is_sound(index: ShardIndex) -> bool:
    """It may have come over the net: no row of it may point out of it, or out of its tar."""
    first, key_end, members = index.first, index.key_end, len(index.kind)
    if any(array.ndim != 1 or array.dtype.kind not in "iu" for array in (getattr(index, name) for name in _ARRAYS)):
        return False
    if len(first) != len(index) + 1 or first[0] != 0 or first[-1] != members:
        return False
    if not len(index.offset) == len(index.size) == members:
        return False
    if len(index.key_bytes) != (key_end[-1] if len(index) else 0):
        return False
    within = (index.kind >= 0) & (index.kind < len(index.extensions)) & (index.size >= 0) & (index.offset >= BLOCK)
    within &= index.offset <= index.tar.size - index.size
    return bool(within.all() and (np.diff(first) >= 0).all() and (np.diff(key_end) >= 0).all())


@contextlib.contextmanager
def index_facts(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
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
    except (SafetensorError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is a damaged index ({error})") from None
