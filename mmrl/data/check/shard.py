"""Checks one shard: reads every member once, in the order of the tar, by the rules of training.

This runs in worker processes. What they return is small: counts, lengths, and hashes to find duplicates over the whole
set, 24 bytes per sample (image and group), 16 per caption and, if asked for, 64 per image (its look).
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from mmrl.data.captions import caption_id
from mmrl.data.check.sortedness import CHARACTERS, sampled_rows
from mmrl.data.fields import FieldsConfig, merged_names
from mmrl.data.groups import NO_GROUP, GroupFile, group_id, parse_groups
from mmrl.data.index import NotATar, Problem, ShardIndex, index_shard
from mmrl.data.opening import store_index
from mmrl.data.parsing import BOTH, IMAGE, SAMPLE_ERRORS, TEXT, ParsedSample, parse, reason_of
from mmrl.data.stores import ShardCache
from mmrl.images.decode import decode_pixels
from mmrl.images.perceptual_hash import NO_HASH, perceptual_hash
from mmrl.images.upright import format_of

# Kinds of problems that command.py treats in a special way.
NO_SAMPLE, CUT_SHORT = "no sample in this shard", ("truncated tar", "damaged tar")
# Kinds of problems of samples that the index leaves out.
NOT_INDEXED = ("duplicate key", "cut sample", "merged names")
_PIECE = 1 << 20
_TEXT_BATCH = 512
"""Captions per call of the tokenizer."""
_NO_IMAGE = bytes(16)


@dataclass(frozen=True)
class TokenCounter:
    """A tokenizer's function texts -> numbers of tokens, the model's context length, and the characters tokenised."""

    lengths: Callable[[list[str]], list[int]]
    context_length: int
    max_characters: int | None = None
    """Characters of a caption that are tokenised; None for all."""


@dataclass(frozen=True)
class CheckOptions:
    """How shards are checked; sent to each worker process once."""

    cache: ShardCache
    decode: bool
    tokens: TokenCounter | None
    index_next_to_shard: bool
    looks: bool = False
    """Compute the perceptual hashes of the images."""
    shards: int = 1
    """Shards that are checked: the more there are, the fewer rows of each are compared with their neighbours."""
    sides: Collection[str] = BOTH
    """What a sample must have, as for SampleReader."""
    second: frozenset[str] | None = None
    """What second members of pairs have in the run; None without a config: second images are decoded too."""


@dataclass(frozen=True)
class ImageSize:
    """An image's size in pixels, and its sample."""

    width: int
    height: int
    shard: str
    key: str


@dataclass
class Tally:
    """Counts over samples, of a shard or a set. Counter[int] maps a length to the number of times it occurs."""

    extensions: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    captions_of_sample: Counter[int] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    shorter_sides: Counter[int] = field(default_factory=Counter)
    smallest: ImageSize | None = None
    largest: ImageSize | None = None
    seconds: Counter[str] = field(default_factory=Counter)
    """Samples with a second IMAGE or TEXT of their own."""
    bad: Counter[str] = field(default_factory=Counter)
    """Samples that training skips, by the kind of their problem."""

    def add(self, other: "Tally") -> None:
        """Adds the counts of another shard."""
        for name, counter in vars(self).items():
            if isinstance(counter, Counter):
                counter.update(getattr(other, name))
        for size in (other.smallest, other.largest):
            if size is not None:
                self.add_size(size)

    def add_size(self, size: ImageSize) -> None:
        """Keeps the size if it is the smallest or the largest so far."""
        pixels = size.width * size.height
        if self.smallest is None or pixels < self.smallest.width * self.smallest.height:
            self.smallest = size
        if self.largest is None or pixels > self.largest.width * self.largest.height:
            self.largest = size


