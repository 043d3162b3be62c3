"""How many gallery rows score as high as each of a query's positives: all dims and both directions in one walk.

Before normalisation the similarities of the dims are running sums over column blocks of the embeddings, as in
losses/sweep.py: all dims cost the multiply-adds of the largest. Each similarity serves its row as a query and its
column as a query; what is kept of a tile are counts. A first walk over the few tiles that hold positives (both sides
are sorted by group, so these lie along a diagonal) finds the scores to be counted against.

Tiles are of one padded shape, so that a score is a function of its two vectors alone, wherever they stand: equal
vectors tie, and neither the order of rows nor the number of processes changes a count.

Shapes: N rows of a side, n of a strip, D the embedding's width, K dims; I rows and J columns of a tile, both n; P the
greatest number of positives that a query of a strip has.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# A query with more positives than these is ranked by sorting its scores, not by a comparison for each positive.
MANY = 16
# Rows, and columns, of a tile: 1 MB of float32, which a CPU keeps in its caches; a GPU wants few and large ones.
_CPU_TILE, _GPU_TILE = 512, 4096
# Below this share of a tile, scores that may count are listed and looked at one by one.
_SPARSE = 0.03


class Side:
    """Embeddings sorted by group, in strips of equal length; the last is padded."""

    def __init__(self, embedding_ND: Tensor, group_N: Tensor, dims: Sequence[int], device: torch.device) -> None:
        self.group_N, self.order_N = group_N.cpu().sort(stable=True)
        self.cuts = [slice(start, end) for start, end in pairwise((0, *dims))]
        self._width = dims[-1]
        self._in_order = bool((self.order_N == torch.arange(len(group_N))).all())
        self._embedding_ND = embedding_ND.to(device)
        self.length = tile_length(len(group_N), device)

    def __len__(self) -> int:
        return len(self.group_N)

    @property
    def strips(self) -> range:
        """The numbers of the strips."""
        return range(-(-len(self) // self.length))

    def span(self, strip: int) -> slice:
        """The sorted rows that a strip holds."""
        return slice(strip * self.length, min((strip + 1) * self.length, len(self)))

    def rows(self, strip: int) -> Tensor:
        """A strip, of float32 or wider, padded with zeros: (n, D)."""
        span = self.span(strip)
        wide = self.take(span if self._in_order else torch.arange(span.start, span.stop))
        missing = self.length - len(wide)
        return torch.nn.functional.pad(wide, (0, 0, 0, missing)) if missing else wide

    def take(self, sorted_rows: slice | Tensor) -> Tensor:
        """Some of the sorted rows, of float32 or wider."""
        places = sorted_rows if self._in_order else self.order_N[sorted_rows]
        given = self._embedding_ND[places if isinstance(places, slice) else places.to(self._embedding_ND.device)]
        given = given[:, : self._width]
        return given.float() if given.dtype in (torch.float16, torch.bfloat16) else given

    @cached_property
    def inverse_norms(self) -> list[Tensor]:
        """1 / the norm of each prefix, at most 1e12, of each strip: (K, n). NaN where a strip is padded, so that no
        comparison with what is there holds."""
        result = []
        for strip in self.strips:
            squares_Kn = torch.stack([part.square().sum(1) for part in self.blocks(self.rows(strip))]).cumsum(0)
            inverse_Kn = 1 / squares_Kn.sqrt().clamp_min(1e-12)
            span = self.span(strip)
            inverse_Kn[:, span.stop - span.start :] = torch.nan
            result.append(inverse_Kn)
        return result

    def blocks(self, rows_nD: Tensor) -> list[Tensor]:
        """What each dim adds to the one before."""
        return [rows_nD[:, cut] for cut in self.cuts]


def tile_length(rows: int, device: torch.device) -> int:
    """Rows of a strip: less than usual only where there are fewer."""
    return min(_GPU_TILE if device.type == "cuda" else _CPU_TILE, -(-rows // 64) * 64)


@dataclass(frozen=True)
class _Strip:
    """The queries of one strip."""

    first_n: Tensor
    """Where the query's positives begin in the sorted gallery; they are neighbours."""
    count_n: Tensor
    """How many they are, itself among them where the gallery holds the queries; 0 where it has none or many."""
    bound_KPn: Tensor
    """The positives' scores, ascending; +inf beyond the last."""
    at_least_KPn: Tensor
    """int32: the gallery rows that score as high or higher."""

    @property
    def reach(self) -> tuple[int, int]:
        """The sorted gallery rows between which all positives lie."""
        asks = self.count_n > 0
        if not asks.any():
            return 0, 0
        return int(self.first_n[asks].min()), int((self.first_n + self.count_n)[asks].max())


