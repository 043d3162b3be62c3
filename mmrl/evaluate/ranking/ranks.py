"""Exact, tie-aware ranks of every query's positives at every dim.

The rank of a query's n-th best positive is n plus the number of non-positives that score at least as high: a tie counts
against the query.

Shapes: Q queries, G gallery rows, N rows of one side sorted by group, D the embedding's width, d one dim, K dims; q and
m some of the queries, n those of one strip, P the greatest number of positives of one of them, c candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.errors import InputError
from mmrl.evaluate.ranking.tiles import Direction, SortedEmbeddings, count_at_least, exact_products
from mmrl.nesting import check_dims

Scores = dict[str, float]
KS = (1, 5, 10)
"""The K of recall@K that are always reported."""
NO_POSITIVE = "retrieval: no query has a positive; check image_of_text_M or the groups."
# Similarities in memory at once where whole rows of scores are computed: 32 MB of float32.
_CHUNK_ELEMENTS = 1 << 23
OnRows = Callable[[float], None]
"""Progress callback, called with a number of queries."""


@dataclass(frozen=True)
class PerQuery:
    """Metrics of each query of one direction at one dim. All but `query_Q` are float64."""

    query_Q: Tensor
    """int64: the rows of the queries that have a positive, ascending."""
    rank_Q: Tensor
    """The rank of the best positive, from 1."""
    average_precision_Q: Tensor
    r_precision_Q: Tensor
    """Average precision within the first R ranks, R the query's number of positives. Its mean is mAP@R."""
    ndcg_Q: Tensor
    """nDCG@10."""

    def scores(self, ks: Sequence[int] = KS) -> Scores:
        """The means over the queries, with the names of retrieval.json."""
        scores = {f"R@{k}": float((self.rank_Q <= k).double().mean()) for k in ks}
        return scores | {
            "mAP": float(self.average_precision_Q.mean()),
            "mAP@R": float(self.r_precision_Q.mean()),
            "nDCG@10": float(self.ndcg_Q.mean()),
            "MRR": float((1 / self.rank_Q).mean()),
            # torch.quantile takes at most 16 million values.
            "median_rank": float(np.median(self.rank_Q.numpy())),
            "mean_rank": float(self.rank_Q.mean()),
        }


def metric_names(ks: Sequence[int] = KS) -> tuple[str, ...]:
    """The keys of `PerQuery.scores`."""
    one = torch.ones(1, dtype=torch.float64)
    return tuple(PerQuery(one.long(), one, one, one, one).scores(ks))


def is_better_lower(metric: str) -> bool:
    """True for median_rank and mean_rank."""
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
    """Ranks the whole gallery for every query, by cosine of the prefixes at each of `dims`.

    Args:
        query_group_Q, gallery_group_G: int64; rows of equal group are positives of each other.
        same_rows: query i is gallery row i; it is left out of its own gallery.
        on_rows: called with numbers of queries that add up to Q.
        over_ranks: divide the work over all processes. All of them must call this with the same arguments; each gets
            the whole result.

    Raises:
        InputError: no query has a positive; dims out of range.
    """
    _check(dims, query_QD, gallery_GD)
    ascending, device = sorted(dims), comm.world().device
    queries = SortedEmbeddings(query_QD, query_group_Q, ascending, device)
    gallery = queries if same_rows else SortedEmbeddings(gallery_GD, gallery_group_G, ascending, device, columns=True)
    direction = Direction(queries, gallery, same_rows)
    return _rank(direction, direction if same_rows else None, ascending, on_rows, over_ranks)[0]


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
    """`rank_queries` for image→text and for text→image; each similarity is computed once.

    `on_rows` is called with numbers of queries that add up to N + M. Raises as `rank_queries`.
    """
    _check(dims, image_ND, text_MD)
    ascending, device = sorted(dims), comm.world().device
    image = SortedEmbeddings(image_ND, image_group_N, ascending, device)
    text = SortedEmbeddings(text_MD, text_group_M, ascending, device, columns=True)
    by_image, by_text = _rank(Direction(image, text), Direction(text, image), ascending, on_rows, over_ranks)
    return by_image, by_text


