"""What is embedded: the samples of shards, or the pictures of a folder, in a fixed order and from any position."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch

from mmrl.data.index import Problem
from mmrl.data.pack.pairs import FolderPairs
from mmrl.data.samples import NO_GROUP, BadSample, FieldsConfig, Sample, SampleReader, group_number
from mmrl.data.sources import open_reader
from mmrl.images.decode import decode_pixels

Picture = tuple[Sample, torch.Tensor]
"""A sample and its pixels, uint8 (C, H, W)."""


class Pictures(Protocol):
    """A set of pictures."""

    @property
    def problems(self) -> list[Problem]:
        """What is known to be wrong before any picture is read."""
        ...

    @property
    def fingerprint(self) -> str:
        """Tells this set from another one."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, end: int) -> Iterator[Picture | Problem]:
        """Pictures `start` … `end` - 1, with a problem in place of each that cannot be used."""
        ...


def open_pictures(source: str, group_key: str = "group") -> Pictures:
    """The pictures that SOURCE names: shards, or a folder that holds pictures and no shard.

    Args:
        group_key: what a sample's JSON calls its group.

    Raises:
        InputError: there are none, or no sample has the group key that was asked for.
    """
    folder = Path(source)
    if folder.is_dir() and next(folder.rglob("*.tar"), None) is None:
        return _Folder(folder, group_key)
    fields = FieldsConfig() if group_key == "group" else FieldsConfig(group=group_key)
    return _Shards(open_reader(source, fields))


class _Shards:
    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader
        self.problems, self.fingerprint = reader.problems, reader.fingerprint

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, start: int, end: int) -> Iterator[Picture | Problem]:
        for number in range(start, end):
            try:
                yield self._reader.read_picture(number)
            except BadSample as error:
                yield error.problem


class _Folder:
    """A picture's key is its path below the folder. Captions are not needed."""

    def __init__(self, folder: Path, group_key: str) -> None:
        self._folder = folder
        self._pairs = FolderPairs(folder, ("captions", "caption"), group_key)
        self.problems: list[Problem] = []
        self.fingerprint = str(self._pairs.fingerprint()["hash of file names"])

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, start: int, end: int) -> Iterator[Picture | Problem]:
        for pair in islice(self._pairs.after(start), end - start):
            if isinstance(pair, Problem):
                yield pair
                continue
            path = Path(pair.image)
            key = path.relative_to(self._folder).as_posix()
            try:
                data = path.read_bytes() if path.is_file() else b""
                captions = list(dict.fromkeys(text for caption in pair.captions if (text := _clean(caption))))
                group = NO_GROUP if pair.group is None else group_number(pair.group)
                yield Sample(key, data, captions, group, pair.group or ""), decode_pixels(data)
            except (OSError, ValueError) as error:
                yield Problem(str(self._folder), key, f"unreadable image: {error}")


def _clean(caption: str) -> str:
    # JSON can hold half of a surrogate pair, which is no text: that raises here, a ValueError.
    return caption.encode().decode().strip()
