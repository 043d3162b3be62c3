"""Nested sigmoid loss (SigLIP) over the global batch, on the same tiles as nested_infonce.py.

Shapes: b local pairs (of this rank), B = b * world_size pairs of the global batch, D embedding width, K dims; tiles as
in sweep.py.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.losses import inputs
from mmrl.losses.backward import gradients
from mmrl.losses.inputs import Groups, NestedLoss
from mmrl.losses.sweep import LOG2_E, LogitMatrix, LogitTile, LogitTiles, Targets, constant, matmul_precision
from mmrl.losses.terms import DEFAULT_OPTIONS, Sides, Term, TermMatrices, gather_keys, make_sides
from mmrl.nesting import Nesting

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
    """Equals, in value and gradient, this formula on the rows of all ranks (tests/helpers/reference.py)::

        logits = {d: scale[d] * F.normalize(image[:, :d]) @ F.normalize(text[:, :d]).T + bias[d] for d in dims}
        loss = {d: -F.logsigmoid((2 * torch.eye(B) - 1) * logits[d]).sum() / B for d in dims}
        total = sum(w[d] * loss[d] for d in dims) / sum(w.values())

    Sources: Zhai et al. 2023 (arXiv 2303.15343), section 3.2; the nesting: Kusupati et al. 2022 (arXiv 2205.13147).

    Args:
        logit_bias: added to the scaled similarities: a scalar, (1,), or (K,) in the order of `dims`.
        same_group: other pairs of one group are masked ("mask") or positives ("positive").
        All others: as in `nested_info_nce`.

    Raises:
        InputError: as `nested_info_nce`.
    """
    sides = make_sides(image_BD, text_BD, groups, DEFAULT_OPTIONS, check_finite=check_finite)
    nested = Nesting.from_dims(dims, weights, image_BD.shape[1])
    scale_K = inputs.per_dim("logit_scale", logit_scale, dims, image_BD)
    bias_K = inputs.per_dim("logit_bias", logit_bias, dims, image_BD)
    if same_group not in ("mask", "positive"):
        raise InputError(f"same_group: {same_group!r}; allowed: 'mask', 'positive'.")
    positive = same_group == "positive"
    total, by_dim_K = _NestedSigmoid.apply(image_BD, text_BD, scale_K, bias_K, nested, sides, positive)  # pyright: ignore[reportGeneralTypeIssues]
    return NestedLoss(total, dict(zip(nested.dims, by_dim_K.unbind(), strict=True)))


class _NestedSigmoid(torch.autograd.Function):
    """Forward saves only the embeddings and groups; backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        image_bD: torch.Tensor,
        text_bD: torch.Tensor,
        scale_K: torch.Tensor,
        bias_K: torch.Tensor,
        nested: Nesting,
        sides: Sides,
        positive: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text_BD, b = comm.all_gather_rows(text_bD), len(image_bD)
        local_groups, num_positives = (), scale_K.new_full((), b)
        (keys,) = gather_keys(sides, b, len(text_BD))
        if keys is not None:
            local_groups = keys.local(b)
            if positive:
                num_positives = num_positives + keys.others()[0][comm.local_rows(b)].sum()
        inputs.check_scales(scale_K.tolist())
        matrix, targets = _logits_and_targets(image_bD, text_BD, scale_K, nested, local_groups, positive)
        with matmul_precision(image_bD.dtype, image_bD.device):
            loss_K = _loss_sums(matrix, _in_base_2(bias_K, matrix), targets)
        by_dim_K = comm.all_reduce_sum(loss_K) / len(text_BD)
        ctx.save_for_backward(image_bD, text_BD, scale_K, bias_K, *local_groups)
        ctx.nested, ctx.positive, ctx.num_positives = nested, positive, num_positives
        ctx.mark_non_differentiable(by_dim_K)
        return (by_dim_K * constant(nested.weights, by_dim_K)).sum(), by_dim_K

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's decorator has no types)
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        image_bD, text_BD, scale_K, bias_K, *local_groups = ctx.saved_tensors
        matrix, targets = _logits_and_targets(image_bD, text_BD, scale_K, ctx.nested, local_groups, ctx.positive)
        prob = _SigmoidProb(_in_base_2(bias_K, matrix))
        grad_scale_K = constant(ctx.nested.weights, matrix.scale_K) * (comm.world().size / len(text_BD))
        with matmul_precision(image_bD.dtype, image_bD.device):
            found = gradients(matrix, prob, grad_scale_K, targets, image_bD.shape[1])
        text_grad_bD = comm.reduce_scatter_sum(found.column_mD)
        bias_grad_K = (prob.sum_K - ctx.num_positives) * grad_scale_K
        return (
            found.row_nD.mul_(grads[0]).to(image_bD.dtype),
            text_grad_bD.mul_(grads[0]).to(text_BD.dtype),
            (grads[0] * found.log_scale_K / scale_K).to(scale_K.dtype),
            (grads[0] * bias_grad_K).to(bias_K.dtype),
            *[None] * 3,
        )


