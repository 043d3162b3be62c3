"""The nested symmetric InfoNCE over the global batch.

Every process computes its own rows of both similarity matrices against the columns of all; the embeddings are gathered
once, whatever the number of dims. losses/reference.py has the formula to which value and gradient are held.

Shapes: b pairs of this process, B = b * world_size pairs of all, D the embedding's width, d a nested dim, K dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mmrl import distributed
from mmrl.errors import InputError
from mmrl.nesting import cut, nesting

Groups = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class NestedLoss:
    """What `nested_info_nce` returns."""

    total: torch.Tensor
    """Scalar, the same on every process; its gradient is this process's share (averaged over processes, the whole)."""
    by_dim: dict[int, torch.Tensor]
    """Each dim's InfoNCE over the global batch, detached."""


def nested_info_nce(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor | float,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
) -> NestedLoss:
    """Equal, in value and gradient, to::

        sum(w[d] * info_nce(F.normalize(image[:, :d]), F.normalize(text[:, :d]), scale[d]) for d in dims) / sum(w)

    over the rows of all processes, in the order of ranks.

    Args:
        image_BD, text_BD: this process's rows, of any float type, not normalised; row i of one belongs to row i of
            the other. Equally many on every process. Logits are computed in float32 or wider.
        logit_scale: the multiplier, already exponentiated: a scalar, (1,), or (K,) in the order of `dims`.
        dims: nested dims, in any order.
        weights: one a dim; all equal when left out.
        groups: int64 (b,), or a pair (of the images, of the texts): pairs of one group are no negatives of each
            other; -1 is in no group.

    Raises:
        InputError: shapes that do not match, dims out of range or repeated, unfit weights.
    """
    _check_shapes(image_BD, text_BD, groups)
    nested = nesting(dims, weights, image_BD.shape[1])
    scale_of_dim = _scale_by_dim(logit_scale, dims, image_BD.device)
    # Widened first, so that gradients are added up over dims and processes in float32 and rounded at the end.
    all_image_BD, all_text_BD = distributed.gather(_wide(image_BD)), distributed.gather(_wide(text_BD))
    world = distributed.world()
    rows = slice(world.rank * len(image_BD), (world.rank + 1) * len(image_BD))
    masks = _same_group_masks(groups, rows)

    losses = []
    for dim in nested.dims:
        image_Bd, text_Bd = cut(all_image_BD, dim), cut(all_text_BD, dim)
        losses.append(_info_nce_of_rows(image_Bd, text_Bd, scale_of_dim[dim], rows, masks))
    losses_K = torch.stack(losses)
    shares_K = losses_K.new_tensor(nested.shares)
    global_K = distributed.mean(losses_K)
    share = (losses_K * shares_K).sum()
    total = share + ((global_K * shares_K).sum() - share).detach()
    return NestedLoss(total, dict(zip(nested.dims, global_K.unbind(), strict=True)))


def _info_nce_of_rows(
    image_Bd: torch.Tensor,
    text_Bd: torch.Tensor,
    scale: torch.Tensor,
    rows: slice,
    masks: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """The symmetric InfoNCE's mean over these rows, against all columns."""
    logits_image_bB = scale * image_Bd[rows] @ text_Bd.T
    logits_text_bB = scale * text_Bd[rows] @ image_Bd.T
    if masks is not None:
        logits_image_bB = logits_image_bB.masked_fill(masks[0], -torch.inf)
        logits_text_bB = logits_text_bB.masked_fill(masks[1], -torch.inf)
    labels_b = torch.arange(rows.start, rows.stop, device=image_Bd.device)
    return (F.cross_entropy(logits_image_bB, labels_b) + F.cross_entropy(logits_text_bB, labels_b)) / 2


def _wide(embedding_BD: torch.Tensor) -> torch.Tensor:
    return embedding_BD.float() if embedding_BD.dtype in (torch.float16, torch.bfloat16) else embedding_BD


def _same_group_masks(groups: Groups | None, rows: slice) -> tuple[torch.Tensor, torch.Tensor] | None:
    """True where a column is of the row's group but not its own pair, for both directions: (b, B) each."""
    if groups is None:
        return None
    image_b, text_b = groups if isinstance(groups, tuple) else (groups, groups)
    image_B, text_B = distributed.gather(image_b), distributed.gather(text_b)
    own_bB = torch.arange(rows.start, rows.stop, device=image_B.device)[:, None] == torch.arange(
        len(image_B), device=image_B.device
    )

    def same(row_group_b: torch.Tensor, column_group_B: torch.Tensor) -> torch.Tensor:
        return (row_group_b[:, None] == column_group_B) & (row_group_b >= 0)[:, None] & ~own_bB

    return same(image_b, text_B), same(text_b, image_B)


def _scale_by_dim(
    logit_scale: torch.Tensor | float, dims: Sequence[int], device: torch.device
) -> dict[int, torch.Tensor]:
    scale = torch.as_tensor(logit_scale, device=device).reshape(-1)
    if len(scale) not in (1, len(dims)):
        raise InputError(f"logit_scale: {len(scale)} values for {len(dims)} dims; give one, or one a dim.")
    return dict(zip(dims, scale.expand(len(dims)), strict=True))


def _check_shapes(image_BD: torch.Tensor, text_BD: torch.Tensor, groups: Groups | None) -> None:
    if image_BD.ndim != 2 or image_BD.shape != text_BD.shape:
        raise InputError(
            f"image_BD, text_BD: shapes {tuple(image_BD.shape)} and {tuple(text_BD.shape)}; both must be (B, D)."
        )
    for group in groups if isinstance(groups, tuple) else (groups,):
        if group is not None and group.shape != image_BD.shape[:1]:
            raise InputError(f"groups: shape {tuple(group.shape)}; want ({len(image_BD)},), one a pair.")