@dataclass
class ShardFacts:
    """The result for one shard. The arrays have one row per sample, in the order of its index."""

    location: str
    samples: int = 0
    size: int = 0
    """Bytes."""
    tally: Tally = field(default_factory=Tally)
    problems: list[Problem] = field(default_factory=list)
    usable: bool = False
    """Whether training can open the shard."""
    index_error: str | None = None
    """Why the index could not be written next to the shard."""
    image_N2: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.uint64))
    """128 bits of the image's bytes, zeros if there is none."""
    group_N: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    caption_C2: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    """The sample's row and the id of each caption."""
    look_N8: np.ndarray | None = None
    """The perceptual hashes, NO_HASH if there is none."""
    neighbours: list[tuple[str, int]] = field(default_factory=list)
    """First caption and group of some rows, for `order_note`."""

    def add_problem(self, key: str, reason: str) -> None:
        """Lists a problem of a sample, or of the shard if `key` is empty."""
        self.problems.append(Problem(self.location, key, reason))


def check_shard(shard: tuple[str, FieldsConfig], options: CheckOptions) -> ShardFacts:
    """Checks one shard, given as its location and its fields. If it cannot be read, that is a problem in the result;
    nothing is raised."""
    location, fields = shard
    facts = ShardFacts(location)
    try:
        # Kept open to the end: the downloads of other workers may evict this shard from a small cache folder.
        with os.fdopen(options.cache.open(location), "rb", buffering=0) as raw:
            _read_ahead(raw.fileno())
            try:
                index = index_shard(location, raw)
            except NotATar:
                options.cache.discard(location, raw.fileno())  # e.g. a server's error page
                raise
            facts.samples, facts.size = len(index), os.fstat(raw.fileno()).st_size
            for key, reason in index.problems:
                facts.add_problem(key, reason)
            if IMAGE in options.sides:
                for key, reason in merged_names(index, fields, TEXT in options.sides):
                    facts.add_problem(key, reason)
            facts.tally.bad.update(problem.kind for problem in facts.problems if problem.kind in NOT_INDEXED)
            facts.tally.extensions.update(index.count_extensions())
            _ShardScan(facts, fields, options, raw, index).run()
            if options.index_next_to_shard:
                groups = parse_groups(fields, index, lambda offset, size: os.pread(raw.fileno(), size, offset))
                GroupFile(location, fields, options.cache).save(groups, index.tar, next_to_shard=True)
    except NotATar as error:
        facts.add_problem("", error.reason)
        return facts
    except OSError as error:
        facts.samples = 0
        facts.add_problem("", f"shard out of reach: {error}")
        return facts
    facts.usable = facts.samples > 0
    if not facts.samples:
        facts.add_problem("", NO_SAMPLE)
    try:
        store_index(index, location, options.cache, options.index_next_to_shard)
    except OSError as error:  # in the cache folder an index only saves time
        facts.index_error = str(error) if options.index_next_to_shard else None
    return facts


