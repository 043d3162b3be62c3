"""The plainest formulas, to be read first: one process, whole matrices, no shortcuts.

They are the oracle of the tests and the baseline of the benchmarks; training uses nested_infonce.py and
nested_sigmoid.py, which are held to their value and gradient.

Shapes: B pairs, D the embedding's width, d a nested dim.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

Groups = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
SameGroup = Literal["mask", "positive"]


def info_nce(
    image_Bd: torch.Tensor,
    text_Bd: torch.Tensor,
    logit_scale: torch.Tensor,
    groups: Groups | None = None,
    same_group: SameGroup = "mask",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Symmetric InfoNCE of unit rows: the mean of image->text and text->image cross-entropy.

    Row i's positive is column i. Where groups are given, other columns of row i's group are left out of its
    negatives, or share its target (-1 belongs to no group). Source: Radford et al. 2021 (arXiv 2103.00020),
    section 2.3; several positives: Khosla et al. 2020 (arXiv 2004.11362), equation 2.
    """
    logits_BB, others_BB = _logits_and_others(image_Bd, text_Bd, logit_scale, groups, same_group)
    own_BB = torch.eye(len(logits_BB), dtype=logits_BB.dtype, device=logits_BB.device)
    positive_BB = own_BB + others_BB if same_group == "positive" else own_BB
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
    """Each pair of unit rows is told from the others by itself: a sum over all pairs, divided by B.

    Source: Zhai et al. 2023 (arXiv 2303.15343), algorithm 1. Groups as in `info_nce`.
    """
    logits_BB, others_BB = _logits_and_others(image_Bd, text_Bd, logit_scale, groups, same_group)
    positive_BB = torch.eye(len(logits_BB), device=logits_BB.device).bool()
    if same_group == "positive":
        positive_BB |= others_BB.bool()
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
    """The weighted mean over `dims` of the InfoNCE of the renormalised prefixes, and each dim's own.

    Source: Kusupati et al. 2022 (arXiv 2205.13147), equation 1; there the losses are summed, here averaged.
    """
    scale_of = _by_dim(logit_scale, dims)

    def one(dim: int) -> torch.Tensor:
        image_Bd, text_Bd = _prefix(image_BD, dim), _prefix(text_BD, dim)
        loss = info_nce(image_Bd, text_Bd, scale_of[dim], groups, same_group, label_smoothing)
        if not distillation or dim == max(dims):
            return loss
        teacher_BB, _ = _logits_and_others(
            _prefix(image_BD, max(dims)), _prefix(text_BD, max(dims)), scale_of[max(dims)], groups, same_group
        )
        student_BB, _ = _logits_and_others(image_Bd, text_Bd, scale_of[dim], groups, same_group)
        return loss + distillation * (_divergence(teacher_BB, student_BB) + _divergence(teacher_BB.T, student_BB.T)) / 2

    return _weighted_mean(one, dims, weights)


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
    """The weighted mean over `dims` of the sigmoid loss of the renormalised prefixes, and each dim's own."""
    scale_of, bias_of = _by_dim(logit_scale, dims), _by_dim(logit_bias, dims)

    def one(dim: int) -> torch.Tensor:
        prefixes = (_prefix(image_BD, dim), _prefix(text_BD, dim))
        return sigmoid(*prefixes, scale_of[dim], bias_of[dim], groups, same_group)

    return _weighted_mean(one, dims, weights)


def _prefix(embedding_BD: torch.Tensor, dim: int) -> torch.Tensor:
    return F.normalize(embedding_BD[:, :dim], dim=-1)


def _logits_and_others(
    image_Bd: torch.Tensor,
    text_Bd: torch.Tensor,
    logit_scale: torch.Tensor,
    groups: Groups | None,
    same_group: SameGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, minus infinity where a pair is left out, and 1 at pairs of one group but for the own ones."""
    logits_BB = logit_scale * image_Bd @ text_Bd.T
    if groups is None:
        return logits_BB, torch.zeros_like(logits_BB)
    image_B, text_B = groups if isinstance(groups, tuple) else (groups, groups)
    others_BB = (image_B[:, None] == text_B[None, :]) & (image_B >= 0)[:, None]
    others_BB.fill_diagonal_(False)
    if same_group == "mask":
        logits_BB = logits_BB.masked_fill(others_BB, -torch.inf)
    return logits_BB, others_BB.to(logits_BB.dtype)


def _cross_entropy(logits_BB: torch.Tensor, positive_BB: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Of each row's softmax to its positives in equal shares, some of it spread over all that is not left out."""
    allowed_BB = (logits_BB > -torch.inf).to(positive_BB.dtype)
    target_BB = (1 - smoothing) * positive_BB / positive_BB.sum(1, keepdim=True)
    target_BB = target_BB + smoothing * allowed_BB / allowed_BB.sum(1, keepdim=True)
    log_softmax_BB = F.log_softmax(logits_BB, dim=1).masked_fill(allowed_BB == 0, 0)
    return -(target_BB * log_softmax_BB).sum(1).mean()


def _divergence(teacher_BB: torch.Tensor, student_BB: torch.Tensor) -> torch.Tensor:
    """KL(teacher's softmax || student's), the mean of the rows; the teacher is held fixed."""
    allowed_BB = teacher_BB > -torch.inf
    teacher_BB = F.log_softmax(teacher_BB.detach(), dim=1)
    lead_BB = (teacher_BB - F.log_softmax(student_BB, dim=1)).masked_fill(~allowed_BB, 0)
    return (teacher_BB.exp() * lead_BB).sum(1).mean()


def _by_dim(value: torch.Tensor, dims: Sequence[int]) -> dict[int, torch.Tensor]:
    """A scalar, or one value a dim."""
    return dict(zip(dims, value.reshape(-1).expand(len(dims)), strict=True))


def _weighted_mean(
    one: Callable[[int], torch.Tensor], dims: Sequence[int], weights: Sequence[float] | None
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    weights = [1.0] * len(dims) if weights is None else weights
    by_dim = {dim: one(dim) for dim in dims}
    total = sum(weight * by_dim[dim] for dim, weight in zip(dims, weights, strict=True)) / sum(weights)
    return torch.as_tensor(total), by_dim
