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
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from mmrl.evaluate.ranking.counting import Asked, Attempt, Counter, nearly

# A query with more positives than these is ranked by sorting its scores, not by a comparison for each positive.
MANY = 16
# Rows of a tile at most, and half of its columns where these are another side: 2 MB of float32 on a CPU, whose caches
# keep them; a GPU wants few and large ones.
_CPU_TILE, _GPU_TILE = 512, 4096
# Tiles that a thread takes at once: some tenths of a second, for which Ctrl-C may have to wait.
_AT_A_TIME = 16
# How many threads torch has is in part a matter of the whole process.
_one_walk = threading.Lock()


class Side:
    """Embeddings sorted by group, in strips of equal length; the last is padded."""

    def __init__(
        self, embedding_ND: Tensor, group_N: Tensor, dims: Sequence[int], device: torch.device, columns: bool = False
    ) -> None:
        """Args: columns: those of tiles whose rows are another side."""
        self.group_N, self.order_N = group_N.cpu().sort(stable=True)
        self.cuts = [slice(start, end) for start, end in pairwise((0, *dims))]
        self._width = dims[-1]
        self._in_order = bool((self.order_N == torch.arange(len(group_N))).all())
        self._embedding_ND = embedding_ND.to(device)
        self.length = tile_length(len(group_N), device, columns)
        self.norms = [self._norms(strip) for strip in self.strips]
        """Of each strip."""

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

    def _norms(self, strip: int) -> "Norms":
        squares_Kn = torch.stack([part.square().sum(1) for part in self.blocks(self.rows(strip))]).cumsum(0)
        norm_Kn = squares_Kn.sqrt().clamp_min(1e-12)
        span = self.span(strip)
        norm_Kn[:, span.stop - span.start :] = torch.nan
        return Norms(norm_Kn, 1 / norm_Kn)

    def blocks(self, rows_nD: Tensor) -> list[Tensor]:
        """What each dim adds to the one before."""
        return [rows_nD[:, cut] for cut in self.cuts]


