"""What every nested loss does with its arguments before the sweep, and what it returns.

Shapes: b pairs of this process, B = b * world_size pairs of all, D the embedding's width, K dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.losses import sweep
from mmrl.losses.sweep import LOG2_E, Block
from mmrl.nesting import Nesting

Groups = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""int64 (b,): equal numbers are one item, negative ones are in no group; or a pair of those, of the images and of the
texts."""


@dataclass(frozen=True)
class NestedLoss:
    """What a nested loss returns."""

    total: torch.Tensor
    """Scalar, the same on every process; its gradient is this process's share (averaged over processes, the whole)."""
    by_dim: dict[int, torch.Tensor]
    """Each dim's loss over the global batch, detached; `total` is their weighted mean."""


def check(image_BD: torch.Tensor, text_BD: torch.Tensor, groups: Groups | None, finite: bool) -> None:
    """Raises InputError unless the arguments fit each other; with `finite`, also at NaN and infinity, anywhere."""
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape:
        raise InputError(
            f"image_BD, text_BD: shapes {tuple(image_BD.shape)} and {tuple(text_BD.shape)}; both must be (B, D)."
        )
    if image_BD.dtype != text_BD.dtype or not image_BD.is_floating_point():
        raise InputError(f"image_BD, text_BD: {image_BD.dtype} and {text_BD.dtype}; both must be of one float type.")
    if not len(image_BD):
        raise InputError("image_BD, text_BD: no rows; give at least one pair.")
    wanted = f"want int64 ({len(image_BD)},), one a pair, or a pair of such, of the images and of the texts"
    if isinstance(groups, tuple) and len(groups) != 2:
        raise InputError(f"groups: a tuple of {len(groups)}; {wanted}.")
    for group in groups if isinstance(groups, tuple) else () if groups is None else (groups,):
        if not isinstance(group, torch.Tensor):
            raise InputError(f"groups: a {type(group).__name__}; {wanted}.")
        if group.shape != image_BD.shape[:1] or group.dtype != torch.int64:
            raise InputError(f"groups: {group.dtype} of shape {tuple(group.shape)}; {wanted}.")
    if finite:
        bad = [len(x) - int(x.isfinite().all(1).sum()) for x in (image_BD, text_BD)]
        # Raised on all processes, since one alone would leave the others waiting.
        if comm.any_rank(any(bad)):
            raise InputError(
                f"image_BD, text_BD: {bad[0]} and {bad[1]} of {len(image_BD)} rows here hold NaN or infinity; all must "
                "be finite, on every process."
            )


def by_dim(name: str, value: torch.Tensor | float, dims: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A scalar, or one number a dim in the order of `dims` -> (K,), in ascending order of the dims."""
    values = torch.as_tensor(value, device=like.device).reshape(-1)
    if len(values) not in (1, len(dims)):
        raise InputError(f"{name}: {len(values)} values for {len(dims)} dims; give one, or one a dim.")
    if not values.is_floating_point():
        values = values.float()
    ascending = sorted(range(len(dims)), key=lambda i: dims[i])
    return values.expand(len(dims))[ascending]


def positive(scale_K: torch.Tensor) -> list[float]:
    """The logit scales as numbers. NaN may pass: like a NaN embedding it comes from a run gone wrong, and makes the
    loss NaN.

    Raises:
        InputError: one is not finite and positive.
    """
    scales: list[float] = scale_K.tolist()
    for scale in scales:
        if scale <= 0 or scale == float("inf"):
            raise InputError(f"logit_scale: {scale}; the multiplier must be positive and finite.")
    return scales


def strip(
    image_bD: torch.Tensor,
    text_BD: torch.Tensor,
    scales: Sequence[float],
    nested: Nesting,
    groups: Sequence[torch.Tensor] = (),
) -> Block:
    """This process's images against all texts; `groups`, if any, are of the images here and of all texts."""
    scales = [scale * LOG2_E for scale in scales]
    sides = (sweep.side(image_bD, nested.dims), sweep.side(text_BD, nested.dims))
    return Block(*sides, scales, comm.local_rows(len(image_bD)).start, *groups)


def gather_groups(groups: Groups) -> torch.Tensor:
    """Of all processes' pairs, the image's group and the text's: (B, 2)."""
    pair = groups if isinstance(groups, tuple) else (groups, groups)
    return comm.gather(torch.stack(pair, dim=1))


def groups_of_strip(group_B2: torch.Tensor, own: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups of the images in `own` and of all texts, where negative numbers equal nothing."""
    return group_B2[own, 0].clamp(min=-1), torch.where(group_B2[:, 1] < 0, -2, group_B2[:, 1])


def others_of_the_group(group_B2: torch.Tensor) -> torch.Tensor:
    """How many texts beside its own share an image's group, and how many images a text's: (B, 2)."""
    image_B, text_B = group_B2.T.contiguous()

    def matches(group_B: torch.Tensor, among_B: torch.Tensor) -> torch.Tensor:
        sorted_B = among_B.sort().values
        count_B = torch.searchsorted(sorted_B, group_B, right=True) - torch.searchsorted(sorted_B, group_B)
        return torch.where(group_B < 0, 0, count_B)

    own_B = ((image_B == text_B) & (image_B >= 0)).long()
    return torch.stack([matches(image_B, text_B) - own_B, matches(text_B, image_B) - own_B], dim=1)


def own_logits(block: Block) -> torch.Tensor:
    """The own pairs' logits, base 2: (K, b)."""
    products_Kb = sweep.prefix_products(block.rows.blocks, [y[block.own] for y in block.columns.blocks])
    scale_K = products_Kb.new_tensor(block.scale_K)
    return products_Kb * block.rows.inverse_norm_Kn * block.columns.inverse_norm_Kn[:, block.own] * scale_K[:, None]
