"""InfoNCE's part of the sweep: sums of exponentials forward, the softmax of rows and of columns backward.

One exponential serves both directions where the range of the logits allows a shared shift; where it does not, rows and
columns are shifted by their own maxima, so that nothing overflows and nothing that counts vanishes.

Shapes: as in sweep.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmrl.losses.sweep import Block, Targets, Tile, Tiles, by_strip

Shift = float | tuple[torch.Tensor, torch.Tensor]
"""What is taken off one dim's logits before the exponential: one number for all, where the range of the logits allows
it, else a number a row (n,) and a number a column (m,)."""


@dataclass
class Sums:
    """What one sweep forward leaves: O(K (n + m)) numbers."""

    row_Kn: torch.Tensor
    """Sums of 2^(logit - shift) over the columns."""
    column_Km: torch.Tensor
    """The same over the rows."""
    target_K: torch.Tensor
    """Sums of target times logit (base 2), but for own pairs' `Targets.own_n`."""
    gap_row_Kn: torch.Tensor
    """With `gaps`: sums over the columns of 2^(largest dim's logit - shift) times its lead over dim k's logit."""
    gap_column_Km: torch.Tensor


def sums(block: Block, shifts: Sequence[Shift], targets: Targets, gaps: bool, by_kernel: bool) -> Sums:
    """The sweep forward. `gaps` is asked for by distillation; `by_kernel` lets kernels.py do the passes."""
    K, row_Kn, column_Km = len(shifts), block.rows.inverse_norm_Kn, block.columns.inverse_norm_Kn
    result = Sums(*(torch.zeros_like(x) for x in (row_Kn, column_Km, row_Kn[:, 0], row_Kn, column_Km)))
    tiles = Tiles(block, targets, buffers=1 if by_kernel else (K if gaps else 1) + 3)
    row_sums, column_sums = by_strip(result.row_Kn, tiles.rows), by_strip(result.column_Km, tiles.columns)
    for tile in tiles:
        spare = tile.buffers[-3:]
        if by_kernel:
            _add_sums_by_kernel(tile, shifts, row_sums[tile.rows.number], column_sums[tile.columns.number])
            continue
        for k in tile.products(keep=gaps):
            logits_IJ = tile.logits(k, tile.buffers[k if gaps else 0], out=spare[0])
            if tile.target_IJ is not None:
                result.target_K[k] += (tile.target_IJ * logits_IJ).sum()
            by_row_IJ, by_column_IJ = _exponentials(logits_IJ, shifts[k], tile, spare[0], spare[1])
            row_sums[tile.rows.number][k] += by_row_IJ.sum(1)
            column_sums[tile.columns.number][k] += by_column_IJ.sum(0)
            if gaps and k == K - 1:
                _add_gaps(result, tile, by_row_IJ, by_column_IJ, spare[2])
    return result


def _add_sums_by_kernel(
    tile: Tile, shifts: Sequence[Shift], row_sum_K: Sequence[torch.Tensor], column_sum_K: Sequence[torch.Tensor]
) -> None:
    from mmrl.losses import kernels

    for k in tile.products(keep=False):
        shift = shifts[k]
        if isinstance(shift, tuple):
            shift = (shift[0][tile.rows.span], shift[1][tile.columns.span])
        factors = (tile.rows.factor_K[k][:, 0], tile.columns.factor_K[k])
        kernels.add_sums(tile.buffers[0], factors, shift, tile.groups, tile.own_shift, row_sum_K[k], column_sum_K[k])


def _add_gaps(
    result: Sums, tile: Tile, by_row_IJ: torch.Tensor, by_column_IJ: torch.Tensor, spare: torch.Tensor
) -> None:
    """What distillation needs of a tile, from the exponentials of its largest dim."""
    K, rows, columns = len(result.target_K), tile.rows.span, tile.columns.span
    largest_IJ = tile.logits(K - 1, tile.buffers[K - 1], out=spare)
    for k in range(K - 1):
        lead_IJ = largest_IJ - tile.logits(k, tile.buffers[k], out=tile.buffers[k])
        result.gap_row_Kn[k, rows] += torch.linalg.vecdot(by_row_IJ, lead_IJ)
        result.gap_column_Km[k, columns] += torch.linalg.vecdot(by_column_IJ, lead_IJ, dim=0)


