"""Read single samples by index: image bytes, captions and group, or the reason why a sample is bad."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmrl.data.fields import EXTENSIONS_SHOWN, FIRST_DOT, FieldsConfig, hidden_images, merged_names, unused_note
from mmrl.data.groups import NO_GROUP, group_id, own_group
from mmrl.data.index import Problem, printable
from mmrl.data.parsing import BOTH, IMAGE, SAMPLE_ERRORS, TEXT, parse, parse_metadata, reason_of
from mmrl.data.shard_reader import ShardReader, Source
from mmrl.data.stores import ShardCache, is_remote
from mmrl.errors import InputError, did_you_mean
from mmrl.images.decode import decode_pixels

# Samples read before training, to tell a wrong field name from a field that some samples lack.
_PREFLIGHT_SAMPLES = 64


@dataclass(frozen=True)
class Sample:
    """A sample with its image not decoded yet."""

    name: str
    """Shard and key, after the source's name if there are several sources: unique in the set."""
    image: bytes
    """Empty if the sample has none and none is required."""
    captions: list[str]
    group: int
    """Hash of `group_name`, or NO_GROUP."""
    group_name: str = ""
    negatives: list[str] = field(default_factory=list)
    """Keys and captions of hard negatives, as its JSON names them."""
    second_text: str = ""
    """See fields.second_text; empty if it has none, as is the second image."""
    second_image: bytes = b""


class BadSample(Exception):
    """A sample cannot be used; `problem` is its line in bad_samples.jsonl."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


class SampleReader(ShardReader):
    """Random access to the samples of all sources."""

    def __init__(
        self, sources: Sequence[Source], cache: ShardCache, required: Collection[str] = BOTH, group_all: bool = False
    ) -> None:
        """Args:
        required: IMAGE and TEXT, or one of them: a sample without it is bad.
        group_all: a sample without a group is a group of its own.

        Raises:
            InputError: no sample of a source has a configured field.
        """
        super().__init__(sources, cache)
        self.required, self._group_all = required, group_all
        self.looked_at, self.second_counts = 0, Counter[str]()
        """Usable samples that were looked at, and how many of them have a second IMAGE or TEXT of their own."""
        self.problems = [problem for shard in self._shards for problem in shard.problems]
        self.notes: list[str] = []
        """Sentences on what is not read, to print before work begins."""
        for source, first in zip(sources, np.cumsum([0, *(share.total for share in self.shares)]), strict=False):
            self._preflight(source, int(first))

    def read(self, index: int, with_image: bool = True) -> Sample:
        """Reads sample `index`, or all of it but its image.

        Raises:
            BadSample: no image, no usable caption, text that is not UTF-8, invalid JSON, a missing shard.
            InputError: the shard is not a tar, or has another number of samples than a file declares.
        """
        try:
            return self._parse(*self.locate(index), with_image)
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
        return sample, self.decode(index, sample.image, min_size)

    def decode(self, index: int, image: bytes, min_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Decodes an image of sample `index`, as `read_image`; raises BadSample."""
        try:
            return decode_pixels(image, min_size)
        except ValueError as error:
            raise BadSample(self.problem(index, str(error))) from error

    def problem(self, index: int, reason: str) -> Problem:
        """A Problem with the shard and key of sample `index`."""
        shard, row = self.locate(index)
        try:
            key = self._indexes[shard].key(row)
        except OSError:  # the index is missing too
            key = f"sample {row}"
        return Problem(self._shards[shard].location, key, reason)

    def _parse(self, shard: int, row: int, with_image: bool) -> Sample:
        index, source = self._indexes[shard], self.sources[self._source_of_shard[shard]]
        members = index.members(row)
        wanted = members if with_image else (source.fields.text, source.fields.metadata)
        parsed = parse(
            source.fields,
            members,
            lambda extension: self._read_member(shard, *members[extension]) if extension in wanted else b"",
            self.required,
        )
        name = f"{self.shard_name(shard)}/{index.key(row)}"
        group = parsed.group
        if group is None and (source.repeat > 1 or self._group_all):  # copies must not be each other's negatives
            group = own_group(name)
        return Sample(
            name=name,
            image=parsed.image,
            captions=parsed.captions,
            group=NO_GROUP if group is None else group_id(group),
            group_name=group or "",
            negatives=parsed.negatives,
            second_text=parsed.second_text,
            second_image=parsed.second_image,
        )

    def _preflight(self, source: Source, first: int) -> None:
        """Raises InputError if no sample of a source has a configured field, which is a mistake in the config."""
        fields = source.fields
        counts = self._count_extensions(source, first)
        present, looked_at = sorted(counts), [shard for shard in source.shards if shard.header] or source.shards[:1]
        where = f"in {len(looked_at)} shards such as {printable(looked_at[0].location)}"
        if IMAGE in self.required and set(fields.image_extensions).isdisjoint(present):
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
        if fields.is_renamed("second_image") and set(fields.second_image_extensions).isdisjoint(present):
            shown = ", ".join(present[:EXTENSIONS_SHOWN])
            raise InputError(
                f"fields.second_image: no sample {where} has .{fields.second_image_extensions[0]} or another image "
                f"format after .{fields.second_image}; the members there are .{shown}."
            )
        self._preflight_captions(source, first, where)

    def _count_extensions(self, source: Source, first: int) -> Counter[str]:
        """Extension -> number of samples that have it, in the shards with a known index, or else in the first shard."""
        counts: Counter[str] = Counter()
        for shard in source.shards:
            counts.update(shard.count_extensions())
        if not any(shard.header for shard in source.shards):
            try:
                counts.update(self._indexes[self.locate(first)[0]].count_extensions())
            except OSError as error:
                raise InputError(f"shards: {source.shards[0].location} cannot be read ({error}).") from None
        return counts

    def _note_unused(self, source: Source, first: int, counts: Counter[str]) -> None:
        """Adds the members that no field uses to the notes, and the images among them to the problems."""
        for shard, one in enumerate(source.shards, start=self.locate(first)[0]):
            unused = one.count_extensions().keys() - source.fields.extensions
            if not is_remote(one.location) and any("." in extension for extension in unused):
                merged = merged_names(self._indexes[shard], source.fields, TEXT in self.required)
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
                sample = self.read(int(index))
                captioned += bool(sample.captions)
                self.looked_at += 1
                self.second_counts.update({IMAGE: bool(sample.second_image), TEXT: bool(sample.second_text)})
            except BadSample as error:
                rejected = rejected or f" The first of them: {error}."
            keys |= self._metadata_keys(int(index), fields)
        for name in ("captions", "group", "second_text"):
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
        if not captioned and TEXT in self.required:
            if self.problems:
                problem = self.problems[0]
                rejected += f" The shards' first problem: {problem.key} {problem.reason}."
            raise InputError(
                f"fields.text, fields.captions: none of {count} samples {where} can be used with a caption in "
                f".{fields.text} or under {fields.captions!r} in .{fields.metadata}; "
                f"set the field names to those of your shards.{rejected}"
            )

    def _metadata_keys(self, index: int, fields: FieldsConfig) -> set[str]:
        shard, row = self.locate(index)
        try:
            members = self._indexes[shard].members(row)
            return set(parse_metadata(fields, members, lambda one: self._read_member(shard, *members[one])))
        except SAMPLE_ERRORS:
            return set()
