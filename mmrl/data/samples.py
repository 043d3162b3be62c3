"""One sample: its members in a tar -> image bytes, captions, group; and what becomes of a sample that is bad.

Nothing here runs code from the data: members are images, text and JSON, whatever their names say.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pydantic import Field

from mmrl.data.index import BLOCK, Problem, header_size
from mmrl.data.opening import Shard
from mmrl.data.order import Share
from mmrl.data.stores import Store, is_remote
from mmrl.errors import InputError, did_you_mean
from mmrl.images.decode import decode_pixels
from mmrl.settings import Settings

# How many samples of a set are looked at before training, to tell a wrong field name from a rare gap.
_PREFLIGHT_SAMPLES = 64
NO_GROUP = -1


class FieldsConfig(Settings):
    """The names of a sample's parts: file extensions in the tar, keys in its JSON."""

    image: list[str] = Field(default=["jpg", "jpeg", "png", "webp"], min_length=1)
    """Extensions that hold the picture; the first that a sample has is taken."""
    text: str = "txt"
    """Extension of a plain caption."""
    metadata: str = "json"
    """Extension of the JSON object."""
    captions: str = "captions"
    """Key in the JSON: a list of captions (or one)."""
    group: str = "group"
    """Key in the JSON: names the item shown, so that its samples are not each other's negatives."""


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in the tar, parsed but not decoded."""

    name: str
    image: bytes
    captions: list[str]
    group: int
    group_name: str = ""
    """What the group's number was made of."""


@dataclass(frozen=True)
class Parts:
    """What a sample's members hold."""

    image: bytes
    captions: list[str]
    """The plain one first, then those of the JSON that differ from it; stripped, never empty."""
    group: str | None


# What the functions below raise on a sample that cannot be used; `reason_of` words it.
UNUSABLE = (ValueError, OSError, RecursionError)


