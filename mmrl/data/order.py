"""The order of an epoch: a pure function of (seed, epoch), found at any position without what came before."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmrl.data import draws


@dataclass(frozen=True)
class Share:
    """How much of an epoch comes from one source of samples."""

    samples_of_shard: Sequence[int]
    repeat: float = 1.0
    """So many times is the source seen in an epoch; 0.5 is another half of it each epoch."""

    @property
    def total(self) -> int:
        """Samples of the source."""
        return sum(self.samples_of_shard)

    @property
    def per_epoch(self) -> int:
        """Samples that it gives to each epoch, one at least."""
        return max(1, round(self.total * self.repeat))


class EpochOrder:
    """The order of one epoch: position -> sample.

    The shards of all sources are permuted, laid end to end and shuffled in windows of `window` samples; the whole is
    then turned by a random start, so that window edges and the tail that fills no batch fall elsewhere each epoch.
    Any position is found at once, which is what makes resuming, and dividing the work otherwise, free.

    Samples are numbered in the order of the sources and their shards (`sample`, 0 … N-1), their places in the epoch
    0 … length-1 (`position`). A source that is seen more than once has its second copies at sample + N, and so on: so
    each appearance has a number, and random draws, of its own.
    """

    def __init__(self, shares: Sequence[Share], seed: int, epoch: int, window: int) -> None:
        total, first, pieces = sum(share.total for share in shares), 0, []
        for number, share in enumerate(shares):
            pieces.append(_pieces(share, first, total, seed, epoch, number))
            first += share.total
        number_of_piece, count_of_piece = np.concatenate(pieces, axis=1)
        order = draws.permutation(len(count_of_piece), seed, epoch, 1)
        self.length = int(count_of_piece.sum())
        self._number_of_piece = number_of_piece[order]
        self._start_of_piece = np.cumsum(count_of_piece[order]) - count_of_piece[order]
        self._turn = int(draws.bits(seed, epoch, 2) % np.uint64(self.length))
        self._window = window
        self._names = (seed, epoch, 3)
        # Batches walk through a window; the ones that straddle an edge need two.
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at these positions, sample + copy * N; positions beyond the end go on at the beginning."""
        places = (positions + self._turn) % self.length
        for window in np.unique(places // self._window):
            inside = places // self._window == window
            first = window * self._window
            places[inside] = first + self._shuffled(int(window))[places[inside] - first]
        return self._number_at(places)

    def window_of(self, position: int) -> int:
        """Which window a position lies in."""
        return (position + self._turn) % self.length // self._window

    def ahead(self, position: int, windows: int) -> np.ndarray:
        """A number in each piece that the window of a position reads, and in each of those that the `windows` after it
        read; beyond the end, those of the beginning."""
        first = self.window_of(position) * self._window
        places = np.array([first, min(first + (1 + windows) * self._window, first + self.length) - 1])
        start, end = np.searchsorted(self._start_of_piece, places % self.length, side="right") - 1
        if places[1] < self.length:
            return self._number_of_piece[start : end + 1]
        return np.concatenate([self._number_of_piece[start:], self._number_of_piece[: min(end + 1, start)]])

    def _number_at(self, places: np.ndarray) -> np.ndarray:
        piece = np.searchsorted(self._start_of_piece, places, side="right") - 1
        return places - self._start_of_piece[piece] + self._number_of_piece[piece]

    def _shuffle(self, window: int) -> np.ndarray:
        length = min(self._window, self.length - window * self._window)
        return draws.permutation(length, *self._names, window)


def _pieces(share: Share, first: int, total: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """What a source gives to an epoch, as runs of neighbouring samples: (number of the first, how many), (2, P).

    The source's shards lie in a circle; each epoch takes the next `per_epoch` samples of it. So every sample comes
    equally often, and with repeat 1 an epoch is each whole shard once.
    """
    counts = np.asarray(share.samples_of_shard, np.int64)
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
