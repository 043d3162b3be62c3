"""The softmax of InfoNCE, tile by tile: sums of exponentials forward, row plus column softmax backward.

Where the range of the logits allows it, all logits of a dim share one shift, and one exponential serves rows and
columns. Otherwise each row and each column is shifted by its own maximum, as usual for log-sum-exp, so that nothing
overflows and no row sum underflows.

Shapes: as in sweep.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmrl.losses.sweep import LogitMatrix, LogitTile, LogitTiles, Targets

Shift = float | tuple[torch.Tensor, torch.Tensor]
"""What is subtracted from one dim's logits before the exponential: one number for all, or one per row (n,) and one per
column (m,)."""


@dataclass
class ExpSums:
    """The result of the forward pass over all tiles: O(K (n + m)) numbers."""

    row_Kn: torch.Tensor
    """Sums over the columns of 2^(logit - shift)."""
    column_Km: torch.Tensor
    """Sums over the rows of 2^(logit - shift)."""
    target_logit_Kn: torch.Tensor
    """Sums over the columns of target * logit (base 2), without the matching pairs' targets (`Targets.matching_n`)."""
    row_logit_gap_Kn: torch.Tensor
    """For distillation: sums over the columns of 2^(teacher logit - shift) * (teacher logit - logit of dim k), where
    the teacher is the largest dim."""
    column_logit_gap_Km: torch.Tensor
    """The same, over the rows."""


def exp_sums(
    matrix: LogitMatrix, shifts: Sequence[Shift], targets: Targets, distillation: bool, use_triton: bool
) -> ExpSums:
    """The forward pass: sums of exponentials over rows and columns, and the other sums the loss needs."""
    K, row_Kn, column_Km = len(shifts), matrix.rows.inverse_norm_Kn, matrix.columns.inverse_norm_Kn
    result = ExpSums(*(torch.zeros_like(x) for x in (row_Kn, column_Km, row_Kn, row_Kn, column_Km)))
    tiles = LogitTiles(matrix, targets, num_buffers=(K if distillation else 1) + (0 if use_triton else 3))
    for tile in tiles:
        if use_triton:
            _add_sums_by_triton(tiles, tile, shifts, distillation, result)
            continue
        spare = tile.buffers[-3:]
        for k in tile.products(keep_all=distillation):
            logits_IJ = tile.logits(k, tile.buffers[k if distillation else 0], out=spare[0])
            if tile.target_IJ is not None:
                result.target_logit_Kn[k, tile.rows] += torch.linalg.vecdot(tile.target_IJ, logits_IJ)
            row_exp_IJ, column_exp_IJ = _exponentials(logits_IJ, shifts[k], tile, spare[0], spare[1])
            result.row_Kn[k, tile.rows] += row_exp_IJ.sum(1)
            result.column_Km[k, tile.columns] += column_exp_IJ.sum(0)
            if distillation and k == K - 1:
                _add_logit_gaps(result, tile, row_exp_IJ, column_exp_IJ, spare[2])
    return result


def _add_sums_by_triton(
    tiles: LogitTiles, tile: LogitTile, shifts: Sequence[Shift], distillation: bool, result: ExpSums
) -> None:
    from mmrl.losses import kernels

    rows, columns = tile.rows, tile.columns
    of_tile = [(one[0][rows], one[1][columns]) if isinstance(one, tuple) else one for one in shifts]
    factors = tiles.row_factor_Kn[:, rows], tiles.column_factor_Km[:, columns]
    for k in tile.products(keep_all=distillation):
        sums = result.row_Kn[k, rows], result.column_Km[k, columns]
        product_IJ, target_logit_I = tile.buffers[k if distillation else 0], result.target_logit_Kn[k, rows]
        kernels.add_exp_sums(tile, product_IJ, (factors[0][k], factors[1][k]), of_tile[k], sums, target_logit_I)
    if distillation:
        gaps = result.row_logit_gap_Kn[:, rows], result.column_logit_gap_Km[:, columns]
        kernels.add_logit_gaps(tile, tile.stacked_buffers, factors, of_tile[-1], gaps)


