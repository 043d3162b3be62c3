"""Baselines for nested prefixes: other reductions of the same embeddings to d dims, scored on the same queries.

- `pca`: the first d principal components of the full vector. Each side is centred by its own mean; the components are
  those of the mean of both sides' covariances. It was the strongest of the PCA variants measured
  (tests/benchmarks/LOG.md).
- `best_dims`: the d single dims with the highest d' (`mmrl.evaluate.analysis.blocks.dim_signal`).
- `random_dims`: d random dims, the mean of three draws.

PCA and best dims are fitted on half of the items and scored on the queries of the other half, both ways; the gallery is
always whole. Each baseline is ranked once for all dims.

Shapes: N rows (queries or gallery), Q queries, G gallery rows, D the embedding's width, d one dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmrl.evaluate.analysis.blocks import dim_signal
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.nesting import truncate

NAMES = {
    "full": "the full vector",
    "pca": "PCA of the full vector",
    "best_dims": "best single dims",
    "random_dims": "random dims",
}
_RANDOM_DRAWS = 3


def label(method: str) -> str:
    """The label of a baseline in the report; another model is labelled by its name."""
    return NAMES.get(method, method)


def baseline_ranks(task: Task, dims: Sequence[int]) -> dict[str, dict[int, list[Tensor]]]:
    """{baseline: {dim: rank_Q of each of its draws}}. All queries of `task` must have a positive."""
    result = {"pca": pca_ranks(task, dims), "best_dims": _cross_fitted(task, dims, _fit_best_dims)}
    draws = [_ranks(task, _permutation(task.dim, seed), dims) for seed in range(_RANDOM_DRAWS)]
    result["random_dims"] = {dim: [ranks[dim] for ranks in draws] for dim in dims}
    return result


def pca_ranks(task: Task, dims: Sequence[int]) -> dict[int, list[Tensor]]:
    """{dim: [rank_Q]} of the PCA baseline."""
    return _cross_fitted(task, dims, _fit_pca)


Transform = Callable[[Tensor, bool], Tensor]
"""(unit rows (N, D), whether they are queries) -> (N, D), whose prefixes are compared."""


def _cross_fitted(
    task: Task, dims: Sequence[int], fit: Callable[[Task, Tensor, Tensor], Transform]
) -> dict[int, list[Tensor]]:
    """Ranks of each query under the transform fitted on the other half of the items."""
    rank_of = {dim: torch.zeros(len(task.query_QD), dtype=torch.float64) for dim in dims}
    for half in (True, False):
        scored_Q = task.half_Q == half
        fitted_Q, fitted_G = ~scored_Q, task.half_G != half
        if not scored_Q.any():
            continue
        if not fitted_Q.any() or not fitted_G.any():  # one item only: fit on it
            fitted_Q, fitted_G = torch.ones_like(fitted_Q), torch.ones_like(fitted_G)
        transform = fit(task, fitted_Q, fitted_G)
        ranks = _ranks(task.select_queries(scored_Q.nonzero()[:, 0]), transform, dims)
        for dim in dims:
            rank_of[dim][scored_Q] = ranks[dim]
    return {dim: [rank_Q] for dim, rank_Q in rank_of.items()}


def _ranks(task: Task, transform: Transform, dims: Sequence[int]) -> dict[int, Tensor]:
    query_QD = transform(truncate(task.query_QD, task.dim), True)
    gallery_GD = transform(truncate(task.gallery_GD, task.dim), False)
    ranked = rank_queries(query_QD, gallery_GD, task.query_group_Q, task.gallery_group_G, list(dims))
    return {dim: ranked[dim].rank_Q for dim in dims}


def _fit_pca(task: Task, query_Q: Tensor, gallery_G: Tensor) -> Transform:
    """PCA fitted on the queries and gallery rows of two masks."""
    query_qD, gallery_gD = truncate(task.query_QD[query_Q], task.dim), truncate(task.gallery_GD[gallery_G], task.dim)
    query_mean_D, gallery_mean_D = query_qD.mean(0), gallery_gD.mean(0)
    covariance_DD = torch.zeros(task.dim, task.dim, dtype=torch.float64)
    for centred_nD in (query_qD - query_mean_D, gallery_gD - gallery_mean_D):
        covariance_DD += (centred_nD.T @ centred_nD / len(centred_nD)).double()
    axes_DD = torch.linalg.eigh(covariance_DD).eigenvectors.flip(1).to(query_qD.dtype)
    return lambda rows_ND, is_query: (rows_ND - (query_mean_D if is_query else gallery_mean_D)) @ axes_DD


def _fit_best_dims(task: Task, query_Q: Tensor, gallery_G: Tensor) -> Transform:
    """The dims in descending order of their d' on these queries and gallery rows."""
    order_D = dim_signal(task, query_Q, gallery_G).argsort(descending=True, stable=True)
    return lambda rows_ND, _: rows_ND[:, order_D]


def _permutation(dim: int, seed: int) -> Transform:
    order_D = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return lambda rows_ND, _: rows_ND[:, order_D]
