"""What each block of dims adds, and which dims could go.

A block is the numbers between one dim asked for and the next. Of each: what it adds to the recall of the prefix before
it, the recall of the block alone, the recall of the full vector without it, its share of the vectors' energy (their
squared length), and its effective rank: the exponential of the entropy of its covariance's normalised eigenvalues
(Roy and Vetterli 2007), which says how many directions of it are really used.

Shapes: Q queries, G gallery rows, D the embedding's width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.nesting import cut

_STEPS_OF_DROPPING = 16
# More rows would not change a covariance of some hundred numbers.
_ROWS_OF_COVARIANCE = 1 << 16
# A number that carries less of the energy than this, relative to its fair share, is never used.
_DEAD = 1e-3


def blocks_of(dims: Sequence[int]) -> list[tuple[int, int]]:
    """From where to where the blocks go that `dims` are the borders of: [4, 8, 16] -> (0, 4), (4, 8), (8, 16)."""
    ends = sorted(dims)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def rank_blocks(task: Task, rank_of: Mapping[int, Tensor], bootstrap: Bootstrap, k: int = 10) -> list[dict[str, Any]]:
    """One object a block, from the first to the last.

    Args:
        task: queries that all have an answer.
        rank_of: {dim: rank_Q} of its prefixes; the greatest dim is where the vectors end here.
    """
    full = max(rank_of)
    query_Qd, gallery_Gd = cut(task.query_QD, full), cut(task.gallery_GD, full)
    result = []
    for start, end in blocks_of(list(rank_of)):
        before_Q = (rank_of[start] <= k).double() if start else torch.zeros(len(task.query_QD), dtype=torch.float64)
        after_Q = (rank_of[end] <= k).double()
        kept = torch.tensor([d for d in range(full) if not start <= d < end], dtype=torch.int64)
        alone_Q = _hits(task, query_Qd[:, start:end], gallery_Gd[:, start:end], k)
        without_Q = _hits(task, query_Qd[:, kept], gallery_Gd[:, kept], k) if len(kept) else torch.zeros_like(after_Q)
        full_Q = (rank_of[full] <= k).double()
        result.append(
            {
                "from": start,
                "to": end,
                "adds": bootstrap.difference(after_Q, before_Q).as_json(),
                "adds_p": bootstrap.paired_p(after_Q, before_Q),
                "alone": float(alone_Q.mean()),
                "lost_without": bootstrap.difference(full_Q, without_Q).as_json(),
                "energy_queries": _energy(query_Qd)[start:end].sum().item(),
                "energy_gallery": _energy(gallery_Gd)[start:end].sum().item(),
                "effective_rank_queries": effective_rank(query_Qd[:, start:end]),
                "effective_rank_gallery": effective_rank(gallery_Gd[:, start:end]),
            }
        )
    return result


def droppable(task: Task, full: int, bootstrap: Bootstrap, most_lost: float = 0.01, k: int = 10) -> dict[str, Any]:
    """How many single numbers of the full vector can go, and which.

    The numbers go in steps, those of least signal first, until recall has lost more than `most_lost` of itself. The
    order is found on one half of the items and judged by the queries of the other, both ways.

    Returns: "curve": [{"kept": …, "recall": …}, …]; "droppable": how many can go; "dims": these, by the order found on
        all items, ascending; "dead": numbers that carry next to no energy.
    """
    steps = sorted({max(1, round(full * n / _STEPS_OF_DROPPING)) for n in range(1, _STEPS_OF_DROPPING + 1)})
    whole = task.with_vectors(cut(task.query_QD, full), cut(task.gallery_GD, full))
    hit_of = {kept: torch.zeros(len(task.query_QD), dtype=torch.float64) for kept in steps}
    for half in (True, False):
        asking_Q = whole.half_Q == half
        if not asking_Q.any():
            continue
        order_D = signal(whole, ~asking_Q, whole.half_G != half).argsort(descending=True, stable=True)
        asking = whole.only(asking_Q.nonzero()[:, 0])
        ranked = rank_queries(
            asking.query_QD[:, order_D],
            asking.gallery_GD[:, order_D],
            asking.query_group_Q,
            asking.gallery_group_G,
            steps,
        )
        for kept in steps:
            hit_of[kept][asking_Q] = (ranked[kept].rank_Q <= k).double()
    least = full
    for kept in reversed(steps):
        if bootstrap.difference(hit_of[full], hit_of[kept], relative=True).value > most_lost:
            break
        least = kept
    everything = torch.ones(len(whole.query_QD), dtype=torch.bool), torch.ones(len(whole.gallery_GD), dtype=torch.bool)
    order_D = signal(whole, *everything).argsort(descending=True, stable=True)
    energy_D = (_energy(whole.query_QD) + _energy(whole.gallery_GD)) / 2
    return {
        "curve": [{"kept": kept, "recall": float(hit_of[kept].mean())} for kept in steps],
        "droppable": full - least,
        "within": most_lost,
        "dims": sorted(order_D[least:].tolist()),
        "dead": (energy_D < _DEAD / full).nonzero()[:, 0].tolist(),
    }


def signal(task: Task, query_Q: Tensor, gallery_G: Tensor) -> Tensor:
    """How well each number alone tells right answers from wrong ones, on some of the queries and of the gallery: (D,).

    It is the d' of detection: the mean of the products x_j y_j of right pairs less that of all pairs, over the
    standard deviation of all pairs. Each query is paired with the mean of its right answers.
    """
    query_qD, gallery_gD = cut(task.query_QD[query_Q], task.dim).double(), cut(task.gallery_GD[gallery_G], task.dim)
    gallery_gD = gallery_gD.double()
    groups, member_g = task.gallery_group_G[gallery_G].unique(return_inverse=True)
    mean_nD = torch.zeros(len(groups), task.dim, dtype=torch.float64).index_add_(0, member_g, gallery_gD)
    mean_nD /= torch.bincount(member_g, minlength=len(groups))[:, None]
    wanted_q = task.query_group_Q[query_Q]
    place_q = torch.searchsorted(groups, wanted_q).clamp_(max=len(groups) - 1)
    found_q = groups[place_q] == wanted_q
    if not found_q.any():
        return torch.zeros(task.dim, dtype=torch.float64)
    right_D = (query_qD[found_q] * mean_nD[place_q[found_q]]).mean(0)
    any_D = query_qD.mean(0) * gallery_gD.mean(0)
    spread_D = (query_qD.square().mean(0) * gallery_gD.square().mean(0) - any_D.square()).clamp_(min=0).sqrt()
    return torch.where(spread_D > 1e-12, (right_D - any_D) / spread_D.clamp(min=1e-12), 0.0)


def effective_rank(rows_ND: Tensor) -> float:
    """The exponential of the entropy of the covariance's eigenvalues, as shares of their sum; 1 to D."""
    some_ND = rows_ND[:: max(1, len(rows_ND) // _ROWS_OF_COVARIANCE)].double()
    centred_ND = some_ND - some_ND.mean(0)
    share_D = torch.linalg.eigvalsh(centred_ND.T @ centred_ND).clamp(min=0)
    if not share_D.sum() > 0:
        return 1.0
    share_D = share_D / share_D.sum()
    return float(torch.exp(-torch.special.xlogy(share_D, share_D).sum()))


def found_from(rank_of: Mapping[int, Tensor], k: int = 10) -> Tensor:
    """The smallest dim from which on, at it and at every wider one, a query is answered within k; 0 where it is not
    even at the widest: int64 (Q,)."""
    wide_first = sorted(rank_of, reverse=True)
    still_Q = torch.ones(len(rank_of[wide_first[0]]), dtype=torch.bool)
    result_Q = torch.zeros(len(still_Q), dtype=torch.int64)
    for dim in wide_first:
        still_Q = still_Q & (rank_of[dim] <= k)
        result_Q[still_Q] = dim
    return result_Q


def groups_found_from(group_Q: Tensor, rank_of: Mapping[int, Tensor], k: int = 10) -> tuple[Tensor, Tensor]:
    """The items that are asked for, and the dim from which on each is retrievable: the least that answers at least half
    of its queries, or 0 where none does. (items,) both."""
    wide_first = sorted(rank_of, reverse=True)
    groups, member_Q, count = group_Q.unique(return_inverse=True, return_counts=True)
    from_Q = found_from(rank_of, k)
    result = torch.zeros(len(groups), dtype=torch.int64)
    for dim in wide_first:
        answered_Q = (from_Q > 0) & (from_Q <= dim)
        share = torch.zeros(len(groups)).index_add_(0, member_Q, answered_Q.float()) / count
        result[share >= 0.5] = dim
    return groups, result


def _hits(task: Task, query_Qd: Tensor, gallery_Gd: Tensor, k: int) -> Tensor:
    dim = query_Qd.shape[1]
    ranked = rank_queries(query_Qd, gallery_Gd, task.query_group_Q, task.gallery_group_G, [dim])
    return (ranked[dim].rank_Q <= k).double()


def _energy(rows_ND: Tensor) -> Tensor:
    """The mean share of the squared length that each number has: (D,)."""
    return rows_ND.square().mean(0, dtype=torch.float64)
