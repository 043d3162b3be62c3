"""A whole set once, in the order of its shards, with every caption: what evaluation and embedding read.

Shapes: B pictures of a batch, M their captions in all, C channels, H and W the image's size, L tokens of a text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mmrl.data.index import Problem
from mmrl.data.samples import BadSample, Sample
from mmrl.images.image_spec import ImageSpec


class PictureReader(Protocol):
    """Random access to a set's samples: a SampleReader, or what reads like one."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What cannot be read at all, and has no number."""
        ...

    def __len__(self) -> int: ...

    def read_picture(self, number: int) -> tuple[Sample, torch.Tensor]:
        """Sample `number` and its picture, uint8 (C, H, W); raises BadSample."""
        ...


@dataclass
class WholeBatch:
    """Some samples of a set with all their captions."""

    keys: list[str]
    image_BCHW: torch.Tensor
    text_ML: torch.Tensor
    captions: list[str]
    row_of_text_M: torch.Tensor
    """Which of the B pictures each caption belongs to."""
    group_B: torch.Tensor
    numbers: list[int]
    """Which samples of the set the B pictures are."""
    bad: list[Problem] = field(default_factory=list)


def read_whole(
    reader: PictureReader,
    image: ImageSpec,
    text: Callable[[list[str]], torch.Tensor],
    *,
    batch_size: int = 256,
    captions: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[WholeBatch]:
    """This process's share of the set, a run of neighbouring samples; bad samples are left out and listed.

    Args:
        captions: how many captions of each sample at most, the plain one first; None takes all.
    """
    first, last = (len(reader) * r // world_size for r in (rank, rank + 1))
    for start in range(first, last, batch_size):
        keys, numbers, pictures, groups, texts, rows = [], [], [], [], [], []
        bad: list[Problem] = []
        for number in range(start, min(start + batch_size, last)):
            try:
                sample, picture = reader.read_picture(number)
            except BadSample as error:
                bad.append(error.problem)
                continue
            pictures.append(image.pixels(picture))
            chosen = sample.captions[:captions]
            texts += chosen
            rows += [len(keys)] * len(chosen)
            keys.append(sample.name)
            numbers.append(number)
            groups.append(sample.group)
        if not keys:  # all bad: an empty batch carries their list
            empty, no_picture = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, image.height, image.width)
            yield WholeBatch([], no_picture, empty[:, None], [], empty, empty, [], bad)
            continue
        row_of_text_M, group_B = torch.tensor(rows), torch.tensor(groups)
        yield WholeBatch(keys, torch.stack(pictures), text(texts), texts, row_of_text_M, group_B, numbers, bad)