def _logits_and_targets(
    image_bD: torch.Tensor,
    text_BD: torch.Tensor,
    scale_K: torch.Tensor,
    nested: Nesting,
    local_groups: Sequence[torch.Tensor],
    positive: bool,
) -> tuple[LogitMatrix, Targets]:
    """The local logits and their targets: 1 for matching pairs and, with `positive`, for all pairs of one group."""
    sides = {"image": image_bD, "text": text_BD}
    matrix = TermMatrices(sides, {"text": text_BD}, scale_K, nested).of(Term("", "image", "text"), local_groups)
    row_n, column_m = matrix.rows.inverse_norm_Kn[0], matrix.columns.inverse_norm_Kn[0]
    same_group = (torch.ones_like(row_n), torch.zeros_like(column_m)) if positive and local_groups else None
    return matrix, Targets(torch.ones_like(row_n), mask_same_group=not positive, same_group=same_group)


def _in_base_2(bias_K: torch.Tensor, matrix: LogitMatrix) -> torch.Tensor:
    return (bias_K.detach().double() * LOG2_E).to(matrix.scale_K)


def _loss_sums(matrix: LogitMatrix, bias_K: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Each dim's sum over the local logits of -log sigmoid(± logit): (K,)."""
    loss_K = torch.zeros_like(bias_K)
    for tile in LogitTiles(matrix, targets, num_buffers=2):
        for k in tile.products(keep_all=False):
            logits_IJ = tile.logits(k, tile.buffers[0], out=tile.buffers[1]).add_(bias_K[k]).mul_(_LN_2)
            # -log sigmoid(x) = softplus(x) - x for a positive pair, and softplus(x) for a negative one.
            matching = tile.matching_pairs(logits_IJ)
            if matching is not None:
                loss_K[k] -= matching[1].sum()
            if tile.target_IJ is not None:
                loss_K[k] -= (tile.target_IJ * logits_IJ).sum()
            softplus_IJ = F.softplus(logits_IJ, threshold=40)  # exact to the last bit of float64
            loss_K[k] += (softplus_IJ if tile.mask_IJ is None else softplus_IJ.masked_fill_(tile.mask_IJ, 0)).sum()
    return loss_K


class _SigmoidProb:
    """A `backward.ProbFunction`: the sigmoid of each logit. `sum_K` adds them up for the bias gradient."""

    def __init__(self, bias_K: torch.Tensor) -> None:
        self._bias_K = bias_K
        self.sum_K = torch.zeros_like(bias_K)

    def __call__(
        self, k: int, tile: LogitTile, logits_IJ: torch.Tensor, out: torch.Tensor, spare: torch.Tensor
    ) -> torch.Tensor:
        """See `backward.ProbFunction`."""
        torch.add(logits_IJ, self._bias_K[k], out=out).mul_(_LN_2).sigmoid_()
        if tile.mask_IJ is not None:
            out.masked_fill_(tile.mask_IJ, 0)
        self.sum_K[k] += out.sum()
        return out
