"""One sample: its members in a tar -> image bytes, captions, group; and what becomes of a sample that is bad.

Nothing here runs code from the data: members are images, text and JSON, whatever their names say.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import Field

from mmrl.data.shards import Problem, ShardIndex
from mmrl.errors import InputError, did_you_mean
from mmrl.image_spec import decode
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


class BadSample(Exception):
    """This sample cannot be used; `problem` is its line in bad_samples.jsonl."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


class SampleReader:
    """Random access to all samples of a set, numbered in the order of its shards."""

    def __init__(self, indexes: Sequence[ShardIndex], fields: FieldsConfig) -> None:
        self.fields = fields
        self.samples_of_shard = [len(index) for index in indexes]
        self.problems = [problem for index in indexes for problem in index.problems]
        self._indexes = list(indexes)
        self._ends = np.cumsum(self.samples_of_shard)
        self._root = Path(os.path.commonpath([index.path.resolve().parent for index in indexes]))
        self._preflight()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, number: int) -> Sample:
        """Sample `number`.

        Raises:
            BadSample: no image, no usable caption, text that is not UTF-8, JSON that does not parse, a vanished shard.
        """
        try:
            return self._parse(*self._locate(number))
        except (ValueError, OSError, RecursionError) as error:
            raise BadSample(self.problem(number, str(error))) from error

    def read_picture(self, number: int) -> tuple[Sample, Image.Image]:
        """Sample `number` and its picture, decoded.

        Raises:
            BadSample: as `read`, or a picture that cannot be decoded.
        """
        sample = self.read(number)
        try:
            return sample, decode(sample.image)
        except ValueError as error:
            raise BadSample(self.problem(number, f"image: {error}")) from error

    def problem(self, number: int, reason: str) -> Problem:
        """A reason against sample `number`, with its shard and key."""
        index, row = self._locate(number)
        return Problem(str(index.path), index.keys[row], reason)

    def _locate(self, number: int) -> tuple[ShardIndex, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self._indexes[shard], number - int(self._ends[shard]) + self.samples_of_shard[shard]

    def _parse(self, index: ShardIndex, row: int) -> Sample:
        members = index.members(row)
        image = next((members[kind] for kind in self.fields.image if kind in members), None)
        if image is None:
            raise ValueError(f"no image (none of .{', .'.join(self.fields.image)})")
        metadata = self._metadata(index.path, members)
        captions = self._captions(index.path, members, metadata)
        if not captions:
            raise ValueError("no caption, or only empty ones")
        group = metadata.get(self.fields.group) or None
        return Sample(
            name=f"{index.path.resolve().relative_to(self._root)}/{index.keys[row]}",
            image=_read(index.path, *image),
            captions=captions,
            group=NO_GROUP if group is None else group_number(str(group)),
        )

    def _metadata(self, path: Path, members: dict[str, tuple[int, int]]) -> dict[str, object]:
        if self.fields.metadata not in members:
            return {}
        metadata = json.loads(_read(path, *members[self.fields.metadata]))
        if not isinstance(metadata, dict):
            raise ValueError(f".{self.fields.metadata} holds no JSON object")
        return metadata

    def _captions(self, path: Path, members: dict[str, tuple[int, int]], metadata: dict[str, object]) -> list[str]:
        """The plain caption first, then those of the JSON that differ from it; stripped, never empty."""
        captions = []
        if self.fields.text in members:
            captions.append(_read(path, *members[self.fields.text]).decode())
        listed = metadata.get(self.fields.captions, [])
        captions += [listed] if isinstance(listed, str) else listed if isinstance(listed, list) else []
        # JSON can hold half of a surrogate pair, which is no text and stops some tokenizers: that raises here.
        stripped = [caption.encode().decode().strip() for caption in captions if isinstance(caption, str)]
        return list(dict.fromkeys(caption for caption in stripped if caption))

    def _preflight(self) -> None:
        """A field that no sample has is a mistake in the config, not a hundred million bad samples."""
        present = sorted({kind for index in self._indexes for kind in index.extensions})
        where = f"in {len(self._indexes)} shards such as {self._indexes[0].path}"
        if not set(self.fields.image) & set(present):
            raise InputError(
                f"fields.image: no sample {where} has .{' or .'.join(self.fields.image)}; "
                f"the members there are .{', .'.join(present)}."
            )
        for name in ("text", "metadata"):
            kind = getattr(self.fields, name)
            if name in self.fields.model_fields_set and kind not in present:
                raise InputError(f"fields.{name}: no sample {where} has .{kind}.{did_you_mean(kind, present)}")
        self._preflight_captions(where)

    def _preflight_captions(self, where: str) -> None:
        count = min(len(self), _PREFLIGHT_SAMPLES)
        keys: set[str] = set()
        captioned = 0
        for number in np.linspace(0, len(self) - 1, count).astype(int):
            with contextlib.suppress(BadSample):
                captioned += bool(self.read(int(number)).captions)
            keys |= self._metadata_keys(int(number))
        for name in ("captions", "group"):
            key = getattr(self.fields, name)
            if name in self.fields.model_fields_set and key not in keys:
                raise InputError(
                    f"fields.{name}: none of {count} samples {where} has {key!r} in its JSON." + did_you_mean(key, keys)
                )
        if not captioned:
            raise InputError(
                f"fields.text, fields.captions: none of {count} samples {where} can be used with a caption in "
                f".{self.fields.text} or under {self.fields.captions!r} in .{self.fields.metadata}; "
                "run with the names that your shards use."
            )

    def _metadata_keys(self, number: int) -> set[str]:
        index, row = self._locate(number)
        try:
            return set(self._metadata(index.path, index.members(row)))
        except (ValueError, OSError, RecursionError):
            return set()


def group_number(name: str) -> int:
    """A group's name -> 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb", buffering=0) as raw:
        data = os.pread(raw.fileno(), size, offset)
    if len(data) != size:
        raise ValueError("the shard ends before this member does")
    return data
