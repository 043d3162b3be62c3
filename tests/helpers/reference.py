"""The plain formulas of all losses: one process, whole logit matrices, no optimisations.

Tests compare the values and gradients of mmrl.losses with those of these functions.

Shapes: B pairs, D embedding width, d a nested dim.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

Groups = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # (B,) or (B, 2), as in mmrl.losses.inputs
SameGroup = Literal["mask", "positive"]


def info_nce(
    image_Bd: torch.Tensor,
    text_Bd: torch.Tensor,
    logit_scale: torch.Tensor,
    groups: Groups | None = None,
    same_group: SameGroup = "mask",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Symmetric InfoNCE of normalised embeddings: the mean of the image-to-text and text-to-image cross-entropies.

    Image i matches text i. Other pairs of one group (equal in any column) are masked, or are positives that share the
    target equally (negative values are in no group). Source: Radford et al. 2021 (arXiv 2103.00020), section 2.3;
    several positives: Khosla et al. 2020 (arXiv 2004.11362), equation 2.
    """
    logits_BB, same_group_BB = _logits(image_Bd, text_Bd, logit_scale, groups, same_group)
    matching_BB = torch.eye(len(logits_BB), dtype=logits_BB.dtype, device=logits_BB.device)
    positive_BB = matching_BB + same_group_BB if same_group == "positive" else matching_BB
    image_to_text = _cross_entropy(logits_BB, positive_BB, label_smoothing)
    text_to_image = _cross_entropy(logits_BB.T, positive_BB.T, label_smoothing)
    return (image_to_text + text_to_image) / 2


def sigmoid(
    image_Bd: torch.Tensor,
    text_Bd: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    groups: Groups | None = None,
    same_group: SameGroup = "mask",
) -> torch.Tensor:
    """Sigmoid loss (SigLIP) of normalised embeddings: binary cross-entropy of each of the B² pairs, summed, over B.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1. Groups as in `info_nce`.
    """
    logits_BB, same_group_BB = _logits(image_Bd, text_Bd, logit_scale, groups, same_group)
    positive_BB = torch.eye(len(logits_BB), device=logits_BB.device).bool()
    if same_group == "positive":
        positive_BB |= same_group_BB.bool()
    sign_BB = torch.where(positive_BB, 1.0, -1.0)
    return -F.logsigmoid(sign_BB * (logits_BB + logit_bias)).sum() / len(logits_BB)


