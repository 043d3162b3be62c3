"""Read single samples by index: image bytes, captions and group, or the reason why a sample is bad."""

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from mmrl.data.counts import Shard
from mmrl.data.fields import EXTENSIONS_SHOWN, FIRST_DOT, FieldsConfig, hidden_images, merged_names, unused_note
from mmrl.data.index import BLOCK, NotATar, Problem, ShardIndex, header_size, printable
from mmrl.data.opening import CHANGED, forget, load_shard_index, stored_index
from mmrl.data.order import SourceShare
from mmrl.data.parsing import SAMPLE_ERRORS, parse, parse_metadata, reason_of
from mmrl.data.stores import ShardCache, is_remote
from mmrl.errors import InputError, did_you_mean
from mmrl.images.decode import decode_pixels

# Samples read before training, to tell a wrong field name from a field that some samples lack.
_PREFLIGHT_SAMPLES = 64
NO_GROUP = -1


@dataclass(frozen=True)
class Sample:
    """A sample with its image not decoded yet."""

    name: str
    """Shard and key, after the source's name if there are several sources: unique in the set."""
    image: bytes
    captions: list[str]
    group: int
    """Hash of `group_name`, or NO_GROUP."""
    group_name: str = ""


class BadSample(Exception):
    """A sample cannot be used; `problem` is its line in bad_samples.jsonl."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


@dataclass(frozen=True)
class Source:
    """A set of shards with the same fields and the same number of passes per epoch."""

    shards: Sequence[Shard]
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    repeat: float = 1.0
    name: str = ""
    """Prefix of its samples' names if there are several sources."""

    @cached_property
    def share(self) -> SourceShare:
        """How many samples of each epoch come from it."""
        return SourceShare([shard.samples for shard in self.shards], self.repeat)

    @cached_property
    def root(self) -> str:
        """The longest folder path, or URL prefix, that all its shards have in common."""
        folders = [_absolute(shard.location).rpartition("/")[0] for shard in self.shards]
        # Not commonpath, which collapses the two slashes of a URL.
        return os.path.commonprefix([f"{folder}/" for folder in folders]).rpartition("/")[0] + "/"  # noqa: RUF071

    def name_of(self, shard: Shard) -> str:
        """A shard's location relative to `root`, which begins its samples' names."""
        return _absolute(shard.location)[len(self.root) :]


# Limits per process: samples of all loaded indexes, and open files. The shuffle windows of all lanes rarely need more.
_SAMPLES_INDEXED, _OPEN_FILES = 2_000_000, 256


