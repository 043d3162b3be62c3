"""The place of every query's right answers, exact and tie-aware, at every dim.

A positive's place is its number among the query's positives, the best first, plus the number of non-positives that
score as high or higher: a tie counts against it.

Shapes: Q queries, G gallery rows, D the embedding's width, d one dim, K dims; q queries of one chunk, P the greatest
number of positives that one of them has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.errors import InputError
from mmrl.evaluate.ranking.tiles import Direction, Side, count_few, exact_products
from mmrl.nesting import check_dims, cut

Scores = dict[str, float]
KS = (1, 5, 10)
"""The K of each recall@K that is always told."""
NO_POSITIVE = "retrieval: no query has a positive; check image_of_text_M or the groups."
# Similarities in memory at once where rows are taken whole: 32 MB of float32.
_CHUNK_ELEMENTS = 1 << 23
OnRows = Callable[[int], None]


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

    def scores(self, ks: Sequence[int] = KS) -> Scores:
        """The means over the queries, as retrieval.json has them."""
        scores = {f"R@{k}": float((self.rank_Q <= k).double().mean()) for k in ks}
        return scores | {
            "mAP": float(self.average_precision_Q.mean()),
            "mAP@R": float(self.r_precision_Q.mean()),
            "nDCG@10": float(self.ndcg_Q.mean()),
            "MRR": float((1 / self.rank_Q).mean()),
            # Not quantile, which takes 16 million numbers at most.
            "median_rank": float(np.median(self.rank_Q.numpy())),
            "mean_rank": float(self.rank_Q.mean()),
        }


def metric_names(ks: Sequence[int] = KS) -> tuple[str, ...]:
    """The names of what `PerQuery.scores` gives."""
    one = torch.ones(1, dtype=torch.float64)
    return tuple(PerQuery(one.long(), one, one, one, one).scores(ks))


def is_better_lower(metric: str) -> bool:
    """Whether less of a metric is better: ranks count from the best."""
    return metric.endswith("_rank")


def rank_queries(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_group_Q: Tensor,
    gallery_group_G: Tensor,
    dims: Sequence[int],
    *,
    same_rows: bool = False,
    on_rows: OnRows | None = None,
    over_ranks: bool = False,
) -> dict[int, PerQuery]:
    """Ranks the renormalised prefixes of every query against all of the gallery, at each of `dims`.

    Args:
        query_group_Q, gallery_group_G: int64; equal numbers are positives of each other.
        same_rows: query i is gallery row i, and is left out of its own gallery.
        on_rows: told numbers of queries that add up to Q, for a progress bar.
        over_ranks: all processes call this, with the same arguments, and divide the work; each has the whole answer.

    Raises:
        InputError: no query has a positive; dims out of range.
    """
    check_dims(dims, query_QD.shape[1])
    ascending = sorted(dims)
    device = comm.world().device
    query = Side(query_QD, query_group_Q, ascending, device)
    gallery = query if same_rows else Side(gallery_GD, gallery_group_G, ascending, device, columns=True)
    like = query.rows(0)
    direction = Direction(query, gallery, same_rows, like)
    told = _Telling(on_rows)
    _sweep(query, gallery, direction, direction if same_rows else None, told, over_ranks)
    return _finish(direction, dims, over_ranks, told)


def rank_both(
    image_ND: Tensor,
    text_MD: Tensor,
    image_group_N: Tensor,
    text_group_M: Tensor,
    dims: Sequence[int],
    *,
    on_rows: OnRows | None = None,
    over_ranks: bool = False,
) -> tuple[dict[int, PerQuery], dict[int, PerQuery]]:
    """`rank_queries` of the images among the texts and of the texts among the images, each similarity computed once.

    `on_rows` is told numbers of queries that add up to N + M. Raises as `rank_queries`.
    """
    check_dims(dims, image_ND.shape[1])
    ascending = sorted(dims)
    device = comm.world().device
    image = Side(image_ND, image_group_N, ascending, device)
    text = Side(text_MD, text_group_M, ascending, device, columns=True)
    like = image.rows(0)
    by_image, by_text = Direction(image, text, False, like), Direction(text, image, False, like)
    told = _Telling(on_rows)
    _sweep(image, text, by_image, by_text, told, over_ranks)
    return _finish(by_image, dims, over_ranks, told), _finish(by_text, dims, over_ranks, told)


class _Telling:
    """Progress that adds up to a total, whatever it is told in."""

    def __init__(self, on_rows: OnRows | None) -> None:
        self._on_rows = on_rows
        self._exact, self._told = 0.0, 0

    def add(self, share: float) -> None:
        """So many more rows; the remainder of a fraction is kept for later."""
        self._exact += share
        reached = round(self._exact)
        if self._on_rows and reached > self._told:
            self._on_rows(reached - self._told)
            self._told = reached


def _sweep(
    rows: Side, columns: Side, by_row: Direction, by_column: Direction | None, told: _Telling, over_ranks: bool
) -> None:
    directions = [by_row] if by_column is None or by_column is by_row else [by_row, by_column]
    few = sum(len(one.queries) - int(one.many_N.sum()) for one in directions)
    if not any(one.asks_few for one in directions):
        told.add(few)
        return
    world = comm.world() if over_ranks else World()
    count_few(
        rows,
        columns,
        by_row,
        by_column,
        rank=world.rank,
        world_size=world.size,
        total=comm.all_reduce_sum if over_ranks else _same,
        on_share=lambda share: told.add(share * few),
    )


def _same(values: Tensor) -> Tensor:
    return values


def _finish(direction: Direction, dims: Sequence[int], over_ranks: bool, told: _Telling) -> dict[int, PerQuery]:
    """What was counted, as measures of the queries, in the order of their rows."""
    ascending, queries = sorted(dims), direction.queries
    # Of each dim: rank, average precision, precision at R, nDCG of each sorted query.
    measure_K4N = torch.zeros(len(dims), 4, len(queries), dtype=torch.float64)
    positives_N = direction.count_N - int(direction.same_rows)
    for number, strip in enumerate(direction.strips):
        span = queries.span(number)
        n = span.stop - span.start
        asks_n = (strip.count_n[:n] > int(direction.same_rows)).cpu()
        if asks_n.any():
            bound_KqP, counts_KqP = (
                x[:, :, :n].cpu()[:, :, asks_n].transpose(1, 2).contiguous()
                for x in (strip.bound_KPn, strip.at_least_KPn)
            )
            # In two steps, since the mask makes a copy.
            measure_K4n = measure_K4N[:, :, span]
            measure_K4n[:, :, asks_n] = _measures(bound_KqP, counts_KqP, positives_N[span][asks_n])
    many_m = direction.many_N.nonzero()[:, 0]
    if len(many_m):
        found_K4m = _by_sorting(direction, many_m, over_ranks, told)
        measure_K4N[:, :, many_m] = found_K4m
    asks_N = positives_N > 0
    if not asks_N.any():
        raise InputError(NO_POSITIVE)
    query_Q, place_Q = queries.order_N[asks_N].sort()
    return {dim: PerQuery(query_Q, *measure_K4N[ascending.index(dim)][:, asks_N][:, place_Q]) for dim in dims}


def _measures(bound_KqP: Tensor, at_least_KqP: Tensor, count_q: Tensor) -> Tensor:
    """(K, 4, q): rank of the best positive, average precision, that within the first R places, nDCG@10.

    Args:
        bound_KqP: the positives' scores, ascending, +inf beyond the last.
        at_least_KqP: how many of the gallery, positives among them, score as high or higher.
    """
    count_q1 = count_q[:, None]
    positives_at_least_KqP = count_q1 - torch.searchsorted(bound_KqP, bound_KqP)
    nth_qP = count_q1 - torch.arange(bound_KqP.shape[2])
    exists_qP = nth_qP > 0
    place_KqP = torch.where(exists_qP, nth_qP + at_least_KqP - positives_at_least_KqP, 1).double()
    precision_KqP = nth_qP / place_KqP * exists_qP
    gain_KqP = (place_KqP <= 10) * exists_qP / torch.log2(place_KqP + 1)
    ideal_10 = (1 / torch.log2(torch.arange(2, 12).double())).cumsum(0)
    best = (count_q1 - 1).expand(len(place_KqP), -1, -1)
    return torch.stack(
        [
            place_KqP.gather(2, best)[:, :, 0],
            _sum_in_order(precision_KqP) / count_q,
            _sum_in_order(precision_KqP * (place_KqP <= count_q1)) / count_q,
            _sum_in_order(gain_KqP) / ideal_10[count_q.clamp_max(10) - 1],
        ],
        dim=1,
    )


def _sum_in_order(values_KqP: Tensor) -> Tensor:
    """Sums from the best positive to the last, one after the other, so that they do not depend on the padding."""
    return values_KqP.flip(2).cumsum(2)[:, :, -1]


def _by_sorting(direction: Direction, many_m: Tensor, over_ranks: bool, told: _Telling) -> Tensor:
    """The measures of queries with many positives, (K, 4, m): a few whole rows of scores at a time, sorted."""
    queries, gallery = direction.queries, direction.gallery
    world = comm.world() if over_ranks else World()
    result_K4m = torch.zeros(len(queries.cuts), 4, len(many_m), dtype=torch.float64)
    chunk = max(1, _CHUNK_ELEMENTS // (len(gallery.strips) * gallery.length))
    with exact_products(queries.rows(0).device):
        for number, start in enumerate(range(0, len(many_m), chunk)):
            span = slice(start, min(start + chunk, len(many_m)))
            if number % world.size == world.rank:
                result_K4m[:, :, span] = _measure_whole_rows(direction, many_m[span])
            told.add(span.stop - span.start)
    if not over_ranks:
        return result_K4m
    return comm.all_reduce_sum(result_K4m.to(world.device)).cpu()


def _measure_whole_rows(direction: Direction, query_q: Tensor) -> Tensor:
    """(K, 4, q) of the measures of some sorted queries."""
    queries, gallery = direction.queries, direction.gallery
    # Padded as tiles are, so that a score is the same whatever rows it is computed with.
    x_qD = torch.nn.functional.pad(queries.take(query_q), (0, 0, 0, -len(query_q) % 64))
    first_q, count_q = direction.first_N[query_q], direction.count_N[query_q]
    measures = []
    product_qG = x_qD.new_zeros(len(query_q), len(gallery))
    scores_qG = torch.empty_like(product_qG)
    for k in range(len(queries.cuts)):
        score_qG = scores_qG
        for strip in gallery.strips:
            span = gallery.span(strip)
            n = span.stop - span.start
            y_nd = gallery.rows(strip)[:, gallery.cuts[k]]
            product_qG[:, span] += (x_qD[:, queries.cuts[k]] @ y_nd.T)[: len(query_q), :n]
            torch.mul(product_qG[:, span], gallery.norms[strip].inverse_Kn[k, :n], out=score_qG[:, span])
        if direction.same_rows:
            score_qG[torch.arange(len(query_q)), query_q] = -torch.inf
        score_qG = score_qG.cpu()
        # The positives are neighbours; one's own score, -inf with `same_rows`, comes first and is cut off.
        most = int(count_q.max())
        column_qP = (first_q[:, None] + torch.arange(most)).clamp_max(len(gallery) - 1)
        bound_qP = score_qG.gather(1, column_qP).masked_fill(torch.arange(most) >= count_q[:, None], torch.inf)
        bound_qP = bound_qP.sort(1).values[:, int(direction.same_rows) :].contiguous()
        score_qG.numpy().sort(axis=1)  # ten times torch's speed
        at_least_qP = len(gallery) - torch.searchsorted(score_qG, bound_qP)
        measures.append(_measures(bound_qP[None], at_least_qP[None], count_q - int(direction.same_rows)))
    return torch.cat(measures)


def nearest(
    query_QD: Tensor, gallery_GD: Tensor, dim: int, k: int, *, same_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """The k gallery rows that score highest for each query at one dim, the best first, and their cosines: (Q, k) each.

    Of equal scores the lower row comes first. With `same_rows` query i is gallery row i, and is left out of its own.
    """
    check_dims([dim], query_QD.shape[1])
    k = min(k, len(gallery_GD) - same_rows)
    device = comm.world().device
    chunk = max(1, _CHUNK_ELEMENTS // len(gallery_GD))
    gallery_Gd = cut(gallery_GD.to(device), dim)
    found = [torch.zeros(0, k, dtype=torch.int64)]
    scores = [gallery_Gd.new_zeros(0, k).cpu()]
    with exact_products(device):
        for start in range(0, len(query_QD), chunk):
            rows = torch.arange(start, min(start + chunk, len(query_QD)))
            score_qG = cut(query_QD[rows].to(device), dim) @ gallery_Gd.T
            if same_rows:
                score_qG[torch.arange(len(rows)), rows] = -torch.inf
            # All that reach the k-th score, ties among them, and of these the first k by score, then by row.
            least_q1 = score_qG.topk(k, dim=1).values[:, -1:]
            query_c, row_c = (x.cpu().numpy() for x in (score_qG >= least_q1).nonzero(as_tuple=True))
            value_c = score_qG.cpu().numpy()[query_c, row_c]
            order_c = np.lexsort((row_c, -value_c, query_c))
            first_q = np.searchsorted(query_c, np.arange(len(rows)))
            chosen = torch.from_numpy(order_c[first_q[:, None] + np.arange(k)])
            found.append(torch.from_numpy(row_c)[chosen])
            scores.append(torch.from_numpy(value_c)[chosen])
    return torch.cat(found), torch.cat(scores)