def _read_ahead(file: int) -> None:
    """Has the kernel read the whole file sequentially: the scan of the headers alone would seek between them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)


class _ShardScan:
    """One pass over the samples of a shard."""

    def __init__(
        self, facts: ShardFacts, fields: FieldsConfig, options: CheckOptions, raw: IO[bytes], index: ShardIndex
    ) -> None:
        self._facts, self._tally, self._fields, self._options = facts, facts.tally, fields, options
        self._file, self._index = raw.fileno(), index
        self._texts: list[str] = []
        self._captions: list[tuple[int, int]] = []
        self._looks = [NO_HASH] * len(index) if options.looks else []
        self._sampled = sampled_rows(len(index), options.shards)

    def run(self) -> None:
        """Fills in the facts."""
        found = [self._scan_sample(row, self._index.key(row)) for row in range(len(self._index))]
        images, groups = [image for image, _ in found], [group for _, group in found]
        self._count_tokens()
        self._facts.image_N2 = np.frombuffer(b"".join(images), np.uint64).reshape(-1, 2)
        self._facts.group_N = np.array(groups, np.int64)
        self._facts.caption_C2 = np.array(self._captions, np.int64).reshape(-1, 2)
        self._facts.look_N8 = np.stack(self._looks) if self._looks else None

    def _scan_sample(self, row: int, key: str) -> tuple[bytes, int]:
        """The image's hash, zeros if training skips the sample, and the id of the group."""
        members, done, group, usable = self._index.members(row), dict[str, bytes](), NO_GROUP, True

        def read(kind: str) -> bytes:
            done[kind] = self._read(*members[kind])
            return done[kind]

        try:
            parsed = parse(self._fields, members, read, self._options.sides)
            group = NO_GROUP if parsed.group is None else group_id(parsed.group)
            self._count_texts(parsed)
            if row in self._sampled:
                self._facts.neighbours.append(("".join(parsed.captions[:1])[:CHARACTERS], group))
            if self._options.decode and IMAGE in self._options.sides:
                self._decode(row, key, parsed)
            if TEXT in self._options.sides:
                texts = [*parsed.captions, *filter(None, [parsed.second_text])]
                self._captions += [(row, caption_id(text)) for text in texts]
        except SAMPLE_ERRORS as error:
            usable = False
            self._facts.add_problem(key, reason_of(error))
            self._tally.bad[self._facts.problems[-1].kind] += 1
        digest = self._scan_members(members, done, key)
        return digest if usable else _NO_IMAGE, group

    def _decode(self, row: int, key: str, parsed: ParsedSample) -> None:
        """Decodes the images that training decodes, and counts their sizes; raises one of SAMPLE_ERRORS."""
        second, images = self._options.second, [parsed.image]
        if parsed.second_image and (second is None or IMAGE in second):
            images.append(parsed.second_image)
        for number, image in enumerate(images):
            pixels_CHW = decode_pixels(image)
            height, width = pixels_CHW.shape[1:]
            if self._options.looks and number == 0:
                self._looks[row] = perceptual_hash(pixels_CHW)
            self._tally.shorter_sides[min(height, width)] += 1
            self._tally.add_size(ImageSize(width, height, self._facts.location, key))

    def _scan_members(self, members: dict[str, tuple[int, int]], done: dict[str, bytes], key: str) -> bytes:
        """Reads the members that `parse` did not, to find disk errors; returns the hash of the image, zeros if the run
        reads none."""
        image = second = None
        if IMAGE in self._options.sides:
            image = next((kind for kind in self._fields.image_extensions if kind in members), None)
            second = self._fields.second_image_of(members)
        digest = _NO_IMAGE
        try:
            for kind, (offset, size) in members.items():
                if kind in (image, second):
                    data = done[kind] if kind in done else self._read(offset, size)
                    digest = hashlib.blake2b(data, digest_size=16).digest() if kind == image else digest
                    self._tally.formats[format_of(data) or "unknown"] += 1
                elif kind not in done:
                    for start in range(offset, offset + size, _PIECE):
                        self._read(start, min(_PIECE, offset + size - start))
        except (OSError, ValueError) as error:
            # If training needs the member, `parse` has had the same error and it is listed.
            if not self._facts.problems or self._facts.problems[-1].key != key:
                self._facts.add_problem(key, f"unreadable member that training does not use: {error}")
        return digest

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            raise ValueError("truncated tar: the shard ends before this member does")
        return data

    def _count_texts(self, parsed: ParsedSample) -> None:
        texts = [*parsed.captions, *filter(None, [parsed.second_text])]
        self._tally.captions_of_sample[len(parsed.captions)] += 1
        self._tally.seconds.update({IMAGE: bool(parsed.second_image), TEXT: bool(parsed.second_text)})
        self._tally.characters.update(map(len, texts))
        if self._options.tokens is not None:
            self._texts += texts
            if len(self._texts) >= _TEXT_BATCH:
                self._count_tokens()

    def _count_tokens(self) -> None:
        if self._options.tokens is not None and self._texts:
            self._tally.tokens.update(self._options.tokens.lengths(self._texts))
            self._texts = []