def _check(dims: Sequence[int], query_QD: Tensor, gallery_GD: Tensor) -> None:
    check_dims(dims, query_QD.shape[1])
    if not len(query_QD) or not len(gallery_GD):
        raise InputError(NO_POSITIVE)


def _rank(
    by_row: Direction, by_column: Direction | None, dims: Sequence[int], on_rows: OnRows | None, over_ranks: bool
) -> list[dict[int, PerQuery]]:
    """The metrics in each of the distinct directions; the arguments are those of `count_at_least`."""
    directions = [by_row] if by_column is None or by_column is by_row else [by_row, by_column]
    advance = on_rows or (lambda _: None)
    few = sum(len(one.queries) - int(one.many_N.sum()) for one in directions)
    if any(bool(one.few_N.any()) for one in directions):
        count_at_least(by_row, by_column, over_ranks, lambda fraction: advance(fraction * few))
    else:
        advance(few)
    return [_per_query(direction, dims, over_ranks, advance) for direction in directions]


def _per_query(direction: Direction, dims: Sequence[int], over_ranks: bool, advance: OnRows) -> dict[int, PerQuery]:
    """The metrics of the queries that have a positive, in the order of their rows; `dims` ascend."""
    queries = direction.queries
    positives_N = direction.count_N - int(direction.same_rows)
    if not (positives_N > 0).any():
        raise InputError(NO_POSITIVE)
    # Rank, average precision, R-precision and nDCG of each sorted query, at each dim.
    metric_K4N = torch.zeros(len(dims), 4, len(queries), dtype=torch.float64)
    few_q, many_m = (mask_N.nonzero()[:, 0] for mask_N in (direction.few_N, direction.many_N))
    for metric_4N, *of_dim in zip(metric_K4N, direction.threshold_KPN, direction.at_least_KPN, strict=True):
        threshold_qP, at_least_qP = (x_PN.cpu()[:, few_q].T.contiguous() for x_PN in of_dim)
        metric_4N[:, few_q] = _metrics(threshold_qP, at_least_qP, positives_N[few_q])
    if len(many_m):
        metric_K4N[:, :, many_m] = _metrics_by_sorting(direction, many_m, over_ranks, advance)
    query_Q, order_Q = queries.order_N[positives_N > 0].sort()
    metric_K4Q = metric_K4N[:, :, positives_N > 0][:, :, order_Q]
    return {dim: PerQuery(query_Q, *metric_4Q) for dim, metric_4Q in zip(dims, metric_K4Q, strict=True)}


def _metrics(threshold_qP: Tensor, at_least_qP: Tensor, count_q: Tensor) -> Tensor:
    """(4, q): rank of the best positive, average precision, average precision within the first R ranks, nDCG@10.

    Args:
        threshold_qP: the positives' scores, ascending, +inf after the last.
        at_least_qP: how many gallery rows, positives included, score at least as high.
        count_q: number of positives.
    """
    count_q1 = count_q[:, None]
    positives_at_least_qP = count_q1 - torch.searchsorted(threshold_qP, threshold_qP)
    nth_qP = count_q1 - torch.arange(threshold_qP.shape[1])
    exists_qP = nth_qP > 0
    rank_qP = torch.where(exists_qP, nth_qP + at_least_qP - positives_at_least_qP, 1).double()
    precision_qP = nth_qP / rank_qP * exists_qP
    gain_qP = (rank_qP <= 10) * exists_qP / torch.log2(rank_qP + 1)
    ideal_10 = (1 / torch.log2(torch.arange(2, 12).double())).cumsum(0)
    return torch.stack(
        [
            rank_qP.gather(1, count_q1 - 1)[:, 0],
            _sum_in_order(precision_qP) / count_q,
            _sum_in_order(precision_qP * (rank_qP <= count_q1)) / count_q,
            _sum_in_order(gain_qP) / ideal_10[count_q.clamp_max(10) - 1],
        ]
    )


