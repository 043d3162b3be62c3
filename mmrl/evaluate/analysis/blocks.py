"""What each block of dims adds, and which single dims can be dropped.

A block is the dims between two consecutive evaluated dims. Reported per block: the recall it adds to the shorter
prefix, the recall of the block alone, the recall lost by the full vector without it, its share of the energy (squared
length), and the effective rank of its covariance (Roy and Vetterli 2007).

Shapes: N rows (queries or gallery), Q queries, D the embedding's width, d one dim.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmrl.evaluate.analysis.baselines import best_dims_ranks, dim_signal
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.analysis.task import Task
from mmrl.nesting import effective_rank, truncate

_DROP_STEPS = 16
# Enough rows for the covariance of some hundred dims.
_COVARIANCE_ROWS = 1 << 16
# A dim is dead if its energy is below this fraction of the mean.
_DEAD = 1e-3


def block_scores(task: Task, rank_of: Mapping[int, Tensor], bootstrap: Bootstrap, k: int = 10) -> list[dict[str, Any]]:
    """One object per block, in order.

    Args:
        task: queries that all have a positive.
        rank_of: {dim: rank_Q} of the prefixes; the largest dim is the full vector here.
    """
    full = max(rank_of)
    query_Qd, gallery_Gd = truncate(task.query_QD, full), truncate(task.gallery_GD, full)
    result = []
    for start, end in pairwise([0, *sorted(rank_of)]):
        before_Q = (rank_of[start] <= k).double() if start else torch.zeros(len(task.query_QD), dtype=torch.float64)
        after_Q = (rank_of[end] <= k).double()
        rest = torch.tensor([d for d in range(full) if not start <= d < end], dtype=torch.int64)
        alone_Q = _hits(task, query_Qd[:, start:end], gallery_Gd[:, start:end], k)
        without_Q = _hits(task, query_Qd[:, rest], gallery_Gd[:, rest], k) if len(rest) else torch.zeros_like(after_Q)
        full_Q = (rank_of[full] <= k).double()
        result.append(
            {
                "from": start,
                "to": end,
                "adds": bootstrap.difference(after_Q, before_Q).as_json(),
                "adds_p": bootstrap.paired_p(after_Q, before_Q),
                "alone": float(alone_Q.mean()),
                "lost_without": bootstrap.difference(full_Q, without_Q).as_json(),
                "energy_gallery": _energy(gallery_Gd)[start:end].sum().item(),
                "effective_rank_gallery": covariance_effective_rank(gallery_Gd[:, start:end]),
            }
        )
    return result


def droppable_dims(task: Task, full: int, bootstrap: Bootstrap, max_loss: float = 0.01, k: int = 10) -> dict[str, Any]:
    """How many single dims of the full vector can be dropped, and which.

    Dims are dropped in steps, lowest d' first, until more than `max_loss` of the recall is lost. The order is found on
    one half of the items and scored on the queries of the other, both ways.

    Returns: "curve": [{"kept": …, "recall": …}, …]; "droppable": how many dims can be dropped; "dims": these,
        ascending, by the order found on all items; "dead": dims with almost no energy.
    """
    steps = sorted({max(1, round(full * n / _DROP_STEPS)) for n in range(1, _DROP_STEPS + 1)})
    whole = task.with_vectors(truncate(task.query_QD, full), truncate(task.gallery_GD, full))
    hit_of = {kept: (rank_Q <= k).double() for kept, (rank_Q,) in best_dims_ranks(whole, steps).items()}
    fewest = full
    for kept in reversed(steps):
        if bootstrap.difference(hit_of[full], hit_of[kept], relative=True).value > max_loss:
            break
        fewest = kept
    everything = torch.ones(len(whole.query_QD), dtype=torch.bool), torch.ones(len(whole.gallery_GD), dtype=torch.bool)
    order_D = dim_signal(whole, *everything).argsort(descending=True, stable=True)
    energy_D = (_energy(whole.query_QD) + _energy(whole.gallery_GD)) / 2
    return {
        "curve": [{"kept": kept, "recall": float(hit_of[kept].mean())} for kept in steps],
        "droppable": full - fewest,
        "within": max_loss,
        "dims": sorted(order_D[fewest:].tolist()),
        "dead": (energy_D < _DEAD / full).nonzero()[:, 0].tolist(),
    }


def covariance_effective_rank(rows_ND: Tensor) -> float:
    """The effective rank of the rows' covariance: exp of the entropy of its normalised eigenvalues, from 1 to D.

    Rows are centred, unlike in `nesting.effective_rank`, which takes an uncentred second moment.
    """
    some_ND = rows_ND[:: max(1, len(rows_ND) // _COVARIANCE_ROWS)].double()
    centred_ND = some_ND - some_ND.mean(0)
    covariance_DD = centred_ND.T @ centred_ND
    return effective_rank(covariance_DD) if covariance_DD.trace() > 0 else 1.0


def found_from(rank_of: Mapping[int, Tensor], k: int = 10) -> Tensor:
    """The smallest dim such that a query hits within k at it and at every larger dim; 0 if it misses at the largest:
    int64 (Q,)."""
    wide_first = sorted(rank_of, reverse=True)
    still_Q = torch.ones(len(rank_of[wide_first[0]]), dtype=torch.bool)
    result_Q = torch.zeros(len(still_Q), dtype=torch.int64)
    for dim in wide_first:
        still_Q = still_Q & (rank_of[dim] <= k)
        result_Q[still_Q] = dim
    return result_Q


def groups_found_from(group_Q: Tensor, rank_of: Mapping[int, Tensor], k: int = 10) -> Tensor:
    """The smallest dim at which at least half of each group's queries are found for good (see `found_from`), or 0;
    in ascending order of the groups."""
    _, member_Q, count = group_Q.unique(return_inverse=True, return_counts=True)
    from_Q = found_from(rank_of, k)
    result = torch.zeros(len(count), dtype=torch.int64)
    for dim in sorted(rank_of, reverse=True):
        found_Q = (from_Q > 0) & (from_Q <= dim)
        share = torch.zeros(len(count)).index_add_(0, member_Q, found_Q.float()) / count
        result[share >= 0.5] = dim
    return result


def _hits(task: Task, query_Qd: Tensor, gallery_Gd: Tensor, k: int) -> Tensor:
    dim = query_Qd.shape[1]
    return (task.with_vectors(query_Qd, gallery_Gd).ranks([dim])[dim] <= k).double()


def _energy(rows_ND: Tensor) -> Tensor:
    """The mean share of each dim in the squared length: (D,)."""
    return rows_ND.square().mean(0, dtype=torch.float64)
