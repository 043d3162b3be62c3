"""Nested symmetric InfoNCE over the global batch: all dims in one pass over tiles, in memory linear in the batch.

Each rank computes the logits of its local images with all texts. Communication, whatever the number of dims: forward
one all-gather of the texts, one all-reduce of the columns' exponential sums and one of the loss; backward one
reduce-scatter of the text gradient. Groups add an all-gather. On a GPU, and where logits may be too large for a shared
shift (see softmax.py), an all-reduce of K numbers decides on the shifts; shifts per row add one of extremes.

On a GPU the host waits once: it reads the scales and the lowest logits of matching pairs together.

Shapes: b local pairs (of this rank), B = b * world_size pairs of the global batch, D embedding width, K dims.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch.autograd.function import once_differentiable

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.hardware import reads_at_once
from mmrl.losses import inputs, softmax
from mmrl.losses.backward import gradients
from mmrl.losses.inputs import Groups, NestedLoss
from mmrl.losses.softmax import Shift
from mmrl.losses.sweep import (
    LOG2_E,
    LogitMatrix,
    Targets,
    constant,
    matmul_precision,
    prefix_dots,
    split_into_blocks,
)
from mmrl.losses.triton_probe import require_triton, triton_problem
from mmrl.nesting import Nesting
from mmrl.settings import Settings, machine_field

# With a shared shift, exponents (base 2) stay below _MAX_EXPONENT, so that a sum of 2^30 terms fits float32. If a row's
# largest exponent could be below _MIN_EXPONENT, where float32 loses precision, the dim uses per-row maxima instead.
_MAX_EXPONENT, _MIN_EXPONENT = 80.0, -100.0


class InfoNCEOptions(Settings):
    """Options of the symmetric InfoNCE."""

    same_group: Literal["mask", "positive"] = "mask"
    """Other pairs of one group: mask them (no negatives), or make them positives that share the target equally."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over all unmasked pairs of its row or column."""
    distillation: float = Field(default=0.0, ge=0)
    """Weight of KL(softmax of the largest dim, detached || softmax of the dim), added to each smaller dim's loss."""
    kernels: Literal["auto", "torch", "triton"] = machine_field("auto")
    """PyTorch operations or fused Triton kernels between the matrix products. 'auto' uses the kernels on a GPU where
    they run: they need a C compiler, and embeddings in float32 or narrower."""


DEFAULT_OPTIONS = InfoNCEOptions()


def nested_info_nce(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor | float,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    options: InfoNCEOptions = DEFAULT_OPTIONS,
    check_finite: bool = False,
) -> NestedLoss:
    """Equals, in value and gradient, this formula on the rows of all ranks (tests/helpers/reference.py)::

        logits = {d: scale[d] * F.normalize(image[:, :d]) @ F.normalize(text[:, :d]).T for d in dims}
        loss = {d: (F.cross_entropy(logits[d], labels) + F.cross_entropy(logits[d].T, labels)) / 2 for d in dims}
        total = sum(w[d] * loss[d] for d in dims) / sum(w.values())

    with `labels = torch.arange(B)`. Sources: Kusupati et al. 2022 (arXiv 2205.13147), equation 1, for the nesting;
    Radford et al. 2021 (arXiv 2103.00020), figure 3, for the loss.

    Args:
        image_BD, text_BD: the local rows, of any float dtype, not normalised; image i matches text i. Every rank has
            the same number of rows. Logits and sums are float32, or float64 for float64 embeddings. A zero vector has
            zero similarities and, as with `F.normalize`, a very large gradient (finite except in float16).
        logit_scale: the multiplier, already exponentiated, positive: a scalar, (1,), or (K,) in the order of `dims`.
        dims: nested dims, in any order.
        weights: one per dim (default: equal).
        groups: int64 (b,), or (b, 2) for two keys, such as item and caption; or a tuple (image groups, text groups).
            Pairs of one group (equal in any column) are not negatives of each other; negative values are in no group.
            Must be given on all ranks or on none.
        options: label smoothing, distillation and the treatment of groups.
        check_finite: check the embeddings for NaN and infinity first (synchronises with the device).

    Time and memory: 4 B^2 D multiply-adds for all dims and all ranks together, forward and backward. Per rank,
    O(B (D + K)) numbers and the tile buffers, whose size `sweep.tile_shape` adapts to the device.

    Raises:
        InputError: shapes that do not match, dims out of range or repeated, invalid weights or scales.
    """
    inputs.check_inputs(image_BD, text_BD, groups, check_finite)
    nested = Nesting.from_dims(dims, weights, image_BD.shape[1])
    operands = Operands(image_BD, text_BD, inputs.per_dim("logit_scale", logit_scale, dims, image_BD), nested)
    (limits,) = read_limits(operands)
    return sweep_loss(operands, limits, groups, options)


class Operands(NamedTuple):
    """What the logits of one sweep are computed from."""

    image_bD: torch.Tensor
    text_bD: torch.Tensor
    scale_K: torch.Tensor
    nested: Nesting