def maxima(block: Block, exact: Sequence[bool], targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit (base 2) of each row and of each column, for the dims that ask for it: (K, n), (K, m)."""
    lowest = torch.finfo(block.rows.inverse_norm_Kn.dtype).min
    row_Kn = torch.full_like(block.rows.inverse_norm_Kn, lowest)
    column_Km = torch.full_like(block.columns.inverse_norm_Kn, lowest)
    for tile in Tiles(block, targets, buffers=2):
        rows, columns = tile.rows.span, tile.columns.span
        for k in tile.products(keep=False):
            if exact[k]:
                logits_IJ = tile.logits(k, tile.buffers[0], out=tile.buffers[1])
                if tile.mask_IJ is not None:
                    logits_IJ.masked_fill_(tile.mask_IJ, lowest)
                row_Kn[k, rows] = torch.maximum(row_Kn[k, rows], logits_IJ.amax(1))
                column_Km[k, columns] = torch.maximum(column_Km[k, columns], logits_IJ.amax(0))
    return row_Kn, column_Km


class Softmaxes:
    """A tile's slope: the softmax over the row plus the softmax over the column, from their log-sum-exps (base 2)."""

    def __init__(
        self,
        shifts: Sequence[Shift],
        row_lse_Kn: torch.Tensor,
        column_lse_Km: torch.Tensor,
        distillation: float = 0.0,
    ) -> None:
        self._shifts, self._row_lse_Kn, self._column_lse_Km = shifts, row_lse_Kn, column_lse_Km
        self._distillation = distillation
        self._largest_IJ = row_lse_Kn
        shared_K1 = row_lse_Kn.new_tensor([[shift if isinstance(shift, float) else 0.0] for shift in shifts])
        self._row_Kn1 = torch.exp2(shared_K1 - row_lse_Kn)[:, :, None]
        self._column_Km = torch.exp2(shared_K1 - column_lse_Km)

    def __call__(
        self, k: int, tile: Tile, logits_IJ: torch.Tensor, out: torch.Tensor, spare: torch.Tensor
    ) -> torch.Tensor:
        """As `sweep.Slope` says."""
        rows, columns = tile.rows.span, tile.columns.span
        if isinstance(self._shifts[k], float):
            _exponentials(logits_IJ, self._shifts[k], tile, out, out)
            torch.add(self._row_Kn1[k, rows], self._column_Km[k, columns], out=spare)
            out.mul_(spare)
        else:
            _exponentials(logits_IJ, (self._row_lse_Kn[k], self._column_lse_Km[k]), tile, out, spare)
            out.add_(spare)
        if self._distillation:
            if k == len(self._shifts) - 1:
                self._largest_IJ = out.clone()
            else:
                out.mul_(1 + self._distillation).sub_(self._largest_IJ, alpha=self._distillation)
        return out


def _exponentials(
    logits_IJ: torch.Tensor, shift: Shift, tile: Tile, row_out: torch.Tensor, column_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """2^(logit - shift) as the rows and as the columns shift it, zero where masked: one tensor, `row_out`, where the
    shift is shared. `row_out` may be the logits' own buffer."""
    if not isinstance(shift, tuple):
        if shift:
            logits_IJ = torch.sub(logits_IJ, shift, out=row_out)
        results = (torch.exp2(logits_IJ, out=row_out),)
    else:
        torch.sub(logits_IJ, shift[1][tile.columns.span], out=column_out).exp2_()
        torch.sub(logits_IJ, shift[0][tile.rows.span, None], out=row_out).exp2_()
        results = (row_out, column_out)
    if tile.mask_IJ is not None:
        for result_IJ in results:
            result_IJ.masked_fill_(tile.mask_IJ, 0)
    return results[0], results[-1]
