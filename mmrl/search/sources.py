"""What `mmrl embed` reads: the samples of shards, or the images of a folder, in a fixed order and from any position."""

from collections.abc import Iterator
from pathlib import Path

import torch

from mmrl.data.folder import ImageFolder, is_image_folder
from mmrl.data.index import Problem
from mmrl.data.samples import BadSample, FieldsConfig, Sample, SampleReader
from mmrl.data.sources import open_reader


class ImageSource:
    """The images of shards or of a folder, by position."""

    def __init__(self, reader: SampleReader | ImageFolder) -> None:
        self._reader = reader
        self.problems = reader.problems
        """What is known to be bad before any image is read; it has no position."""
        self.notes = reader.notes if isinstance(reader, SampleReader) else []
        """What is not read; to be printed before work begins."""
        self.fingerprint = reader.fingerprint
        """Differs between sets of images: a hash of the shards, or of the file names."""

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, start: int, end: int) -> Iterator[tuple[Sample, torch.Tensor] | Problem]:
        """Samples `start` … `end` - 1, each with its image, uint8 (C, H, W); a Problem in place of each bad one."""
        for number in range(start, end):
            try:
                yield self._reader.read_image(number)
            except BadSample as error:
                yield error.problem


def open_images(source: str, group_key: str = "group") -> ImageSource:
    """Opens shards, or a folder that holds images and no shards.

    Args:
        group_key: the key of the group in a sample's JSON.

    Images need no captions.

    Raises:
        InputError: there are no images, or no sample of the shards has a `group_key` other than the default.
    """
    if is_image_folder(Path(source)):
        return ImageSource(ImageFolder(Path(source), group_key=group_key))
    fields = FieldsConfig() if group_key == "group" else FieldsConfig(group=group_key)
    return ImageSource(open_reader(source, fields, require_captions=False))
