"""Compute the logits of all nested dims tile by tile, without ever storing a whole logit matrix.

Before normalisation, the dot products of nested prefixes are running sums over column blocks of the embeddings: the
prefix of length d_k adds the product of block d_(k-1) … d_k to that of the prefix of length d_(k-1). So all K logit
matrices together cost the multiply-adds of the largest one, forward and backward. Normalisation is one factor per row
and one per column. Each tile serves both directions: its rows for image-to-text, its columns for text-to-image.

Logits are in base 2 (multiplied by log2 e), because exp2 is several times faster than exp on a CPU.

This file has the operands, the tiles and their logits. backward.py has the gradients; softmax.py and nested_sigmoid.py
have what each loss computes from a tile.

Shapes: n rows and m columns of the logit matrix, I rows and J columns of a tile, D embedding width, K dims.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrl.hardware import has_native_bfloat16, reads_at_once

LOG2_E = math.log2(math.e)
# The default of torch.nn.functional.normalize: a zero vector stays a zero vector.
NORM_EPS = 1e-12


@dataclass(frozen=True)
class EmbeddingBlocks:
    """The embeddings of one tower, split at the nested dims, with the inverse norm of each prefix."""

    blocks: list[torch.Tensor]
    """The columns d_(k-1) … d_k, contiguous, float32 or float64: (n, d_k - d_(k-1)) each."""
    inverse_norm_Kn: torch.Tensor
    """1 / norm of each prefix, at most 1 / NORM_EPS."""
    low_precision_blocks: list[torch.Tensor]
    """Operands of the matrix products of the backward pass: bfloat16 if the embeddings are bfloat16 and the device
    multiplies it natively, else `blocks`."""

    def __len__(self) -> int:
        return self.inverse_norm_Kn.shape[1]

    def part(self, rows: slice) -> "EmbeddingBlocks":
        blocks = [block[rows] for block in self.blocks]
        is_low = self.low_precision_blocks is not self.blocks
        low = [block[rows] for block in self.low_precision_blocks] if is_low else blocks
        return EmbeddingBlocks(blocks, self.inverse_norm_Kn[:, rows], low)

    def followed_by(self, other: "EmbeddingBlocks") -> "EmbeddingBlocks":
        """These rows and then those of another tensor with the same dims."""
        is_low = self.low_precision_blocks is not self.blocks
        blocks = [torch.cat(pair) for pair in zip(self.blocks, other.blocks, strict=True)]
        pairs = zip(self.low_precision_blocks, other.low_precision_blocks, strict=True)
        low = [torch.cat(pair) for pair in pairs] if is_low else blocks
        return EmbeddingBlocks(blocks, torch.cat([self.inverse_norm_Kn, other.inverse_norm_Kn], 1), low)

    def beside(self, teacher: "EmbeddingBlocks") -> "EmbeddingBlocks":
        """These blocks and the only one of a teacher's embeddings of the same rows."""
        inverse_norm_Kn = torch.cat([self.inverse_norm_Kn, teacher.inverse_norm_Kn.to(self.inverse_norm_Kn)])
        blocks = [block.to(self.blocks[0].dtype) for block in teacher.blocks]
        return EmbeddingBlocks([*self.blocks, *blocks], inverse_norm_Kn, [*self.low_precision_blocks, *blocks])


