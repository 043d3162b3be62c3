"""How many scores of a tile reach each of its queries' bounds: what more dims cost in a ranking.

A tile is looked at no closer than it needs. First all scores are compared with a little less than the lowest bound of
their query; where few reach it, these are listed and looked at one by one, else all are compared with all bounds. Both
ways are exact, and which of them a tile takes changes no count. The tile is gone through in bands of rows for both of
its directions at once, so that what is made of a band stays in a core's cache.

Shapes: I rows and J columns of a tile, b rows of a band; Q queries (one of the two) and G gallery rows (the other); P
bounds of a query; c scores listed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Rows of a band for each thread.
_BAND = 64
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
    listing: Attempt

    def in_bands(self, queries: Tensor, gallery: Tensor, height: int) -> list[tuple[Tensor, Tensor]]:
        """A number for each query and one for each gallery row, as they go with each band of the tile."""
        if self.axis == 0:
            return [(part, gallery) for part in queries[:, None].split(height)]
        return [(queries, part) for part in gallery[:, None].split(height)]


def nearly(bound: Tensor) -> Tensor:
    """Somewhat less, by more than a product is rounded."""
    return bound - bound.abs() * 2**-19 - 1e-30


class Counter:
    """Counts in the tiles that are made, one after the other, in `product_IJ`: inner products, before normalisation."""

    def __init__(self, product_IJ: Tensor) -> None:
        self._product_IJ = product_IJ
        # A GPU would wait for the number of scores to list, and has its own ways with memory.
        self._lists = not product_IJ.is_cuda
        self._height = min(len(product_IJ), _BAND * torch.get_num_threads()) if self._lists else len(product_IJ)
        self._bands = product_IJ.split(self._height)
        self._score_bJ, self._reached_bJ = (torch.empty_like(self._bands[0]) for _ in range(2))
        self._masks = [np.empty(product_IJ.shape if self._lists else (0, 0), dtype=bool) for _ in range(2)]

    def count(self, asked: Sequence[Asked]) -> None:
        """Counts for the queries of one axis, or of both."""
        listed = [one for one in asked if self._lists and one.listing.is_due()]
        compared = [one for one in asked if one not in listed]
        self._go_through(listed, compared)
        too_many = [one for one in listed if not self._count_listed(one)]
        if too_many:
            self._go_through([], too_many)

    def _go_through(self, listed: Sequence[Asked], compared: Sequence[Asked]) -> None:
        marked = [(one.in_bands(one.nearly_Q, one.norm_G, self._height), self._masks[one.axis]) for one in listed]
        counts = [_Comparison(one, self._height) for one in compared]
        for number, product_bJ in enumerate(self._bands):
            score_bJ, reached_bJ = (x[: len(product_bJ)] for x in (self._score_bJ, self._reached_bJ))
            for bands, mask_IJ in marked:
                above_bJ = torch.addcmul(product_bJ, *bands[number], value=-1, out=score_bJ)
                start = number * self._height
                np.greater_equal(above_bJ.numpy(), 0, out=mask_IJ[start : start + len(product_bJ)])
            for one in counts:
                one.take(number, product_bJ, score_bJ, reached_bJ)
        for one in counts:
            one.add()

    def _count_listed(self, one: Asked) -> bool:
        """Counts the scores that are marked; False where they are too many to be listed."""
        place_c = np.flatnonzero(self._masks[one.axis])
        if len(place_c) > _FEW * len(one.bound_PQ) * self._product_IJ.numel():
            one.listing.failed()
            return False
        width = self._product_IJ.shape[1]
        row_c = place_c // width
        column_c = place_c - row_c * width
        query_c, gallery_c = (row_c, column_c) if one.axis == 0 else (column_c, row_c)
        score_c = self._product_IJ.numpy().reshape(-1)[place_c] * one.inverse_G.numpy()[gallery_c]
        for bound_Q, at_least_Q in zip(one.bound_PQ.numpy(), one.at_least_PQ.numpy(), strict=True):
            if not len(query_c):
                break
            reached_c = score_c >= bound_Q[query_c]
            query_c, score_c = query_c[reached_c], score_c[reached_c]  # bounds ascend
            at_least_Q += np.bincount(query_c, minlength=len(at_least_Q)).astype(np.int32)
        return True


class _Comparison:
    """All scores of a tile with all bounds."""

    def __init__(self, asked: Asked, height: int) -> None:
        self._asked = asked
        self._bands = [asked.in_bands(bound_Q, asked.inverse_G, height) for bound_Q in asked.bound_PQ]
        self._counts: list[list[Tensor]] = [[] for _ in asked.bound_PQ]

    def take(self, number: int, product_bJ: Tensor, score_bJ: Tensor, reached_bJ: Tensor) -> None:
        """A band; the other two are overwritten. The answers are numbers: booleans take several times as long to write
        and to sum."""
        torch.mul(product_bJ, self._bands[0][number][1], out=score_bJ)
        for bands, counts in zip(self._bands, self._counts, strict=True):
            counts.append(torch.ge(score_bJ, bands[number][0], out=reached_bJ).sum(1 - self._asked.axis))

    def add(self) -> None:
        """When all bands are taken."""
        for counts, at_least_Q in zip(self._counts, self._asked.at_least_PQ, strict=True):
            at_least_Q += (torch.cat(counts) if self._asked.axis == 0 else torch.stack(counts).sum(0)).int()
