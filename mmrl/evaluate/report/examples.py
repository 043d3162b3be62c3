"""Example queries for the page: the first results at the full dim and at a short one, hits and misses.

Shapes: Q queries that have a positive.
"""

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mmrl.data.samples import BadSample
from mmrl.data.sequential import ImageReader
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import top_k
from mmrl.evaluate.sets import Embedded
from mmrl.images.decode import to_pil
from mmrl.nesting import truncate

SHOWN = 5
_THUMBNAIL_SIDE, _QUALITY = 112, 78
# Number of examples of each kind.
_KINDS = {"found at both dims": 2, "lost at the short dim": 3, "gained at the short dim": 1, "missed at both dims": 2}


@dataclass(frozen=True)
class ResultList:
    """The first images at one dim, and the rank of the best positive."""

    dim: int
    rank: int
    images: list[tuple[int, bool]]
    """(row, whether it is a positive)."""


@dataclass(frozen=True)
class Example:
    """One query with its results at the full dim and at the short dim."""

    kind: str
    query: str
    results: tuple[ResultList, ResultList]


def choose_examples(
    task: Task, captions: list[str], rank_of: Mapping[int, Tensor], query_Q: Tensor, short: int
) -> list[Example]:
    """Random text→image queries of each kind, always the same.

    Args:
        rank_of: {dim: rank_Q}; the largest dim is the full one.
        query_Q: the row of each of these queries in `task`.
        short: the short dim.
    """
    full = max(rank_of)
    full_hit_Q, short_hit_Q = rank_of[full] <= SHOWN, rank_of[short] <= SHOWN
    masks = (
        (rank_of[full] == 1) & (rank_of[short] == 1),
        full_hit_Q & ~short_hit_Q,
        ~full_hit_Q & short_hit_Q,
        ~full_hit_Q & ~short_hit_Q,
    )
    order = torch.randperm(len(query_Q), generator=torch.Generator().manual_seed(0))
    examples, seen = [], set()
    for (kind, most), mask_Q in zip(_KINDS.items(), masks, strict=True):
        for index in order[mask_Q[order]].tolist():
            row = int(query_Q[index])
            if captions[row] in seen:  # several samples may have one caption
                continue
            seen.add(captions[row])
            at_full, at_short = (_results(task, row, dim, int(rank_of[dim][index])) for dim in (full, short))
            examples.append(Example(kind, captions[row], (at_full, at_short)))
            most -= 1
            if not most:
                break
    return examples


def _results(task: Task, row: int, dim: int, rank: int) -> ResultList:
    score_1G = truncate(task.query_QD[row : row + 1], dim) @ truncate(task.gallery_GD, dim).T
    images, group = top_k(score_1G.numpy(), SHOWN)[0][0].tolist(), task.query_group_Q[row]
    return ResultList(dim, rank, [(image, bool(task.gallery_group_G[image] == group)) for image in images])


def thumbnails(reader: ImageReader, embedded: Embedded, rows: Iterable[int]) -> dict[int, str]:
    """{row: a small WebP as a data: URL}. Images that can no longer be read are left out."""
    result = {}
    for row in sorted(set(rows)):
        try:
            sample, image_CHW = reader.read_image(embedded.sample_indices[row])
        except BadSample:
            continue
        if sample.name == embedded.keys[row]:
            result[row] = _data_url(to_pil(image_CHW))
    return result


def _data_url(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
