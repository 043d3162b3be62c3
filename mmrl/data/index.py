"""Shard indexes: the byte offset and size of each sample's members in a tar.

With an index, any sample is one seek away, so a run resumes in the middle of an epoch without reading what came
before. Scanning a tar's headers takes seconds per 100,000 members, so the index is stored: next to the shard as
`shard-000000.tar.index` (written by `mmrl pack` and `mmrl check --index`), else in the cache folder when the shard is
first opened (see index_file.py).
"""

import contextlib
import hashlib
import itertools
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from mmrl.errors import InputError
from mmrl.images.upright import format_of

BAD_SAMPLES = "bad_samples.jsonl"
"""The file that lists the problems of a run, a pack or an embedding."""
BLOCK = 512
"""A tar's block size: each member begins with a header of one block."""
# Headers, evenly spaced over the tar, that its fingerprint is made of.
_FINGERPRINT_HEADERS = 6
_CHUNK = 1 << 20


def printable(name: str) -> str:
    """The name of a file, of a sample or of a shard as text: \\xff in place of a byte that is not UTF-8.

    Such a name could not be printed, nor stored in JSON, Parquet or HTML.
    """
    try:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, from JSON
        return name.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Problem:
    """A sample, or a part of a shard, that cannot be used: one line of bad_samples.jsonl."""

    shard: str
    key: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("shard", "key", "reason"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    @property
    def kind(self) -> str:
        """The kind that problems are counted by. A reason is "KIND: details", or just "KIND"."""
        return self.reason.partition(":")[0]


class NotATar(InputError):
    """A file is not a shard; `reason` says why, without the file's name."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"shards: {path} is {reason}.")
        self.reason = reason


def summarise_problems(count_of_kind: Counter[str], top: int = 3) -> str:
    """The most common kinds of problems with their counts: "12 damaged picture, 3 no caption and 2 others"."""
    shown = count_of_kind.most_common(top)
    rest = count_of_kind.total() - sum(count for _, count in shown)
    return ", ".join(f"{count:,} {kind}" for kind, count in shown) + (f" and {rest:,} others" if rest else "")


def header_size(header: bytes) -> int | None:
    """The member size that a tar header states in octal; None if in base 256, -1 if this is not a tar header."""
    field = header[124:136]
    if field[0] & 0x80:
        return None
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


@dataclass(frozen=True)
class TarFingerprint:
    """Identifies a tar without reading all of it: by its size and some headers, which hold names, sizes and times."""

    size: int
    headers: list[int]
    """Byte offsets of these headers."""
    digest: str

    @classmethod
    def of(cls, file: int, headers: list[int]) -> "TarFingerprint":
        """The fingerprint of the tar behind a file descriptor."""
        digest = hashlib.blake2b(digest_size=16)
        for offset in headers:
            digest.update(os.pread(file, BLOCK, offset))
        return cls(os.fstat(file).st_size, headers, digest.hexdigest())

    def matches(self, file: int) -> bool:
        """Whether the tar behind a file descriptor has this fingerprint."""
        is_inside = all(0 <= offset < self.size for offset in self.headers)  # an index may be an untrusted download
        return is_inside and TarFingerprint.of(file, self.headers) == self


@dataclass(frozen=True)
class ShardIndex:
    """The members of each sample in one tar, as arrays; about 90 bytes per sample.

    Sample i has the members first[i] … first[i+1]-1; member m has extension extensions[kind[m]] and the bytes
    offset[m] … offset[m]+size[m]-1. The key of sample i ends at key_bytes[key_end[i]].
    """

    key_bytes: np.ndarray
    key_end: np.ndarray
    first: np.ndarray
    kind: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extensions: list[str]
    tar: TarFingerprint
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of what cannot be used."""
    modified: int | None = None
    """The tar's modification time in ns, if the index was loaded from the cache folder."""

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, row: int) -> str:
        """The key of sample `row`, `printable`."""
        start = int(self.key_end[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_end[row])].tobytes().decode(errors="backslashreplace")

    def count_extensions(self) -> dict[str, int]:
        """Extension -> number of samples that have it; a sample has each extension at most once."""
        return dict(zip(self.extensions, np.bincount(self.kind, minlength=len(self.extensions)).tolist(), strict=True))

    def members(self, row: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of sample `row`."""
        indices = range(self.first[row], self.first[row + 1])
        return {self.extensions[self.kind[m]]: (int(self.offset[m]), int(self.size[m])) for m in indices}


def index_shard(path: Path | str, opened: IO[bytes] | None = None) -> ShardIndex:
    """Index a tar by scanning its headers.

    Consecutive members with the same key (the name up to its first dot, as in WebDataset) are one sample. If the tar
    is truncated or damaged, the complete samples before that point are kept and the loss is added to the problems.

    Args:
        opened: the open file, if it is open already; `path` is then used in messages only.

    Raises:
        NotATar: the file is not a plain tar.
    """
    with contextlib.nullcontext(opened) if opened else Path(path).open("rb") as raw:
        return _scan(path, raw)


def _scan(path: Path | str, raw: IO[bytes]) -> ShardIndex:
    builder, length, damage, end = _IndexBuilder(), os.fstat(raw.fileno()).st_size, None, 0
    try:
        with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                # By a negative size, of the member or stored for a sparse one, tarfile steps back and loops forever.
                if member.size < 0 or tar.offset <= member.offset:
                    raise tarfile.ReadError(f"{member.name} has a size below 0")
                if tar.offset > length and (member.issparse() or not member.isfile()):
                    raise tarfile.ReadError(f"the file ends inside {member.name}")
                if member.islnk() or member.issym() or member.issparse():
                    builder.add_link(member)
                    continue
                if not member.isfile():
                    continue
                if member.offset_data + member.size > length:
                    damage = f"truncated tar: the file ends inside {member.name}"
                    builder.drop_unfinished(member.name)
                    break
                name = _with_extension(member.name, raw, member.offset_data)
                builder.add(name, member.offset_data, member.size)
                end = member.offset_data + member.size
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else tarfile keeps them all
            else:
                damage = _damage_at_end(raw, tar.offset)
                if damage and not damage.startswith(_TRAILING_DATA):
                    builder.drop_unfinished()
    except OSError:
        raise
    except Exception as error:  # damaged headers make tarfile raise many kinds
        if not builder.has_members:
            hint = "; decompress it first" if _is_gzip(raw) else ""
            raise NotATar(path, f"not a plain tar file: {error}{hint}") from error
        damage = f"damaged tar: {error}; its last {length - end:,} bytes cannot be read"
        builder.drop_unfinished()
    if damage:
        builder.add_problem("", damage)
    return builder.finish(raw.fileno())


_TRAILING_DATA = "data beyond the end of the tar"


def _damage_at_end(raw: IO[bytes], offset: int) -> str | None:
    """What is wrong with a tar after `offset`, where tarfile stopped; None if it ends in zero blocks, as it should.

    A cut between two members, or a damaged header, raises no error in tarfile.
    """
    raw.seek(offset)
    rest = os.fstat(raw.fileno()).st_size - offset
    block = raw.read(BLOCK)
    if len(block) < BLOCK:
        return "truncated tar: no end-of-archive mark"
    if any(block):
        return f"damaged tar: no header at byte {offset:,}; its last {rest:,} bytes cannot be read"
    while chunk := raw.read(_CHUNK):
        if any(chunk):
            return f"{_TRAILING_DATA}: its last {rest:,} bytes are not read; do not join tars with cat"
    return None


def _is_gzip(raw: IO[bytes]) -> bool:
    raw.seek(0)
    return raw.read(2) == b"\x1f\x8b"


def _with_extension(name: str, raw: IO[bytes], offset: int) -> str:
    """A member's name; an image without an extension gets that of its format."""
    if "." in name.rpartition("/")[2]:
        return name
    kind = format_of(os.pread(raw.fileno(), 32, offset))
    return f"{name}.{kind.lower()}" if kind else name


def _split_name(name: str) -> tuple[str, str]:
    """A member's key and extension; ('', '') if it belongs to no sample."""
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return "", ""
    return (f"{folder}/{stem}" if folder else stem), extension


class _IndexBuilder:
    def __init__(self) -> None:
        self.problems: list[tuple[str, str]] = []
        self._keys: list[bytes] = []
        self._seen: dict[str, int] = {}
        self._first: list[int] = [0]
        self._members: list[tuple[int, int, int]] = []
        self._kinds: dict[str, int] = {}
        self._key: str | None = None
        self._kinds_of_sample: set[int] = set()
        self._skipping = False

    def add(self, name: str, offset: int, size: int) -> None:
        key, extension = self._start_sample(name)
        if not key or self._skipping:
            return
        kind = self._kinds.setdefault(printable(extension.lower()), len(self._kinds))
        if kind in self._kinds_of_sample:
            self.add_problem(key, f"two members of one extension: .{extension}; the first is used")
            return
        self._kinds_of_sample.add(kind)
        self._members.append((kind, offset, size))

    def add_link(self, member: tarfile.TarInfo) -> None:
        """Lists a member that has no bytes of its own in the tar, or not in one piece; its sample lacks it."""
        key, _ = self._start_sample(member.name)
        if key and member.issparse():
            self.add_problem(key, f"sparse member: {member.name}; pack again without tar's --sparse")
        elif key:
            kind, option = ("hard", "--hard-dereference") if member.islnk() else ("symbolic", "--dereference")
            target = f"{member.name} links to {member.linkname}"
            self.add_problem(key, f"{kind} link: {target} and has no bytes of its own; pack again with tar's {option}")

    def _start_sample(self, name: str) -> tuple[str, str]:
        """The key and extension of the next member, as `_split_name`; a key that differs from the last starts a
        sample."""
        key, extension = _split_name(name)
        if not key or key == self._key:
            return key, extension  # no key: e.g. README or a hidden file
        self._finish_sample()
        self._key, self._kinds_of_sample, self._skipping = key, set(), key in self._seen
        if self._skipping:
            row = self._seen[key]
            earlier = [kind for kind, _, _ in self._members[self._first[row] : self._first[row + 1]]]
            if self._kinds.get(printable(extension.lower()), -1) in earlier:
                self.add_problem(key, "duplicate key: it occurs earlier in this shard; the first sample is used")
            else:
                self.add_problem(
                    key,
                    f"members not adjacent: .{extension} stands apart from the other members and is not read; "
                    "make the tar again with tar --sort=name",
                )
        else:
            self._seen[key] = len(self._keys)
        return key, extension

    def drop_unfinished(self, next_name: str | None = None) -> None:
        """Drops the sample that is being read, unless the next member is known and belongs to another sample."""
        if self._key is None or (next_name is not None and _split_name(next_name)[0] != self._key):
            return
        if not self._skipping:
            del self._members[self._first[-1] :]
            self.add_problem(self._key, "cut sample: the tar ends or is damaged inside it or right after it")
        self._key = None

    @property
    def has_members(self) -> bool:
        return bool(self._members)

    def add_problem(self, key: str, reason: str) -> None:
        self.problems.append((printable(key), printable(reason)))

    def _finish_sample(self) -> None:
        if self._key is not None and not self._skipping:
            self._keys.append(self._key.encode(errors="surrogateescape"))
            self._first.append(len(self._members))

    def finish(self, file: int) -> ShardIndex:
        """The index; `file` is the tar's descriptor."""
        self._finish_sample()
        kind, offset, size = np.array(self._members, np.int64).reshape(-1, 3).T
        spaced = np.linspace(0, len(offset) - 1, _FINGERPRINT_HEADERS).astype(int) if len(offset) else []
        fingerprint = TarFingerprint.of(file, [int(offset[m]) - BLOCK for m in np.unique(spaced)])
        return ShardIndex(
            key_bytes=np.frombuffer(b"".join(self._keys), np.uint8),
            key_end=np.array([*itertools.accumulate(map(len, self._keys))], np.int64),
            first=np.array(self._first, np.int64),
            kind=kind.astype(np.int32),
            offset=np.ascontiguousarray(offset),
            size=np.ascontiguousarray(size),
            extensions=list(self._kinds),
            tar=fingerprint,
            problems=self.problems,
        )
