"""What `mmrl check` finds in one shard: every member read once, in the order of the tar, by the rules of training.

Worker processes run this; what they hand back is small: counts, lengths, and 32 bytes a sample (hashes of its key,
picture and group), by which the whole set's duplicates are found.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from mmrl.data.index import NotATar, Problem, ShardIndex, index_shard
from mmrl.data.opening import keep_index
from mmrl.data.samples import NO_GROUP, UNUSABLE, FieldsConfig, group_number, parse, reason_of
from mmrl.data.stores import Store
from mmrl.images.decode import decode_pixels

# Kinds of problems that are told apart here and in check.py.
NO_SAMPLE, CUT_SHORT = "no sample in this shard", ("truncated tar", "damaged tar")
# Samples that the index leaves out.
LEFT_OUT = ("duplicate key", "cut sample")
_PIECE = 1 << 20
# Captions are handed to the tokenizer so many at a time.
_TEXTS = 512
_NO_PICTURE = bytes(16)
# First bytes of a file -> the format, as Pillow calls it.
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"BM", "BMP"), (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """A tokenizer: how long texts are to it, and how much of them the model reads."""

    lengths: Callable[[list[str]], list[int]]
    context_length: int


@dataclass(frozen=True)
class Work:
    """How a shard is looked at; handed to each worker process once."""

    store: Store
    decode: bool
    tokens: Tokens | None
    index_beside: bool


@dataclass(frozen=True)
class Picture:
    """A picture's size in pixels, and whose it is."""

    width: int
    height: int
    shard: str
    key: str


@dataclass
class Tally:
    """Counts over samples; those of shards add up to those of a set. Counters of numbers are lengths -> how many."""

    extensions: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    captions_of_sample: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    smallest: Picture | None = None
    largest: Picture | None = None
    bad: Counter[str] = field(default_factory=Counter)
    """Samples that training does without, by the kind of their problem."""

    def add(self, other: "Tally") -> None:
        """Adds what was counted elsewhere."""
        for name in ("extensions", "formats", "captions_of_sample", "characters", "tokens", "shorter_sides", "bad"):
            getattr(self, name).update(getattr(other, name))
        for picture in (other.smallest, other.largest):
            if picture is not None:
                self.compare(picture)

    def compare(self, picture: Picture) -> None:
        """Keeps the picture if it is the smallest or the largest so far."""
        pixels = picture.width * picture.height
        if self.smallest is None or pixels < self.smallest.width * self.smallest.height:
            self.smallest = picture
        if self.largest is None or pixels > self.largest.width * self.largest.height:
            self.largest = picture


@dataclass
class ShardFacts:
    """What was found in one shard. The arrays have a row a sample, in the order of its index."""

    location: str
    samples: int = 0
    size: int = 0
    """Bytes."""
    tally: Tally = field(default_factory=Tally)
    problems: list[Problem] = field(default_factory=list)
    usable: bool = False
    """Whether training can open it at all."""
    index_error: str | None = None
    """Why the index could not be written beside it."""
    key_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    picture_N2: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    """128 bits of the picture's bytes, zeros where there is none."""
    group_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def note(self, key: str, reason: str) -> None:
        """Lists a problem."""
        self.problems.append(Problem(self.location, key, reason))


def check_shard(location: str, fields: FieldsConfig, work: Work) -> ShardFacts:
    """All that can be found out about one shard. A shard that cannot be read is a problem, not an error."""
    facts = ShardFacts(location)
    try:
        # Open from the first to the last: other workers' copies may push this one out of a small cache folder.
        with os.fdopen(work.store.open(location), "rb", buffering=0) as raw:
            _read_ahead(raw.fileno())
            index = index_shard(Path(location), raw)
            facts.samples, facts.size = len(index), os.fstat(raw.fileno()).st_size
            for key, reason in index.problems:
                facts.note(key, reason)
            facts.tally.bad.update(problem.kind for problem in facts.problems if problem.kind in LEFT_OUT)
            facts.tally.extensions.update(_extensions(index))
            _Reading(facts, fields, work, raw, index).all_samples()
    except NotATar as error:
        facts.note("", error.reason)
        return facts
    except OSError as error:
        facts.samples = 0
        facts.note("", f"shard out of reach: {error}")
        return facts
    facts.usable = facts.samples > 0
    if not facts.samples:
        facts.note("", NO_SAMPLE)
    try:
        keep_index(index, location, work.store, work.index_beside)
    except OSError as error:  # in the cache folder it would only have saved time
        facts.index_error = str(error) if work.index_beside else None
    return facts