def parse(fields: FieldsConfig, kinds: Collection[str], read: Callable[[str], bytes]) -> Parts:
    """A sample's parts, from the extensions that it has and what reads the member of one.

    Raises:
        one of UNUSABLE: no image, no usable caption, text that is not UTF-8, JSON that does not parse; or what `read`
            raises.
    """
    image = next((kind for kind in fields.image if kind in kinds), None)
    if image is None:
        raise ValueError(f"no image: none of .{', .'.join(fields.image)}")
    metadata = parse_metadata(fields, kinds, read)
    captions = [read(fields.text).decode()] if fields.text in kinds else []
    listed = metadata.get(fields.captions, [])
    captions += [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
    # JSON can hold half of a surrogate pair, which is no text and stops some tokenizers: that raises here.
    stripped = [caption.encode().decode().strip() for caption in captions if isinstance(caption, str)]
    usable = list(dict.fromkeys(caption for caption in stripped if caption))
    if not usable:
        raise ValueError("only empty captions" if stripped else "no caption")
    group = metadata.get(fields.group)
    return Parts(read(image), usable, None if group is None or group == "" else str(group))


def parse_metadata(fields: FieldsConfig, kinds: Collection[str], read: Callable[[str], bytes]) -> dict[str, Any]:
    """A sample's JSON object, empty where it has none. Raises as `parse`."""
    if fields.metadata not in kinds:
        return {}
    metadata = json.loads(read(fields.metadata))
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata not JSON: .{fields.metadata} holds no object")
    return metadata


def reason_of(error: BaseException) -> str:
    """Why a sample cannot be used, of what `parse` raised."""
    if isinstance(error, UnicodeError):
        return f"text not UTF-8: {error}"
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return f"metadata not JSON: {error}"
    return f"shard out of reach: {error}" if isinstance(error, OSError) else str(error)


class BadSample(Exception):
    """This sample cannot be used; `problem` is its line in bad_samples.jsonl."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


@dataclass(frozen=True)
class Source:
    """Shards that belong together."""

    shards: Sequence[Shard]
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    repeat: float = 1.0
    name: str = ""
    """Begins the names of its samples, where there are several sources."""

    @cached_property
    def share(self) -> Share:
        """What it gives to an epoch."""
        return Share([shard.samples for shard in self.shards], self.repeat)

    @cached_property
    def root(self) -> str:
        """The folder, or the part of the address, that all its shards lie below."""
        folders = [_absolute(shard.location).rpartition("/")[0] for shard in self.shards]
        # Not commonpath, which makes one slash of the two in an address.
        return os.path.commonprefix([f"{folder}/" for folder in folders]).rpartition("/")[0] + "/"  # noqa: RUF071

    def name_of(self, shard: Shard) -> str:
        """A shard's name in those of its samples."""
        return _absolute(shard.location)[len(self.root) :]


# What a process keeps at hand: indexes of so many samples in all, and open files. A window of the order reads no more
# of either, mostly.
_SAMPLES_INDEXED, _FILES = 2_000_000, 64


class SampleReader:
    """Random access to all samples of a set, numbered in the order of its sources and their shards."""

    def __init__(self, sources: Sequence[Source], store: Store) -> None:
        self.sources, self.store = list(sources), store
        self.shares = [source.share for source in sources]
        self._shards = [shard for source in sources for shard in source.shards]
        self._source_of_shard = np.repeat(np.arange(len(sources)), [len(source.shards) for source in sources])
        self.problems = [problem for shard in self._shards for problem in shard.problems]
        self._ends = np.cumsum([shard.samples for shard in self._shards])
        self._open_none()
        for source, first in zip(sources, np.cumsum([0, *(share.total for share in self.shares)]), strict=False):
            self._preflight(source, int(first))

    def _open_none(self) -> None:
        self._indexes = Recent(_SAMPLES_INDEXED, lambda shard: self._shards[shard].load(), size_of=len)
        self._files = Recent(_FILES, self._open, close=os.close)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Files stay behind where a worker process is spawned."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_indexes", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_none()

    @cached_property
    def fingerprint(self) -> str:
        """Tells this set from another one: its shards' names, order and headers, and how often they are seen."""
        facts = [
            [
                source.name,
                source.repeat,
                [[source.name_of(shard), shard.samples, shard.tar.digest] for shard in source.shards],
            ]
            for source in self.sources
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def read(self, number: int) -> Sample:
        """Sample `number`.

        Raises:
            BadSample: no image, no usable caption, text that is not UTF-8, JSON that does not parse, a vanished shard.
        """
        try:
            return self._parse(*self._locate(number))
        except UNUSABLE as error:
            raise BadSample(self.problem(number, reason_of(error))) from None

    def read_picture(self, number: int, least: tuple[int, int] | None = None) -> tuple[Sample, torch.Tensor]:
        """Sample `number` and its picture, uint8 (C, H, W); `least` as `decode.decode_pixels` has it.

        Raises:
            BadSample: as `read`, or a picture that cannot be decoded.
        """
        sample = self.read(number)
        try:
            return sample, decode_pixels(sample.image, least)
        except ValueError as error:
            raise BadSample(self.problem(number, str(error))) from error

    def problem(self, number: int, reason: str) -> Problem:
        """A reason against sample `number`, with its shard and key."""
        shard, row = self._locate(number)
        try:
            key = self._indexes[shard].key(row)
        except OSError:  # the index has gone as well
            key = f"sample {row}"
        return Problem(self._shards[shard].location, key, reason)

    def fetch_ahead(self, numbers: Iterable[int]) -> None:
        """Starts to fetch the remote shards that hold these samples."""
        self.store.fetch_ahead(self._shards[self._locate(number)[0]].location for number in numbers)

    @cached_property
    def is_remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return any(is_remote(shard.location) for shard in self._shards)

    def _locate(self, number: int) -> tuple[int, int]:
        """The shard of a sample and its row there."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard]) + self._shards[shard].samples

    def _open(self, shard: int) -> int:
        """Raises OSError where the shard cannot be had, or is another one by now."""
        location, mark = self._shards[shard].location, self._shards[shard].tar
        file = self.store.open(location)
        if not mark.fits(file):
            os.close(file)
            self.store.discard(location)  # a remote one may have changed since it was fetched
            file = self.store.open(location)
        if not mark.fits(file):
            os.close(file)
            self._shards[shard].forget()
            raise OSError("it is not the shard that was indexed any more; start again to index it anew, or restore it")
        return file

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        """A member's bytes. The header before them comes along, and tells where the shard has changed."""
        data = os.pread(self._files[shard], BLOCK + size, offset - BLOCK)
        if len(data) != BLOCK + size:
            raise ValueError("truncated tar: the shard ends before this member does")
        if header_size(data) not in (size, None):
            raise OSError("it has changed since it was indexed")
        return data[BLOCK:]

    def _parse(self, shard: int, row: int) -> Sample:
        index, source = self._indexes[shard], self.sources[self._source_of_shard[shard]]
        members = index.members(row)
        parts = parse(source.fields, members, lambda kind: self._bytes(shard, *members[kind]))
        name = f"{source.name_of(self._shards[shard])}/{index.key(row)}"
        if len(self.sources) > 1:
            name = f"{source.name}/{name}"
        group = parts.group
        if group is None and source.repeat > 1:  # two copies of a sample are no negatives of each other
            group = f"the sample {name}"
        return Sample(
            name=name,
            image=parts.image,
            captions=parts.captions,
            group=NO_GROUP if group is None else group_number(group),
            group_name=group or "",
        )

    def _preflight(self, source: Source, first: int) -> None:
        """A field that no sample has is a mistake in the config, not a hundred million bad samples."""
        fields = source.fields
        present = sorted({kind for shard in source.shards for kind in shard.extensions})
        where = f"in {len(source.shards)} shards such as {source.shards[0].location}"
        if not set(fields.image) & set(present):
            raise InputError(
                f"fields.image: no sample {where} has .{' or .'.join(fields.image)}; "
                f"the members there are .{', .'.join(present)}."
            )
        for name in ("text", "metadata"):
            kind = getattr(fields, name)
            if name in fields.model_fields_set and kind not in present:
                raise InputError(f"fields.{name}: no sample {where} has .{kind}.{did_you_mean(kind, present)}")
        self._preflight_captions(source, first, where)

    def _preflight_captions(self, source: Source, first: int, where: str) -> None:
        fields, total = source.fields, source.share.total
        keys: set[str] = set()
        captioned, refused = 0, ""
        # Remote shards are not fetched for this: the first one alone, which a run needs anyway.
        looked_at = source.shards[0].samples if self.is_remote else total
        count = min(looked_at, _PREFLIGHT_SAMPLES)
        for number in first + np.linspace(0, looked_at - 1, count).astype(int):
            try:
                captioned += bool(self.read(int(number)).captions)
            except BadSample as error:
                refused = refused or f" The first of them: {error}."
            keys |= self._metadata_keys(int(number), fields)
        for name in ("captions", "group"):
            key = getattr(fields, name)
            if name in fields.model_fields_set and key not in keys:
                raise InputError(
                    f"fields.{name}: none of {count} samples {where} has {key!r} in its JSON." + did_you_mean(key, keys)
                )
        if not captioned:
            raise InputError(
                f"fields.text, fields.captions: none of {count} samples {where} can be used with a caption in "
                f".{fields.text} or under {fields.captions!r} in .{fields.metadata}; "
                f"run with the names that your shards use.{refused}"
            )

    def _metadata_keys(self, number: int, fields: FieldsConfig) -> set[str]:
        shard, row = self._locate(number)
        try:
            members = self._indexes[shard].members(row)
            return set(parse_metadata(fields, members, lambda kind: self._bytes(shard, *members[kind])))
        except UNUSABLE:
            return set()


def group_number(name: str) -> int:
    """A group's name -> 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def _absolute(location: str) -> str:
    return location if is_remote(location) else os.path.abspath(location)  # noqa: PTH100 (a string, for speed)


Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by number, opened when first asked for. Those unused for longest are closed again when all together are
    larger than `limit`; the size of each is 1 where `size_of` does not tell."""

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

    def __getitem__(self, number: int) -> Value:
        if number in self._values:
            self._values.move_to_end(number)
            return self._values[number]
        value = self._values[number] = self._open(number)
        self._size += self._size_of(value)
        while self._size > self._limit and len(self._values) > 1:
            _, oldest = self._values.popitem(last=False)
            self._size -= self._size_of(oldest)
            self._close(oldest)
        return value
