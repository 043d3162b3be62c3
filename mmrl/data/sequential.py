"""Read a whole set once, in shard order, with all captions: for evaluation, rotation and embedding.

Shapes: B images of a batch, M their captions in all, C channels, H and W the image size, L tokens of a text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mmrl.data.index import Problem
from mmrl.data.samples import BadSample, Sample
from mmrl.images.image_spec import ImageSpec


class ImageReader(Protocol):
    """Random access to the samples of a set: a SampleReader, or another class with its methods."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What is unusable and therefore has no index."""
        ...

    def __len__(self) -> int: ...

    def read_image(self, index: int, /) -> tuple[Sample, torch.Tensor]:
        """Reads sample `index` and decodes its image, uint8 (C, H, W); raises BadSample."""
        ...


@dataclass
class SequentialBatch:
    """Consecutive samples of a set with all their captions."""

    keys: list[str]
    image_BCHW: torch.Tensor
    text_ML: torch.Tensor
    captions: list[str]
    row_of_text_M: torch.Tensor
    """The row in image_BCHW that each caption belongs to."""
    group_B: torch.Tensor
    indices: list[int]
    """The index in the set of each of the B samples."""
    bad: list[Problem] = field(default_factory=list)


def read_sequential(
    reader: ImageReader,
    image: ImageSpec,
    text: Callable[[list[str]], torch.Tensor],
    *,
    batch_size: int = 256,
    captions: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[SequentialBatch]:
    """Yields this rank's contiguous share of the set in batches; bad samples are left out and listed in `bad`.

    Args:
        captions: at most this many captions per sample, the plain one first; None for all.
    """
    first, last = (len(reader) * r // world_size for r in (rank, rank + 1))
    for start in range(first, last, batch_size):
        keys, indices, images, groups, texts, rows = [], [], [], [], [], []
        bad: list[Problem] = []
        for index in range(start, min(start + batch_size, last)):
            try:
                sample, image_CHW = reader.read_image(index)
            except BadSample as error:
                bad.append(error.problem)
                continue
            images.append(image.pixels(image_CHW))
            chosen = sample.captions[:captions]
            texts += chosen
            rows += [len(keys)] * len(chosen)
            keys.append(sample.name)
            indices.append(index)
            groups.append(sample.group)
        if not keys:  # an empty batch, for its list of bad samples
            empty, no_image = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, image.height, image.width)
            yield SequentialBatch([], no_image, empty[:, None], [], empty, empty, [], bad)
            continue
        row_of_text_M, group_B = torch.tensor(rows), torch.tensor(groups)
        yield SequentialBatch(keys, torch.stack(images), text(texts), texts, row_of_text_M, group_B, indices, bad)
