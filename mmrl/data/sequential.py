"""A whole set once, in the order of its shards, with every caption: what evaluation and embedding read.

Shapes: B pictures of a batch, M their captions in all, C channels, H and W the image's size, L tokens of a text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mmrl.data.index import Problem
from mmrl.data.samples import BadSample, SampleReader
from mmrl.image_spec import ImageSpec


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
    bad: list[Problem] = field(default_factory=list)


def read_whole(
    reader: SampleReader,
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
        keys, pictures, groups, texts, rows = [], [], [], [], []
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
            groups.append(sample.group)
        if not keys:  # all bad: an empty batch carries their list
            empty = torch.zeros(0, dtype=torch.int64)
            yield WholeBatch([], torch.zeros(0, 3, image.height, image.width), empty[:, None], [], empty, empty, bad)
            continue
        yield WholeBatch(keys, torch.stack(pictures), text(texts), texts, torch.tensor(rows), torch.tensor(groups), bad)
