"""How many scores of a tile reach each of its queries' bounds: what more dims cost in a ranking.

A tile is looked at no closer than it needs. First all scores are compared with a little less than the lowest bound of
their query; where few reach it, these are listed, for both directions in one list, and looked at one by one; else all
are compared with all bounds. Both ways are exact, and which of them a tile takes changes no count.

Shapes: I rows and J columns of a tile; Q queries (one of the two) and G gallery rows (the other); P bounds of a query;
c scores listed, w words of eight scores.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Up to this share of a tile, for each bound of a query, scores are listed.
_FEW = 0.008
# For so many tiles listing is not tried again after there were too many.
_REST = 15


class Attempt:
    """Whether listing is to be tried: not for a while after it led nowhere."""

    def __init__(self) -> None:
        self._rest = 0

    def is_due(self) -> bool:
        """Asked once a tile."""
        self._rest -= 1
        return self._rest < 0

    def failed(self) -> None:
        """It was tried in vain."""
        self._rest = _REST


@dataclass(frozen=True, eq=False)
class Asked:
    """What is counted of a tile for the queries along one of its axes."""

    axis: int
    bound_PQ: Tensor
    """Ascending scores: inner products over the gallery row's norm. (The query's own norm orders nothing.)"""
    nearly_Q: Tensor
    """`nearly` of the lowest."""
    norm_G: Tensor
    inverse_G: Tensor
    at_least_PQ: Tensor
    """int32; what is counted is added here."""
    adding: threading.Lock
    """Held meanwhile: other threads count of other tiles for the same queries."""
    listing: Attempt

    def as_tile(self, queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
        """A number for each query and one for each gallery row, as they go with the tile."""
        return (queries[:, None], gallery) if self.axis == 0 else (queries, gallery[:, None])


def nearly(bound: Tensor) -> Tensor:
    """Somewhat less, by more than a product is rounded."""
    return bound - bound.abs() * 2**-19 - 1e-30


class Counter:
    """Counts in the tiles that are made, one after the other, in `product_IJ`: inner products, before normalisation."""

    def __init__(self, product_IJ: Tensor) -> None:
        self._product_IJ = product_IJ
        self._score_IJ, self._reached_IJ = torch.empty_like(product_IJ), torch.empty_like(product_IJ)
        # A GPU would wait for the number of scores to list, and has its own ways with memory.
        self._lists = not product_IJ.is_cuda
        self._masks = [np.empty(product_IJ.shape if self._lists else (0, 0), dtype=bool) for _ in range(2)]

    def count(self, asked: Sequence[Asked]) -> None:
        """Counts for the queries of one axis, or of both."""
        listed = [one for one in asked if self._lists and one.listing.is_due()]
        compared = [one for one in asked if one not in listed]
        if listed:
            compared += self._list(listed)
        for one in compared:
            self._compare(one)

    def _list(self, asked: Sequence[Asked]) -> list[Asked]:
        """Counts those scores one by one that may count; returns those asked of whom there are too many for that."""
        masks = dict(zip(asked, self._masks, strict=False))
        for one, mask_IJ in masks.items():
            queries, gallery = one.as_tile(one.nearly_Q, one.norm_G)
            above_IJ = torch.addcmul(self._product_IJ, queries, gallery, value=-1, out=self._score_IJ)
            np.greater_equal(above_IJ.numpy(), 0, out=mask_IJ)
        most = {one: int(_FEW * len(one.bound_PQ) * self._product_IJ.numel()) for one in asked}
        too_many = [one for one, mask_IJ in masks.items() if np.count_nonzero(mask_IJ) > most[one]]
        for one in too_many:
            one.listing.failed()
            del masks[one]
        if masks:
            first, *second = (mask_IJ.reshape(-1).view(np.uint64) for mask_IJ in masks.values())
            for other in second:
                first |= other
            place_c = _places(first)
            score_c = self._product_IJ.numpy().reshape(-1)[place_c]
            row_c, column_c = np.divmod(place_c, self._product_IJ.shape[1])
            for one in masks:
                _count_listed(one, score_c, row_c, column_c)
        return too_many

    def _compare(self, one: Asked) -> None:
        """All scores with all bounds. The answers are numbers: booleans take several times as long to write and sum."""
        score_IJ = torch.mul(self._product_IJ, one.as_tile(one.inverse_G, one.inverse_G)[1], out=self._score_IJ)
        for bound_Q, at_least_Q in zip(one.bound_PQ, one.at_least_PQ, strict=True):
            reached_IJ = torch.ge(score_IJ, one.as_tile(bound_Q, bound_Q)[0], out=self._reached_IJ)
            count_Q = reached_IJ.sum(1 - one.axis).int()
            with one.adding:
                at_least_Q += count_Q


def _places(word_w: np.ndarray) -> np.ndarray:
    """Where the answers are true, ascending, of eight to a word: hardly any word holds one."""
    some_w = np.flatnonzero(word_w != 0)
    place_c = np.flatnonzero(word_w[some_w].view(bool))
    return some_w[place_c >> 3] * 8 + (place_c & 7)


def _count_listed(one: Asked, product_c: np.ndarray, row_c: np.ndarray, column_c: np.ndarray) -> None:
    """Looks at each of the listed scores; those that count for the other axis alone reach none of these bounds."""
    query_c, gallery_c = (row_c, column_c) if one.axis == 0 else (column_c, row_c)
    score_c = product_c * one.inverse_G.numpy()[gallery_c]
    for bound_Q, at_least_Q in zip(one.bound_PQ.numpy(), one.at_least_PQ.numpy(), strict=True):
        reached_c = score_c >= bound_Q[query_c]
        query_c, score_c = query_c[reached_c], score_c[reached_c]  # bounds ascend
        count_Q = np.bincount(query_c, minlength=len(at_least_Q)).astype(np.int32)
        with one.adding:
            at_least_Q += count_Q
