"""Baselines for nested prefixes: other reductions of the same embeddings to d dims, scored on the same queries.

- `pca`: the first d principal components of the full vector. Each side is centred by its own mean; the components are
  those of the mean of both sides' covariances. It was the strongest of the PCA variants measured
  (tests/benchmarks/LOG.md).
- `best_dims`: the d single dims with the highest d' (`dim_signal`).
- `random_dims`: d random dims, the mean of three draws.

PCA and best dims are fitted on half of the items and scored on the queries of the other half, both ways; the gallery is
always whole. Each baseline is ranked once for all dims.

Shapes: N rows (queries or gallery), Q queries, G gallery rows, q and g some of them, n groups, D the embedding's width,
d one dim.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mmrl.evaluate.analysis.task import Task
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
    result = {"pca": pca_ranks(task, dims), "best_dims": best_dims_ranks(task, dims)}
    draws = [_ranks(task, _permutation(task.dim, seed), dims) for seed in range(_RANDOM_DRAWS)]
    result["random_dims"] = {dim: [ranks[dim] for ranks in draws] for dim in dims}
    return result


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
    query_QD, gallery_GD = truncate(task.query_QD, task.dim), truncate(task.gallery_GD, task.dim)
    return task.with_vectors(transform(query_QD, True), transform(gallery_GD, False)).ranks(dims)


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


pca_ranks = partial(_cross_fitted, fit=_fit_pca)
"""(task, dims) -> {dim: [rank_Q]} of the PCA baseline."""
best_dims_ranks = partial(_cross_fitted, fit=_fit_best_dims)
"""(task, dims) -> {dim: [rank_Q]} of the best-dims baseline."""


def dim_signal(task: Task, query_Q: Tensor, gallery_G: Tensor) -> Tensor:
    """How well each dim alone separates positives from all pairs, on the queries and gallery rows of two masks: (D,).

    It is d' of signal detection: the mean of the products x_j y_j of positive pairs minus that of all pairs, over the
    standard deviation of all pairs. Each query is paired with the mean of its positives.
    """
    query_qD = truncate(task.query_QD[query_Q], task.dim).double()
    gallery_gD = truncate(task.gallery_GD[gallery_G], task.dim).double()
    groups, member_g = task.gallery_group_G[gallery_G].unique(return_inverse=True)
    mean_nD = torch.zeros(len(groups), task.dim, dtype=torch.float64).index_add_(0, member_g, gallery_gD)
    mean_nD /= torch.bincount(member_g, minlength=len(groups))[:, None]
    group_q = task.query_group_Q[query_Q]
    index_q = torch.searchsorted(groups, group_q).clamp_(max=len(groups) - 1)
    has_positive_q = groups[index_q] == group_q
    if not has_positive_q.any():
        return torch.zeros(task.dim, dtype=torch.float64)
    positive_D = (query_qD[has_positive_q] * mean_nD[index_q[has_positive_q]]).mean(0)
    all_D = query_qD.mean(0) * gallery_gD.mean(0)
    spread_D = (query_qD.square().mean(0) * gallery_gD.square().mean(0) - all_D.square()).clamp_(min=0).sqrt()
    return torch.where(spread_D > 1e-12, (positive_D - all_D) / spread_D.clamp(min=1e-12), 0.0)


def _permutation(dim: int, seed: int) -> Transform:
    order_D = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return lambda rows_ND, _: rows_ND[:, order_D]