class Direction:
    """The queries of one side, each with at most MANY positives on the other."""

    def __init__(self, queries: Side, gallery: Side, same_rows: bool, like: Tensor) -> None:
        self.queries, self.gallery, self.same_rows = queries, gallery, same_rows
        self.first_N = torch.searchsorted(gallery.group_N, queries.group_N)
        self.count_N = torch.searchsorted(gallery.group_N, queries.group_N, right=True) - self.first_N
        """Positives of each sorted query, itself among them with `same_rows`."""
        self.many_N = self.count_N > MANY + same_rows
        """Which of them are not counted here."""
        few_N = self.count_N.masked_fill(self.many_N | (self.count_N == int(same_rows)), 0)
        self.asks_few = bool(few_N.any())
        self.strips: list[_Strip] = []
        for strip in queries.strips:
            span = queries.span(strip)
            missing = queries.length - (span.stop - span.start)
            first_n, count_n = (
                torch.nn.functional.pad(x[span], (0, missing)).to(like.device) for x in (self.first_N, few_N)
            )
            shape = (len(queries.cuts), max(int(count_n.max()), 1), queries.length)
            self.strips.append(
                _Strip(first_n, count_n, like.new_zeros(shape), like.new_zeros(shape, dtype=torch.int32))
            )
        self._reach = [strip.reach for strip in self.strips]

    def touches(self, strip: int, other: int) -> bool:
        """Whether a tile may hold positives of the strip's queries."""
        (first, last), span = self._reach[strip], self.gallery.span(other)
        return first < span.stop and last > span.start

    def take(self, k: int, strip: int, other: int, score_nJ: Tensor) -> None:
        """Keeps the positives' scores that a tile holds."""
        one, start = self.strips[strip], other * self.gallery.length
        nth_P1 = torch.arange(one.bound_KPn.shape[1], device=score_nJ.device)[:, None]
        column_Pn = one.first_n + nth_P1 - start
        here = (nth_P1 < one.count_n) & (column_Pn >= 0) & (column_Pn < self.gallery.length)
        p, row = here.nonzero(as_tuple=True)
        one.bound_KPn[k, p, row] = score_nJ[row, column_Pn[p, row]]

    def ready(self, total: Callable[[Tensor], Tensor]) -> None:
        """After all are taken: what each process found is put together, and sorted."""
        for strip in self.strips:
            nth_P1 = torch.arange(strip.bound_KPn.shape[1], device=strip.count_n.device)[:, None]
            found_KPn = total(strip.bound_KPn).masked_fill(nth_P1 >= strip.count_n, torch.inf)
            strip.bound_KPn.copy_(found_KPn.sort(dim=1).values)

    def count(self, k: int, strip: int, score_IJ: Tensor, spare: "_Spare", axis: int) -> None:
        """Counts a tile's scores against the bounds; the tile is used up. `axis` is the one of the queries."""
        one = self.strips[strip]
        bound_Pn, counts_Pn = one.bound_KPn[k], one.at_least_KPn[k]
        todo = len(bound_Pn)
        if todo > 1 and spare.mask_IJ is not None:
            todo = _count_sparse(bound_Pn, counts_Pn, score_IJ, spare.mask_IJ, axis)
        for p in range(len(bound_Pn) - todo, len(bound_Pn)):
            bound = bound_Pn[p, :, None] if axis == 0 else bound_Pn[p]
            if p < len(bound_Pn) - 1:
                above_IJ = torch.sub(score_IJ, bound, out=spare.score_IJ).ge_(0)
            else:
                above_IJ = score_IJ.ge_(bound)  # in place, since that is several times faster than to booleans
            counts_Pn[p] += above_IJ.sum(1 - axis).int()


@dataclass(frozen=True)
class _Spare:
    """Memory that all tiles share."""

    product_IJ: Tensor
    scaled_IJ: Tensor
    score_IJ: Tensor
    mask_IJ: Tensor | None
    """On a CPU."""


def _count_sparse(bound_Pn: Tensor, counts_Pn: Tensor, score_IJ: Tensor, mask_IJ: Tensor, axis: int) -> int:
    """Counts against the lowest bound; against the others too where few scores reach that one. Returns how many bounds
    are left to count against."""
    lowest = bound_Pn[0, :, None] if axis == 0 else bound_Pn[0]
    if torch.get_num_threads() < 4:  # numpy's comparison is the faster, but runs on one core
        np.greater_equal(score_IJ.numpy(), lowest.numpy(), out=mask_IJ.numpy())
    else:
        torch.ge(score_IJ, lowest, out=mask_IJ)
    sums_n = _sums_of_mask(mask_IJ, axis)
    counts_Pn[0] += sums_n
    if int(sums_n.sum()) > _SPARSE * mask_IJ.numel():
        return len(bound_Pn) - 1
    place_c = torch.from_numpy(np.flatnonzero(mask_IJ.numpy()))
    n = len(sums_n)
    query_c = torch.arange(n).repeat_interleave(sums_n) if axis == 0 else place_c % n
    reached_c = (score_IJ.view(-1)[place_c] >= bound_Pn[1:].index_select(1, query_c)).sum(0)
    # So many candidates of each query reach no further bound, the second, the third …
    reached_Pn = (reached_c * n + query_c).bincount(minlength=n * len(bound_Pn)).view(-1, n)
    counts_Pn[1:] += reached_Pn[1:].flip(0).cumsum(0).flip(0).int()
    return 0