Limits = list[tuple[float, float]]
"""Each dim's logit scale, and a lower bound of the logits of all ranks' matching pairs; both in base 2."""


@torch.no_grad()
def read_limits(*sweeps: Operands) -> list[Limits]:
    """The limits of several sweeps, in one read: each read waits for the device. Collective.

    Raises:
        InputError: a logit scale is zero, negative or infinite.
    """
    scale_K = torch.cat([one.scale_K for one in sweeps]).double()
    scales: list[float] = scale_K.tolist() if reads_at_once(scale_K) else []
    lowest = [-scale for scale in scales]
    if not scales or any(_may_underflow(scale * LOG2_E, -scale * LOG2_E) for scale in scales):
        lowest_K = torch.cat([_lowest_matching_cosine(one) for one in sweeps]) * scale_K
        scales, lowest = torch.stack([scale_K, -comm.all_reduce_max(-lowest_K)]).tolist()
    inputs.check_scales(scales)
    limits = iter([(scale * LOG2_E, low * LOG2_E) for scale, low in zip(scales, lowest, strict=True)])
    return [list(islice(limits, len(one.scale_K))) for one in sweeps]


def _lowest_matching_cosine(operands: Operands) -> torch.Tensor:
    """Each dim's lowest cosine of a local matching pair: (K,)."""
    x, y = (split_into_blocks(side, operands.nested.dims) for side in operands[:2])
    return (prefix_dots(x.blocks, y.blocks) * x.inverse_norm_Kn * y.inverse_norm_Kn).amin(1).double()


def sweep_loss(operands: Operands, limits: Limits, groups: Groups | None, options: InfoNCEOptions) -> NestedLoss:
    """`nested_info_nce` of operands whose limits were read."""
    nested = operands.nested
    total, by_dim_K, kl_K = _NestedInfoNCE.apply(*operands, limits, groups, options)  # pyright: ignore[reportGeneralTypeIssues]
    by_dim = dict(zip(nested.dims, by_dim_K.unbind(), strict=True))
    # The largest dim is the teacher.
    distillation_by_dim = dict(zip(nested.dims[:-1], kl_K[:-1].unbind(), strict=True)) if options.distillation else {}
    return NestedLoss(total, by_dim, distillation_by_dim)


