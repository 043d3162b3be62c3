"""Baselines against scikit-learn's PCA and plain formulas; what blocks of dims add, where it is known."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.decomposition import PCA

from mmrl.evaluate.analysis import baselines, blocks
from mmrl.evaluate.analysis.baselines import baseline_ranks
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.nesting import truncate


def make_task(items: int = 150, useful: int = 6, dim: int = 16, seed: int = 0) -> Task:
    """Two queries per item; the first `useful` dims are shared by an item's rows, the rest is noise."""
    rng = torch.Generator().manual_seed(seed)
    group_G = torch.arange(items)
    gallery_GD, query_QD = torch.randn(items, dim, generator=rng), torch.randn(2 * items, dim, generator=rng)
    group_Q = group_G.repeat_interleave(2)
    query_QD[:, :useful] = gallery_GD[group_Q, :useful] + 0.3 * torch.randn(2 * items, useful, generator=rng)
    return Task("text_to_image", query_QD, gallery_GD, group_Q, group_G)


def hit_rate(draws: list[torch.Tensor], k: int = 5) -> float:
    return float(torch.stack([(rank_Q <= k).double() for rank_Q in draws]).mean())


def test_halves_are_of_items_and_about_equal() -> None:
    task = make_task(items=1000)
    assert torch.equal(task.half_Q, task.half_G[task.query_group_Q])
    assert 0.45 < task.half_G.double().mean() < 0.55


def test_pca_is_scikit_learns_fitted_on_the_other_half() -> None:
    task = make_task()
    got = baselines.pca_ranks(task, [3, 8])
    x, y = truncate(task.query_QD, 16).double(), truncate(task.gallery_GD, 16).double()
    for half in (True, False):
        fit_x, fit_y = x[task.half_Q != half], y[task.half_G != half]
        mean_x, mean_y = fit_x.mean(0), fit_y.mean(0)
        # Both sides weigh alike, though there are twice as many queries.
        both = torch.cat([(fit_x - mean_x) / len(fit_x) ** 0.5, (fit_y - mean_y) / len(fit_y) ** 0.5])
        axes = np.asarray(PCA(n_components=8).fit(torch.cat([both, -both]).numpy()).components_).T
        scored = torch.eq(task.half_Q, half).nonzero()[:, 0]
        expected = rank_queries(
            torch.from_numpy((x[scored] - mean_x).numpy() @ axes),
            torch.from_numpy((y - mean_y).numpy() @ axes),
            task.query_group_Q[scored],
            task.gallery_group_G,
            [3, 8],
        )
        for dim in (3, 8):
            assert torch.equal(got[dim][0][scored], expected[dim].rank_Q)


def test_best_dims_beat_random_dims_where_few_dims_are_useful() -> None:
    shuffled = torch.randperm(16, generator=torch.Generator().manual_seed(9))
    task = make_task()
    task = task.with_vectors(task.query_QD[:, shuffled], task.gallery_GD[:, shuffled])
    everything = torch.ones(300, dtype=torch.bool), torch.ones(150, dtype=torch.bool)
    best = baselines.dim_signal(task, *everything).argsort(descending=True)[:6]
    assert set(best.tolist()) == set((shuffled < 6).nonzero()[:, 0].tolist())
    ranks = baseline_ranks(task, [6, 16])
    assert hit_rate(ranks["best_dims"][6]) > hit_rate(ranks["random_dims"][6]) + 0.2
    assert len(ranks["random_dims"][6]) == 3
    plain = rank_queries(task.query_QD, task.gallery_GD, task.query_group_Q, task.gallery_group_G, [16])[16]
    assert hit_rate(ranks["random_dims"][16]) == pytest.approx(hit_rate([plain.rank_Q]), abs=0.01)


def test_dim_signal_equals_its_formula() -> None:
    task = make_task(items=40)
    everything = torch.ones(80, dtype=torch.bool), torch.ones(40, dtype=torch.bool)
    x, y = truncate(task.query_QD, 16).double().numpy(), truncate(task.gallery_GD, 16).double().numpy()
    for d, got in enumerate(baselines.dim_signal(task, *everything).tolist()):
        every = np.array([[a * b for b in y[:, d]] for a in x[:, d]])
        right = np.array([x[q, d] * y[int(task.query_group_Q[q]), d] for q in range(80)])
        assert got == pytest.approx((right.mean() - every.mean()) / every.std(), rel=1e-6)


