"""Queries to look at: what the full vector finds beside what a short one finds, hits and misses.

Shapes: Q queries that have an answer.
"""

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mmrl.data.samples import BadSample
from mmrl.data.sequential import PictureReader
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import nearest
from mmrl.evaluate.sets import Embedded
from mmrl.images.decode import to_picture

SHOWN = 5
_SIDE, _QUALITY = 112, 78
# How many of each kind; drawn at random, always the same.
_KINDS = {"found by both": 2, "lost by the short one": 3, "found by the short one alone": 1, "missed by both": 2}


@dataclass(frozen=True)
class Found:
    """One picture in an answer."""

    row: int
    score: float
    is_right: bool


@dataclass(frozen=True)
class Answer:
    """The first pictures at one dim, and the place of the best right one."""

    dim: int
    rank: int
    found: list[Found]


@dataclass(frozen=True)
class Example:
    """One query and its answers, the full vector's first."""

    kind: str
    query: str
    answers: tuple[Answer, Answer]


def choose(
    task: Task, captions: list[str], rank_of: Mapping[int, Tensor], query_Q: Tensor, short: int
) -> list[Example]:
    """Some queries of each kind, by text among pictures.

    Args:
        rank_of: {dim: rank_Q}; the greatest dim is the full vector's.
        query_Q: the row of each of these queries in `task`.
    """
    full = max(rank_of)
    wide_Q, narrow_Q = rank_of[full] <= SHOWN, rank_of[short] <= SHOWN
    kinds = {
        "found by both": (rank_of[full] == 1) & (rank_of[short] == 1),
        "lost by the short one": wide_Q & ~narrow_Q,
        "found by the short one alone": ~wide_Q & narrow_Q,
        "missed by both": ~wide_Q & ~narrow_Q,
    }
    order = torch.randperm(len(query_Q), generator=torch.Generator().manual_seed(0))
    examples, asked = [], set()
    for kind, most in _KINDS.items():
        for place in order[kinds[kind][order]].tolist():
            row = int(query_Q[place])
            if captions[row] in asked:  # several samples may have one name
                continue
            asked.add(captions[row])
            answers = tuple(_answer(task, row, dim, int(rank_of[dim][place])) for dim in (full, short))
            examples.append(Example(kind, captions[row], (answers[0], answers[1])))
            most -= 1
            if not most:
                break
    return examples


def _answer(task: Task, row: int, dim: int, rank: int) -> Answer:
    rows, scores = nearest(task.query_QD[row : row + 1], task.gallery_GD, dim, SHOWN)
    wanted = task.query_group_Q[row]
    found = [
        Found(place, score, bool(task.gallery_group_G[place] == wanted))
        for place, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
    ]
    return Answer(dim, rank, found)


def thumbnails(reader: PictureReader, embedded: Embedded, rows: Iterable[int]) -> dict[int, str]:
    """{row: a small WebP as a data: address}. A picture that cannot be read any more is left out."""
    result = {}
    for row in sorted(set(rows)):
        try:
            sample, picture_CHW = reader.read_picture(embedded.numbers[row])
        except BadSample:
            continue
        if sample.name == embedded.keys[row]:
            result[row] = _as_address(to_picture(picture_CHW))
    return result


def _as_address(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
