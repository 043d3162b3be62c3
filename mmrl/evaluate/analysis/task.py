"""One direction of retrieval: queries, gallery, and their groups.

Shapes: Q queries, G gallery rows, q some of the queries, D the embedding's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmrl.data import draws
from mmrl.evaluate.ranking.ranks import rank_queries

_TENSORS = ("query_QD", "gallery_GD", "query_group_Q", "gallery_group_G")


@dataclass(frozen=True)
class Task:
    """Queries and gallery, not normalised. Rows of equal group are positives of each other."""

    name: str
    query_QD: Tensor
    gallery_GD: Tensor
    query_group_Q: Tensor
    gallery_group_G: Tensor

    @property
    def dim(self) -> int:
        return self.query_QD.shape[1]

    @cached_property
    def half_Q(self) -> Tensor:
        """True for the queries of a random half of the items. What is fitted on one half is scored on the other, so no
        query is scored by a fit that used it."""
        return in_half(self.query_group_Q)

    @cached_property
    def half_G(self) -> Tensor:
        """True for the gallery rows of the same half of the items."""
        return in_half(self.gallery_group_G)

    def with_vectors(self, query_QD: Tensor, gallery_GD: Tensor) -> "Task":
        """The same groups with other embeddings."""
        return replace(self, query_QD=query_QD, gallery_GD=gallery_GD)

    def ranks(self, dims: Sequence[int]) -> dict[int, Tensor]:
        """{dim: the rank of each query's best positive}. All queries must have one."""
        ranked = rank_queries(self.query_QD, self.gallery_GD, self.query_group_Q, self.gallery_group_G, dims)
        return {dim: ranked[dim].rank_Q for dim in dims}

    def select_queries(self, row_q: Tensor) -> "Task":
        """Some of the queries, with the whole gallery."""
        return replace(self, query_QD=self.query_QD[row_q], query_group_Q=self.query_group_Q[row_q])

    def to(self, device: torch.device) -> "Task":
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)

    def sample_queries(self, pairs: int, least: int, most: int) -> Tensor:
        """Rows of queries that have a positive, ascending: all of them if they are few, otherwise a sample by item,
        always the same, of `pairs` / gallery size queries, clamped to `least`..`most`."""
        has_positive_Q = torch.isin(self.query_group_Q, self.gallery_group_G)
        rows = has_positive_Q.nonzero()[:, 0]
        limit = min(most, max(least, pairs // len(self.gallery_group_G)))
        if len(rows) <= limit:
            return rows
        order = torch.from_numpy(_draw(self.query_group_Q[rows]))
        return rows[order.sort(stable=True).indices[:limit]].sort().values


def in_half(group: Tensor) -> Tensor:
    """True for the rows of a random half of the groups, always the same."""
    return torch.from_numpy(_draw(group) % 2 == 0).to(group.device)


def _draw(group: Tensor) -> np.ndarray:
    """A random integer >= 0 per row, the same for rows of one group."""
    return (draws.bits(group.cpu().numpy()) >> np.uint64(1)).astype(np.int64)
