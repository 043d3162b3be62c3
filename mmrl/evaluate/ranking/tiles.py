"""Tiled exact ranking: counts the gallery rows that score at least as high as each positive, at all dims at once.

Before normalisation, the similarities at each dim are running sums over column blocks of the embeddings, as in
losses/sweep.py: all dims together cost the multiply-adds of the largest. A tile serves its rows as queries and its
columns as queries; only counts are kept of it. A first pass, over the few tiles that hold positives, collects the
positives' scores: the thresholds. (Both sides are sorted by group, so these tiles are near the diagonal.) A second pass
over all tiles counts the scores that reach them.

All tiles are padded to one shape, so that a score depends on its two vectors only, not on their positions: equal
vectors tie, and neither the order of rows nor the number of processes changes a count.

Shapes: N rows of one side, n of a strip (the rows of one tile), D the embedding's width, K dims; I rows and J columns
of a tile, both n; P the greatest number of positives of a query.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
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
        self._embedding_ND, self._order_N = embedding_ND.to(device)[:, : dims[-1]], self.order_N.to(device)
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
        rows_ND = self.take(self.span(strip))
        return F.pad(rows_ND, (0, 0, 0, self.length - len(rows_ND)))

    def take(self, sorted_rows: slice | Tensor) -> Tensor:
        rows = self._embedding_ND[self._order_N[sorted_rows]]
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


class Direction:
    """The queries of one side against the gallery of the other, with thresholds and counts for those that have at most
    MANY positives."""

    def __init__(self, queries: SortedEmbeddings, gallery: SortedEmbeddings, same_rows: bool = False) -> None:
        """Args: same_rows: the gallery is the queries, each of which is left out of its own gallery."""
        self.queries, self.gallery, self.same_rows = queries, gallery, same_rows
        self.first_N = torch.searchsorted(gallery.group_N, queries.group_N)
        """Index of the query's first positive in the sorted gallery; the positives are consecutive."""
        self.count_N = torch.searchsorted(gallery.group_N, queries.group_N, right=True) - self.first_N
        """Number of positives of each sorted query, itself included with `same_rows`."""
        self.many_N = self.count_N > MANY + same_rows
        """Queries with more than MANY positives, which are not counted here."""
        self.few_N = (self.count_N > int(same_rows)) & ~self.many_N
        like = queries.inverse_norms[0]  # the dtype and the device of the thresholds
        counted_N, padded = self.count_N * self.few_N, len(queries.strips) * queries.length
        self._first_N, self._counted_N = (
            F.pad(x, (0, padded - len(queries))).to(like.device) for x in (self.first_N, counted_N)
        )
        self._nth_P1 = torch.arange(max(int(counted_N.max()), 1), device=like.device)[:, None]
        shape = (len(queries.block_slices), len(self._nth_P1), padded)
        self.threshold_KPN = like.new_zeros(shape)
        """The positives' scores, ascending; +inf after the last."""
        self.at_least_KPN = like.new_zeros(shape, dtype=torch.int32)
        """The number of gallery rows that score at least as high."""
        self._reaches = [self._reach(strip) for strip in queries.strips]
        self._lock = threading.Lock()

    def _padded_span(self, strip: int) -> slice:
        return slice(strip * self.queries.length, (strip + 1) * self.queries.length)

    def _reach(self, strip: int) -> tuple[int, int, int]:
        """First and last + 1 of the sorted gallery rows that hold positives of a strip; its greatest number of them."""
        first_n, counted_n = (x[self._padded_span(strip)] for x in (self._first_N, self._counted_N))
        first_n, counted_n = first_n[counted_n > 0], counted_n[counted_n > 0]
        if not len(first_n):
            return 0, 0, 0
        return int(first_n.min()), int((first_n + counted_n).max()), int(counted_n.max())

    def may_hold_positives(self, query_strip: int, gallery_strip: int) -> bool:
        """Whether the tile of these two strips may hold positives."""
        (first, last, _), span = self._reaches[query_strip], self.gallery.span(gallery_strip)
        return first < span.stop and last > span.start

    def collect_thresholds(self, k: int, query_strip: int, gallery_strip: int, product_QG: Tensor) -> None:
        """Stores the scores of the positives in a tile."""
        span, length = self._padded_span(query_strip), self.gallery.length
        column_PQ = self._first_N[span] + self._nth_P1 - gallery_strip * length
        in_tile_PQ = (self._nth_P1 < self._counted_N[span]) & (column_PQ >= 0) & (column_PQ < length)
        p, query = in_tile_PQ.nonzero(as_tuple=True)
        column = column_PQ[p, query]
        inverse = self.gallery.inverse_norms[gallery_strip][k, column]
        self.threshold_KPN[k, :, span][p, query] = product_QG[query, column] * inverse

    def finish_thresholds(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Merges the thresholds that the processes collected, and sorts them."""
        missing_PN = self._nth_P1 >= self._counted_N
        self.threshold_KPN = all_reduce(self.threshold_KPN).masked_fill(missing_PN, torch.inf).sort(dim=1).values

    def count(self, k: int, query_strip: int, gallery_strip: int, product_QG: Tensor, spare_2QG: Tensor) -> None:
        """Adds the number of a tile's scores that reach each threshold. A score is an inner product divided by the
        gallery row's norm: the query's norm does not change the order."""
        span = self._padded_span(query_strip)
        score_QG = torch.mul(product_QG, self.gallery.inverse_norms[gallery_strip][k], out=spare_2QG[0])
        for p in range(self._reaches[query_strip][2]):
            # Floats: booleans take several times as long to write and sum.
            threshold_Q1 = self.threshold_KPN[k, p, span, None]
            count_Q = torch.ge(score_QG, threshold_Q1, out=spare_2QG[1]).sum(1).int()
            with self._lock:  # other threads count other tiles for the same queries
                self.at_least_KPN[k, p, span] += count_Q


def count_at_least(
    by_row: Direction, by_column: Direction | None, over_ranks: bool, on_fraction: Callable[[float], None]
) -> None:
    """Fills `at_least_KPN` of the given directions, for the queries that have at most MANY positives.

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
    tiles, device = sum(len(chunk) for _, chunk in tasks), rows.inverse_norms[0].device
    with _thread_map(device) as map_tasks:
        for _ in map_tasks(partial(_run_task, by_row, by_column, False), tasks):
            pass
        for direction in directions:
            direction.finish_thresholds(all_reduce)
        for done in map_tasks(partial(_run_task, by_row, by_column, True), tasks):
            on_fraction(done / tiles)
    for direction in directions:
        direction.at_least_KPN = all_reduce(direction.at_least_KPN)


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


def _run_task(by_row: Direction, by_column: Direction | None, counts: bool, task: tuple[int, Sequence[int]]) -> int:
    """Computes some tiles of a strip of rows and passes them to the directions: in the first pass, those that may hold
    positives, to collect thresholds; in the second all, to count. Returns the number of tiles."""
    rows, columns, (r, chunk) = by_row.queries, by_row.gallery, task
    product_IJ = rows.inverse_norms[0].new_empty(rows.length, columns.length)
    spare_2IJ = product_IJ.new_empty(2, *product_IJ.shape)
    with torch.inference_mode(), exact_products(product_IJ.device):
        row_blocks = rows.blocks(rows.rows(r))
        for c in chunk:
            served = [(by_row, r, c, product_IJ, spare_2IJ)]
            if by_column is not None and (by_column is not by_row or r != c):  # the columns are other queries
                served.append((by_column, c, r, product_IJ.T, spare_2IJ.mT))
            if not counts and not any(direction.may_hold_positives(q, g) for direction, q, g, *_ in served):
                continue
            for k, (x, y) in enumerate(zip(row_blocks, columns.blocks(columns.rows(c)), strict=True)):
                torch.addmm(product_IJ, x, y.T, beta=min(k, 1), out=product_IJ)
                if by_row.same_rows and r == c:  # a row is not its own positive, and not counted
                    product_IJ.fill_diagonal_(-torch.inf if counts else torch.inf)
                for direction, query_strip, gallery_strip, product_QG, spare_2QG in served:
                    if counts:
                        direction.count(k, query_strip, gallery_strip, product_QG, spare_2QG)
                    else:
                        direction.collect_thresholds(k, query_strip, gallery_strip, product_QG)
    return len(chunk)


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
