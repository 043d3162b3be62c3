"""Tiled exact ranking: counts the gallery rows that score at least as high as each positive, at all dims at once.

Before normalisation, the similarities at each dim are running sums over column blocks of the embeddings, as in
losses/sweep.py: all dims together cost the multiply-adds of the largest. A tile serves its rows as queries and its
columns as queries; only counts are kept of it. A first pass, over the few tiles that hold positives, collects the
positives' scores: the thresholds. (Both sides are sorted by group, so these tiles are near the diagonal.) A second pass
over all tiles counts the scores that reach them.

All tiles are padded to one shape, so that a score depends on its two vectors only, not on their positions: equal
vectors tie, and neither the order of rows nor the number of processes changes a count.

Shapes: N rows of one side, n of a strip (the rows of one tile), D the embedding's width, K dims; I rows and J columns
of a tile, both n; P the greatest number of positives of a query in a strip.
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

from mmrl.distributed import comm
from mmrl.distributed.comm import World

# Queries with more positives than this are ranked by sorting their scores, not by one comparison per positive.
MANY = 16
# Rows of a tile at most; its columns may be twice as many if they are another side. On a CPU, 2 MB of float32, which
# stay in its cache; a GPU wants few large tiles.
_CPU_TILE, _GPU_TILE = 512, 4096
# Tiles per task of a thread: some tenths of a second, the time Ctrl-C may have to wait.
_TILES_PER_TASK = 16
# torch's number of threads is partly a process-wide setting.
_thread_count_lock = threading.Lock()


class SortedEmbeddings:
    """Embeddings sorted by group, in strips of equal length; the last strip is padded."""

    def __init__(
        self, embedding_ND: Tensor, group_N: Tensor, dims: Sequence[int], device: torch.device, columns: bool = False
    ) -> None:
        """Args: columns: these are the columns of tiles whose rows are other embeddings."""
        self.group_N, self.order_N = group_N.cpu().sort(stable=True)
        self.block_slices = [slice(start, end) for start, end in pairwise((0, *dims))]
        self._width = dims[-1]
        self._is_sorted = bool((self.order_N == torch.arange(len(group_N))).all())
        self._embedding_ND = embedding_ND.to(device)
        self.length = tile_length(len(group_N), device, columns)
        self.inverse_norms = [self._inverse_norms(strip) for strip in self.strips]
        """Of each strip: 1 / the norm, at least 1e-12, of its rows' prefixes, (K, n). NaN in the padding, so that every
        comparison with a padded row is false."""

    def __len__(self) -> int:
        return len(self.group_N)

    @property
    def strips(self) -> range:
        """The indices of the strips."""
        return range(-(-len(self) // self.length))

    def span(self, strip: int) -> slice:
        """The sorted rows of a strip."""
        return slice(strip * self.length, min((strip + 1) * self.length, len(self)))

    def rows(self, strip: int) -> Tensor:
        """A strip in float32 or wider, zero-padded: (n, D)."""
        span = self.span(strip)
        rows_ND = self.take(span if self._is_sorted else torch.arange(span.start, span.stop))
        missing = self.length - len(rows_ND)
        return torch.nn.functional.pad(rows_ND, (0, 0, 0, missing)) if missing else rows_ND

    def take(self, sorted_rows: slice | Tensor) -> Tensor:
        """Some sorted rows in float32 or wider."""
        index = sorted_rows if self._is_sorted else self.order_N[sorted_rows]
        rows = self._embedding_ND[index if isinstance(index, slice) else index.to(self._embedding_ND.device)]
        rows = rows[:, : self._width]
        return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows

    def _inverse_norms(self, strip: int) -> Tensor:
        squares_Kn = torch.stack([block.square().sum(1) for block in self.blocks(self.rows(strip))]).cumsum(0)
        span = self.span(strip)
        squares_Kn[:, span.stop - span.start :] = torch.nan
        return 1 / squares_Kn.sqrt().clamp_min(1e-12)

    def blocks(self, rows_nD: Tensor) -> list[Tensor]:
        """The columns that each dim adds to the previous one."""
        return [rows_nD[:, columns] for columns in self.block_slices]


def tile_length(rows: int, device: torch.device, columns: bool = False) -> int:
    """Rows per strip: as few equal strips as fit the tile size, with little padding (a multiple of 64)."""
    most = _GPU_TILE if device.type == "cuda" else _CPU_TILE * (1 + columns)
    strips = -(-rows // most)
    return -(-rows // (64 * strips)) * 64


@dataclass(frozen=True)
class _QueryStrip:
    """The queries of one strip: their positives, thresholds and counts."""

    first_n: Tensor
    """Index of the query's first positive in the sorted gallery; the positives are consecutive."""
    count_n: Tensor
    """Number of positives, the query itself included if the gallery contains it; 0 if it has none or more than MANY."""
    threshold_KPn: Tensor
    """The positives' scores, ascending; +inf after the last."""
    at_least_KPn: Tensor
    """int32: the number of gallery rows that score at least as high."""

    @property
    def reach(self) -> tuple[int, int]:
        """First and last + 1 of the sorted gallery rows that hold positives."""
        has_positives = self.count_n > 0
        if not has_positives.any():
            return 0, 0
        return int(self.first_n[has_positives].min()), int((self.first_n + self.count_n)[has_positives].max())


