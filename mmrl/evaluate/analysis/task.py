"""One direction of retrieval: who asks, among what, and which answers are right.

Shapes: Q queries, G gallery rows, D the embedding's width.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_TENSORS = ("query_QD", "gallery_GD", "query_group_Q", "gallery_group_G")
DIRECTIONS = {"text_to_image": "text→image", "image_to_text": "image→text"}


@dataclass(frozen=True)
class Task:
    """Queries and a gallery; not normalised. Equal groups are right answers."""

    name: str
    query_QD: Tensor
    gallery_GD: Tensor
    query_group_Q: Tensor
    gallery_group_G: Tensor

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return self.query_QD.shape[1]

    @cached_property
    def half_Q(self) -> Tensor:
        """True for the queries of half of the items, drawn at random: what is fitted on one half is scored on the
        other, so that no query is scored by what it taught."""
        return in_half(self.query_group_Q)

    @cached_property
    def half_G(self) -> Tensor:
        """True for the gallery rows of the same half of the items."""
        return in_half(self.gallery_group_G)

    def with_vectors(self, query_QD: Tensor, gallery_GD: Tensor) -> "Task":
        """The same questions in other vectors."""
        return replace(self, query_QD=query_QD, gallery_GD=gallery_GD)

    def only(self, row_q: Tensor) -> "Task":
        """Some of the queries, the gallery whole."""
        return replace(self, query_QD=self.query_QD[row_q], query_group_Q=self.query_group_Q[row_q])

    def to(self, device: torch.device) -> "Task":
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)

    def rows_within(self, pairs: int, least: int, most: int) -> Tensor:
        """The queries that have an answer, or so many of them that queries times gallery stay within `pairs`, but from
        `least` to `most`. They are drawn by item, always the same. Ascending."""
        asks_Q = torch.isin(self.query_group_Q, self.gallery_group_G)
        rows = asks_Q.nonzero()[:, 0]
        room = min(most, max(least, pairs // len(self.gallery_group_G)))
        if len(rows) <= room:
            return rows
        order = torch.from_numpy(_draw(self.query_group_Q[rows]))
        return rows[order.sort(stable=True).indices[:room]].sort().values


def in_half(group: Tensor) -> Tensor:
    """A random half of the groups: True for their rows."""
    return torch.from_numpy(_draw(group) % 2 == 0).to(group.device)


def _draw(group: Tensor) -> np.ndarray:
    """A random number a row, equal for equal groups and for nothing else: SplitMix64, which is a bijection."""
    x = group.cpu().numpy().astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)
