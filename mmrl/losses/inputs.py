"""Arguments and result of the nested losses: validation, groups, and the operands of the local logits.

Shapes: b local pairs (of this rank), B = b * world_size pairs of the global batch, D embedding width, K dims, G keys of
a group (1 or 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.hardware import reads_at_once
from mmrl.losses.sweep import LOG2_E, LogitMatrix, prefix_dots, split_into_blocks
from mmrl.nesting import Nesting

Groups = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""int64 (b,): equal values are one group (pairs of one item), negative values are in no group. With two keys, such as
item and caption, (b, 2): two rows are one group if they are equal in any column. Or a tuple of two such tensors, of the
images and of the texts."""


@dataclass(frozen=True)
class NestedLoss:
    """The result of a nested loss."""

    total: torch.Tensor
    """Scalar, equal on all ranks. Its gradient is this rank's part: averaged over ranks (DDP), it is the whole."""
    by_dim: dict[int, torch.Tensor]
    """The InfoNCE (or sigmoid loss) of each dim over the global batch, detached."""
    distillation_by_dim: dict[int, torch.Tensor] = field(default_factory=dict)
    """With distillation: the KL divergence of each smaller dim, detached, before its weight `options.distillation`."""


def check_inputs(image_BD: torch.Tensor, text_BD: torch.Tensor, groups: Groups | None, check_finite: bool) -> None:
    """Raise InputError unless shapes and dtypes match; with `check_finite`, also for NaN or infinity on any rank."""
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape:
        raise InputError(
            f"image_BD, text_BD: shapes {tuple(image_BD.shape)} and {tuple(text_BD.shape)}; both must be (B, D)."
        )
    if image_BD.dtype != text_BD.dtype or not image_BD.is_floating_point():
        raise InputError(f"image_BD, text_BD: {image_BD.dtype} and {text_BD.dtype}; both must be of one float dtype.")
    if not len(image_BD):
        raise InputError("image_BD, text_BD: no rows; give at least one pair.")
    b = len(image_BD)
    expected = f"expected int64 of shape ({b},) or ({b}, 2), or a tuple of two such tensors (image groups, text groups)"
    if isinstance(groups, tuple) and len(groups) != 2:
        raise InputError(f"groups: a tuple of {len(groups)}; {expected}.")
    for group in groups if isinstance(groups, tuple) else () if groups is None else (groups,):
        if not isinstance(group, torch.Tensor):
            raise InputError(f"groups: {type(group).__name__}; {expected}.")
        if tuple(group.shape) not in ((b,), (b, 1), (b, 2)) or group.dtype != torch.int64:
            raise InputError(f"groups: {group.dtype} of shape {tuple(group.shape)}; {expected}.")
    if isinstance(groups, tuple) and groups[0].shape != groups[1].shape:
        shapes = " and ".join(str(tuple(group.shape)) for group in groups)
        raise InputError(f"groups: shapes {shapes} of images and texts differ; {expected}.")
    if check_finite:
        bad = [len(x) - int(x.isfinite().all(1).sum()) for x in (image_BD, text_BD)]
        # Raised on all ranks: if one rank raised alone, the others would wait for it in the next collective.
        if comm.any_rank(any(bad)):
            raise InputError(
                f"image_BD, text_BD: {bad[0]} and {bad[1]} of {len(image_BD)} rows on rank {comm.world().rank} contain "
                "NaN or infinity; all rows must be finite on every rank."
            )


