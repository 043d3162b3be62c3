"""The sweep: every nested similarity of rows against columns, a tile at a time, never a whole matrix.

Before normalisation the similarities of the nested dims are running sums over column blocks of the embeddings: the
prefix of length d_k adds the block d_(k-1) … d_k to the product of the prefix before. So all K matrices cost the
multiply-adds of the largest, forward and backward; normalisation is a factor a row and a factor a column, and one tile
serves both directions, its rows as queries and its columns as queries.

Logits are held in base 2 (times log2 e), because exp2 is several times faster than exp on a CPU.

This file knows the walk over the tiles and the way back to the embeddings; softmax.py and nested_sigmoid.py know what
a loss wants of a tile. Shapes: n rows and m columns of the block, I rows and J columns of a tile, D the embedding's
width, K dims.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mmrl.hardware import multiplies_bfloat16

LOG2_E = math.log2(math.e)
# As in torch.nn.functional.normalize, so that a zero vector stays a zero vector.
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Side:
    """One tower's embeddings, ready for the sweep."""

    blocks: list[torch.Tensor]
    """The columns d_(k-1) … d_k, contiguous, of float32 or wider: (n, d_k - d_(k-1)) each."""
    inverse_norm_Kn: torch.Tensor
    """1 / the norm of each prefix, at most 1e12."""
    narrow_blocks: list[torch.Tensor]
    """What the gradient's products are made with: bfloat16 where the embeddings came so and it is no slower, else
    `blocks`."""

    def __len__(self) -> int:
        return self.inverse_norm_Kn.shape[1]