def _read_ahead(file: int) -> None:
    """Lets the kernel read the whole file in one go, or the scan of the headers would hop over the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)


def _extensions(index: ShardIndex) -> dict[str, int]:
    """How many samples have each extension; a sample has each once at most."""
    counts = np.bincount(index.kind, minlength=len(index.extensions)).tolist()
    return dict(zip(index.extensions, counts, strict=True))


class _Reading:
    """One pass over a shard."""

    def __init__(self, facts: ShardFacts, fields: FieldsConfig, work: Work, raw: IO[bytes], index: ShardIndex) -> None:
        self._facts, self._tally, self._fields, self._work = facts, facts.tally, fields, work
        self._file, self._index = raw.fileno(), index
        self._texts: list[str] = []

    def all_samples(self) -> None:
        """Fills the facts."""
        keys, pictures, groups = [], [], []
        for row in range(len(self._index)):
            key = self._index.key(row)
            picture, group = self._sample(row, key)
            keys.append(hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest())
            pictures.append(picture)
            groups.append(group)
        self._count_tokens()
        self._facts.key_N = np.frombuffer(b"".join(keys), np.uint64)
        self._facts.picture_N2 = np.frombuffer(b"".join(pictures), np.uint64).reshape(-1, 2)
        self._facts.group_N = np.array(groups, np.int64)

    def _sample(self, row: int, key: str) -> tuple[bytes, int]:
        """The picture's hash, zeros where training sees none, and the group's number."""
        members, had, group, usable = self._index.members(row), dict[str, bytes](), NO_GROUP, True

        def read(kind: str) -> bytes:
            had[kind] = self._bytes(*members[kind])
            return had[kind]

        try:
            parts = parse(self._fields, members, read)
            group = NO_GROUP if parts.group is None else group_number(parts.group)
            self._count_captions(parts.captions)
            if self._work.decode:
                height, width = decode_pixels(parts.image).shape[1:]
                self._tally.shorter_sides[min(height, width)] += 1
                self._tally.compare(Picture(width, height, self._facts.location, key))
        except UNUSABLE as error:
            usable = False
            self._facts.note(key, reason_of(error))
            self._tally.bad[self._facts.problems[-1].kind] += 1
        digest = self._rest(members, had, key)
        return digest if usable else _NO_PICTURE, group

    def _rest(self, members: dict[str, tuple[int, int]], had: dict[str, bytes], key: str) -> bytes:
        """Reads what parsing had no need of, for errors of the disk; the hash of the picture."""
        image = next((kind for kind in self._fields.image if kind in members), None)
        digest = _NO_PICTURE
        try:
            for kind, (offset, size) in members.items():
                if kind == image:
                    data = had[kind] if kind in had else self._bytes(offset, size)
                    digest = hashlib.blake2b(data, digest_size=16).digest()
                    self._tally.formats[_format(data)] += 1
                elif kind not in had:
                    for start in range(offset, offset + size, _PIECE):
                        self._bytes(start, min(_PIECE, offset + size - start))
        except (OSError, ValueError) as error:
            # Where training needs the member, parsing has met the same error and listed it.
            if not self._facts.problems or self._facts.problems[-1].key != key:
                self._facts.note(key, f"unreadable member that training does not use: {error}")
        return digest

    def _bytes(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise ValueError("truncated tar: the shard ends before this member does")
        return data

    def _count_captions(self, captions: list[str]) -> None:
        self._tally.captions_of_sample[len(captions)] += 1
        self._tally.characters.update(map(len, captions))
        if self._work.tokens is not None:
            self._texts += captions
            if len(self._texts) >= _TEXTS:
                self._count_tokens()

    def _count_tokens(self) -> None:
        if self._work.tokens is not None and self._texts:
            self._tally.tokens.update(self._work.tokens.lengths(self._texts))
            self._texts = []


def _format(data: bytes) -> str:
    """The format that a file's first bytes tell."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if data.startswith(magic)), "unknown")
