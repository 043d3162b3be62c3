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


def lane_count(batch_size: int, samples: int, window: int, most: int) -> int:
    """The number of lanes: the largest divisor of the global batch size that is at most `most`, such that a lane's
    share of `samples` fills a shuffle window of `window`. A set of up to two windows has one lane."""
    limit = max(1, min(most, samples // window))
    return max(count for count in range(1, limit + 1) if batch_size % count == 0)


class EpochOrder:
    """Maps the positions 0 … length-1 of one epoch to sample indices.

    The shards of all sources are permuted and concatenated, and the sequence is divided into lanes, equal but for one
    sample. Global batch t has the positions t * batch_size … (t + 1) * batch_size - 1, and each lane fills an equal
    number of neighbouring rows of it. So a host that loads some rows of each batch needs the shards of its lanes only.
    A lane's samples are shuffled within windows of window / lanes, and shifted cyclically by a random offset, so that
    window edges and the samples of the incomplete last batch differ per epoch. Any position is computed directly, so
    resuming or another split over workers costs nothing.

    The N samples are numbered in the order of the sources and their shards. With repeat > 1, copy c of a sample in an
    epoch has the index sample + c * N, so that each copy gets its own random numbers.
    """

    def __init__(
        self, shares: Sequence[SourceShare], seed: int, epoch: int, window: int, batch_size: int = 1, lanes: int = 1
    ) -> None:
        """`window` and `batch_size` count samples of all lanes; `lanes` divides `batch_size`."""
        self.epoch = epoch
        total, first, runs = sum(share.total for share in shares), 0, []
        for source, share in enumerate(shares):
            runs.append(_runs_of_source(share, first, total, seed, epoch, source))
            first += share.total
        index_of_run, length_of_run = np.concatenate(runs, axis=1)
        order = draws.permutation(len(length_of_run), seed, epoch, 1)
        self.length = int(length_of_run.sum())
        self._index_of_run, self._total = index_of_run[order], total
        self._start_of_run = np.cumsum(length_of_run[order]) - length_of_run[order]
        self._batch_size, self._rows_of_lane = batch_size, batch_size // lanes
        edges = np.arange(lanes + 1) * self.length // lanes
        self._start_of_lane, self._length_of_lane = edges[:-1], np.diff(edges)
        # With one lane, the keys of random numbers are those from before there were lanes.
        self._lane_key = np.arange(lanes)[:, None] if lanes > 1 else np.empty((1, 0), np.int64)
        self._offset = draws.bits(seed, epoch, 2, *self._lane_key.T) % self._length_of_lane.astype(np.uint64)
        self._offset = np.broadcast_to(self._offset, lanes).astype(np.int64)
        self._window = max(1, window // lanes)
        self._windows_per_lane = -(-int(self._length_of_lane.max()) // self._window)
        self._window_key = (seed, epoch, 3)
        # Batches move through one window of each lane at a time; those across an edge need two.
        self._permutation = lru_cache(maxsize=4 * lanes)(self._permute)
        self.lane_samples = lru_cache(maxsize=lanes)(self._lane_samples)
        """Lane -> for each of the N samples, whether this lane reads it in this epoch; bool (N,)."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The indices sample + copy * N at these positions; positions beyond the end wrap around in their lanes."""
        lane, shifted = self._shifted(positions)
        shuffled = shifted % self._length_of_lane[lane]
        window_id = lane * self._windows_per_lane + shuffled // self._window
        for one in np.unique(window_id):
            inside = window_id == one
            first = one % self._windows_per_lane * self._window
            shuffled[inside] = first + self._permutation(int(one))[shuffled[inside] - first]
        shuffled += self._start_of_lane[lane]
        run = self._run_at(shuffled)
        return shuffled - self._start_of_run[run] + self._index_of_run[run]

    def lane_of(self, position: int) -> int:
        """The lane that fills this position."""
        return position % self._batch_size // self._rows_of_lane

    def window_ids(self, positions: np.ndarray) -> np.ndarray:
        """The ids of the shuffle windows that these positions of the epoch are in, each once. The window in which a
        lane begins is also its last one, under another id."""
        lane, shifted = self._shifted(positions)
        rounds, shuffled = np.divmod(shifted, self._length_of_lane[lane])
        return np.unique((2 * lane + rounds) * self._windows_per_lane + shuffled // self._window)

    def prefetch_indices(self, window_id: int, ahead: int) -> np.ndarray:
        """One index per run of neighbouring samples that its lane reads in this shuffle window, and per run that it
        reads next in this epoch, up to `ahead` of them."""
        lane_and_round, window = divmod(window_id, self._windows_per_lane)
        lane, rounds = divmod(lane_and_round, 2)
        start_of_lane, length = int(self._start_of_lane[lane]), int(self._length_of_lane[lane])
        first_run, last_run = self._run_at(start_of_lane + np.array([0, length - 1])).tolist()
        runs = last_run - first_run + 1

        def run_of(shifted: int) -> int:
            """The run of a position that is not wrapped at the lane's end; later rounds count on."""
            return shifted // length * runs + int(self._run_at(np.array(start_of_lane + shifted % length))) - first_run

        def last_run_of_window(shifted: int) -> int:
            """The last run of the window that this position is in."""
            end = min((shifted % length // self._window + 1) * self._window, length)
            return run_of(shifted // length * length + end - 1)

        start = rounds * length + window * self._window
        last_of_epoch = last_run_of_window(int(self._offset[lane]) + length - 1)
        count = min(last_run_of_window(start) + ahead, last_of_epoch) - run_of(start) + 1
        return self._index_of_run[first_run + (run_of(start) + np.arange(min(count, runs))) % runs]

    def _shifted(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(lane, position in it after the cyclic shift) of these positions, not wrapped at the lane's end."""
        batch, row = np.divmod(positions, self._batch_size)
        lane, row_of_lane = np.divmod(row, self._rows_of_lane)
        return lane, batch * self._rows_of_lane + row_of_lane + self._offset[lane]

    def _run_at(self, positions: np.ndarray) -> np.ndarray:
        """The runs that these positions of the concatenated shards are in."""
        return np.searchsorted(self._start_of_run, positions, side="right") - 1

    def _lane_samples(self, lane: int) -> np.ndarray:
        first = self._start_of_lane[lane]
        end, is_in_lane_N = first + self._length_of_lane[lane], np.zeros(self._total, bool)
        first_run, last_run = self._run_at(np.array([first, end - 1]))
        starts = np.append(self._start_of_run, self.length)
        for run in range(first_run, last_run + 1):
            begin, stop = max(starts[run], first), min(starts[run + 1], end)
            sample = self._index_of_run[run] % self._total + begin - starts[run]
            is_in_lane_N[sample : sample + stop - begin] = True
        return is_in_lane_N

    def _permute(self, window_id: int) -> np.ndarray:
        lane, window = divmod(window_id, self._windows_per_lane)
        length = min(self._window, int(self._length_of_lane[lane]) - window * self._window)
        return draws.permutation(length, *self._window_key, *self._lane_key[lane].tolist(), window)


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
