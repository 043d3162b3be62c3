"""Nested InfoNCE with a learnable rotation, and a factor on the prefixes' gradient into the towers.

With z = Q x (model/rotation.py), L_k the InfoNCE of the prefixes of length d_k of z, D the full dim, P the weighted
mean of the smaller dims' losses (each with its distillation term), and a = `prefix_gradient` between 0 and 1,

    the towers descend                          L_D + a P
    Q and the smaller dims' logit scales        P
    the full dim's logit scale                  L_D

Why: at random initialisation the gradient of a prefix's loss with respect to the embedding is larger than the full
dim's by |full vector| / |prefix|, so young towers learn what serves the shortest prefix. With a rising from 0, the
towers first learn the full dim, while Q moves the directions that separate matching pairs to the front.

Two sweeps compute it: L_D on x, and the smaller dims on z, whose gradient with respect to x is multiplied by a.

Shapes: b local pairs (of this rank), D embedding width, K dims.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmrl.errors import InputError
from mmrl.losses import inputs
from mmrl.losses.inputs import Groups, NestedLoss
from mmrl.losses.nested_infonce import Operands, read_limits, sweep_loss
from mmrl.losses.terms import DEFAULT_OPTIONS, HardNegatives, InfoNCEOptions, SecondMembers, Teacher, make_sides
from mmrl.nesting import Nesting


def rotated_nested_info_nce(
    image_bD: torch.Tensor | None,
    text_bD: torch.Tensor | None,
    logit_scale: torch.Tensor | float,
    dims: Sequence[int],
    rotation: Callable[[torch.Tensor], torch.Tensor],
    prefix_gradient: float,
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    options: InfoNCEOptions = DEFAULT_OPTIONS,
    second: SecondMembers | None = None,
    negatives: HardNegatives | None = None,
    teacher: Teacher | None = None,
) -> NestedLoss:
    """The loss whose backward pass gives each part the gradient above; tests/helpers/reference.py has the formula.

    Args:
        image_bD, text_bD, logit_scale, weights, groups, options, second, negatives, teacher: as for `nested_info_nce`.
        dims: nested dims in any order; D must be among them.
        rotation: maps (b, D) to (b, D), e.g. a `NestedRotation`.
        prefix_gradient: a, from 0 to 1.

    Returns: `total` is L_D + P, what is differentiated. If D is the only dim with a weight, it is L_D, and `by_dim` has
        only D.

    Raises:
        InputError: D is not among the dims, a outside 0 … 1, or as for `nested_info_nce`.
    """
    sides = make_sides(image_bD, text_bD, groups, options, second, negatives, teacher)
    first = next(iter(sides.embeddings.values()))
    full_dim = first.shape[-1]
    if full_dim not in dims:
        raise InputError(f"dims: {list(dims)} must include the full dim, {full_dim}, which the rotation preserves.")
    if not 0 <= prefix_gradient <= 1:
        raise InputError(f"prefix_gradient: {prefix_gradient} is out of range; give a value from 0 to 1.")
    nested = Nesting.from_dims(dims, weights, full_dim)
    scale_K = inputs.per_dim("logit_scale", logit_scale, dims, first)
    sweeps = [Operands(sides, scale_K[-1:], Nesting.from_dims([full_dim], None, full_dim))]
    if any(nested.weights[:-1]):
        # For distillation the full dim takes part as the teacher, with weight 0; its logits and scale are held fixed.
        count = len(nested.dims) if options.distillation and teacher is None else len(nested.dims) - 1
        scales = torch.cat([scale_K[:-1], scale_K[-1:].detach()])[:count]
        prefixes = Nesting.from_dims(nested.dims[:count], [*nested.weights[:-1], 0.0][:count], full_dim)
        rotated = sides.mapped(lambda x: rotation(_ScaleGradient.apply(x, prefix_gradient)))
        sweeps.append(Operands(rotated, scales, prefixes))
    losses = [sweep_loss(*one, options) for one in zip(sweeps, read_limits(*sweeps), strict=True)]
    by_dim, kl_by_dim, others = {}, {}, {name: {} for name in losses[0].other_terms}
    for loss in reversed(losses):
        by_dim |= loss.by_dim
        kl_by_dim |= loss.distillation_by_dim
        others = {name: one | loss.other_terms[name] for name, one in others.items()}
    return NestedLoss(torch.stack([loss.total for loss in losses]).sum(), by_dim, kl_by_dim, others)


class _ScaleGradient(torch.autograd.Function):
    """Identity in the forward pass; multiplies the gradient by a factor in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None
