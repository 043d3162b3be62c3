from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.data import draws
from mmrl.data.order import EpochOrder, SourceShare, lane_count


def indices(shares: list[SourceShare], epoch: int = 0, window: int = 16) -> np.ndarray:
    order = EpochOrder(shares, seed=5, epoch=epoch, window=window)
    return order.indices(np.arange(order.length))


@pytest.mark.parametrize("counts", [[7], [5, 1, 30], [100] * 20])
@pytest.mark.parametrize("window", [1, 16, 10_000])
def test_each_epoch_is_a_different_permutation_of_all_samples(counts: list[int], window: int) -> None:
    everywhere = np.arange(sum(counts))
    epochs = [indices([SourceShare(counts)], epoch, window) for epoch in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == everywhere.tolist()
    assert epochs[0].tolist() != epochs[1].tolist() != epochs[2].tolist()
    # Random access to any positions, also beyond the end.
    again = EpochOrder([SourceShare(counts)], seed=5, epoch=1, window=window)
    assert again.indices(everywhere[3:6]).tolist() == epochs[1][3:6].tolist()
    assert again.indices(everywhere[:2] + sum(counts)).tolist() == epochs[1][:2].tolist()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([0.1, 0.5, 1, 1.7, 3])),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 60),
)
def test_all_samples_of_a_source_are_seen_equally_often(sources: list[tuple[list[int], float]], window: int) -> None:
    shares = [SourceShare(counts, repeat) for counts, repeat in sources]
    total = sum(share.total for share in shares)
    seen: Counter[int] = Counter()
    epochs = 10
    for epoch in range(epochs):
        order = indices(shares, epoch, window)
        assert len(set(order.tolist())) == len(order)  # copies of a sample have different indices
        seen.update((order % total).tolist())
    first = 0
    for share in shares:
        times = [seen[sample] for sample in range(first, first + share.total)]
        assert sum(times) == epochs * share.per_epoch
        assert max(times) - min(times) <= 1
        first += share.total


def test_with_repeat_one_half_two_epochs_are_one_pass() -> None:
    first, second = (set(indices([SourceShare([30, 10], 0.5)], epoch).tolist()) for epoch in range(2))
    assert len(first) == len(second) == 20
    assert not first & second


@pytest.mark.parametrize("lanes", [1, 4])
def test_prefetch_indices_cover_the_shards_of_the_next_windows(lanes: int) -> None:
    order = EpochOrder([SourceShare([10] * 50)], seed=1, epoch=0, window=40 * lanes, batch_size=8, lanes=lanes)
    per_lane = 500 // lanes
    for window in order.window_ids(np.arange(0, 496, 5)).tolist():
        for ahead in (0, 1, 2, 50):
            lane, number = divmod(window, -(-per_lane // 40))
            found = order.prefetch_indices(window, ahead)
            windows = {lane * -(-per_lane // 40) + (number + i) % -(-per_lane // 40) for i in range(ahead + 1)}
            positions = [p for p in range(500) if order.window_ids(np.array([p]))[0] in windows]
            needed = {int(index) // 10 for index in order.indices(np.array(positions))}
            assert needed <= {int(index) // 10 for index in found}
            assert len(found) <= min(5 * (ahead + 1) + 2, per_lane // 10 + 2)


def test_at_least_one_shard_per_lane_is_prefetched_ahead_of_a_small_window() -> None:
    order = EpochOrder([SourceShare([100] * 20)], seed=1, epoch=0, window=8, batch_size=8, lanes=2)
    for window in order.window_ids(np.arange(2000)).tolist():
        assert len(order.prefetch_indices(window, 0)) in (1, 2)  # a window may lie across the edge of two shards
        assert len(order.prefetch_indices(window, 1)) in (2, 3)


@pytest.mark.parametrize(("counts", "batch_size", "lanes"), [
    ([900], 32, 8), ([50] * 4, 96, 2), ([3, 40, 7, 250], 96, 32), ([11] * 65, 32, 32), ([11] * 65, 96, 48),
])  # fmt: skip
def test_lanes_divide_an_epoch_equally(counts: list[int], batch_size: int, lanes: int) -> None:
    seen = set[int]()
    for epoch in range(12):
        order = EpochOrder([SourceShare(counts)], 3, epoch, 64, batch_size, lanes)
        batches = order.length // batch_size
        indices = order.indices(np.arange(batches * batch_size)).reshape(batches, lanes, -1)
        assert len(np.unique(indices)) == indices.size  # each sample once; fewer than one batch is left out
        assert order.length - indices.size < batch_size
        # A lane reads neighbouring shards only: the lanes cut the sequence of shards in no more than lanes - 1 places.
        shard_of = np.repeat(np.arange(len(counts)), counts)
        assert sum(len(np.unique(shard_of[indices[:, lane]])) for lane in range(lanes)) <= len(counts) + lanes - 1
        seen.update(indices.ravel().tolist())
    assert len(seen) == sum(counts)  # other samples are left out in each epoch


@pytest.mark.parametrize(("shards", "hosts", "batch_size"), [(65, 3, 96), (160, 16, 1536), (320, 16, 1024)])
def test_hosts_read_about_each_shard_once(shards: int, hosts: int, batch_size: int) -> None:
    rows = np.arange(shards * 100 // batch_size * batch_size).reshape(-1, hosts, batch_size // hosts)

    def shards_read(lanes: int) -> int:
        order = EpochOrder([SourceShare([100] * shards)], 1, 2, 256, batch_size, lanes)
        return sum(len(np.unique(order.indices(rows[:, host].ravel()) // 100)) for host in range(hosts))

    lanes = lane_count(batch_size, shards * 100, 256, 64)
    assert shards_read(lanes) <= min(shards * (lanes + hosts - 1) / lanes, shards + hosts - 1)
    assert shards_read(1) > 2 * shards


def test_the_number_of_lanes_divides_the_batch_and_fits_the_set() -> None:
    assert lane_count(96, 10**6, 1000, 64) == 48
    assert lane_count(32, 10**6, 1000, 64) == 32
    assert lane_count(4096, 20_000, 1000, 64) == 16  # 20 windows
    assert lane_count(4096, 1999, 1000, 64) == 1
    assert lane_count(97, 10**6, 1000, 64) == 1


def test_hundreds_of_millions_of_samples_have_their_order_at_once() -> None:
    shares = [SourceShare([10_000] * 40_000)]
    lanes = lane_count(32_768, 400_000_000, 16 * 32_768, 64)
    indices = EpochOrder(shares, 0, 0, 16 * 32_768, 32_768, lanes).indices(np.arange(32_768))
    assert lanes == 64
    assert len(np.unique(indices)) == 32_768
    assert 64 <= len(np.unique(indices // 10_000)) <= 2 * 64


def test_uniform_is_uniform_and_depends_only_on_the_key() -> None:
    numbers = draws.uniform(1, 2, np.arange(20_000))
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.histogram(numbers, 10)[0] / 2000 - 1).max() < 0.1
    assert draws.uniform(1, 2, np.array([77]))[0] == numbers[77]
    assert draws.uniform(1, 3, 77) != numbers[77]
    assert sorted(draws.permutation(50, 9).tolist()) == list(range(50))
