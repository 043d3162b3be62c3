"""The sample order of an epoch: a pure function of (seed, epoch), with random access to any position."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmrl.data import draws


@dataclass(frozen=True)
class SourceShare:
    """How many samples of each epoch come from one source."""

    samples_per_shard: Sequence[int]
    repeat: float = 1.0
    """Passes over the source per epoch; with 0.5, two epochs together are one pass."""

    @property
    def total(self) -> int:
        """Samples of the source."""
        return sum(self.samples_per_shard)

    @property
    def per_epoch(self) -> int:
        """Samples per epoch, at least one."""
        return max(1, round(self.total * self.repeat))


class EpochOrder:
    """Maps the positions 0 … length-1 of one epoch to sample indices.

    The shards of all sources are permuted and concatenated, and samples are shuffled within windows of `window`. The
    result is shifted cyclically by a random offset, so that window edges and the incomplete last batch differ per
    epoch. Any position is computed directly, so resuming or another split over workers costs nothing.

    The N samples are numbered in the order of the sources and their shards. With repeat > 1, copy c of a sample in an
    epoch has the index sample + c * N, so that each copy gets its own random numbers.
    """

    def __init__(self, shares: Sequence[SourceShare], seed: int, epoch: int, window: int) -> None:
        total, first, runs = sum(share.total for share in shares), 0, []
        for source, share in enumerate(shares):
            runs.append(_runs_of_source(share, first, total, seed, epoch, source))
            first += share.total
        index_of_run, length_of_run = np.concatenate(runs, axis=1)
        order = draws.permutation(len(length_of_run), seed, epoch, 1)
        self.length = int(length_of_run.sum())
        self._index_of_run = index_of_run[order]
        self._start_of_run = np.cumsum(length_of_run[order]) - length_of_run[order]
        self._offset = int(draws.bits(seed, epoch, 2) % np.uint64(self.length))
        self._window = window
        self._window_key = (seed, epoch, 3)
        # Batches move through one window at a time; those across an edge need two.
        self._permutation = lru_cache(maxsize=4)(self._permute)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The indices sample + copy * N at these positions; positions beyond the end wrap around."""
        shuffled = (positions + self._offset) % self.length
        for window in np.unique(shuffled // self._window):
            inside = shuffled // self._window == window
            first = window * self._window
            shuffled[inside] = first + self._permutation(int(window))[shuffled[inside] - first]
        run = np.searchsorted(self._start_of_run, shuffled, side="right") - 1
        return shuffled - self._start_of_run[run] + self._index_of_run[run]

    def window_of(self, position: int) -> int:
        """The shuffle window that a position is in."""
        return (position + self._offset) % self.length // self._window

    def prefetch_indices(self, position: int, windows: int) -> np.ndarray:
        """One index per run of neighbouring samples that is read in the window of `position` and in the `windows` after
        it; windows beyond the end wrap around."""
        first = self.window_of(position) * self._window
        ends = np.array([first, min(first + (1 + windows) * self._window, first + self.length) - 1])
        start, end = np.searchsorted(self._start_of_run, ends % self.length, side="right") - 1
        if ends[1] < self.length:
            return self._index_of_run[start : end + 1]
        return np.concatenate([self._index_of_run[start:], self._index_of_run[: min(end + 1, start)]])

    def _permute(self, window: int) -> np.ndarray:
        length = min(self._window, self.length - window * self._window)
        return draws.permutation(length, *self._window_key, window)


def _runs_of_source(share: SourceShare, first: int, total: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """The R runs of neighbouring samples that an epoch takes from a source: (index of the first, length), (2, R).

    The source's shards form a circle in a fixed random order, and each epoch takes its next `per_epoch` samples. So
    all samples are seen equally often, and with repeat 1 an epoch is each whole shard once.
    """
    counts = np.asarray(share.samples_per_shard, np.int64)
    layout = draws.permutation(len(counts), seed, 4, source)
    first_of_shard = (np.cumsum(counts) - counts + first)[layout]
    end_of_shard = np.cumsum(counts[layout])
    size, wanted = share.total, share.per_epoch
    start = epoch * wanted % size
    rounds = np.arange((start + wanted - 1) // size + 1)[:, None]
    edges = np.concatenate([(rounds * size + end_of_shard).ravel(), start + np.arange(0, wanted, size)])
    begins = np.unique(edges[(edges >= start) & (edges < start + wanted)])
    ends = np.append(begins[1:], start + wanted)
    shard = np.searchsorted(end_of_shard, begins % size, side="right")
    within = begins % size - (end_of_shard - counts[layout])[shard]
    copy = (begins - start) // size
    return np.stack([first_of_shard[shard] + within + copy * total, ends - begins])
