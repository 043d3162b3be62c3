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


@pytest.mark.parametrize(("lanes", "window"), [(1, 40), (4, 160), (2, 8), (1, 300)])
def test_prefetch_covers_the_window_and_the_next_shards_until_the_epoch_ends(lanes: int, window: int) -> None:
    order = EpochOrder([SourceShare([10] * 50)], seed=1, epoch=0, window=window, batch_size=8, lanes=lanes)
    rows = np.arange(496).reshape(-1, lanes, 8 // lanes)
    for lane in range(lanes):
        positions = rows[:, lane].ravel()
        window_ids = np.array([order.window_ids(np.array([p]))[0] for p in positions.tolist()])
        shards = order.indices(positions) // 10
        assert len(np.unique(window_ids)) == (np.diff(window_ids) != 0).sum() + 1  # each id is one stretch of the epoch
        for window_id in np.unique(window_ids).tolist():
            at = int(np.flatnonzero(window_ids == window_id)[-1])
            needed = set(shards[window_ids == window_id].tolist())
            later = list(dict.fromkeys(shards[at + 1 :].tolist()))  # by their first use
            for ahead in (0, 1, 3, 50):
                found = (order.prefetch_indices(window_id, ahead) // 10).tolist()
                assert needed <= {*found}
                assert len(found) <= len({*found}) + 1 <= window // lanes // 10 + 3 + ahead
                new = [one for one in later if one not in needed]
                assert len({*found} & {*new}) >= min(len(new), ahead) - (window // lanes // 10 + 1 if ahead < 50 else 0)
                if ahead == 50:
                    assert {*new} <= {*found}


def test_nothing_is_prefetched_beyond_the_end_of_the_epoch() -> None:
    order = EpochOrder([SourceShare([10] * 50)], seed=1, epoch=0, window=20, batch_size=10, lanes=1)
    (last,) = order.window_ids(np.array([499]))
    needed = {int(one) // 10 for one in order.indices(np.arange(470, 500))}
    assert {int(one) // 10 for one in order.prefetch_indices(int(last), 20)} <= needed


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
