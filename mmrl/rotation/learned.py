"""Learn the rotation whose prefixes retrieve best, from embeddings alone: the towers do not change.

Principal directions (PCA) have the most variance, but part of the variance of images has no counterpart in their texts.
So the rotation starts at the principal directions and descends the nested loss of the prefixes over orthogonal
matrices, on embeddings that were computed once. Full-dim similarities cannot change.

Embeddings of the images that the towers were trained on carry little signal, because the towers have memorised these
pairs. So prefixes are also distilled from the full dim's softmax, which generalises to new images
(tests/benchmarks/LOG.md).

Within the block of dims between two nested dims the loss does not determine the order. They are ordered by the
covariance of images with their texts, so that prefixes between the nested dims are usable, too.

The orthogonal matrix is the Cayley transform (I - S)⁻¹ (I + S) of a skew-symmetric S, which Adam updates: every S gives
an orthogonal matrix, and S = 0 the identity. (Cayley 1846; Helfrich et al. 2018, arXiv 1707.09520, learn with it.)

Shapes: N images, M texts, D the embedding's width, R the number of rotated dims, B pairs of a batch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mmrl import nesting
from mmrl.distributed import comm
from mmrl.evaluate.ranking.ranks import rank_both
from mmrl.losses.nested_infonce import nested_info_nce
from mmrl.losses.terms import InfoNCEOptions

STEPS = 300
_BATCH = 512
_LR, _SCALE_LR = 1e-2, 1e-2
_OPTIONS = InfoNCEOptions(distillation=1.0)
_HOLDOUT_EVERY = 10  # every tenth image is held out
_MAX_HOLDOUT = 2048


@dataclass(frozen=True)
class Pairs:
    """Embeddings of images and of their texts, on the CPU."""

    image_ND: torch.Tensor
    text_MD: torch.Tensor
    image_of_text_M: torch.Tensor
    group_N: torch.Tensor
    """Images of one group are not negatives of each other; -1: no group."""

    def select(self, image_n: torch.Tensor) -> "Pairs":
        """The images with these indices, with their texts."""
        new_index_N = torch.full((len(self.image_ND),), -1).scatter(0, image_n, torch.arange(len(image_n)))
        image_of_text_M = new_index_N[self.image_of_text_M]
        kept = image_of_text_M >= 0
        return Pairs(self.image_ND[image_n], self.text_MD[kept], image_of_text_M[kept], self.group_N[image_n])

    def rotated(self, rotation_DD: torch.Tensor) -> "Pairs":
        """The embeddings times a rotation, as unit vectors in float32."""
        image_ND, text_MD = (
            F.normalize((rows.double() @ rotation_DD.T), dim=-1).float() for rows in (self.image_ND, self.text_MD)
        )
        return Pairs(image_ND, text_MD, self.image_of_text_M, self.group_N)


@dataclass(frozen=True)
class LearnedRotation:
    """A learned rotation and its score on held-out images."""

    rotation_DD: torch.Tensor
    """Orthogonal, float64 (D, D), on the CPU; the initial rotation if the learned one is not better on the holdout."""
    images: int
    """Images that it was learned from."""
    holdout_images: int
    before: float
    """Mean reciprocal rank on the holdout, over the smaller dims and both directions, with the initial rotation."""
    after: float
    """The same with the learned rotation."""

    @property
    def helps(self) -> bool:
        """Whether the learned rotation is better on the holdout than the initial one."""
        return self.after > self.before

    def summary(self) -> str:
        """One line for the console."""
        kept = "" if self.helps else "; no improvement, so PCA is used"
        return (
            f"rotation learned from {self.images:,} images; on {self.holdout_images:,} held-out images the mean "
            f"reciprocal rank of the smaller dims went from {100 * self.before:.1f} to {100 * self.after:.1f} %{kept}"
        )

    def as_json(self) -> dict[str, Any]:
        """The manifest's `rotation.learnt`."""
        return {
            "pictures": self.images,
            "judged_by": self.holdout_images,
            "before": self.before,
            "after": self.after,
            "taken": self.helps,
        }


def find_rotation(
    moment_DD: torch.Tensor,
    pairs: Pairs | None,
    logit_scale: float,
    dims: Sequence[int],
    keep: int = 0,
    steps: int = STEPS,
) -> tuple[torch.Tensor, LearnedRotation | None]:
    """The rotation of a set: PCA, or a learned rotation if it is better on held-out images.

    Computed on rank 0 and broadcast to all ranks.

    Args:
        moment_DD: the second moment, the mean of x xᵀ.
        pairs: embeddings to learn from; None: PCA only.
        logit_scale: the model's scale of the full dim.
        keep: leave the first `keep` dims unchanged.
    """
    rotation_DD, learned = torch.empty(0), None
    if comm.world().is_rank_0:
        rotation_DD = nesting.principal_rotation(moment_DD, keep)
        if pairs is not None:
            with comm.single_process():
                learned = learn_rotation(pairs, logit_scale, rotation_DD, dims, keep, steps)
    rotation_DD, learned = comm.broadcast_object((rotation_DD, learned))
    return (learned.rotation_DD if learned else rotation_DD), learned


