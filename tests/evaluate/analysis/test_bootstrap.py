"""Intervals against their formulas and against how often they hold; paired tests against scipy's."""

import numpy as np
import pytest
import scipy.stats
import torch

from mmrl.evaluate.analysis import bootstrap
from mmrl.evaluate.analysis.bootstrap import Bootstrap, Interval


def test_the_interval_of_a_mean_is_about_the_normal_one() -> None:
    value_Q = (torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    (interval,) = Bootstrap(torch.arange(4000)).intervals(value_Q[:, None])
    share = float(value_Q.mean())
    half = 1.96 * (share * (1 - share) / 4000) ** 0.5
    assert interval.value == pytest.approx(share)
    assert interval.low == pytest.approx(share - half, abs=half / 10)
    assert interval.high == pytest.approx(share + half, abs=half / 10)


def test_intervals_cover_the_true_value_at_about_their_level() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        # 150 items of 1 to 4 queries, whose queries mostly share their item's fate: independent draws would be wrong.
        item_Q = np.repeat(np.arange(150), rng.integers(1, 5, 150))
        fate = rng.random(150) < 0.4
        value_Q = np.where(rng.random(len(item_Q)) < 0.9, fate[item_Q], rng.random(len(item_Q)) < 0.4)
        (interval,) = Bootstrap(torch.from_numpy(item_Q), 400, trial).intervals(torch.from_numpy(value_Q)[:, None])
        held += interval.low <= 0.4 <= interval.high
    assert 0.89 <= held / 200 <= 0.985


def test_items_are_resampled_whole() -> None:
    hits = torch.arange(300) % 3 == 0
    alone = Bootstrap(torch.arange(300)).intervals(hits[:, None])[0]
    fourfold = Bootstrap(torch.arange(300).repeat_interleave(4)).intervals(hits.repeat_interleave(4)[:, None])[0]
    assert fourfold.low == pytest.approx(alone.low, abs=0.005)
    assert fourfold.high == pytest.approx(alone.high, abs=0.005)


def test_merging_very_many_items_does_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    value_Q = (torch.rand(30_000, generator=torch.Generator().manual_seed(3)) < 0.2).double()
    few = Bootstrap(torch.arange(30_000)).intervals(value_Q[:, None])[0]
    monkeypatch.setattr(bootstrap, "_MAX_CLUSTERS", 30_000)
    all_of_them = Bootstrap(torch.arange(30_000), resamples=500).intervals(value_Q[:, None])[0]
    assert few.value == all_of_them.value
    assert few.high - few.low == pytest.approx(all_of_them.high - all_of_them.low, rel=0.15)


def test_without_a_difference_the_binomial_bound_holds() -> None:
    bootstrap = Bootstrap(torch.arange(50))
    exact = scipy.stats.binomtest(50, 50).proportion_ci(0.95, method="exact")
    all_hit = bootstrap.intervals(torch.ones(50, 1))[0]
    assert all_hit == Interval(1.0, pytest.approx(exact.low), 1.0)  # pyright: ignore[reportArgumentType]
    same = bootstrap.difference(torch.ones(50), torch.ones(50))
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(exact.low - 1), pytest.approx(1 - exact.low))
    one = Bootstrap(torch.zeros(4)).intervals(torch.tensor([[0.0], [1], [1], [1]]))[0]
    assert one.value == 0.75


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    rng = torch.Generator().manual_seed(4)
    a_Q = (torch.rand(2000, generator=rng) < 0.6).double()
    b_Q = torch.where(torch.rand(2000, generator=rng) < 0.02, 0.0, a_Q)
    bootstrap = Bootstrap(torch.arange(2000))
    drop, share = bootstrap.difference(a_Q, b_Q), bootstrap.difference(a_Q, b_Q, relative=True)
    expected = 1.96 * float((a_Q - b_Q).std()) / 2000**0.5
    assert drop.value == pytest.approx(float(a_Q.mean() - b_Q.mean()))
    assert drop.high - drop.value == pytest.approx(expected, rel=0.15)
    assert share.value == pytest.approx(drop.value / float(a_Q.mean()))
    wide = bootstrap.intervals(a_Q[:, None])[0]
    assert drop.high - drop.low < (wide.high - wide.low) / 3


@pytest.mark.parametrize(("better", "worse"), [(7, 1), (6, 0), (3, 3), (40, 15), (30, 25)])
def test_the_paired_test_is_mcnemars(better: int, worse: int) -> None:
    a_Q = torch.cat([torch.ones(better), torch.zeros(worse), torch.ones(100)])
    b_Q = torch.cat([torch.zeros(better), torch.ones(worse), torch.ones(100)])
    exact = scipy.stats.binomtest(better, better + worse).pvalue
    bootstrap = Bootstrap(torch.arange(len(a_Q)), resamples=10_000)
    assert bootstrap.paired_p(a_Q, b_Q) == pytest.approx(exact, abs=1e-9 if better + worse <= 12 else 0.015)
    assert bootstrap.paired_p(a_Q, a_Q) == 1.0


def test_the_paired_test_is_scipys_on_means_of_items() -> None:
    rng = np.random.default_rng(5)
    item_Q = np.repeat(np.arange(10), 3)
    a_Q, b_Q = rng.normal(0.2, 1, 30), rng.normal(0, 1, 30)
    sums = np.array([(a_Q - b_Q)[item_Q == item].sum() for item in range(10)])
    exact = scipy.stats.permutation_test(
        (sums,), np.sum, permutation_type="samples", n_resamples=5000, alternative="two-sided"
    ).pvalue
    got = Bootstrap(torch.from_numpy(item_Q)).paired_p(torch.from_numpy(a_Q), torch.from_numpy(b_Q))
    assert got == pytest.approx(exact, abs=2e-3)


def test_equal_seeds_give_equal_intervals() -> None:
    value_QS = torch.rand(100, 3, generator=torch.Generator().manual_seed(6))
    assert Bootstrap(torch.arange(100)).intervals(value_QS) == Bootstrap(torch.arange(100)).intervals(value_QS)