def _sum_in_order(values_qP: Tensor) -> Tensor:
    """Sums one by one from the best positive to the last, so that the padding does not change the rounding."""
    return values_qP.flip(1).cumsum(1)[:, -1]


def _metrics_by_sorting(direction: Direction, many_m: Tensor, over_ranks: bool, advance: OnRows) -> Tensor:
    """The metrics of queries with more than MANY positives, (K, 4, m): whole rows of scores are sorted, in chunks."""
    queries, gallery = direction.queries, direction.gallery
    world = comm.world() if over_ranks else World()
    metric_K4m = torch.zeros(len(queries.block_slices), 4, len(many_m), dtype=torch.float64)
    chunk = max(1, _CHUNK_ELEMENTS // (len(gallery.strips) * gallery.length))
    with exact_products(world.device):
        for index, row_m in enumerate(torch.arange(len(many_m)).split(chunk)):
            if index % world.size == world.rank:
                metric_K4m[:, :, row_m] = _metrics_of_whole_rows(direction, many_m[row_m])
            advance(len(row_m))
    return comm.all_reduce_sum(metric_K4m.to(world.device)).cpu() if over_ranks else metric_K4m


def _metrics_of_whole_rows(direction: Direction, query_q: Tensor) -> Tensor:
    """(K, 4, q) for some sorted queries."""
    queries, gallery = direction.queries, direction.gallery
    # Padded like tiles, so that a score does not depend on the rows it is computed with.
    x_qD = torch.nn.functional.pad(queries.take(query_q), (0, 0, 0, -len(query_q) % 64))
    first_q, count_q = direction.first_N[query_q], direction.count_N[query_q]
    metrics = []
    product_qG = x_qD.new_zeros(len(query_q), len(gallery))
    scores_qG = torch.empty_like(product_qG)
    for k in range(len(queries.block_slices)):
        score_qG = scores_qG
        for strip in gallery.strips:
            span = gallery.span(strip)
            n = span.stop - span.start
            y_nd = gallery.rows(strip)[:, gallery.block_slices[k]]
            product_qG[:, span] += (x_qD[:, queries.block_slices[k]] @ y_nd.T)[: len(query_q), :n]
            torch.mul(product_qG[:, span], gallery.inverse_norms[strip][k, :n], out=score_qG[:, span])
        if direction.same_rows:
            score_qG[torch.arange(len(query_q)), query_q] = -torch.inf
        score_qG = score_qG.cpu()
        # Positives are consecutive columns. With `same_rows` the query's own score, -inf, sorts first and is cut off.
        most = int(count_q.max())
        column_qP = (first_q[:, None] + torch.arange(most)).clamp_max(len(gallery) - 1)
        threshold_qP = score_qG.gather(1, column_qP).masked_fill(torch.arange(most) >= count_q[:, None], torch.inf)
        threshold_qP = threshold_qP.sort(1).values[:, int(direction.same_rows) :].contiguous()
        score_qG.numpy().sort(axis=1)  # ten times as fast as torch's sort
        at_least_qP = len(gallery) - torch.searchsorted(score_qG, threshold_qP)
        metrics.append(_metrics(threshold_qP, at_least_qP, count_q - int(direction.same_rows)))
    return torch.stack(metrics)


def top_k(score_qG: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the k highest scores of each row, best first, ties by column, and the scores: (q, k) each."""
    k = min(k, score_qG.shape[1])
    if not k:
        return np.zeros((len(score_qG), 0), np.int64), score_qG[:, :0]
    # Candidates: all that reach the k-th score, so that ties at the end are decided by column as well.
    kth_q1 = np.partition(score_qG, -k, axis=1)[:, -k, None]
    query_c, column_c = np.divmod(np.flatnonzero(score_qG >= kth_q1), score_qG.shape[1])
    score_c = score_qG[query_c, column_c]
    order_c = np.lexsort((column_c, -score_c, query_c))
    first_q = np.searchsorted(query_c, np.arange(len(score_qG)))
    chosen_qk = order_c[first_q[:, None] + np.arange(k)]
    return column_c[chosen_qk], score_c[chosen_qk]