def tile_length(rows: int, device: torch.device, columns: bool = False) -> int:
    """Rows of a strip: as many as there is room for, in as many equal strips as it takes, with little padding."""
    most = _GPU_TILE if device.type == "cuda" else _CPU_TILE * (1 + columns)
    strips = -(-rows // most)
    return -(-rows // (64 * strips)) * 64


@dataclass(frozen=True)
class Norms:
    """Of the prefixes of a strip's rows, at least 1e-12. NaN where the strip is padded, so that no comparison with what
    is there holds."""

    norm_Kn: Tensor
    inverse_Kn: Tensor


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
    nearly_Kn: Tensor
    """Somewhat below the lowest of the positives' scores, by more than a product is rounded."""

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
        self._adding = threading.Lock()
        self._listing = [Attempt() for _ in queries.cuts]
        for strip in queries.strips:
            span = queries.span(strip)
            missing = queries.length - (span.stop - span.start)
            first_n, count_n = (
                torch.nn.functional.pad(x[span], (0, missing)).to(like.device) for x in (self.first_N, few_N)
            )
            shape = (len(queries.cuts), max(int(count_n.max()), 1), queries.length)
            bound_KPn, at_least_KPn = like.new_zeros(shape), like.new_zeros(shape, dtype=torch.int32)
            self.strips.append(_Strip(first_n, count_n, bound_KPn, at_least_KPn, torch.empty_like(bound_KPn[:, 0])))
        self._reach = [strip.reach for strip in self.strips]

    def touches(self, strip: int, other: int) -> bool:
        """Whether a tile may hold positives of the strip's queries."""
        (first, last), span = self._reach[strip], self.gallery.span(other)
        return first < span.stop and last > span.start

    def take(self, k: int, strip: int, other: int, product_QG: Tensor) -> None:
        """Keeps the positives' scores that a tile holds."""
        one, start = self.strips[strip], other * self.gallery.length
        nth_P1 = torch.arange(one.bound_KPn.shape[1], device=product_QG.device)[:, None]
        column_PQ = one.first_n + nth_P1 - start
        here_PQ = (nth_P1 < one.count_n) & (column_PQ >= 0) & (column_PQ < self.gallery.length)
        p, query = here_PQ.nonzero(as_tuple=True)
        column = column_PQ[p, query]
        one.bound_KPn[k, p, query] = product_QG[query, column] * self.gallery.norms[other].inverse_Kn[k, column]

    def ready(self, total: Callable[[Tensor], Tensor]) -> None:
        """After all are taken: what each process found is put together, and sorted."""
        for strip in self.strips:
            nth_P1 = torch.arange(strip.bound_KPn.shape[1], device=strip.count_n.device)[:, None]
            found_KPn = total(strip.bound_KPn).masked_fill(nth_P1 >= strip.count_n, torch.inf)
            strip.bound_KPn.copy_(found_KPn.sort(dim=1).values)
            lowest_Kn = strip.bound_KPn[:, 0]
            strip.nearly_Kn.copy_(nearly(lowest_Kn)).nan_to_num_(nan=torch.inf)

    def asked(self, k: int, strip: int, other: int, axis: int) -> Asked:
        """What is to be counted of a tile whose `axis` has the queries."""
        one, norms = self.strips[strip], self.gallery.norms[other]
        return Asked(
            axis,
            one.bound_KPn[k],
            one.nearly_Kn[k],
            norms.norm_Kn[k],
            norms.inverse_Kn[k],
            one.at_least_KPn[k],
            self._adding,
            self._listing[k],
        )


def count_few(
    rows: Side,
    columns: Side,
    by_row: Direction,
    by_column: Direction | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[Tensor], Tensor] = lambda values: values,
    on_share: Callable[[float], None] | None = None,
) -> None:
    """Fills `at_least_KPn` of both directions. `by_column` is left out where columns are no queries; it is `by_row`
    itself where the two sides are one, and then half of the tiles serve both.

    Args:
        on_share: told shares of the work, which add up to 1.
    """
    directions = [by_row] if by_column is None or by_column is by_row else [by_row, by_column]
    parts = [
        (r, others[start : start + _AT_A_TIME])
        for r in rows.strips[rank::world_size]
        for others in (columns.strips[r if by_column is by_row else 0 :],)
        for start in range(0, len(others), _AT_A_TIME)
    ]
    tiles = sum(len(others) for _, others in parts)
    device, mine = rows.norms[0].norm_Kn.device, threading.local()

    def walk(how: Callable[[_Walk, int, Sequence[int]], None], part: tuple[int, Sequence[int]]) -> int:
        if not hasattr(mine, "walk"):
            mine.walk = _Walk(rows, columns, by_row, by_column)
        with torch.inference_mode(), exact_products(device):
            how(mine.walk, *part)
        return len(part[1])

    with _on_threads(device) as each:
        for _ in each(partial(walk, _Walk.find_bounds), parts):
            pass
        for direction in directions:
            direction.ready(total)
        for done in each(partial(walk, _Walk.count), parts):
            if on_share:
                on_share(done / tiles)
    for direction in directions:
        for strip in direction.strips:
            strip.at_least_KPn.copy_(total(strip.at_least_KPn))


@contextlib.contextmanager
def _on_threads(device: torch.device) -> Iterator[Callable[..., Iterator[int]]]:
    """A `map` over as many threads as torch has, in each of which a product has one: a tile is too small to be divided.
    A GPU is fed by the caller."""
    count = 1 if device.type == "cuda" else torch.get_num_threads()
    if count == 1:
        yield map
        return
    with _one_walk:
        pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool.map
        finally:
            try:
                pool.shutdown(cancel_futures=True)
            finally:
                torch.set_num_threads(count)


class _Walk:
    """Over tiles of two sides, some of a strip of rows at a time."""

    def __init__(self, rows: Side, columns: Side, by_row: Direction, by_column: Direction | None) -> None:
        self.rows, self.columns, self.by_row, self.by_column = rows, columns, by_row, by_column
        self.product_IJ = rows.rows(0).new_empty(rows.length, columns.length)
        self._counter = Counter(self.product_IJ)

    def find_bounds(self, r: int, columns: Sequence[int]) -> None:
        """The positives' scores, from those tiles that hold any."""
        by_row, by_column = self.by_row, self.by_column
        holding = [c for c in columns if by_row.touches(r, c) or (by_column is not None and by_column.touches(c, r))]
        for c, k in self._tiles(r, holding, own=torch.inf):
            by_row.take(k, r, c, self.product_IJ)
            if by_column is not None and self._both(r, c):
                by_column.take(k, c, r, self.product_IJ.T)

    def count(self, r: int, columns: Sequence[int]) -> None:
        """All of these tiles."""
        for c, k in self._tiles(r, columns, own=-torch.inf):
            asked = [self.by_row.asked(k, r, c, axis=0)]
            if self.by_column is not None and self._both(r, c):
                asked.append(self.by_column.asked(k, c, r, axis=1))
            self._counter.count(asked)

    def _both(self, r: int, c: int) -> bool:
        """Whether a tile's columns are other queries than its rows."""
        return self.by_column is not self.by_row or r != c

    def _tiles(self, r: int, chosen: Sequence[int], own: float) -> Iterator[tuple[int, int]]:
        """(strip of columns, number of the dim), the tile's inner products being in `product_IJ`. With `same_rows`,
        `own`, plus or minus infinity, stands for those of a row with itself."""
        row_blocks = self.rows.blocks(self.rows.rows(r)) if chosen else []
        for c in chosen:
            column_blocks = self.columns.blocks(self.columns.rows(c))
            for k, (x, y) in enumerate(zip(row_blocks, column_blocks, strict=True)):
                if k == 0:
                    torch.mm(x, y.T, out=self.product_IJ)
                else:
                    torch.addmm(self.product_IJ, x, y.T, out=self.product_IJ)
                if self.by_row.same_rows and r == c:
                    self.product_IJ.fill_diagonal_(own)
                yield c, k


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
