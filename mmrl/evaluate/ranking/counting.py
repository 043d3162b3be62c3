"""Counts how many scores of a tile reach each query's thresholds.

Two exact methods, with equal counts. Listing: all scores are compared with a value slightly below their query's lowest
threshold; if few reach it, these are listed (one list for both directions) and compared one by one. Otherwise all
scores are compared with all thresholds.

Shapes: I rows and J columns of a tile; Q queries (one axis) and G gallery rows (the other axis); P thresholds per
query; c listed scores, w words of eight scores.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Scores are listed if at most this fraction of the tile, per threshold, reaches the lowest threshold.
_MAX_LISTED = 0.008
# After a failed attempt, this many tiles are counted without trying to list.
_BACKOFF_TILES = 15


class ListingBackoff:
    """Decides whether to try listing: not for `_BACKOFF_TILES` tiles after a failed attempt."""

    def __init__(self) -> None:
        self._wait = 0

    def should_try(self) -> bool:
        """Call once per tile."""
        self._wait -= 1
        return self._wait < 0

    def failed(self) -> None:
        """Call when too many scores reached the lowest threshold."""
        self._wait = _BACKOFF_TILES


@dataclass(frozen=True, eq=False)
class TileQueries:
    """The queries along one axis of a tile: their thresholds and their counts."""

    axis: int
    threshold_PQ: Tensor
    """Ascending scores: inner products divided by the gallery row's norm. (The query's norm does not change the
    order.)"""
    below_Q: Tensor
    """`slightly_below` the lowest threshold."""
    norm_G: Tensor
    inverse_G: Tensor
    at_least_PQ: Tensor
    """int32; the counts are added in place."""
    lock: threading.Lock
    """Held while adding: other threads count other tiles for the same queries."""
    backoff: ListingBackoff

    def broadcast(self, queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the axis that makes a value per query and a value per gallery row broadcast over the tile."""
        return (queries[:, None], gallery) if self.axis == 0 else (queries, gallery[:, None])


def slightly_below(threshold: Tensor) -> Tensor:
    """A smaller value, by more than the rounding error of a product."""
    return threshold - threshold.abs() * 2**-19 - 1e-30


class Counter:
    """Counts in tiles that are computed one after the other into `product_IJ`: inner products before normalisation."""

    def __init__(self, product_IJ: Tensor) -> None:
        self._product_IJ = product_IJ
        self._score_IJ, self._reached_IJ = torch.empty_like(product_IJ), torch.empty_like(product_IJ)
        # CPU only: a GPU would have to synchronise to learn how many scores to list.
        self._can_list = not product_IJ.is_cuda
        self._masks = [np.empty(product_IJ.shape if self._can_list else (0, 0), dtype=bool) for _ in range(2)]

    def count(self, sides: Sequence[TileQueries]) -> None:
        """Counts for the queries of one axis, or of both."""
        to_list = [side for side in sides if self._can_list and side.backoff.should_try()]
        to_compare = [side for side in sides if side not in to_list]
        if to_list:
            to_compare += self._count_by_listing(to_list)
        for side in to_compare:
            self._count_by_comparing(side)

    def _count_by_listing(self, sides: Sequence[TileQueries]) -> list[TileQueries]:
        """Returns those that were not counted because too many scores reach their lowest threshold."""
        masks = dict(zip(sides, self._masks, strict=False))
        for side, mask_IJ in masks.items():
            queries, gallery = side.broadcast(side.below_Q, side.norm_G)
            above_IJ = torch.addcmul(self._product_IJ, queries, gallery, value=-1, out=self._score_IJ)
            np.greater_equal(above_IJ.numpy(), 0, out=mask_IJ)
        limits = {side: int(_MAX_LISTED * len(side.threshold_PQ) * self._product_IJ.numel()) for side in sides}
        too_many = [side for side, mask_IJ in masks.items() if np.count_nonzero(mask_IJ) > limits[side]]
        for side in too_many:
            side.backoff.failed()
            del masks[side]
        if masks:
            first, *second = (mask_IJ.reshape(-1).view(np.uint64) for mask_IJ in masks.values())
            for other in second:
                first |= other
            index_c = _true_indices(first)
            score_c = self._product_IJ.numpy().reshape(-1)[index_c]
            row_c, column_c = np.divmod(index_c, self._product_IJ.shape[1])
            for side in masks:
                _count_listed(side, score_c, row_c, column_c)
        return too_many

    def _count_by_comparing(self, side: TileQueries) -> None:
        """Compares all scores with all thresholds. Results are floats: booleans take several times as long to write and
        sum."""
        score_IJ = torch.mul(self._product_IJ, side.broadcast(side.inverse_G, side.inverse_G)[1], out=self._score_IJ)
        for threshold_Q, at_least_Q in zip(side.threshold_PQ, side.at_least_PQ, strict=True):
            reached_IJ = torch.ge(score_IJ, side.broadcast(threshold_Q, threshold_Q)[0], out=self._reached_IJ)
            count_Q = reached_IJ.sum(1 - side.axis).int()
            with side.lock:
                at_least_Q += count_Q


def _true_indices(word_w: np.ndarray) -> np.ndarray:
    """Indices of the true values, ascending, of booleans packed eight to a word. Fast where most words are zero."""
    nonzero_w = np.flatnonzero(word_w != 0)
    index_c = np.flatnonzero(word_w[nonzero_w].view(bool))
    return nonzero_w[index_c >> 3] * 8 + (index_c & 7)


def _count_listed(side: TileQueries, product_c: np.ndarray, row_c: np.ndarray, column_c: np.ndarray) -> None:
    """Compares the listed scores with the thresholds. Scores listed only for the other axis reach none of them."""
    query_c, gallery_c = (row_c, column_c) if side.axis == 0 else (column_c, row_c)
    score_c = product_c * side.inverse_G.numpy()[gallery_c]
    for threshold_Q, at_least_Q in zip(side.threshold_PQ.numpy(), side.at_least_PQ.numpy(), strict=True):
        reached_c = score_c >= threshold_Q[query_c]
        query_c, score_c = query_c[reached_c], score_c[reached_c]  # thresholds ascend
        count_Q = np.bincount(query_c, minlength=len(at_least_Q)).astype(np.int32)
        with side.lock:
            at_least_Q += count_Q