def _sums_of_mask(mask_IJ: Tensor, axis: int) -> Tensor:
    """Sums along the other axis than `axis`, of eight booleans at a time: a word adds up eight counts below 256."""
    height, width = mask_IJ.shape
    words = mask_IJ.view(torch.int64)
    if axis == 1:
        parts = words.view(height // 64, 64, -1).sum(1).view(torch.uint8)
        return parts.view(height // 64, width).sum(0, dtype=torch.int32)
    parts = words.view(height, -1, 8).sum(1).view(torch.uint8)
    return parts.view(height, 64).sum(1, dtype=torch.int32)


def count_few(
    rows: Side,
    columns: Side,
    by_row: Direction,
    by_column: Direction | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    on_strip: Callable[[int], None] | None = None,
) -> None:
    """Fills `at_least_KPn` of both directions. `by_column` is left out where columns are no queries; it is `by_row`
    itself where the two sides are one, and then half of the tiles serve both."""
    one_side = by_column is by_row
    directions = [by_row] if one_side or by_column is None else [by_row, by_column]
    like = rows.rows(0)
    shape = (rows.length, columns.length)
    product_IJ, scaled_IJ, score_IJ = (like.new_empty(shape) for _ in range(3))
    mask_IJ = None if like.is_cuda else like.new_empty(shape, dtype=torch.bool)
    spare = _Spare(product_IJ, scaled_IJ, score_IJ, mask_IJ)
    mine = rows.strips[rank::world_size]
    with exact_products(like.device):
        for r in mine:
            row_nD = None
            for c in columns.strips[r if one_side else 0 :]:
                if by_row.touches(r, c) or (by_column is not None and by_column.touches(c, r)):
                    row_nD = rows.rows(r) if row_nD is None else row_nD
                    for k, score_IJ, axis in _scores(rows, columns, r, c, row_nD, by_row, by_column, spare, torch.inf):
                        if axis == 0:
                            by_row.take(k, r, c, score_IJ)
                        elif by_column is not None:
                            by_column.take(k, c, r, score_IJ.T)
        for direction in directions:
            direction.ready(total)
        for r in mine:
            row_nD = rows.rows(r)
            for c in columns.strips[r if one_side else 0 :]:
                for k, score_IJ, axis in _scores(rows, columns, r, c, row_nD, by_row, by_column, spare, -torch.inf):
                    if axis == 0:
                        by_row.count(k, r, score_IJ, spare, 0)
                    elif by_column is not None:
                        by_column.count(k, c, score_IJ, spare, 1)
            if on_strip:
                on_strip(min((r + world_size) * rows.length, len(rows)) - rows.span(r).start)
    for direction in directions:
        for strip in direction.strips:
            strip.at_least_KPn.copy_(total(strip.at_least_KPn))


def _scores(
    rows: Side,
    columns: Side,
    r: int,
    c: int,
    row_nD: Tensor,
    by_row: Direction,
    by_column: Direction | None,
    spare: _Spare,
    own: float,
) -> Iterator[tuple[int, Tensor, int]]:
    """A tile's scores for each dim k and each axis of queries, the query's own norm left out, which orders nothing.
    With `same_rows`, `own` stands for a query's score with itself."""
    one_side = by_column is by_row
    row_blocks, column_blocks = rows.blocks(row_nD), columns.blocks(columns.rows(c))
    product_IJ, scaled_IJ = spare.product_IJ, spare.scaled_IJ
    for k, (x, y) in enumerate(zip(row_blocks, column_blocks, strict=True)):
        if k == 0:
            torch.mm(x, y.T, out=product_IJ)
        else:
            torch.addmm(product_IJ, x, y.T, out=product_IJ)
        torch.mul(product_IJ, columns.inverse_norms[c][k], out=scaled_IJ)
        if by_row.same_rows and r == c:
            scaled_IJ.fill_diagonal_(own)
        yield k, scaled_IJ, 0
        if by_column is not None and not (one_side and r == c):
            yield k, torch.mul(product_IJ, rows.inverse_norms[r][k][:, None], out=scaled_IJ), 1


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """float32 products are float32's, whatever the user allows elsewhere."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        settings = torch.backends.cuda.matmul
        before, settings.fp32_precision = settings.fp32_precision, "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before