def side(embedding_nD: torch.Tensor, dims: Sequence[int]) -> Side:
    """Cuts an embedding at the (ascending) nested dims."""
    widths = [end - start for start, end in zip((0, *dims), dims, strict=False)]
    given = [block.contiguous() for block in embedding_nD[:, : dims[-1]].split(widths, dim=1)]
    blocks = [block.to(wide_dtype(embedding_nD.dtype)) for block in given]
    norms_Kn = prefix_products(blocks, blocks).sqrt()
    narrow = given if embedding_nD.dtype == torch.bfloat16 and multiplies_bfloat16(embedding_nD.device) else blocks
    return Side(blocks, 1 / norms_Kn.clamp_min(_SMALLEST_NORM), narrow)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums of embeddings of this type are held in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def prefix_products(x_blocks: Sequence[torch.Tensor], y_blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each row's dot product with the same row of the other, for every prefix: (K, n)."""
    # Not vecdot, which autocast would narrow.
    return torch.stack([(x * y).sum(1) for x, y in zip(x_blocks, y_blocks, strict=True)]).cumsum(0)


@dataclass(frozen=True)
class Block:
    """Rows against columns: one process's strip of the global similarities."""

    rows: Side
    columns: Side
    scale_K: Sequence[float]
    """The logit scales, in base 2."""
    offset: int
    """Row i's own pair is column i + offset."""
    row_group_n: torch.Tensor | None = None
    column_group_m: torch.Tensor | None = None
    """Equal numbers are pairs of one item; a number of a row without a group equals none of the columns'."""

    @property
    def own(self) -> slice:
        """The columns of the rows' own pairs."""
        return slice(self.offset, self.offset + len(self.rows))


@dataclass(frozen=True)
class Targets:
    """What each pair's probability is pulled to; where a loss has two directions, the sum of both."""

    own_n: torch.Tensor
    """The target of each row's own pair."""
    mask_same_group: bool = True
    """Other pairs of one group are left out; else they have the target below."""
    same_group: tuple[torch.Tensor, torch.Tensor] | None = None
    """The target of a pair of one group, its row's number plus its column's: (n,), (m,)."""
    everywhere: tuple[torch.Tensor, torch.Tensor] | None = None
    """What every pair has that is not left out (label smoothing), likewise: (n,), (m,)."""


@dataclass(frozen=True)
class _Strip:
    """One tile's rows, or its columns: views of all that a tile needs of them, made once."""

    span: slice
    number: int
    """Which strip it is, from the first."""
    blocks: list[torch.Tensor]
    narrow_blocks: list[torch.Tensor]
    factor_K: list[torch.Tensor]
    """What turns a product into a logit, with the other side's: (I, 1) of rows, (J,) of columns."""


class Tile:
    """A part of the block, in buffers that all tiles share."""

    def __init__(self, block: Block, targets: Targets, rows: _Strip, columns: _Strip, buffers: torch.Tensor) -> None:
        self.rows, self.columns = rows, columns
        self._block, self._targets = block, targets
        shape = (rows.span.stop - rows.span.start, columns.span.stop - columns.span.start)
        self.all_buffers = buffers[:, : shape[0] * shape[1]].view(len(buffers), *shape)
        self.buffers = list(self.all_buffers)

    @property
    def own_shift(self) -> int:
        """Row i's own pair is column i + this, if that is a column of the tile."""
        return self.rows.span.start + self._block.offset - self.columns.span.start

    @property
    def groups(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The groups of the rows and of the columns."""
        if self._block.row_group_n is None or self._block.column_group_m is None:
            return None
        return self._block.row_group_n[self.rows.span], self._block.column_group_m[self.columns.span]

    @functools.cached_property
    def _same_IJ(self) -> torch.Tensor | None:
        """True at pairs of one group that are no own pairs; None where there are none."""
        if self.groups is None:
            return None
        same_IJ = self.groups[0][:, None] == self.groups[1]
        own = self.own_pairs(same_IJ)
        if own is not None:
            own[1].fill_(False)
        # On a GPU the question would wait for the device, at every tile.
        return same_IJ if same_IJ.is_cuda or same_IJ.any() else None

    @property
    def mask_IJ(self) -> torch.Tensor | None:
        """True at pairs that are left out; None where there are none."""
        return self._same_IJ if self._targets.mask_same_group else None

    @functools.cached_property
    def target_IJ(self) -> torch.Tensor | None:
        """Targets but for `Targets.own_n`; None where all are zero."""
        targets, rows, columns = self._targets, self.rows.span, self.columns.span
        target_IJ = None
        if targets.everywhere is not None:
            target_IJ = targets.everywhere[0][rows, None] + targets.everywhere[1][columns]
            if self.mask_IJ is not None:
                target_IJ = target_IJ.masked_fill(self.mask_IJ, 0)
        if targets.same_group is not None and self._same_IJ is not None:
            positive_IJ = (targets.same_group[0][rows, None] + targets.same_group[1][columns]) * self._same_IJ
            target_IJ = positive_IJ if target_IJ is None else target_IJ + positive_IJ
        return target_IJ

    def own_pairs(self, tile_IJ: torch.Tensor) -> tuple[slice, torch.Tensor] | None:
        """The rows that have their own pair in this tile, and a view of the pairs; None where no row has."""
        rows, columns, offset = self.rows.span, self.columns.span, self._block.offset
        first, last = max(rows.start, columns.start - offset), min(rows.stop, columns.stop - offset)
        if first >= last:
            return None
        return slice(first, last), tile_IJ.diagonal(self.own_shift)

    def products(self, keep: bool = True) -> Iterator[int]:
        """Fills the product of each dim in turn, into buffers 0 … K-1, or all into buffer 0."""
        before_IJ = self.buffers[0]
        for k, (x, y) in enumerate(zip(self.rows.blocks, self.columns.blocks, strict=True)):
            product_IJ = self.buffers[k if keep else 0]
            if k == 0:
                torch.mm(x, y.T, out=product_IJ)
            else:
                torch.addmm(before_IJ, x, y.T, out=product_IJ)
            yield k
            before_IJ = product_IJ

    def logits(self, k: int, product_IJ: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Dim k's logits in base 2, from its product; the two may be one buffer."""
        return torch.mul(product_IJ, self.columns.factor_K[k], out=out).mul_(self.rows.factor_K[k])


class Tiles:
    """All tiles of a block, row of tiles by row of tiles."""

    def __init__(self, block: Block, targets: Targets, buffers: int) -> None:
        self._block, self._targets = block, targets
        like = block.rows.inverse_norm_Kn
        height, width = tile_shape(len(block.rows), len(block.columns), buffers, like)
        self._buffers = like.new_empty(buffers, height * width)
        self.row_factor_Kn = like * like.new_tensor(block.scale_K)[:, None]
        """With the columns' factor, what turns products into logits."""
        self.rows = _strips(block.rows, self.row_factor_Kn[:, :, None], height)
        self.column_factor_Km = block.columns.inverse_norm_Kn
        self.columns = _strips(block.columns, self.column_factor_Km, width)

    def __iter__(self) -> Iterator[Tile]:
        for rows in self.rows:
            for columns in self.columns:
                yield Tile(self._block, self._targets, rows, columns, self._buffers)


def _strips(whole: Side, factor_Kn: torch.Tensor, length: int) -> list[_Strip]:
    spans = [slice(start, min(start + length, len(whole))) for start in range(0, len(whole), length)]
    return [
        _Strip(
            span,
            number,
            [block[span] for block in whole.blocks],
            [block[span] for block in whole.narrow_blocks],
            [factor_n[span] for factor_n in factor_Kn],
        )
        for number, span in enumerate(spans)
    ]


def by_strip(values_Kn: torch.Tensor, strips: Sequence[_Strip]) -> list[list[torch.Tensor]]:
    """Views of (K, n) values, for each strip and each dim."""
    return [[values_n[strip.span] for values_n in values_Kn] for strip in strips]


def tile_shape(n: int, m: int, buffers: int, like: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a tile: the largest powers of two whose buffers stay in the fast memory of the device.

    On a CPU that is half of the last-level cache (taken for 32 MiB where the system does not tell), so that the
    elementwise passes do not wait for memory; on a GPU, where starting a kernel is what costs, 1/128 of its memory.
    """
    budget = torch.cuda.get_device_properties(like.device).total_memory // 128 if like.is_cuda else _cache_bytes() // 2
    rows = columns = 64
    while 2 * rows * columns * buffers * like.element_size() <= budget and (rows < n or columns < m):
        rows, columns = (rows, 2 * columns) if (columns <= rows and columns < m) or rows >= n else (2 * rows, columns)
    return min(rows, n), min(columns, m)


@functools.cache
def _cache_bytes() -> int:
    """The last-level cache of the first CPU, where the system tells."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        return max(int(text[:-1]) * units[text[-1]] for text in (path.read_text().strip() for path in sizes))
    except (OSError, ValueError, KeyError, IndexError):
        return 1 << 25


class Slope(Protocol):
    """How a loss's value changes with the logits of a tile, its targets left aside."""

    def __call__(
        self, k: int, tile: Tile, logits_IJ: torch.Tensor, out: torch.Tensor, spare: torch.Tensor
    ) -> torch.Tensor:
        """Dim k's probabilities, such as its softmax, zero at masked pairs, written to `out`; of one tile the dims
        are asked for from the largest to the smallest."""
        ...


@dataclass
class Gradients:
    """What the sweep backward leaves."""

    row_nD: torch.Tensor
    """With respect to the rows' embeddings."""
    column_mD: torch.Tensor
    scale_K: torch.Tensor
    """With respect to the logarithms of the scales."""


def gradients(
    block: Block,
    slope: Slope,
    factor_K: Sequence[float],
    targets: Targets,
    width: int,
    log_sums: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Gradients:
    """The sweep backward, which computes the similarities again.

    Args:
        slope: what the loss makes of a tile.
        factor_K: the gradient of a logit (base e) for each unit of slope less target.
        width: of the embeddings; what lies beyond the largest dim has no gradient.
        log_sums: the log-sum-exps of rows and columns, where kernels.py takes the place of `slope`.
    """
    K, wide = len(factor_K), block.rows.inverse_norm_Kn
    row_blocks, column_blocks = ([torch.zeros_like(b) for b in side.blocks] for side in (block.rows, block.columns))
    row_pull_Kn, column_pull_Km = torch.zeros_like(wide), torch.zeros_like(block.columns.inverse_norm_Kn)
    factor_K1 = wide.new_tensor(factor_K)[:, None] / LOG2_E
    tiles = Tiles(block, targets, buffers=K + (3 if log_sums is None else 0))
    if log_sums is None:
        weights = _weights_by_passes(tiles, slope, factor_K1, targets, row_pull_Kn, column_pull_Km)
    else:
        weights = _weights_by_kernel(tiles, log_sums, factor_K1, row_pull_Kn, column_pull_Km)
    for tile, k, weight_IJ in weights:
        rows, columns = tile.rows, tile.columns
        weight_IJ = weight_IJ.to(rows.narrow_blocks[k].dtype)
        _add_product(row_blocks[k][rows.span], weight_IJ, columns.narrow_blocks[k])
        _add_product(column_blocks[k][columns.span], weight_IJ.T, rows.narrow_blocks[k])
    row_pull_Kn *= factor_K1
    column_pull_Km *= factor_K1
    return Gradients(
        _embedding_gradient(block.rows, row_blocks, row_pull_Kn, width),
        _embedding_gradient(block.columns, column_blocks, column_pull_Km, width),
        row_pull_Kn.sum(1),
    )


_Weights = Iterator[tuple[Tile, int, torch.Tensor]]
"""Of each tile and each block what its embeddings are multiplied with: the gradients of the products of all dims that
the block is part of, summed up. From the largest dim, valid until the next."""


def _weights_by_passes(
    tiles: Tiles,
    slope: Slope,
    factor_K1: torch.Tensor,
    targets: Targets,
    row_pull_Kn: torch.Tensor,
    column_pull_Km: torch.Tensor,
) -> _Weights:
    K = len(factor_K1)
    # Logits differ from products by both factors, and so do their gradients, but for the loss's own factor.
    row_slopes = [[x * f for x, f in zip(rows.factor_K, factor_K1, strict=True)] for rows in tiles.rows]
    row_pulls, column_pulls = by_strip(row_pull_Kn, tiles.rows), by_strip(column_pull_Km, tiles.columns)
    for tile in tiles:
        rows, columns = tile.rows, tile.columns
        for _ in tile.products():
            pass
        sum_IJ, grad_IJ, spare_IJ = tile.buffers[K:]
        for k in reversed(range(K)):
            logits_IJ = tile.logits(k, tile.buffers[k], out=tile.buffers[k])
            # The largest dim's gradient is the first of the sum.
            part_IJ = slope(k, tile, logits_IJ, sum_IJ if k == K - 1 else grad_IJ, spare_IJ)
            _subtract_targets(part_IJ, tile, targets)
            logits_IJ.mul_(part_IJ)
            row_pulls[rows.number][k] += logits_IJ.sum(1)
            column_pulls[columns.number][k] += logits_IJ.sum(0)
            part_IJ.mul_(columns.factor_K[k]).mul_(row_slopes[rows.number][k])
            if k < K - 1:
                sum_IJ.add_(part_IJ)
            yield tile, k, sum_IJ


def _weights_by_kernel(
    tiles: Tiles,
    log_sums: tuple[torch.Tensor, torch.Tensor],
    factor_K1: torch.Tensor,
    row_pull_Kn: torch.Tensor,
    column_pull_Km: torch.Tensor,
) -> _Weights:
    from mmrl.losses import kernels

    K = len(factor_K1)
    for tile in tiles:
        rows, columns = tile.rows.span, tile.columns.span
        for _ in tile.products():
            pass
        kernels.write_weights(
            tile.all_buffers,
            tile.all_buffers,
            factors=(tiles.row_factor_Kn[:, rows], tiles.column_factor_Km[:, columns]),
            log_sums=(log_sums[0][:, rows], log_sums[1][:, columns]),
            slope_K=factor_K1[:, 0],
            groups=tile.groups,
            own=tile.own_shift,
            pulls=(row_pull_Kn[:, rows], column_pull_Km[:, columns]),
        )
        yield from ((tile, k, tile.buffers[k]) for k in reversed(range(K)))


def _subtract_targets(part_IJ: torch.Tensor, tile: Tile, targets: Targets) -> None:
    if tile.target_IJ is not None:
        part_IJ.sub_(tile.target_IJ)
    own = tile.own_pairs(part_IJ)
    if own is not None:
        own[1].sub_(targets.own_n[own[0]])


def _add_product(into_Id: torch.Tensor, weight_IJ: torch.Tensor, block_Jd: torch.Tensor) -> None:
    """into += weight @ block, in the block's precision, summed up in `into`'s."""
    if block_Jd.dtype == into_Id.dtype:
        into_Id.addmm_(weight_IJ, block_Jd)
    else:
        into_Id.add_(weight_IJ @ block_Jd)


def _embedding_gradient(side: Side, grad_blocks: list[torch.Tensor], pull_Kn: torch.Tensor, width: int) -> torch.Tensor:
    """The embeddings' gradient, (n, D), from that of their blocks with the norms held fixed, which is used up.

    pull_Kn: sums of logit times its gradient, which is what the logarithm of the norm receives. A norm at its lower
    bound is a constant and receives nothing.
    """
    inverse_Kn = side.inverse_norm_Kn
    pull_Kn = torch.where(inverse_Kn * _SMALLEST_NORM < 1, pull_Kn * inverse_Kn.square(), 0)
    # A block is part of the norms of its own dim and of all larger ones.
    pull_Kn = pull_Kn.flip(0).cumsum(0).flip(0)
    for grad, x, pull_n in zip(grad_blocks, side.blocks, pull_Kn, strict=True):
        grad.addcmul_(x, pull_n[:, None], value=-1)
    beyond = width - sum(grad.shape[1] for grad in grad_blocks)
    return torch.cat([*grad_blocks, grad_blocks[0].new_zeros(len(side), beyond)] if beyond else grad_blocks, dim=1)


@contextlib.contextmanager
def own_precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Keeps autocast out, and lets a GPU's float32 products of half-precision embeddings run on the units made for
    those: forward they lose nothing, backward they round the weights to tf32's 10 bits, and all sums are float32.
    Products of float32 embeddings are left to the user's settings."""
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