def _add_logit_gaps(
    result: ExpSums, tile: LogitTile, row_exp_IJ: torch.Tensor, column_exp_IJ: torch.Tensor, spare: torch.Tensor
) -> None:
    """Add a tile's `logit_gap` sums, from the exponentials of the teacher (the largest dim)."""
    K, rows, columns = len(result.row_Kn), tile.rows, tile.columns
    teacher_IJ = tile.logits(K - 1, tile.buffers[K - 1], out=spare)
    for k in range(K - 1):
        logit_gap_IJ = teacher_IJ - tile.logits(k, tile.buffers[k], out=tile.buffers[k])
        result.row_logit_gap_Kn[k, rows] += torch.linalg.vecdot(row_exp_IJ, logit_gap_IJ)
        result.column_logit_gap_Km[k, columns] += torch.linalg.vecdot(column_exp_IJ, logit_gap_IJ, dim=0)


def max_logits(matrix: LogitMatrix, needed_K: Sequence[bool], targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum logit (base 2) of each row and of each column, for the dims in `needed_K`: (K, n), (K, m)."""
    lowest = torch.finfo(matrix.rows.inverse_norm_Kn.dtype).min
    row_Kn = torch.full_like(matrix.rows.inverse_norm_Kn, lowest)
    column_Km = torch.full_like(matrix.columns.inverse_norm_Kn, lowest)
    for tile in LogitTiles(matrix, targets, num_buffers=2):
        rows, columns = tile.rows, tile.columns
        for k in tile.products(keep_all=False):
            if needed_K[k]:
                logits_IJ = tile.logits(k, tile.buffers[0], out=tile.buffers[1])
                if tile.mask_IJ is not None:
                    logits_IJ.masked_fill_(tile.mask_IJ, lowest)
                row_Kn[k, rows] = torch.maximum(row_Kn[k, rows], logits_IJ.amax(1))
                column_Km[k, columns] = torch.maximum(column_Km[k, columns], logits_IJ.amax(0))
    return row_Kn, column_Km


class SoftmaxProb:
    """A `backward.ProbFunction`: the softmax over the row plus the softmax over the column.

    With distillation, dim k's KL divergence adds `distillation` times (its own softmaxes - the teacher's).
    """

    def __init__(
        self, shifts: Sequence[Shift], row_lse_Kn: torch.Tensor, column_lse_Km: torch.Tensor, distillation: float = 0.0
    ) -> None:
        self._shifts, self._row_lse_Kn, self._column_lse_Km = shifts, row_lse_Kn, column_lse_Km
        self._distillation = distillation
        self._teacher_IJ = row_lse_Kn
        self._normalisers = [
            None if isinstance(shift, tuple) else (torch.exp2(shift - row_n)[:, None], torch.exp2(shift - column_m))
            for shift, row_n, column_m in zip(shifts, row_lse_Kn, column_lse_Km, strict=True)
        ]

    def __call__(
        self, k: int, tile: LogitTile, logits_IJ: torch.Tensor, out: torch.Tensor, spare: torch.Tensor
    ) -> torch.Tensor:
        """See `backward.ProbFunction`."""
        if (normaliser := self._normalisers[k]) is not None:
            _exponentials(logits_IJ, self._shifts[k], tile, out, out)
            torch.add(normaliser[0][tile.rows], normaliser[1][tile.columns], out=spare)
            out.mul_(spare)
        else:
            _exponentials(logits_IJ, (self._row_lse_Kn[k], self._column_lse_Km[k]), tile, out, spare)
            out.add_(spare)
        if self._distillation:
            if k == len(self._shifts) - 1:
                self._teacher_IJ = out.clone()
            else:
                out.mul_(1 + self._distillation).sub_(self._teacher_IJ, alpha=self._distillation)
        return out


def _exponentials(
    logits_IJ: torch.Tensor, shift: Shift, tile: LogitTile, row_out: torch.Tensor, column_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """2^(logit - shift) by the row shifts and by the column shifts, zero for masked pairs.

    With a shared shift both are one tensor, `row_out`. `row_out` may be `logits_IJ`.
    """
    if not isinstance(shift, tuple):
        if shift:
            logits_IJ = torch.sub(logits_IJ, shift, out=row_out)
        results = (torch.exp2(logits_IJ, out=row_out),)
    else:
        torch.sub(logits_IJ, shift[1][tile.columns], out=column_out).exp2_()
        torch.sub(logits_IJ, shift[0][tile.rows, None], out=row_out).exp2_()
        results = (row_out, column_out)
    if tile.mask_IJ is not None:
        for result_IJ in results:
            result_IJ.masked_fill_(tile.mask_IJ, 0)
    return results[0], results[-1]