def nested_info_nce(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    same_group: SameGroup = "mask",
    label_smoothing: float = 0.0,
    distillation: float = 0.0,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The weighted mean over `dims` of the InfoNCE of the renormalised prefixes, and the InfoNCE of each dim.

    With distillation the mean is that of InfoNCE + `distillation` x KL, see `distillation_by_dim`.
    Source: Kusupati et al. 2022 (arXiv 2205.13147), equation 1; there the losses are summed, here averaged.
    """
    scale_of = _per_dim(logit_scale, dims)

    def loss_of(dim: int) -> torch.Tensor:
        image_Bd, text_Bd = _prefix(image_BD, dim), _prefix(text_BD, dim)
        return info_nce(image_Bd, text_Bd, scale_of[dim], groups, same_group, label_smoothing)

    total, by_dim = _weighted_mean(loss_of, dims, weights)
    if distillation:
        kl_of = distillation_by_dim(image_BD, text_BD, logit_scale, dims, groups, same_group)
        total = total + distillation * _weighted_mean(kl_of.__getitem__, dims, weights)[0]
    return total, by_dim


def distillation_by_dim(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    dims: Sequence[int],
    groups: Groups | None = None,
    same_group: SameGroup = "mask",
) -> dict[int, torch.Tensor]:
    """KL(softmax of the largest dim, detached || softmax of each dim), the mean over rows and both directions."""
    scale_of = _per_dim(logit_scale, dims)
    logits_of = {
        dim: _logits(_prefix(image_BD, dim), _prefix(text_BD, dim), scale_of[dim], groups, same_group)[0]
        for dim in dims
    }
    teacher_BB = logits_of[max(dims)]
    return {
        dim: (_kl_divergence(teacher_BB, student_BB) + _kl_divergence(teacher_BB.T, student_BB.T)) / 2
        if student_BB is not teacher_BB
        else teacher_BB.new_zeros(())
        for dim, student_BB in logits_of.items()
    }


def nested_term(
    row_BD: torch.Tensor,
    column_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    label_smoothing: float = 0.0,
    negative_rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    negative_columns: tuple[torch.Tensor, torch.Tensor] | None = None,
    teacher: tuple[torch.Tensor, torch.Tensor, float, float] | None = None,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The weighted mean over dims of a term with hard negatives or a teacher, and the InfoNCE of each dim.

    Args:
        keys: (B, G) of rows and columns; rows and columns that are equal in any, and not negative, are masked.
        negative_rows, negative_columns: embeddings and keys of hard negatives. Negative columns are candidates of all
            rows, negative rows of all columns; they are no queries.
        teacher: its normalised embeddings, its scale, and the weight of KL(its softmax || the dim's).
    """
    B, scale_of = len(row_BD), _per_dim(logit_scale, dims)
    none = torch.full((B, 1), -1), torch.full((B, 1), -1)
    row_keys, column_keys = none if keys is None else keys

    def loss_of(dim: int, with_teacher: bool) -> torch.Tensor:
        loss = row_BD.new_zeros(())
        sides = (row_BD, column_BD), (row_keys, column_keys)
        for direction, more in enumerate((negative_columns, negative_rows)):
            query, candidate = (sides[0][direction], sides[0][1 - direction])
            query_keys, candidate_keys = (sides[1][direction], sides[1][1 - direction])
            if more is not None:
                candidate, candidate_keys = torch.cat([candidate, more[0]]), torch.cat([candidate_keys, more[1]])
            logits = scale_of[dim] * _prefix(query, dim) @ _prefix(candidate, dim).T
            same = ((query_keys[:, None] == candidate_keys[None]) & (query_keys >= 0)[:, None]).any(2)
            same[:, :B].fill_diagonal_(False)
            logits = logits.masked_fill(same, -torch.inf)
            loss = loss + _cross_entropy(logits, torch.eye(*logits.shape, dtype=logits.dtype), label_smoothing)
            if teacher is not None and with_teacher:
                row_BT, column_BT, scale, weight = teacher
                of_teacher = scale * row_BT @ column_BT.T
                of_teacher = (of_teacher.T if direction else of_teacher).masked_fill(same, -torch.inf)
                loss = loss + weight * _kl_divergence(of_teacher, logits)
        return loss / 2

    total, _ = _weighted_mean(lambda dim: loss_of(dim, True), dims, weights)
    return total, {dim: loss_of(dim, False).detach() for dim in dims}


def rotated_nested_info_nce(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    dims: Sequence[int],
    rotation_DD: torch.Tensor,
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    same_group: SameGroup = "mask",
    label_smoothing: float = 0.0,
    distillation: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """L_D, the InfoNCE of the full dim; P, the weighted mean of the smaller dims, after a rotation; each dim's InfoNCE.

    With distillation P is the mean of InfoNCE + `distillation` x KL. In training the towers descend L_D + a P, the
    rotation and the smaller dims' logit scales descend P, and the full dim's logit scale descends L_D. The weights of
    the smaller dims are divided by their own sum; D's is not used. The teacher of the distillation, the full dim's
    softmax, is held fixed together with its logit scale.
    """
    full_dim, scale_of = image_BD.shape[1], _per_dim(logit_scale, dims)
    weight_of = dict(zip(dims, [1.0] * len(dims) if weights is None else weights, strict=True))
    full = info_nce(
        _prefix(image_BD, full_dim), _prefix(text_BD, full_dim), scale_of[full_dim], groups, same_group, label_smoothing
    )
    rotated = (image_BD @ rotation_DD.T, text_BD @ rotation_DD.T)
    scale_K = torch.stack([scale_of[dim] if dim < full_dim else scale_of[dim].detach() for dim in dims])
    prefix_weights = [weight_of[dim] if dim < full_dim else 0.0 for dim in dims]
    options = (groups, same_group, label_smoothing, distillation)
    prefixes, by_dim = nested_info_nce(*rotated, scale_K, dims, prefix_weights, *options)
    return full, prefixes, by_dim | {full_dim: full}


def nested_sigmoid(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups: Groups | None = None,
    same_group: SameGroup = "mask",
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The weighted mean over `dims` of the sigmoid loss of the renormalised prefixes, and the loss of each dim."""
    scale_of, bias_of = _per_dim(logit_scale, dims), _per_dim(logit_bias, dims)

    def loss_of(dim: int) -> torch.Tensor:
        prefixes = (_prefix(image_BD, dim), _prefix(text_BD, dim))
        return sigmoid(*prefixes, scale_of[dim], bias_of[dim], groups, same_group)

    return _weighted_mean(loss_of, dims, weights)


def _prefix(embedding_BD: torch.Tensor, dim: int) -> torch.Tensor:
    return F.normalize(embedding_BD[:, :dim], dim=-1)


def _logits(
    image_Bd: torch.Tensor,
    text_Bd: torch.Tensor,
    logit_scale: torch.Tensor,
    groups: Groups | None,
    same_group: SameGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, -inf for masked pairs; and 1 for non-matching pairs of one group, else 0."""
    logits_BB = logit_scale * image_Bd @ text_Bd.T
    if groups is None:
        return logits_BB, torch.zeros_like(logits_BB)
    image_BG, text_BG = (x.reshape(len(x), -1) for x in (groups if isinstance(groups, tuple) else (groups, groups)))
    same_BBG = (image_BG[:, None] == text_BG[None, :]) & (image_BG >= 0)[:, None]
    same_group_BB = same_BBG.any(2).fill_diagonal_(False)
    if same_group == "mask":
        logits_BB = logits_BB.masked_fill(same_group_BB, -torch.inf)
    return logits_BB, same_group_BB.to(logits_BB.dtype)


def _cross_entropy(logits_BB: torch.Tensor, positive_BB: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Mean cross-entropy of the rows. Positives share the target equally; smoothing goes to all unmasked pairs."""
    unmasked_BB = (logits_BB > -torch.inf).to(positive_BB.dtype)
    target_BB = (1 - smoothing) * positive_BB / positive_BB.sum(1, keepdim=True)
    target_BB = target_BB + smoothing * unmasked_BB / unmasked_BB.sum(1, keepdim=True)
    log_softmax_BB = F.log_softmax(logits_BB, dim=1).masked_fill(unmasked_BB == 0, 0)
    return -(target_BB * log_softmax_BB).sum(1).mean()


def _kl_divergence(teacher_BB: torch.Tensor, student_BB: torch.Tensor) -> torch.Tensor:
    """KL(softmax of the teacher's rows || softmax of the student's rows), mean over rows; the teacher is detached."""
    unmasked_BB = teacher_BB > -torch.inf
    teacher_BB = F.log_softmax(teacher_BB.detach(), dim=1)
    log_ratio_BB = (teacher_BB - F.log_softmax(student_BB, dim=1)).masked_fill(~unmasked_BB, 0)
    return (teacher_BB.exp() * log_ratio_BB).sum(1).mean()


def _per_dim(value: torch.Tensor, dims: Sequence[int]) -> dict[int, torch.Tensor]:
    """A scalar, or one value per dim, as a dict."""
    return dict(zip(dims, value.reshape(-1).expand(len(dims)), strict=True))


def _weighted_mean(
    loss_of: Callable[[int], torch.Tensor], dims: Sequence[int], weights: Sequence[float] | None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    weights = [1.0] * len(dims) if weights is None else weights
    by_dim = {dim: loss_of(dim) for dim in dims}
    total = sum(weight * by_dim[dim] for dim, weight in zip(dims, weights, strict=True)) / sum(weights)
    return torch.as_tensor(total), by_dim
