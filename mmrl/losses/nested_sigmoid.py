"""The nested sigmoid (SigLIP) loss over the global batch, on the same sweep as the InfoNCE.

Shapes: b pairs of this process, B = b * world_size pairs of all, D the embedding's width, K dims; tiles as in sweep.py.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.losses import inputs, sweep
from mmrl.losses.inputs import Groups, NestedLoss
from mmrl.losses.sweep import LOG2_E, Block, Targets, Tile, Tiles
from mmrl.nesting import Nesting, nesting

_LN_2 = math.log(2)


def nested_sigmoid(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    same_group: Literal["mask", "positive"] = "mask",
    check_finite: bool = False,
) -> NestedLoss:
    """Equal, in value and gradient, to::

        sum(w[d] * sigmoid(normalize(image[:, :d]), normalize(text[:, :d]), scale[d], bias[d]) for d in dims) / sum(w)

    of losses/reference.py over the rows of all processes. Sources: Zhai et al. 2023 (arXiv 2303.15343), section 3.2;
    the nesting: Kusupati et al. 2022 (arXiv 2205.13147).

    Args:
        logit_bias: added to the scaled similarities: a scalar, (1,), or (K,) in the order of `dims`.
        same_group: pairs of one group are left out ("mask") or positives ("positive").
        All others: as in `nested_info_nce`.

    Raises:
        InputError: as `nested_info_nce`.
    """
    inputs.check(image_BD, text_BD, groups, check_finite)
    nested = nesting(dims, weights, image_BD.shape[1])
    scale_K = inputs.by_dim("logit_scale", logit_scale, dims, image_BD)
    bias_K = inputs.by_dim("logit_bias", logit_bias, dims, image_BD)
    if same_group not in ("mask", "positive"):
        raise InputError(f"same_group: {same_group!r}; allowed: 'mask', 'positive'.")
    positive = same_group == "positive"
    total, by_dim_K = _NestedSigmoid.apply(image_BD, text_BD, scale_K, bias_K, nested, groups, positive)  # pyright: ignore[reportGeneralTypeIssues]
    return NestedLoss(total, dict(zip(nested.dims, by_dim_K.unbind(), strict=True)))


class _NestedSigmoid(torch.autograd.Function):
    """Forward keeps nothing but the embeddings: each pair stands alone."""

    @staticmethod
    def forward(
        ctx: Any,
        image_bD: torch.Tensor,
        text_bD: torch.Tensor,
        scale_K: torch.Tensor,
        bias_K: torch.Tensor,
        nested: Nesting,
        groups: Groups | None,
        positive: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text_BD = comm.gather(text_bD)
        own, both, positives = comm.local_rows(len(image_bD)), (), len(image_bD)
        if groups is not None:
            group_B2 = inputs.gather_groups(groups)
            both = inputs.groups_of_strip(group_B2, own)
            positives += int(inputs.others_of_the_group(group_B2)[own, 0].sum()) if positive else 0
        scales = inputs.positive(scale_K)
        block, targets = _block(image_bD, text_BD, scales, nested, both, positive)
        biases = [bias * LOG2_E for bias in bias_K.tolist()]
        with sweep.own_precision(image_bD.dtype, image_bD.device):
            loss_K = _losses(block, biases, targets)
        by_dim_K = comm.all_reduce_sum(loss_K) / len(text_BD)
        ctx.save_for_backward(image_bD, text_BD, scale_K, *both)
        ctx.nested, ctx.biases, ctx.bias_dtype = nested, biases, bias_K.dtype
        ctx.positive, ctx.positives, ctx.scales = positive, positives, scales
        ctx.mark_non_differentiable(by_dim_K)
        return (by_dim_K * by_dim_K.new_tensor(nested.shares)).sum(), by_dim_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's decorator has no types)
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        image_bD, text_BD, scale_K, *both = ctx.saved_tensors
        block, targets = _block(image_bD, text_BD, ctx.scales, ctx.nested, both, ctx.positive)
        slope = _Sigmoids(ctx.biases, like=block.rows.inverse_norm_Kn)
        factor_K = [share * comm.world().size / len(text_BD) for share in ctx.nested.shares]
        with sweep.own_precision(image_bD.dtype, image_bD.device):
            found = sweep.gradients(block, slope, factor_K, targets, image_bD.shape[1])
        text_grad_bD = comm.reduce_scatter_sum(found.column_mD)
        bias_grad_K = (slope.total_K - ctx.positives) * slope.total_K.new_tensor(factor_K)
        return (
            found.row_nD.mul_(grads[0]).to(image_bD.dtype),
            text_grad_bD.mul_(grads[0]).to(text_BD.dtype),
            (grads[0] * found.scale_K / scale_K).to(scale_K.dtype),
            (grads[0] * bias_grad_K).to(ctx.bias_dtype),
            None,
            None,
            None,
        )


def _block(
    image_bD: torch.Tensor,
    text_BD: torch.Tensor,
    scales: Sequence[float],
    nested: Nesting,
    both: Sequence[torch.Tensor],
    positive: bool,
) -> tuple[Block, Targets]:
    """This process's strip, and its targets: 1 at own pairs and, with `positive`, at all pairs of one group."""
    block = inputs.strip(image_bD, text_BD, scales, nested, both)
    row_n, column_m = block.rows.inverse_norm_Kn[0], block.columns.inverse_norm_Kn[0]
    of_group = (torch.ones_like(row_n), torch.zeros_like(column_m)) if positive and both else None
    return block, Targets(torch.ones_like(row_n), mask_same_group=not positive, same_group=of_group)


def _losses(block: Block, biases: Sequence[float], targets: Targets) -> torch.Tensor:
    """Each dim's sum over the strip of -log sigmoid(± logit): (K,)."""
    loss_K = block.rows.inverse_norm_Kn.new_zeros(len(biases))
    for tile in Tiles(block, targets, buffers=2):
        for k in tile.products(keep=False):
            logits_IJ = tile.logits(k, tile.buffers[0], out=tile.buffers[1]).add_(biases[k]).mul_(_LN_2)
            own = tile.own_pairs(logits_IJ)
            if own is not None:
                loss_K[k] -= own[1].sum()
            if tile.target_IJ is not None:
                loss_K[k] -= (tile.target_IJ * logits_IJ).sum()
            # -log sigmoid(x) = softplus(x) - x, of which the targets' part is done.
            softplus_IJ = F.softplus(logits_IJ, threshold=40)  # exact to the last bit of float64
            loss_K[k] += (softplus_IJ if tile.mask_IJ is None else softplus_IJ.masked_fill_(tile.mask_IJ, 0)).sum()
    return loss_K


class _Sigmoids:
    """A tile's slope, and what it adds up to, which is the bias's gradient."""

    def __init__(self, biases: Sequence[float], like: torch.Tensor) -> None:
        self._biases = biases
        self.total_K = like.new_zeros(len(biases))

    def __call__(
        self, k: int, tile: Tile, logits_IJ: torch.Tensor, out: torch.Tensor, spare: torch.Tensor
    ) -> torch.Tensor:
        """As `sweep.Slope` says."""
        torch.add(logits_IJ, self._biases[k], out=out).mul_(_LN_2).sigmoid_()
        if tile.mask_IJ is not None:
            out.masked_fill_(tile.mask_IJ, 0)
        self.total_K[k] += out.sum()
        return out