class Direction:
    """The queries of one side against the gallery of the other, with thresholds and counts for those that have at most
    MANY positives."""

    def __init__(self, queries: SortedEmbeddings, gallery: SortedEmbeddings, same_rows: bool = False) -> None:
        """Args: same_rows: the gallery is the queries, each of which is left out of its own gallery."""
        self.queries, self.gallery, self.same_rows = queries, gallery, same_rows
        like = queries.rows(0)  # the dtype and the device of the thresholds
        self.first_N = torch.searchsorted(gallery.group_N, queries.group_N)
        self.count_N = torch.searchsorted(gallery.group_N, queries.group_N, right=True) - self.first_N
        """Number of positives of each sorted query, itself included with `same_rows`."""
        self.many_N = self.count_N > MANY + same_rows
        """Queries with more than MANY positives, which are not counted here."""
        few_N = self.count_N.masked_fill(self.many_N | (self.count_N == int(same_rows)), 0)
        self.has_few = bool(few_N.any())
        self.strips: list[_QueryStrip] = []
        self._lock = threading.Lock()
        for strip in queries.strips:
            span = queries.span(strip)
            missing = queries.length - (span.stop - span.start)
            first_n, count_n = (
                torch.nn.functional.pad(x[span], (0, missing)).to(like.device) for x in (self.first_N, few_N)
            )
            shape = (len(queries.block_slices), max(int(count_n.max()), 1), queries.length)
            at_least_KPn = like.new_zeros(shape, dtype=torch.int32)
            self.strips.append(_QueryStrip(first_n, count_n, like.new_zeros(shape), at_least_KPn))
        self._reach = [strip.reach for strip in self.strips]

    def may_hold_positives(self, query_strip: int, gallery_strip: int) -> bool:
        """Whether the tile of these two strips may hold positives."""
        (first, last), span = self._reach[query_strip], self.gallery.span(gallery_strip)
        return first < span.stop and last > span.start

    def collect_thresholds(self, k: int, query_strip: int, gallery_strip: int, product_QG: Tensor) -> None:
        """Stores the scores of the positives in a tile."""
        strip, start = self.strips[query_strip], gallery_strip * self.gallery.length
        nth_P1 = torch.arange(strip.threshold_KPn.shape[1], device=product_QG.device)[:, None]
        column_PQ = strip.first_n + nth_P1 - start
        in_tile_PQ = (nth_P1 < strip.count_n) & (column_PQ >= 0) & (column_PQ < self.gallery.length)
        p, query = in_tile_PQ.nonzero(as_tuple=True)
        column = column_PQ[p, query]
        inverse = self.gallery.inverse_norms[gallery_strip][k, column]
        strip.threshold_KPn[k, p, query] = product_QG[query, column] * inverse

    def finish_thresholds(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Merges the thresholds that the processes collected, and sorts them."""
        for strip in self.strips:
            nth_P1 = torch.arange(strip.threshold_KPn.shape[1], device=strip.count_n.device)[:, None]
            merged_KPn = all_reduce(strip.threshold_KPn).masked_fill(nth_P1 >= strip.count_n, torch.inf)
            strip.threshold_KPn.copy_(merged_KPn.sort(dim=1).values)

    def count(self, k: int, query_strip: int, gallery_strip: int, product_QG: Tensor, spare_2QG: Tensor) -> None:
        """Adds the number of a tile's scores that reach each threshold. A score is an inner product divided by the
        gallery row's norm: the query's norm does not change the order."""
        strip = self.strips[query_strip]
        score_QG = torch.mul(product_QG, self.gallery.inverse_norms[gallery_strip][k], out=spare_2QG[0])
        for threshold_Q, at_least_Q in zip(strip.threshold_KPn[k], strip.at_least_KPn[k], strict=True):
            # Floats: booleans take several times as long to write and sum.
            count_Q = torch.ge(score_QG, threshold_Q[:, None], out=spare_2QG[1]).sum(1).int()
            with self._lock:  # other threads count other tiles for the same queries
                at_least_Q += count_Q


def count_at_least(
    by_row: Direction, by_column: Direction | None, over_ranks: bool, on_fraction: Callable[[float], None]
) -> None:
    """Fills `at_least_KPn` of the given directions, for the queries that have at most MANY positives.

    Args:
        by_row: its queries are the rows of the tiles, its gallery the columns.
        by_column: None if columns are not queries; `by_row` itself if rows and columns are the same embeddings, and
            then half of the tiles serve both.
        over_ranks: divide the work over all processes.
        on_fraction: called with fractions of the work that add up to 1.
    """
    rows, columns = by_row.queries, by_row.gallery
    directions = [by_row] if by_column is None or by_column is by_row else [by_row, by_column]
    world = comm.world() if over_ranks else World()
    all_reduce = comm.all_reduce_sum if over_ranks else lambda values: values
    tasks = [
        (r, chunk[start : start + _TILES_PER_TASK])
        for r in rows.strips[world.rank :: world.size]
        for chunk in (columns.strips[r if by_column is by_row else 0 :],)
        for start in range(0, len(chunk), _TILES_PER_TASK)
    ]
    tiles = sum(len(chunk) for _, chunk in tasks)
    device, local = rows.inverse_norms[0].device, threading.local()

    def run_task(method: Callable[[_TileWorker, int, Sequence[int]], None], task: tuple[int, Sequence[int]]) -> int:
        if not hasattr(local, "worker"):
            local.worker = _TileWorker(by_row, by_column)
        with torch.inference_mode(), exact_products(device):
            method(local.worker, *task)
        return len(task[1])

    with _thread_map(device) as map_tasks:
        for _ in map_tasks(partial(run_task, _TileWorker.collect_thresholds), tasks):
            pass
        for direction in directions:
            direction.finish_thresholds(all_reduce)
        for done in map_tasks(partial(run_task, _TileWorker.count), tasks):
            on_fraction(done / tiles)
    for direction in directions:
        for strip in direction.strips:
            strip.at_least_KPn.copy_(all_reduce(strip.at_least_KPn))


@contextlib.contextmanager
def _thread_map(device: torch.device) -> Iterator[Callable[..., Iterator[int]]]:
    """A `map` over as many threads as torch has. Each runs single-threaded products, since a tile is too small to be
    divided. On a GPU, the plain `map`."""
    count = 1 if device.type == "cuda" else torch.get_num_threads()
    if count == 1:
        yield map
        return
    with _thread_count_lock:
        pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield pool.map
        finally:
            try:
                pool.shutdown(cancel_futures=True)
            finally:
                torch.set_num_threads(count)


class _TileWorker:
    """Computes the tiles of a strip of rows, for one thread."""

    def __init__(self, by_row: Direction, by_column: Direction | None) -> None:
        self.rows, self.columns, self.by_row, self.by_column = by_row.queries, by_row.gallery, by_row, by_column
        self.product_IJ = self.rows.rows(0).new_empty(self.rows.length, self.columns.length)
        self._spare_2IJ = self.product_IJ.new_empty(2, *self.product_IJ.shape)

    def collect_thresholds(self, r: int, columns: Sequence[int]) -> None:
        """First pass: the positives' scores, from the tiles that may hold any."""
        by_row, by_column = self.by_row, self.by_column
        chosen = [
            c
            for c in columns
            if by_row.may_hold_positives(r, c) or (by_column is not None and by_column.may_hold_positives(c, r))
        ]
        for c, k in self._tiles(r, chosen, self_score=torch.inf):
            by_row.collect_thresholds(k, r, c, self.product_IJ)
            if by_column is not None and self._columns_differ(r, c):
                by_column.collect_thresholds(k, c, r, self.product_IJ.T)

    def count(self, r: int, columns: Sequence[int]) -> None:
        """Second pass: counts in all of these tiles."""
        for c, k in self._tiles(r, columns, self_score=-torch.inf):
            self.by_row.count(k, r, c, self.product_IJ, self._spare_2IJ)
            if self.by_column is not None and self._columns_differ(r, c):
                self.by_column.count(k, c, r, self.product_IJ.T, self._spare_2IJ.mT)

    def _columns_differ(self, r: int, c: int) -> bool:
        """Whether the tile's columns are other queries than its rows."""
        return self.by_column is not self.by_row or r != c

    def _tiles(self, r: int, columns: Sequence[int], self_score: float) -> Iterator[tuple[int, int]]:
        """Yields (strip of columns, index of the dim) with the tile's inner products in `product_IJ`. With `same_rows`,
        a row's product with itself is replaced by `self_score`."""
        row_blocks = self.rows.blocks(self.rows.rows(r)) if columns else []
        for c in columns:
            column_blocks = self.columns.blocks(self.columns.rows(c))
            for k, (x, y) in enumerate(zip(row_blocks, column_blocks, strict=True)):
                if k == 0:
                    torch.mm(x, y.T, out=self.product_IJ)
                else:
                    torch.addmm(self.product_IJ, x, y.T, out=self.product_IJ)
                if self.by_row.same_rows and r == c:
                    self.product_IJ.fill_diagonal_(self_score)
                yield c, k


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Computes float32 products in full float32: disables autocast and TF32."""
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
