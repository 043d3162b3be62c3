from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.data import draws
from mmrl.data.order import EpochOrder, SourceShare


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


def test_prefetch_indices_cover_the_shards_of_the_next_windows() -> None:
    counts = [10] * 50
    order = EpochOrder([SourceShare(counts)], seed=1, epoch=0, window=40)
    for position in (0, 100, 333):
        for windows in (0, 1, 4):
            ahead = {int(index) // 10 for index in order.prefetch_indices(position, windows)}
            following = range(position, position + order.length)
            inside = [p for p in following if (order.window_of(p) - order.window_of(position)) % 13 <= windows]
            needed = {int(index) // 10 for index in order.indices(np.array(inside))}
            assert needed <= ahead
            assert len(ahead) <= 4 * (windows + 1) + 2


def test_uniform_is_uniform_and_depends_only_on_the_key() -> None:
    numbers = draws.uniform(1, 2, np.arange(20_000))
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.histogram(numbers, 10)[0] / 2000 - 1).max() < 0.1
    assert draws.uniform(1, 2, np.array([77]))[0] == numbers[77]
    assert draws.uniform(1, 3, 77) != numbers[77]
    assert sorted(draws.permutation(50, 9).tolist()) == list(range(50))