class SampleReader:
    """Random access to the samples of all sources, numbered 0 … N-1 in the order of the sources and their shards."""

    def __init__(self, sources: Sequence[Source], cache: ShardCache, require_captions: bool = True) -> None:
        """Args:
        require_captions: a sample without a caption is bad.

        Raises:
            InputError: no sample of a source has a configured field.
        """
        self.sources, self.cache, self._require_captions = list(sources), cache, require_captions
        self.shares = [source.share for source in sources]
        self._shards = [shard for source in sources for shard in source.shards]
        self._source_of_shard = np.repeat(np.arange(len(sources)), [len(source.shards) for source in sources])
        self.problems = [problem for shard in self._shards for problem in shard.problems]
        self.notes: list[str] = []
        """Sentences on what is not read, to print before work begins."""
        self._ends = np.cumsum([shard.samples for shard in self._shards])
        self._reset_caches()
        for source, first in zip(sources, np.cumsum([0, *(share.total for share in self.shares)]), strict=False):
            self._preflight(source, int(first))

    def _reset_caches(self) -> None:
        self._indexes = LruCache(_SAMPLES_INDEXED, self._load_index, size_of=len)
        self._files = LruCache(_OPEN_FILES, self._open, close=os.close)
        self._tars = {n: shard.tar for n, shard in enumerate(self._shards) if shard.tar is not None}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        """For spawned workers: without open files."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_indexes", "_files", "_tars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_caches()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources' repeats, and of their shards' names, order, numbers of samples and, where known,
        headers."""
        return self._hash(lambda shard: [shard.header.tar.digest if shard.header else ""])

    @cached_property
    def layout(self) -> str:
        """As `fingerprint`, without the headers: equal however the samples were counted."""
        return self._hash(lambda _: [])

    def _hash(self, more: Callable[[Shard], list[str]]) -> str:
        facts = [
            [
                source.name,
                source.repeat,
                [[source.name_of(shard), shard.samples, *more(shard)] for shard in source.shards],
            ]
            for source in self.sources
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def read(self, index: int) -> Sample:
        """Reads sample `index`.

        Raises:
            BadSample: no image, no usable caption, text that is not UTF-8, invalid JSON, a missing shard.
            InputError: the shard is not a tar, or has another number of samples than a file declares.
        """
        try:
            return self._parse(*self._locate(index))
        except InputError:
            raise
        except SAMPLE_ERRORS as error:
            raise BadSample(self.problem(index, reason_of(error))) from None

    def read_image(self, index: int, min_size: tuple[int, int] | None = None) -> tuple[Sample, torch.Tensor]:
        """Reads sample `index` and decodes its image: uint8 (C, H, W); `min_size` as in `decode_pixels`.

        Raises:
            BadSample: as `read`, or the image cannot be decoded.
        """
        sample = self.read(index)
        try:
            return sample, decode_pixels(sample.image, min_size)
        except ValueError as error:
            raise BadSample(self.problem(index, str(error))) from error

    def problem(self, index: int, reason: str) -> Problem:
        """A Problem with the shard and key of sample `index`."""
        shard, row = self._locate(index)
        try:
            key = self._indexes[shard].key(row)
        except OSError:  # the index is missing too
            key = f"sample {row}"
        return Problem(self._shards[shard].location, key, reason)

    @property
    def is_indexed(self) -> bool:
        """Whether the index headers of all shards are known, and so `fingerprint` depends on all tars."""
        return all(shard.header for shard in self._shards)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Starts to download the remote shards of these samples in the background."""
        self.cache.prefetch(self._shards[self._locate(index)[0]].location for index in indices)

    @cached_property
    def is_remote(self) -> bool:
        """Whether any shard has to be downloaded."""
        return any(is_remote(shard.location) for shard in self._shards)

    def shard_bytes(self) -> list[int]:
        """The size of each shard; that of the largest known one if it is unknown."""
        largest = max([shard.size or 0 for shard in self._shards] + [tar.size for tar in self._tars.values()])
        return [largest if shard.size is None else shard.size for shard in self._shards]

    def _locate(self, index: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self._shards[shard].samples

    def _open(self, shard: int) -> int:
        """A file descriptor of the shard. Raises OSError if it cannot be opened or has changed since it was indexed."""
        location, fingerprint = self._shards[shard].location, self._tars.get(shard)
        file = self.cache.open(location)
        if fingerprint is not None and not fingerprint.matches(file):
            os.close(file)
            self.cache.discard(location)  # download again: the cached copy may be of another version
            file = self.cache.open(location)
            if not fingerprint.matches(file):
                os.close(file)
                forget(location, self.cache)
                raise OSError(CHANGED)
        return file

    def _load_index(self, shard: int) -> ShardIndex:
        one = self._shards[shard]
        try:
            file = self._files[shard]
        except OSError:
            if (index := stored_index(one, self.cache)) is None:
                raise
            return index  # for the keys of what is missing
        try:
            index = load_shard_index(one, file, self.cache)
        except NotATar:
            self.cache.discard(one.location)  # e.g. a server's error page
            raise
        self._tars[shard] = index.tar
        return index

    def _read_member(self, shard: int, offset: int, size: int) -> bytes:
        """A member's bytes. Its header is read as well, to detect that the shard has changed."""
        data = os.pread(self._files[shard], BLOCK + size, offset - BLOCK)
        if len(data) != BLOCK + size:
            raise ValueError("truncated tar: the shard ends before this member does")
        if header_size(data) not in (size, None):
            raise OSError("it has changed since it was indexed")
        return data[BLOCK:]

    def _parse(self, shard: int, row: int) -> Sample:
        index, source = self._indexes[shard], self.sources[self._source_of_shard[shard]]
        members = index.members(row)
        parsed = parse(
            source.fields,
            members,
            lambda extension: self._read_member(shard, *members[extension]),
            self._require_captions,
        )
        name = f"{printable(source.name_of(self._shards[shard]))}/{index.key(row)}"
        if len(self.sources) > 1:
            name = f"{source.name}/{name}"
        group = parsed.group
        if group is None and source.repeat > 1:  # copies of a sample must not be each other's negatives
            group = f"the sample {name}"
        return Sample(
            name=name,
            image=parsed.image,
            captions=parsed.captions,
            group=NO_GROUP if group is None else group_id(group),
            group_name=group or "",
        )

    def _preflight(self, source: Source, first: int) -> None:
        """Raises InputError if no sample of a source has a configured field, which is a mistake in the config."""
        fields = source.fields
        counts = self._count_extensions(source, first)
        present, looked_at = sorted(counts), [shard for shard in source.shards if shard.header] or source.shards[:1]
        where = f"in {len(looked_at)} shards such as {printable(looked_at[0].location)}"
        if set(fields.image_extensions).isdisjoint(present):
            more = ", …" if len(present) > EXTENSIONS_SHOWN else ""
            remedy = f" ({FIRST_DOT})" if hidden_images(fields, present, require_captions=False) else ""
            raise InputError(
                f"fields.image: no sample {where} has .{' or .'.join(fields.image)}; "
                f"the members there are .{', .'.join(present[:EXTENSIONS_SHOWN])}{more}{remedy}."
            )
        self._note_unused(source, first, counts)
        for name in ("text", "metadata"):
            extension = getattr(fields, name)
            if fields.is_renamed(name) and extension not in present:
                hint = did_you_mean(extension, present)
                raise InputError(f"fields.{name}: no sample {where} has .{extension}.{hint}")
        self._preflight_captions(source, first, where)

    def _count_extensions(self, source: Source, first: int) -> Counter[str]:
        """Extension -> number of samples that have it, in the shards with a known index, or else in the first shard."""
        counts: Counter[str] = Counter()
        for shard in source.shards:
            counts.update(shard.count_extensions())
        if not any(shard.header for shard in source.shards):
            try:
                counts.update(self._indexes[self._locate(first)[0]].count_extensions())
            except OSError as error:
                raise InputError(f"shards: {source.shards[0].location} cannot be read ({error}).") from None
        return counts

    def _note_unused(self, source: Source, first: int, counts: Counter[str]) -> None:
        """Adds the members that no field uses to the notes, and the images among them to the problems."""
        for shard, one in enumerate(source.shards, start=self._locate(first)[0]):
            unused = one.count_extensions().keys() - source.fields.extensions
            if not is_remote(one.location) and any("." in extension for extension in unused):
                merged = merged_names(self._indexes[shard], source.fields, self._require_captions)
                self.problems += [Problem(one.location, key, reason) for key, reason in merged]
        unknown = sum(shard.header is None for shard in source.shards)
        if unknown:
            declared = next(shard.declared_by for shard in source.shards if shard.header is None)
            self.notes.append(
                f"{unknown:,} shards are counted by files such as {declared} and opened when they are needed; mmrl "
                "check lists what is wrong inside them."
            )
        if note := unused_note(counts, source.fields):
            self.notes.append(f"{source.name}: {note}" if source.name else note)

    def _preflight_captions(self, source: Source, first: int, where: str) -> None:
        fields, total = source.fields, source.share.total
        keys: set[str] = set()
        captioned, rejected = 0, ""
        # Of shards that are remote or not indexed only the first one is opened for this; training needs it anyway.
        available = total if self.is_indexed and not self.is_remote else source.shards[0].samples
        count = min(available, _PREFLIGHT_SAMPLES)
        for index in first + np.linspace(0, available - 1, count).astype(int):
            try:
                captioned += bool(self.read(int(index)).captions)
            except BadSample as error:
                rejected = rejected or f" The first of them: {error}."
            keys |= self._metadata_keys(int(index), fields)
        for name in ("captions", "group"):
            key = getattr(fields, name)
            if fields.is_renamed(name) and key not in keys:
                raise InputError(
                    f"fields.{name}: none of {count} samples {where} has {key!r} in its JSON." + did_you_mean(key, keys)
                )
            if key not in keys and (other := next((one for one in keys if one.lower() == key.lower()), None)):
                self.notes.append(
                    f"fields.{name}: none of {count} samples {where} has {key!r} in its JSON, but some have {other!r}; "
                    f"to use it, set fields.{name}: {other}."
                )
        if not captioned and self._require_captions:
            if self.problems:
                problem = self.problems[0]
                rejected += f" The shards' first problem: {problem.key} {problem.reason}."
            raise InputError(
                f"fields.text, fields.captions: none of {count} samples {where} can be used with a caption in "
                f".{fields.text} or under {fields.captions!r} in .{fields.metadata}; "
                f"set the field names to those of your shards.{rejected}"
            )

    def _metadata_keys(self, index: int, fields: FieldsConfig) -> set[str]:
        shard, row = self._locate(index)
        try:
            members = self._indexes[shard].members(row)
            return set(parse_metadata(fields, members, lambda one: self._read_member(shard, *members[one])))
        except SAMPLE_ERRORS:
            return set()


def group_id(name: str) -> int:
    """A stable 63-bit hash of a group's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def _absolute(location: str) -> str:
    return location if is_remote(location) else os.path.abspath(location)  # noqa: PTH100 (a string, for speed)


Value = TypeVar("Value")


class LruCache(Generic[Value]):
    """A least-recently-used cache: values by integer key, opened on first access and closed on eviction.

    Values are evicted while their sizes add up to more than `limit`; by default each has size 1.
    """

    def __init__(
        self,
        limit: int,
        open_one: Callable[[int], Value],
        size_of: Callable[[Value], int] = lambda _: 1,
        close: Callable[[Value], None] = lambda _: None,
    ) -> None:
        self._limit, self._open, self._size_of, self._close = limit, open_one, size_of, close
        self._values: OrderedDict[int, Value] = OrderedDict()
        self._size = 0

    def __del__(self) -> None:
        for value in self._values.values():
            self._close(value)

    def __getitem__(self, key: int) -> Value:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = self._open(key)
        self._size += self._size_of(value)
        while self._size > self._limit and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self._size -= self._size_of(oldest)
            self._close(oldest)
        return value