class _NestedInfoNCE(torch.autograd.Function):
    """Forward saves the embeddings and the log-sum-exps of rows and columns; backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        image_bD: torch.Tensor,
        text_bD: torch.Tensor,
        scale_K: torch.Tensor,
        nested: Nesting,
        limits: Limits,
        groups: Groups | None,
        options: InfoNCEOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        text_BD = comm.all_gather_rows(text_bD)
        matrix = inputs.local_logits(image_bD, text_BD, scale_K, nested)
        matrix, targets = _add_groups(matrix, groups, options)
        matching_Kb, distillation = inputs.matching_logits(matrix), options.distillation
        use_triton = _use_triton(matrix, options)
        with matmul_precision(image_bD.dtype, image_bD.device):
            shifts = _choose_shifts(matrix, targets, limits)
            sums = softmax.exp_sums(matrix, shifts, targets, distillation > 0, use_triton)

        column_sums = [sums.column_Km] + ([sums.column_logit_gap_Km] if distillation else [])
        exp_sum_KB, *column_gap = comm.all_reduce_sum(torch.cat(column_sums, 1)).split(len(text_BD), 1)
        row_lse_Kb = sums.row_Kn.log2() + _stack_shifts(shifts, 0, sums.row_Kn)
        column_lse_KB = exp_sum_KB.log2() + _stack_shifts(shifts, 1, exp_sum_KB)
        # Subtract row by row, so that large logits cancel before the sum over rows.
        image_to_text_Kb = row_lse_Kb - matching_Kb
        text_to_image_Kb = column_lse_KB[:, matrix.matching_columns] - matching_Kb
        loss_Kb = image_to_text_Kb + text_to_image_Kb + matching_Kb * (2 - targets.matching_n)
        kl_Kb = torch.zeros_like(loss_Kb)
        if distillation:
            row_kl_Kb = sums.row_logit_gap_Kn / sums.row_Kn[-1] + row_lse_Kb - row_lse_Kb[-1]
            column_kl_KB = column_gap[0] / exp_sum_KB[-1] + column_lse_KB - column_lse_KB[-1]
            kl_Kb = row_kl_Kb + column_kl_KB[:, matrix.matching_columns]
        sums_2K = torch.stack([(loss_Kb - sums.target_logit_Kn).sum(1), kl_Kb.sum(1)])
        by_dim_K, kl_K = comm.all_reduce_sum(sums_2K) / (2 * len(text_BD) * LOG2_E)

        local_groups = () if matrix.row_group_Gn is None else (matrix.row_group_Gn, matrix.column_group_Gm)
        ctx.save_for_backward(image_bD, text_BD, scale_K, row_lse_Kb, column_lse_KB, *local_groups)
        ctx.nested, ctx.shifts, ctx.targets, ctx.distillation = nested, shifts, targets, distillation
        ctx.use_triton = use_triton
        ctx.mark_non_differentiable(by_dim_K, kl_K)
        total = ((by_dim_K + distillation * kl_K) * constant(nested.weights, by_dim_K)).sum()
        return total, by_dim_K, kl_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's decorator has no types)
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        image_bD, text_BD, scale_K, row_lse_Kb, column_lse_KB, *local_groups = ctx.saved_tensors
        # Ranks' gradients add up to the whole, and DDP averages them: hence the factor world size.
        grad_scale_K = constant(ctx.nested.weights, row_lse_Kb) * (comm.world().size / (2 * len(text_BD)))
        lse = (row_lse_Kb, column_lse_KB)
        with matmul_precision(image_bD.dtype, image_bD.device):
            found = gradients(
                inputs.local_logits(image_bD, text_BD, scale_K, ctx.nested, local_groups),
                softmax.SoftmaxProb(ctx.shifts, *lse, ctx.distillation),
                grad_scale_K,
                ctx.targets,
                image_bD.shape[1],
                distillation=ctx.distillation,
                triton_lse=lse if ctx.use_triton else None,
            )
        text_grad_bD = comm.reduce_scatter_sum(found.column_mD)
        return (
            found.row_nD.mul_(grads[0]).to(image_bD.dtype),
            text_grad_bD.mul_(grads[0]).to(text_BD.dtype),
            (grads[0] * found.log_scale_K / scale_K).to(scale_K.dtype),
            *[None] * 4,
        )


def _add_groups(matrix: LogitMatrix, groups: Groups | None, options: InfoNCEOptions) -> tuple[LogitMatrix, Targets]:
    """The matrix with its groups, and the targets of both directions together."""
    like, B, local = matrix.rows.inverse_norm_Kn, len(matrix.columns), matrix.matching_columns
    positive, smooth = options.same_group == "positive", options.label_smoothing
    group_G2B = inputs.gather_groups(groups)
    if group_G2B is not None:
        row_group_Gn, column_group_Gm = inputs.local_groups(group_G2B, local)
        matrix = replace(matrix, row_group_Gn=row_group_Gn, column_group_Gm=column_group_Gm)
    if not smooth and (group_G2B is None or not positive):
        return matrix, Targets(like.new_full((len(matrix.rows),), 2.0))
    others_2B = like.new_zeros(2, B)
    if group_G2B is not None:
        others_2B = inputs.count_same_group(group_G2B).to(like).T.contiguous()
    target_2B = (1 - smooth) / (1 + others_2B) if positive else torch.full_like(others_2B, 1 - smooth)
    smooth_2B = torch.full_like(others_2B, smooth / B) if positive else smooth / (B - others_2B)
    return matrix, Targets(
        matching_n=target_2B[:, local].sum(0),
        mask_same_group=not positive,
        same_group=(target_2B[0, local], target_2B[1]) if positive else None,
        smoothing=(smooth_2B[0, local], smooth_2B[1]) if smooth else None,
    )


def _use_triton(matrix: LogitMatrix, options: InfoNCEOptions) -> bool:
    """Whether to use the Triton kernels.

    Raises:
        InputError: `kernels: triton` is set, but they do not support this device or dtype.
    """
    like = matrix.rows.inverse_norm_Kn
    supported = like.dtype == torch.float32
    if options.kernels != "triton":
        return options.kernels == "auto" and like.is_cuda and supported and triton_problem(like.device) is None
    require_triton(like.device)
    if not supported:
        raise InputError("loss.kernels: triton supports only float32 or narrower embeddings; leave it at 'auto'.")
    return True


def _shared_shift(scale: float) -> float:
    """The shift of all logits of a dim of this scale (base 2), so that no exponential overflows."""
    return max(0.0, scale - _MAX_EXPONENT)


def _may_underflow(scale: float, lowest: float) -> bool:
    """Whether with the shared shift a row's sum, which has its matching pair's logit, may underflow."""
    return lowest < _shared_shift(scale) + _MIN_EXPONENT


def _choose_shifts(matrix: LogitMatrix, targets: Targets, limits: Limits) -> list[Shift]:
    """For each dim one shared shift if no sum can underflow, else the maximum logit of each row and column. The same
    choice on all ranks."""
    shared = [_shared_shift(scale) for scale, _ in limits]
    shifts: list[Shift] = [*shared]
    needs_max_K = [_may_underflow(*one) for one in limits]
    if any(needs_max_K):
        row_Kb, column_KB = softmax.max_logits(matrix, needs_max_K, targets)
        column_KB = comm.all_reduce_max(column_KB)
        shifts = [(row_Kb[k], column_KB[k]) if needs_max_K[k] else shared[k] for k in range(len(shared))]
    return shifts


def _stack_shifts(shifts: Sequence[Shift], side: int, like_Kn: torch.Tensor) -> torch.Tensor:
    """The row shifts (side 0) or the column shifts (side 1) of all dims: (K, n)."""
    return torch.stack(
        [
            s[side] if isinstance(s, tuple) else like.new_full(like.shape, s)
            for s, like in zip(shifts, like_Kn, strict=True)
        ]
    )
