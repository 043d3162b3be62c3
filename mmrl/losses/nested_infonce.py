"""The nested symmetric InfoNCE over the global batch: all dims in one sweep of tiles, in memory linear in the batch.

Every process computes the similarities of its own images with all texts, each once in the cluster: one all-gather of
the texts, one reduction of the columns' sums and one of the loss, and backward one reduce-scatter of the texts'
gradient, whatever the number of dims; groups are gathered too, and logits that no shared shift spans cost two
reductions of their extremes. losses/reference.py has the formula to which value and gradient are held, losses/sweep.py
the sweep.

Shapes: b pairs of this process, B = b * world_size pairs of all, D the embedding's width, K dims.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch.autograd.function import once_differentiable

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.losses import inputs, softmax, sweep
from mmrl.losses.inputs import Groups, NestedLoss
from mmrl.losses.softmax import Shift
from mmrl.losses.sweep import LOG2_E, Block, Targets
from mmrl.nesting import Nesting, nesting
from mmrl.settings import Settings, machine

# Exponentials (base 2) of a shared shift stay below 2^_HIGHEST; a row whose sum could fall below 2^_LOWEST, where
# float32 loses digits, makes its dim take the exact form. Sums of 2^30 terms then still fit float32.
_HIGHEST, _LOWEST = 80.0, -100.0


class InfoNCEOptions(Settings):
    """Departures from the plain symmetric InfoNCE."""

    same_group: Literal["mask", "positive"] = "mask"
    """Pairs of one group: left out of the negatives, or positives like the own pair (targets share 1 equally)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """This much of each target is spread over all pairs of its row or column that are not left out."""
    distillation: float = Field(default=0.0, ge=0)
    """Weight of KL(softmax of the largest dim, held fixed || softmax of the dim), added to each smaller dim's loss."""
    kernels: Literal["auto", "torch", "triton"] = machine("auto")
    """Who does the passes between the matrix products: PyTorch's own operations, or fused Triton kernels, which serve
    the plain loss, also with masked groups, in float32 or narrower. 'auto' takes the kernels on a GPU where they
    serve."""


PLAIN = InfoNCEOptions()


def nested_info_nce(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor | float,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    options: InfoNCEOptions = PLAIN,
    check_finite: bool = False,
) -> NestedLoss:
    """Equal, in value and gradient, to::

        sum(w[d] * info_nce(F.normalize(image[:, :d]), F.normalize(text[:, :d]), scale[d]) for d in dims) / sum(w)

    over the rows of all processes, in the order of ranks. Sources: Kusupati et al. 2022 (arXiv 2205.13147), equation
    1, for the nesting; Radford et al. 2021 (arXiv 2103.00020), figure 3, for the loss.

    Args:
        image_BD, text_BD: this process's rows, of any float type, not normalised; row i of one belongs to row i of
            the other. Equally many on every process. Logits and their sums are float32, or float64 if these are.
            A zero vector has zero similarities and, as with `F.normalize`, a very large gradient, finite but in
            float16.
        logit_scale: the multiplier, already exponentiated, positive: a scalar, (1,), or (K,) in the order of `dims`.
        dims: nested dims, in any order.
        weights: one a dim; all equal when left out.
        groups: int64 (b,), or a pair (of the images, of the texts): pairs of one group are no negatives of each
            other; negative numbers are in no group. Given on all processes or on none.
        options: what else the softmaxes are pulled to.
        check_finite: look for NaN and infinity in the embeddings first, which waits for the device.

    Time and memory: 4 B^2 D multiply-adds for all dims and all processes together, forward and backward, and per
    process O(B (D + K)) numbers and some tiles, whose size `sweep.tile_shape` fits to the device.

    Raises:
        InputError: shapes that do not match, dims out of range or repeated, unfit weights or scales.
    """
    inputs.check(image_BD, text_BD, groups, check_finite)
    nested = nesting(dims, weights, image_BD.shape[1])
    scale_K = inputs.by_dim("logit_scale", logit_scale, dims, image_BD)
    total, by_dim_K = _NestedInfoNCE.apply(image_BD, text_BD, scale_K, nested, groups, options)  # pyright: ignore[reportGeneralTypeIssues]
    return NestedLoss(total, dict(zip(nested.dims, by_dim_K.unbind(), strict=True)))


