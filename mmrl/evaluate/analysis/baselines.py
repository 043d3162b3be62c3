"""What nesting has to beat: other ways to d numbers, on the same features, with the same queries.

- `pca`: the best d directions of the full vector. Each side's mean is taken off, the directions are those of both
  sides' covariance together; that was the strongest of the variants measured (tests/benchmarks/LOG.md).
- `best_dims`: the d single numbers that tell right from wrong answers best (`mmrl.evaluate.analysis.blocks.signal`).
- `random_dims`: any d numbers, the mean of three draws.

What is fitted is fitted on half of the items and scored on the queries of the other half, then the other way round; the
gallery is always whole. Each baseline is one more ranking at all dims.

Shapes: Q queries that have an answer, G gallery rows, D the embedding's width, d one dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmrl.evaluate.analysis.blocks import signal
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.nesting import cut

NAMES = {
    "full": "the full vector",
    "pca": "PCA of the full vector",
    "best_dims": "best single dims",
    "random_dims": "random dims",
}
_RANDOM_DRAWS = 3


def label(method: str) -> str:
    """A method as the page calls it; another model goes by its own name."""
    return NAMES.get(method, method)


def baseline_ranks(task: Task, dims: Sequence[int]) -> dict[str, dict[int, list[Tensor]]]:
    """{baseline: {dim: rank_Q of each of its draws}}, for the queries of `task`, which must all have an answer."""
    result = {"pca": principal_ranks(task, dims), "best_dims": _crossed(task, dims, _by_signal)}
    draws = [_ranks(task, _permuted(task.dim, seed), dims) for seed in range(_RANDOM_DRAWS)]
    result["random_dims"] = {dim: [ranks[dim] for ranks in draws] for dim in dims}
    return result


def principal_ranks(task: Task, dims: Sequence[int]) -> dict[int, list[Tensor]]:
    """{dim: [rank_Q]} of PCA alone."""
    return _crossed(task, dims, _principal)


Change = Callable[[Tensor, bool], Tensor]
"""Rows of unit vectors, and whether they are queries -> as many other rows, whose prefixes are compared."""


def _crossed(task: Task, dims: Sequence[int], fit: Callable[[Task, Tensor, Tensor], Change]) -> dict[int, list[Tensor]]:
    """Each query scored by what was fitted on the half of the items that it does not belong to."""
    rank_of = {dim: torch.zeros(len(task.query_QD), dtype=torch.float64) for dim in dims}
    for half in (True, False):
        asking_Q = task.half_Q == half
        learnt_Q, learnt_G = ~asking_Q, task.half_G != half
        if not asking_Q.any():
            continue
        if not learnt_Q.any() or not learnt_G.any():  # a single item: nothing else to learn from
            learnt_Q, learnt_G = torch.ones_like(learnt_Q), torch.ones_like(learnt_G)
        ranks = _ranks(task.only(asking_Q.nonzero()[:, 0]), fit(task, learnt_Q, learnt_G), dims)
        for dim in dims:
            rank_of[dim][asking_Q] = ranks[dim]
    return {dim: [rank_Q] for dim, rank_Q in rank_of.items()}


def _ranks(task: Task, change: Change, dims: Sequence[int]) -> dict[int, Tensor]:
    query_QD, gallery_GD = change(cut(task.query_QD, task.dim), True), change(cut(task.gallery_GD, task.dim), False)
    ranked = rank_queries(query_QD, gallery_GD, task.query_group_Q, task.gallery_group_G, list(dims))
    return {dim: ranked[dim].rank_Q for dim in dims}


def _principal(task: Task, query_Q: Tensor, gallery_G: Tensor) -> Change:
    """PCA fitted on these queries and gallery rows."""
    query_qD, gallery_gD = cut(task.query_QD[query_Q], task.dim), cut(task.gallery_GD[gallery_G], task.dim)
    query_mean_D, gallery_mean_D = query_qD.mean(0), gallery_gD.mean(0)
    both_DD = torch.zeros(task.dim, task.dim, dtype=torch.float64)
    for rows_nD in (query_qD - query_mean_D, gallery_gD - gallery_mean_D):
        both_DD += (rows_nD.T @ rows_nD / len(rows_nD)).double()
    axes_DD = torch.linalg.eigh(both_DD).eigenvectors.flip(1).to(query_qD.dtype)
    return lambda rows_ND, is_query: (rows_ND - (query_mean_D if is_query else gallery_mean_D)) @ axes_DD


def _by_signal(task: Task, query_Q: Tensor, gallery_G: Tensor) -> Change:
    """The dims in the order of what they tell on these queries and gallery rows."""
    order_D = signal(task, query_Q, gallery_G).argsort(descending=True, stable=True)
    return lambda rows_ND, _: rows_ND[:, order_D]


def _permuted(dim: int, seed: int) -> Change:
    order_D = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return lambda rows_ND, _: rows_ND[:, order_D]
