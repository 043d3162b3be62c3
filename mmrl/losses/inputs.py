"""Arguments and result of the nested losses: validation, groups, and the operands of the local logits.

Shapes: b local pairs (of this rank), B = b * world_size pairs of the global batch, D embedding width, K dims, G keys of
a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations

import torch

from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.losses.sweep import LogitMatrix, prefix_dots

Groups = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""int64 (b,): equal values are one group (pairs of one item), negative values are in no group. With several keys, such
as item and caption, (b, G): two rows are one group if they are equal in any column. Or a tuple of two such tensors, of
the images and of the texts."""


@dataclass(frozen=True)
class NestedLoss:
    """The result of a nested loss."""

    total: torch.Tensor
    """Scalar, equal on all ranks. Its gradient is this rank's part: averaged over ranks (DDP), it is the whole."""
    by_dim: dict[int, torch.Tensor]
    """The InfoNCE (or sigmoid loss) of each dim over the global batch, detached."""
    distillation_by_dim: dict[int, torch.Tensor] = field(default_factory=dict)
    """With distillation or a teacher: the KL divergence of each dim that has one, detached, before its weight."""
    other_terms: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    """`by_dim` of the terms besides the first, e.g. of image_image, detached, before their weights."""


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
    expected = (
        f"expected int64 of shape ({b},) or ({b}, keys), or a tuple of two such tensors (image groups, text groups)"
    )
    if isinstance(groups, tuple) and len(groups) != 2:
        raise InputError(f"groups: a tuple of {len(groups)}; {expected}.")
    for group in groups if isinstance(groups, tuple) else () if groups is None else (groups,):
        if not isinstance(group, torch.Tensor):
            raise InputError(f"groups: {type(group).__name__}; {expected}.")
        is_shaped = group.ndim in (1, 2) and len(group) == b and group.shape[-1] > 0
        if not is_shaped or group.dtype != torch.int64:
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


def count_same_group(group_GN: torch.Tensor, among_GM: torch.Tensor, num_matching: int) -> torch.Tensor:
    """For each row of `group_GN` the number of rows of `among_GM` in its group, but for the matching one: int64 (N,).

    Row i matches row i, for i < num_matching.
    """
    N = group_GN.shape[1]
    total_N = group_GN.new_zeros(N)
    keys = torch.cat([group_GN, among_GM], 1)
    for size in range(1, len(keys) + 1):  # inclusion and exclusion: rows that are equal in two keys were counted twice
        for some in combinations(keys, size):
            in_all = reduce(_joint_key, some)
            total_N += (-1) ** (size + 1) * _count_equal(in_all[:N], in_all[N:], num_matching)
    return total_N


def _joint_key(one_N: torch.Tensor, other_N: torch.Tensor) -> torch.Tensor:
    """A key that is equal where both of these are, and negative where either is."""
    # A rank is below N, so ranks can be combined exactly.
    ranks = [torch.searchsorted(key.sort().values, key.contiguous()) for key in (one_N, other_N)]
    return torch.where((one_N < 0) | (other_N < 0), -1, ranks[0] * len(one_N) + ranks[1])


def _count_equal(key_N: torch.Tensor, among_M: torch.Tensor, num_matching: int) -> torch.Tensor:
    """`count_same_group` of one key."""
    sorted_M, key_N = among_M.contiguous().sort().values, key_N.contiguous()
    count_N = torch.searchsorted(sorted_M, key_N, right=True) - torch.searchsorted(sorted_M, key_N)
    count_N[:num_matching] -= (key_N[:num_matching] == among_M[:num_matching]).long()
    return torch.where(key_N < 0, 0, count_N)


def matching_logits(matrix: LogitMatrix) -> torch.Tensor:
    """The logits of the matching pairs, base 2: (K, b)."""
    rows, columns = matrix.rows.part(slice(0, matrix.num_matching)), matrix.columns.part(matrix.matching_columns)
    products_Kb = prefix_dots(rows.blocks, columns.blocks, matrix.has_teacher)
    return products_Kb * rows.inverse_norm_Kn * columns.inverse_norm_Kn * matrix.scale_K[:, None]