def per_dim(name: str, value: torch.Tensor | float, dims: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Expand a scalar, or one value per dim in the order of `dims`, to (K,) in ascending order of the dims."""
    values = torch.as_tensor(value, device=like.device).reshape(-1)
    if len(values) not in (1, len(dims)):
        raise InputError(f"{name}: {len(values)} values for {len(dims)} dims; give one value, or one per dim.")
    if not values.is_floating_point():
        values = values.float()
    ascending = sorted(range(len(dims)), key=lambda i: dims[i])
    # Not indexed by the list, which would be copied to the device.
    return torch.stack([values.expand(len(dims))[i] for i in ascending])


def check_scales(scales: Sequence[float]) -> None:
    """Raise InputError for a logit scale that is zero, negative or infinite.

    NaN passes: like a NaN embedding it comes from a diverged run, and gives a NaN loss.
    """
    for scale in scales:
        if scale <= 0 or scale == float("inf"):
            raise InputError(f"logit_scale: {scale}; the multiplier must be positive and finite.")


def local_logits(
    image_bD: torch.Tensor,
    text_BD: torch.Tensor,
    scale_K: torch.Tensor,
    nested: Nesting,
    groups: Sequence[torch.Tensor] = (),
) -> LogitMatrix:
    """The logits of the local images with all texts; `groups`, if any, are of the local images and of all texts."""
    operands = (split_into_blocks(image_bD, nested.dims), split_into_blocks(text_BD, nested.dims))
    scale_K = (scale_K.detach().double() * LOG2_E).to(operands[0].inverse_norm_Kn)
    return LogitMatrix(*operands, scale_K, comm.local_rows(len(image_bD)).start, *groups)


def gather_groups(groups: Groups | None) -> torch.Tensor | None:
    """The image groups and the text groups of every pair of the global batch, one row per key: (G, 2, B).

    Keys that no two pairs share are left out; None if there are no others.
    """
    if groups is None:
        return None
    sides = groups if isinstance(groups, tuple) else (groups,)  # of images and of texts, or of both
    stacked_bGs = torch.stack([group.reshape(len(group), -1) for group in sides], dim=2)
    group_G2B = comm.all_gather_rows(stacked_bGs).permute(1, 2, 0).expand(-1, 2, -1)
    if reads_at_once(group_G2B):
        group_G2B = group_G2B[[bool(_count_equal(key_2B).any()) for key_2B in group_G2B]]
    return group_G2B if len(group_G2B) else None


def local_groups(group_G2B: torch.Tensor, local: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The groups of the local images (G, b) and of all texts (G, B), with negative values replaced so that none are
    equal."""
    image_Gb, text_GB = group_G2B[:, 0, local].contiguous(), group_G2B[:, 1].contiguous()
    return image_Gb.clamp(min=-1), torch.where(text_GB < 0, -2, text_GB)


def count_same_group(group_G2B: torch.Tensor) -> torch.Tensor:
    """Number of other texts in each image's group, and of other images in each text's group: (B, 2)."""
    if len(group_G2B) == 1:
        return _count_equal(group_G2B[0])
    one_2B, other_2B = group_G2B
    # Pairs that are equal in both columns were counted twice. A rank is below 2 B, so ranks can be combined exactly.
    ranks = [torch.searchsorted(key_2B.flatten().sort().values, key_2B.contiguous()) for key_2B in group_G2B]
    both_2B = torch.where((group_G2B < 0).any(0), -1, ranks[0] * one_2B.numel() + ranks[1])
    return _count_equal(one_2B) + _count_equal(other_2B) - _count_equal(both_2B)


def _count_equal(key_2B: torch.Tensor) -> torch.Tensor:
    """`count_same_group` of one key."""
    image_B, text_B = key_2B.contiguous()

    def count(group_B: torch.Tensor, among_B: torch.Tensor) -> torch.Tensor:
        sorted_B = among_B.sort().values
        count_B = torch.searchsorted(sorted_B, group_B, right=True) - torch.searchsorted(sorted_B, group_B)
        return torch.where(group_B < 0, 0, count_B)

    matching_B = ((image_B == text_B) & (image_B >= 0)).long()
    return torch.stack([count(image_B, text_B) - matching_B, count(text_B, image_B) - matching_B], dim=1)


def matching_logits(matrix: LogitMatrix) -> torch.Tensor:
    """The logits of the matching pairs, base 2: (K, b)."""
    columns = matrix.matching_columns
    products_Kb = prefix_dots(matrix.rows.blocks, [y[columns] for y in matrix.columns.blocks])
    factors_Kb = matrix.rows.inverse_norm_Kn * matrix.columns.inverse_norm_Kn[:, columns]
    return products_Kb * factors_Kb * matrix.scale_K[:, None]