class _NestedInfoNCE(torch.autograd.Function):
    """Forward keeps the embeddings and the log-sum-exps of rows and columns; backward sweeps once more."""

    @staticmethod
    def forward(
        ctx: Any,
        image_bD: torch.Tensor,
        text_bD: torch.Tensor,
        scale_K: torch.Tensor,
        nested: Nesting,
        groups: Groups | None,
        options: InfoNCEOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text_BD = comm.gather(text_bD)
        scales = inputs.positive(scale_K)
        block = inputs.strip(image_bD, text_BD, scales, nested)
        block, targets = _with_targets(block, groups, options)
        own_Kb, distil, by_kernel = inputs.own_logits(block), options.distillation, _by_kernel(block, targets, options)
        with sweep.own_precision(image_bD.dtype, image_bD.device):
            shifts = _shifts(block, targets, own_Kb)
            sums = softmax.sums(block, shifts, targets, distil > 0, by_kernel)

        parts = [sums.column_Km] + ([sums.gap_column_Km] if distil else [])
        column_sum_KB, *gap = comm.all_reduce_sum(torch.cat(parts, 1)).split(len(text_BD), 1)
        row_lse_Kb = sums.row_Kn.log2() + _per_dim(shifts, 0, sums.row_Kn)
        column_lse_KB = column_sum_KB.log2() + _per_dim(shifts, 1, column_sum_KB)
        # Row by row, so that large logits cancel before they are summed up.
        rows_Kb = (row_lse_Kb - own_Kb) + (column_lse_KB[:, block.own] - own_Kb) + own_Kb * (2 - targets.own_n)
        if distil:
            lead_Kb = sums.gap_row_Kn / sums.row_Kn[-1] + row_lse_Kb - row_lse_Kb[-1]
            lead_KB = gap[0] / column_sum_KB[-1] + column_lse_KB - column_lse_KB[-1]
            rows_Kb = rows_Kb + distil * (lead_Kb + lead_KB[:, block.own])
        by_dim_K = comm.all_reduce_sum(rows_Kb.sum(1) - sums.target_K) / (2 * len(text_BD) * LOG2_E)

        groups_of_strip = () if block.row_group_n is None else (block.row_group_n, block.column_group_m)
        ctx.save_for_backward(image_bD, text_BD, scale_K, row_lse_Kb, column_lse_KB, *groups_of_strip)
        ctx.nested, ctx.shifts, ctx.targets, ctx.distillation = nested, shifts, targets, distil
        ctx.by_kernel, ctx.scales = by_kernel, scales
        ctx.mark_non_differentiable(by_dim_K)
        return (by_dim_K * by_dim_K.new_tensor(nested.shares)).sum(), by_dim_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's decorator has no types)
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        image_bD, text_BD, scale_K, row_lse_Kb, column_lse_KB, *groups_of_strip = ctx.saved_tensors
        # Each process adds its strip's part, and data-parallel training averages them: hence times the world size.
        factor_K = [share * comm.world().size / (2 * len(text_BD)) for share in ctx.nested.shares]
        log_sums = (row_lse_Kb, column_lse_KB)
        with sweep.own_precision(image_bD.dtype, image_bD.device):
            found = sweep.gradients(
                inputs.strip(image_bD, text_BD, ctx.scales, ctx.nested, groups_of_strip),
                softmax.Softmaxes(ctx.shifts, *log_sums, ctx.distillation),
                factor_K,
                ctx.targets,
                image_bD.shape[1],
                log_sums=log_sums if ctx.by_kernel else None,
            )
        text_grad_bD = comm.reduce_scatter_sum(found.column_mD)
        return (
            found.row_nD.mul_(grads[0]).to(image_bD.dtype),
            text_grad_bD.mul_(grads[0]).to(text_BD.dtype),
            (grads[0] * found.scale_K / scale_K).to(scale_K.dtype),
            None,
            None,
            None,
        )


def _with_targets(block: Block, groups: Groups | None, options: InfoNCEOptions) -> tuple[Block, Targets]:
    """The block with its groups, and the targets that groups and options ask for, of both directions together."""
    like, B, own = block.rows.inverse_norm_Kn, len(block.columns), block.own
    if groups is None and not options.label_smoothing:
        return block, Targets(like.new_full((len(block.rows),), 2.0))
    others_B2 = like.new_zeros(B, 2)
    if groups is not None:
        group_B2 = inputs.gather_groups(groups)
        row_group_n, column_group_m = inputs.groups_of_strip(group_B2, own)
        block = replace(block, row_group_n=row_group_n, column_group_m=column_group_m)
        others_B2 = inputs.others_of_the_group(group_B2).to(like)
    positive, smooth = options.same_group == "positive", options.label_smoothing
    sharp_B2 = (1 - smooth) / (1 + others_B2) if positive else torch.full_like(others_B2, 1 - smooth)
    smooth_B2 = torch.full_like(others_B2, smooth / B) if positive else smooth / (B - others_B2)
    return block, Targets(
        own_n=sharp_B2[own].sum(1),
        mask_same_group=not positive,
        same_group=(sharp_B2[own, 0], sharp_B2[:, 1]) if positive else None,
        everywhere=(smooth_B2[own, 0], smooth_B2[:, 1]) if smooth else None,
    )


def require_kernels(device: torch.device) -> None:
    """Raises InputError where Triton kernels cannot run."""
    if not _kernels_run(device):
        raise InputError("loss.kernels: triton wants an NVIDIA GPU and the package triton; leave it at 'auto'.")


def _kernels_run(device: torch.device) -> bool:
    try:
        from mmrl.losses import kernels
    except ImportError:
        return False
    return kernels.usable(device)


def _by_kernel(block: Block, targets: Targets, options: InfoNCEOptions) -> bool:
    """Whether kernels.py does the passes.

    Raises:
        InputError: it was asked for by name and cannot.
    """
    like = block.rows.inverse_norm_Kn
    plain = targets.everywhere is None and targets.same_group is None and not options.distillation
    served = plain and like.dtype == torch.float32
    if options.kernels != "triton":
        return options.kernels == "auto" and like.is_cuda and served and _kernels_run(like.device)
    require_kernels(like.device)
    if not served:
        raise InputError("loss.kernels: triton serves the plain loss in float32 or narrower; leave it at 'auto'.")
    return True


def _shifts(block: Block, targets: Targets, own_Kb: torch.Tensor) -> list[Shift]:
    """One shift for all of a dim's logits where no exponential can overflow and no sum, which has its positive in it,
    can vanish; else the largest logit of each row and each column. The same choice on every process."""
    shared = [max(0.0, scale - _HIGHEST) for scale in block.scale_K]
    shifts: list[Shift] = [*shared]
    # No logit is below -scale: up to a scale of 62 this settles it without asking the device or the other processes.
    if all(-scale >= shift + _LOWEST for scale, shift in zip(block.scale_K, shared, strict=True)):
        return shifts
    lowest_K = -comm.all_reduce_max(-own_Kb.amin(1))
    exact = [low < shift + _LOWEST for low, shift in zip(lowest_K.tolist(), shared, strict=True)]
    if any(exact):
        row_Kb, column_KB = softmax.maxima(block, exact, targets)
        column_KB = comm.all_reduce_max(column_KB)
        shifts = [(row_Kb[k], column_KB[k]) if exact[k] else shared[k] for k in range(len(exact))]
    return shifts


def _per_dim(shifts: Sequence[Shift], side: int, like_Kn: torch.Tensor) -> torch.Tensor:
    """The rows' (0) or the columns' (1) shifts, one tensor for all dims: (K, n)."""
    return torch.stack(
        [
            s[side] if isinstance(s, tuple) else like.new_full(like.shape, s)
            for s, like in zip(shifts, like_Kn, strict=True)
        ]
    )
