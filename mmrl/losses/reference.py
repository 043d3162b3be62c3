"""The plainest formulas, to be read first: one process, whole matrices, no shortcuts.

They are the oracle of the tests and the baseline of the benchmarks; training uses nested_infonce.py, which is held to
their value and gradient.

Shapes: B pairs, D the embedding's width, d a nested dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def info_nce(
    image_Bd: torch.Tensor,
    text_Bd: torch.Tensor,
    logit_scale: torch.Tensor,
    groups_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE of unit rows: the mean of image->text and text->image cross-entropy.

    Row i's positive is column i. Where groups are given, other columns of row i's group are left out of its
    negatives (-1 belongs to no group). Source: Radford et al. 2021 (arXiv 2103.00020), section 2.3.
    """
    logits_BB = logit_scale * image_Bd @ text_Bd.T
    if groups_B is not None:
        same_BB = (groups_B[:, None] == groups_B[None, :]) & (groups_B >= 0)[:, None]
        same_BB.fill_diagonal_(False)
        logits_BB = logits_BB.masked_fill(same_BB, -torch.inf)
    labels_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, labels_B) + F.cross_entropy(logits_BB.T, labels_B)) / 2


def nested_info_nce(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    groups_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The weighted mean over `dims` of the InfoNCE of the renormalised prefixes, and each dim's own.

    Source: Kusupati et al. 2022 (arXiv 2205.13147), equation 1; there the losses are summed, here averaged.
    """
    weights = [1.0] * len(dims) if weights is None else weights
    scales = logit_scale.expand(len(dims)) if logit_scale.ndim else logit_scale.repeat(len(dims))
    by_dim = {
        dim: info_nce(F.normalize(image_BD[:, :dim], dim=-1), F.normalize(text_BD[:, :dim], dim=-1), scale, groups_B)
        for dim, scale in zip(dims, scales, strict=True)
    }
    total = sum(weight * by_dim[dim] for dim, weight in zip(dims, weights, strict=True)) / sum(weights)
    return torch.as_tensor(total), by_dim