def learn_rotation(
    pairs: Pairs,
    logit_scale: float,
    initial_DD: torch.Tensor,
    dims: Sequence[int],
    keep: int = 0,
    steps: int = STEPS,
    seed: int = 0,
) -> LearnedRotation | None:
    """Learns a rotation by the mean nested loss of the `dims` between `keep` and D, starting at `initial_DD`.

    Args:
        logit_scale: of the full dim's softmax, from which prefixes are distilled.
        initial_DD: orthogonal, float64 (D, D), such as the principal directions.
        keep: leave the first `keep` dims as `initial_DD` gives them.

    Returns: None if there is nothing to learn: no steps, too few images, or no dim between `keep` and D.
    """
    width = len(initial_DD)
    dims = sorted(dim for dim in dims if keep < dim < width)
    index_N = torch.arange(len(pairs.image_ND))
    held_out_N = index_N % _HOLDOUT_EVERY == _HOLDOUT_EVERY - 1
    if not dims or not steps or not held_out_N.any():
        return None
    initial = pairs.rotated(initial_DD)
    training, holdout = initial.select(index_N[~held_out_N]), initial.select(index_N[held_out_N][:_MAX_HOLDOUT])
    update_DD = torch.eye(width, dtype=torch.float64)
    update_DD[keep:, keep:] = _descend(training, logit_scale, dims, keep, steps, torch.Generator().manual_seed(seed))
    update_DD = _order_within_blocks(training.rotated(update_DD), [keep, *dims, width]) @ update_DD
    before, after = (mean_reciprocal_rank(one, dims) for one in (holdout, holdout.rotated(update_DD)))
    rotation_DD = update_DD @ initial_DD if after > before else initial_DD
    return LearnedRotation(rotation_DD, len(training.image_ND), len(holdout.image_ND), before, after)


def _descend(
    pairs: Pairs, logit_scale: float, dims: Sequence[int], keep: int, steps: int, generator: torch.Generator
) -> torch.Tensor:
    """The learned orthogonal matrix (R, R) of the dims from `keep` on, in float64."""
    width, texts = pairs.image_ND.shape[1] - keep, len(pairs.text_MD)
    free_RR = torch.zeros(width, width, requires_grad=True)
    log_scale_K = torch.full((len(dims),), math.log(logit_scale), requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [free_RR], "lr": _LR}, {"params": [log_scale_K], "lr": _SCALE_LR}])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step: (1 + math.cos(math.pi * step / steps)) / 2, lambda step: 1.0]
    )
    group_N = _groups(pairs)
    full_scale, weights = torch.tensor([logit_scale]), [1.0] * len(dims) + [0.0]
    for _ in range(steps):
        text_B = torch.randint(texts, (min(_BATCH, texts),), generator=generator)
        image_B = pairs.image_of_text_M[text_B]
        cayley_RR = _cayley(free_RR)
        image_BD, text_BD = (
            torch.cat([rows[:, :keep], rows[:, keep:] @ cayley_RR.T], 1)
            for rows in (pairs.image_ND[image_B], pairs.text_MD[text_B])
        )
        scale_K = torch.cat([log_scale_K.exp(), full_scale])
        loss = nested_info_nce(
            image_BD, text_BD, scale_K, [*dims, keep + width], weights, groups=group_N[image_B], options=_OPTIONS
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
    return _cayley(free_RR.detach().double())


def _cayley(free_RR: torch.Tensor) -> torch.Tensor:
    """The Cayley transform of a square matrix's skew-symmetric part: orthogonal (R, R)."""
    skew_RR, identity_RR = (free_RR - free_RR.T) / 2, torch.eye(len(free_RR), dtype=free_RR.dtype)
    return torch.linalg.solve(identity_RR - skew_RR, identity_RR + skew_RR)


def _order_within_blocks(pairs: Pairs, edges: Sequence[int]) -> torch.Tensor:
    """The orthogonal matrix, float64 (D, D), that sorts the dims of each block between two edges: directions with the
    highest covariance between images and their texts come first (by its symmetric part)."""
    image_MD, text_MD = (
        rows.double() - rows.double().mean(0) for rows in (pairs.image_ND[pairs.image_of_text_M], pairs.text_MD)
    )
    order_DD = torch.eye(image_MD.shape[1], dtype=torch.float64)
    for first, last in itertools.pairwise(edges):
        covariance = image_MD[:, first:last].T @ text_MD[:, first:last] / len(text_MD)
        order_DD[first:last, first:last] = nesting.principal_rotation(covariance)
    return order_DD


def _groups(pairs: Pairs) -> torch.Tensor:
    """A group for every image. An image without one gets its own, so that its texts are not each other's negatives."""
    _, group_N = pairs.group_N.unique(return_inverse=True)  # below N
    return torch.where(pairs.group_N >= 0, group_N, torch.arange(len(group_N)) + len(group_N))


def mean_reciprocal_rank(pairs: Pairs, dims: Sequence[int]) -> float:
    """Mean reciprocal rank of the best match between images and their first texts, over both directions and `dims`.

    All of one group match; ties rank before the match.
    """
    count, texts = len(pairs.image_ND), torch.arange(len(pairs.text_MD))
    text_N = torch.zeros(count).long().scatter_reduce(0, pairs.image_of_text_M, texts, "amin", include_self=False)
    group_N = _groups(pairs)
    both = rank_both(pairs.image_ND, pairs.text_MD[text_N], group_N, group_N, dims)
    return float(torch.cat([1 / ranked[dim].rank_Q for ranked in both for dim in dims]).mean())