def test_best_dims_of_pure_noise_score_at_chance() -> None:
    """Fitted and scored on the same queries, some dims of pure noise would look good."""
    task = make_task(items=200, useful=0, dim=64)
    assert hit_rate(baseline_ranks(task, [4])["best_dims"][4]) < 5 / 200 + 0.03


def test_a_single_item_has_baselines_too() -> None:
    task = Task("x", torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3).long(), torch.zeros(5).long())
    assert hit_rate(baseline_ranks(task, [2])["pca"][2]) == 1.0


def test_effective_rank_counts_equal_directions() -> None:
    rows = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1)).double()
    assert blocks.covariance_effective_rank(rows) == pytest.approx(5, abs=0.05)
    assert blocks.covariance_effective_rank(rows[:, :1].repeat(1, 5)) == pytest.approx(1)
    assert blocks.covariance_effective_rank(torch.ones(10, 3)) == 1.0
    uneven = rows * torch.tensor([3.0, 1, 1, 1, 0])
    share = np.linalg.eigvalsh(np.cov(uneven.numpy().T))
    assert blocks.covariance_effective_rank(uneven) == pytest.approx(
        math.exp(scipy.stats.entropy(np.clip(share, 0, None))), rel=1e-6
    )


def test_blocks_add_up_to_the_recall_of_the_full_vector() -> None:
    task = make_task()
    ranked = rank_queries(task.query_QD, task.gallery_GD, task.query_group_Q, task.gallery_group_G, [4, 8, 16])
    rank_of = {dim: one.rank_Q for dim, one in ranked.items()}
    found = blocks.block_scores(task, rank_of, Bootstrap(task.query_group_Q), k=5)
    assert [(one["from"], one["to"]) for one in found] == [(0, 4), (4, 8), (8, 16)]
    assert sum(one["adds"]["value"] for one in found) == pytest.approx(hit_rate([rank_of[16]]))
    assert found[0]["alone"] == pytest.approx(hit_rate([rank_of[4]]))
    assert sum(one["energy_gallery"] for one in found) == pytest.approx(1)
    without = rank_queries(task.query_QD[:, :8], task.gallery_GD[:, :8], task.query_group_Q, task.gallery_group_G, [8])[
        8
    ]
    lost = hit_rate([rank_of[16]]) - hit_rate([without.rank_Q])
    assert found[2]["lost_without"]["value"] == pytest.approx(lost, abs=1e-2)  # of the full vector's own numbers
    assert found[0]["adds_p"] < 0.01


def test_noise_dims_can_be_dropped() -> None:
    task = make_task()
    task = task.with_vectors(
        torch.cat([task.query_QD, torch.zeros(300, 2)], 1), torch.cat([task.gallery_GD, torch.zeros(150, 2)], 1)
    )
    found = blocks.droppable_dims(task, 18, Bootstrap(task.query_group_Q), max_loss=0.01, k=5)
    assert found["dead"] == [16, 17]
    assert set(found["dims"]) >= set(range(6, 18))  # without the noise the full recall is reached by fewer than six
    assert len(found["dims"]) == found["droppable"]
    assert found["curve"][-1]["kept"] == 18


def test_found_from_is_the_dim_from_which_on_a_query_always_hits() -> None:
    rank_of = {
        2: torch.tensor([1, 20, 1, 30, 1]),
        4: torch.tensor([1, 5, 20, 30, 1]),
        8: torch.tensor([1, 5, 9, 30, 20]),
    }
    assert blocks.found_from(rank_of).tolist() == [2, 4, 8, 0, 0]
    dims = blocks.groups_found_from(torch.tensor([7, 7, 8, 8, 9]), rank_of)
    # Of two queries one is enough: group 7 from 2 by the first, 8 by the third alone, 9 by none.
    assert dims.tolist() == [2, 8, 0]


def test_sampled_queries_have_positives_and_respect_the_limits() -> None:
    task = Task("x", torch.randn(500, 4), torch.randn(100, 4), torch.arange(500), torch.arange(100) * 4)
    assert task.sample_queries(pairs=10**6, least=1, most=1000).tolist() == list(range(0, 400, 4))
    few = task.sample_queries(pairs=3000, least=1, most=1000)
    assert len(few) == 30
    assert (few % 4 == 0).all()
    assert torch.equal(few, few.sort().values)
    assert len(task.sample_queries(pairs=1, least=12, most=1000)) == 12
    assert len(task.sample_queries(pairs=10**6, least=1, most=5)) == 5
