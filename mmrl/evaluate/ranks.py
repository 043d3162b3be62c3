"""The place of every query's right answers, exact and tie-aware, at every dim.

A positive's place is its number among the query's positives, the best first, plus the number of non-positives that
score as high or higher: a tie counts against it.

Shapes: Q queries, G gallery rows, D the embedding's width, d one dim; q queries of one chunk, P the greatest number of
positives that one of them has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.errors import InputError
from mmrl.nesting import check_dims, cut

Scores = dict[str, float]
# Similarities in memory at once: 64 MB of float32.
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class PerQuery:
    """How the queries of one direction fare at one dim."""

    query_Q: Tensor
    """int64: the rows of the queries that have a positive, ascending."""
    rank_Q: Tensor
    """float64, as all below: the place of the best positive, from 1."""
    average_precision_Q: Tensor
    r_precision_Q: Tensor
    """Average precision within the first R places, R the query's number of positives: its mean is mAP@R."""
    ndcg_Q: Tensor
    """nDCG@10."""

    def scores(self, ks: Sequence[int] = (1, 5, 10)) -> Scores:
        """The means over the queries, as retrieval.json has them."""
        scores = {f"R@{k}": float((self.rank_Q <= k).double().mean()) for k in ks}
        return scores | {
            "mAP": float(self.average_precision_Q.mean()),
            "mAP@R": float(self.r_precision_Q.mean()),
            "nDCG@10": float(self.ndcg_Q.mean()),
            "MRR": float((1 / self.rank_Q).mean()),
            "median_rank": float(self.rank_Q.quantile(0.5)),
            "mean_rank": float(self.rank_Q.mean()),
        }


def rank_queries(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_group_Q: Tensor,
    gallery_group_G: Tensor,
    dims: Sequence[int],
    *,
    same_rows: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> dict[int, PerQuery]:
    """Ranks the renormalised prefixes of every query against all of the gallery, at each of `dims`.

    Args:
        query_group_Q, gallery_group_G: int64; equal numbers are positives of each other.
        same_rows: query i is gallery row i, and is left out of its own gallery.
        on_rows: told the number of queries after each chunk, for a progress bar.

    Raises:
        InputError: no query has a positive; dims out of range.
    """
    check_dims(dims, query_QD.shape[1])
    chunk = max(1, _CHUNK_ELEMENTS // len(gallery_GD))
    parts: dict[int, list[PerQuery]] = {dim: [] for dim in dims}
    for start in range(0, len(query_QD), chunk):
        rows = torch.arange(start, min(start + chunk, len(query_QD)))
        positive_qG = query_group_Q[rows, None] == gallery_group_G
        if same_rows:
            positive_qG[torch.arange(len(rows)), rows] = False
        asks = positive_qG.any(1)
        for dim in dims:
            score_qG = cut(query_QD[rows], dim) @ cut(gallery_GD, dim).T
            if same_rows:
                score_qG[torch.arange(len(rows)), rows] = -torch.inf
            parts[dim].append(_of_scores(rows[asks], score_qG[asks], positive_qG[asks]))
        if on_rows:
            on_rows(len(rows))
    joined = {
        dim: PerQuery(*(torch.cat([getattr(part, name) for part in parts[dim]]) for name in PerQuery.__annotations__))
        for dim in dims
    }
    if not len(joined[dims[0]].query_Q):
        raise InputError("retrieval: no query has a positive; check image_of_text_M or the groups.")
    return joined


def _of_scores(query_q: Tensor, score_qG: Tensor, positive_qG: Tensor) -> PerQuery:
    if not len(query_q):
        empty = torch.zeros(0, dtype=torch.float64)
        return PerQuery(query_q, empty, empty, empty, empty)
    count_q = positive_qG.sum(1)
    most = int(count_q.max())
    mine_qP = score_qG.masked_fill(~positive_qG, -torch.inf).topk(most, dim=1).values
    others_qG = score_qG.masked_fill(positive_qG, -torch.inf)
    above_qP = torch.stack([(others_qG >= mine_qP[:, p, None]).sum(1) for p in range(most)], dim=1)
    nth_P = torch.arange(1, most + 1)
    has_qP = nth_P <= count_q[:, None]
    place_qP = (above_qP + nth_P).double()
    precision_qP = nth_P / place_qP * has_qP
    gain_qP = (place_qP <= 10) * has_qP / torch.log2(place_qP + 1)
    ideal_P = torch.cumsum((nth_P <= 10) / torch.log2(nth_P + 1.0).double(), 0)
    return PerQuery(
        query_q,
        place_qP[:, 0],
        precision_qP.sum(1) / count_q,
        (precision_qP * (place_qP <= count_q[:, None])).sum(1) / count_q,
        gain_qP.sum(1) / ideal_P[count_q - 1],
    )


def nearest(
    query_QD: Tensor, gallery_GD: Tensor, dim: int, k: int, *, same_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """The k gallery rows that score highest for each query at one dim, the best first, and their cosines: (Q, k) each.

    Of equal scores the lower row comes first. With `same_rows` query i is gallery row i, and is left out of its own.
    """
    k = min(k, len(gallery_GD) - same_rows)
    chunk = max(1, _CHUNK_ELEMENTS // len(gallery_GD))
    gallery_Gd = cut(gallery_GD, dim)
    found, scores = [], []
    for start in range(0, len(query_QD), chunk):
        rows = torch.arange(start, min(start + chunk, len(query_QD)))
        score_qG = cut(query_QD[rows], dim) @ gallery_Gd.T
        if same_rows:
            score_qG[torch.arange(len(rows)), rows] = -torch.inf
        best = score_qG.sort(dim=1, descending=True, stable=True)
        found.append(best.indices[:, :k])
        scores.append(best.values[:, :k])
    return torch.cat(found), torch.cat(scores)