def split_into_blocks(embedding_nD: torch.Tensor, dims: Sequence[int]) -> EmbeddingBlocks:
    """Split embeddings at the nested dims, which must be ascending."""
    widths = [end - start for start, end in zip((0, *dims), dims, strict=False)]
    given = [block.contiguous() for block in embedding_nD[:, : dims[-1]].split(widths, dim=1)]
    blocks = [block.to(accumulation_dtype(embedding_nD.dtype)) for block in given]
    norms_Kn = prefix_dots(blocks, blocks).sqrt()
    is_low = embedding_nD.dtype == torch.bfloat16 and has_native_bfloat16(embedding_nD.device)
    return EmbeddingBlocks(blocks, 1 / norms_Kn.clamp_min(NORM_EPS), given if is_low else blocks)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums for embeddings of this dtype: float32, or float64 for float64."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def constant(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A tensor of these numbers, with the dtype and device of `like`. Made once: a copy of numbers waits for a GPU."""
    return _constant(tuple(values), like.dtype, like.device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def prefix_dots(
    x_blocks: Sequence[torch.Tensor], y_blocks: Sequence[torch.Tensor], has_teacher: bool = False
) -> torch.Tensor:
    """Row-wise dot products of x and y for every prefix, and of the last block alone if it is a teacher's: (K, n)."""
    # Not torch.linalg.vecdot, which autocast would run in low precision.
    dots_Kn = torch.stack([(x * y).sum(1) for x, y in zip(x_blocks, y_blocks, strict=True)])
    return torch.cat([dots_Kn[:-1].cumsum(0), dots_Kn[-1:]]) if has_teacher else dots_Kn.cumsum(0)


@dataclass(frozen=True)
class LogitMatrix:
    """The operands of one (n, m) logit matrix per nested dim; the matrices themselves are never stored.

    In a loss, the rows are the local images and the columns are the texts of the global batch.
    """

    rows: EmbeddingBlocks
    columns: EmbeddingBlocks
    scale_K: torch.Tensor
    """The logit scales, in base 2."""
    offset: int
    """Row i and column i + offset are a matching pair (an image and its text)."""
    row_group_Gn: torch.Tensor | None = None
    column_group_Gm: torch.Tensor | None = None
    """A row and a column with an equal value of any of the G keys belong to one group. A row in no group has a value no
    column has."""
    num_negative_rows: int = 0
    """The last rows, which match no column: hard negatives of the columns."""
    has_teacher: bool = False
    """Whether the last block is a teacher's whole embedding instead of a part of the largest prefix."""

    @property
    def num_matching(self) -> int:
        """The number of rows that have a matching column; they come first."""
        return len(self.rows) - self.num_negative_rows

    @property
    def matching_columns(self) -> slice:
        """The columns that match rows 0 … num_matching-1."""
        return slice(self.offset, self.offset + self.num_matching)


@dataclass(frozen=True)
class Targets:
    """The target probability of each pair. For InfoNCE it is the sum over both directions."""

    matching_n: torch.Tensor
    """The target of each row's matching pair."""
    mask_same_group: bool = True
    """Whether the other pairs of one group are masked out (excluded from the loss), or have the target below."""
    same_group: tuple[torch.Tensor, torch.Tensor] | None = None
    """The target of a non-matching pair of one group: the row's value plus the column's, (n,) and (m,)."""
    smoothing: tuple[torch.Tensor, torch.Tensor] | None = None
    """What label smoothing adds to the target of every pair that is not masked: row's value plus column's."""


class LogitTile:
    """One tile of the logit matrices: some rows and some columns. Its buffers are shared by all tiles."""

    def __init__(self, tiles: "LogitTiles", rows: slice, columns: slice) -> None:
        self.rows, self.columns = rows, columns
        self._tiles, self._matrix, self._targets = tiles, tiles.matrix, tiles.targets
        height, width = rows.stop - rows.start, columns.stop - columns.start
        self.stacked_buffers = tiles.buffers[:, : height * width].view(-1, height, width)
        self.buffers = list(self.stacked_buffers)

    @property
    def diagonal(self) -> int:
        """The `offset` of `torch.diagonal` that selects the matching pairs: row i matches column i + diagonal."""
        return self.rows.start + self._matrix.offset - self.columns.start

    @property
    def num_matching(self) -> int:
        """The number of the tile's rows that have a matching column, in this tile or another; they come first."""
        return min(max(self._matrix.num_matching - self.rows.start, 0), self.rows.stop - self.rows.start)

    @property
    def groups(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The groups of the rows (G, I) and of the columns (G, J)."""
        if self._matrix.row_group_Gn is None or self._matrix.column_group_Gm is None:
            return None
        return self._matrix.row_group_Gn[:, self.rows], self._matrix.column_group_Gm[:, self.columns]

    @property
    def matching_target_I(self) -> torch.Tensor:
        """`Targets.matching_n` of the rows."""
        return self._targets.matching_n[self.rows]

    @property
    def smoothing(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`Targets.smoothing` of the rows (I,) and of the columns (J,)."""
        return self._of_tile(self._targets.smoothing)

    @property
    def same_group_targets(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`Targets.same_group` of the rows (I,) and of the columns (J,)."""
        return self._of_tile(self._targets.same_group)

    def _of_tile(self, pair: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if pair is None else (pair[0][self.rows], pair[1][self.columns])

    @functools.cached_property
    def _same_group_IJ(self) -> torch.Tensor | None:
        """True for non-matching pairs of one group; None if there are none."""
        if self.groups is None:
            return None
        same_IJ, *others = (row_I[:, None] == column_J for row_I, column_J in zip(*self.groups, strict=True))
        for other_IJ in others:
            same_IJ |= other_IJ
        matching = self.matching_pairs(same_IJ)
        if matching is not None:
            matching[1].fill_(False)
        return None if reads_at_once(same_IJ) and not same_IJ.any() else same_IJ

    @property
    def mask_IJ(self) -> torch.Tensor | None:
        """True for masked pairs; None if there are none."""
        return self._same_group_IJ if self._targets.mask_same_group else None

    @functools.cached_property
    def target_IJ(self) -> torch.Tensor | None:
        """All targets except `Targets.matching_n`; None if all are zero."""
        target_IJ, smoothing, same_group = None, self.smoothing, self.same_group_targets
        if smoothing is not None:
            target_IJ = smoothing[0][:, None] + smoothing[1]
            if self.mask_IJ is not None:
                target_IJ = target_IJ.masked_fill(self.mask_IJ, 0)
        if same_group is not None and self._same_group_IJ is not None:
            positive_IJ = (same_group[0][:, None] + same_group[1]) * self._same_group_IJ
            target_IJ = positive_IJ if target_IJ is None else target_IJ + positive_IJ
        return target_IJ

    def matching_pairs(self, tile_IJ: torch.Tensor) -> tuple[slice, torch.Tensor] | None:
        """The rows whose matching pair is in this tile, and a view of those pairs; None if there are none."""
        rows, columns, offset = self.rows, self.columns, self._matrix.offset
        first = max(rows.start, columns.start - offset)
        last = min(rows.start + self.num_matching, columns.stop - offset)
        if first >= last:
            return None
        return slice(first, last), tile_IJ.diagonal(self.diagonal)[: last - first]

    def products(self, keep_all: bool = True) -> Iterator[int]:
        """Compute the dot products of each prefix in turn and yield k: in buffer k, or all in buffer 0."""
        previous_IJ = self.buffers[0]
        for k, (x, y) in enumerate(zip(self._matrix.rows.blocks, self._matrix.columns.blocks, strict=True)):
            product_IJ = self.buffers[k if keep_all else 0]
            if k == 0 or (self._matrix.has_teacher and k == len(self._matrix.rows.blocks) - 1):
                torch.mm(x[self.rows], y[self.columns].T, out=product_IJ)
            else:
                torch.addmm(previous_IJ, x[self.rows], y[self.columns].T, out=product_IJ)
            yield k
            previous_IJ = product_IJ

    def logits(self, k: int, product_IJ: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Dim k's logits (base 2) from its dot products. `out` may be `product_IJ`."""
        torch.mul(product_IJ, self._tiles.column_factor_Km[k, self.columns], out=out)
        return out.mul_(self._tiles.row_factor_Kn[k, self.rows, None])


class LogitTiles:
    """All tiles of the logit matrices, in row-major order."""

    def __init__(self, matrix: LogitMatrix, targets: Targets, num_buffers: int) -> None:
        self.matrix, self.targets = matrix, targets
        like, n, m = matrix.rows.inverse_norm_Kn, len(matrix.rows), len(matrix.columns)
        height, width = tile_shape(n, m, num_buffers, like)
        self.buffers = like.new_empty(num_buffers, height * width)
        # logit = dot product * row factor * column factor
        self.row_factor_Kn = like * matrix.scale_K[:, None]
        self.column_factor_Km = matrix.columns.inverse_norm_Kn
        self._rows = [slice(start, min(start + height, n)) for start in range(0, n, height)]
        self._columns = [slice(start, min(start + width, m)) for start in range(0, m, width)]

    def __iter__(self) -> Iterator[LogitTile]:
        return (LogitTile(self, rows, columns) for rows in self._rows for columns in self._columns)


def tile_shape(n: int, m: int, num_buffers: int, like: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a tile: the largest powers of two whose buffers fit the budget.

    The budget on a CPU is half of the last-level cache (32 MiB if unknown), so that elementwise operations are not
    bound by memory bandwidth. On a GPU, where kernel launches dominate, it is 1/128 of the memory.
    """
    budget = torch.cuda.get_device_properties(like.device).total_memory // 128 if like.is_cuda else _cache_bytes() // 2
    rows = columns = 64
    while 2 * rows * columns * num_buffers * like.element_size() <= budget and (rows < n or columns < m):
        rows, columns = (rows, 2 * columns) if (columns <= rows and columns < m) or rows >= n else (2 * rows, columns)
    return min(rows, n), min(columns, m)


@functools.cache
def _cache_bytes() -> int:
    """Size of the first CPU's last-level cache; 32 MiB if unknown."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        return max(int(text[:-1]) * units[text[-1]] for text in (path.read_text().strip() for path in sizes))
    except (OSError, ValueError, KeyError, IndexError):
        return 1 << 25


@contextlib.contextmanager
def matmul_precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Disable autocast, and on a GPU allow TF32 in the float32 products of half-precision embeddings.

    Forward, TF32 is exact for these embeddings. Backward, it rounds the logit gradients to TF32's 10 bits. Sums stay
    float32. Products of float32 embeddings follow the user's setting.
    """
    settings = torch.backends.cuda.matmul
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or settings.fp32_precision == "tf32":
        with torch.autocast(device.type, enabled=False):
            yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        settings.fp32_precision = before
