"""The rotation whose prefixes compare best, learnt from vectors alone: the towers are not touched.

Principal directions are those in which vectors differ most. What tells pairs apart is not always that: pictures vary in
much that no text speaks of. So the matrix is learnt: beginning with the principal directions, the nested loss of the
prefixes goes down over orthogonal matrices, on vectors embedded once. Similarities of whole vectors cannot change.

Towers may know the very pictures that taught them by heart, and then pairs teach little. So prefixes are pulled to the
whole vectors' softmaxes as well, which for new pictures are the best there is to go by (tests/benchmarks/LOG.md).

The loss leaves any order within the numbers that one dim adds to the next smaller one. There it is by what pictures and
their texts have in common, so that cuts between the dims serve, too.

An orthogonal matrix is Cayley's (I - S)⁻¹ (I + S) of a skew-symmetric S, which Adam moves: every S gives one, and S = 0
the identity. (Cayley 1846; Helfrich et al. 2018, arXiv 1707.09520, for learning by it.)

Shapes: N pictures, M texts, D the embedding's width, R the entries that are turned, B pairs of a batch.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mmrl import nesting
from mmrl.distributed import comm
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce

STEPS = 300
_BATCH = 512
_LR, _SCALE_LR = 1e-2, 1e-2
_OPTIONS = InfoNCEOptions(distillation=1.0)
_HELD_OUT = 10  # every tenth picture judges what the others taught
_MOST_JUDGES = 2048


@dataclass(frozen=True)
class Pairs:
    """Vectors of some pictures of a set and of their texts, on the CPU."""

    image_ND: torch.Tensor
    text_MD: torch.Tensor
    image_of_text_M: torch.Tensor
    group_N: torch.Tensor
    """Pictures of one group are no negatives of each other; -1 is in no group."""

    def of(self, picture_n: torch.Tensor) -> "Pairs":
        """Some of the pictures, with their texts."""
        place_N = torch.full((len(self.image_ND),), -1).scatter(0, picture_n, torch.arange(len(picture_n)))
        image_of_text_M = place_N[self.image_of_text_M]
        kept = image_of_text_M >= 0
        return Pairs(self.image_ND[picture_n], self.text_MD[kept], image_of_text_M[kept], self.group_N[picture_n])

    def turned(self, rotation_DD: torch.Tensor) -> "Pairs":
        """The same, in other coordinates, as unit vectors in float32."""
        image_ND, text_MD = (
            F.normalize((rows.double() @ rotation_DD.T), dim=-1).float() for rows in (self.image_ND, self.text_MD)
        )
        return Pairs(image_ND, text_MD, self.image_of_text_M, self.group_N)


@dataclass(frozen=True)
class LearnedRotation:
    """A rotation, and how it did on pictures that it was not learnt from."""

    rotation_DD: torch.Tensor
    """Orthogonal, float64 (D, D), on the CPU; the one that was begun with where nothing better was found."""
    pictures: int
    """It was learnt from so many."""
    judged_by: int
    """So many others."""
    before: float
    """Mean reciprocal rank among the judges, of all smaller dims and both directions, as it was begun with."""
    after: float

    @property
    def helps(self) -> bool:
        """Whether what was learnt is the better one."""
        return self.after > self.before

    def told(self) -> str:
        """For the user."""
        taken = "" if self.helps else ", so the principal directions are kept"
        return (
            f"learnt from {self.pictures:,} pictures: mean reciprocal rank of the smaller dims among "
            f"{self.judged_by:,} others {100 * self.before:.1f} → {100 * self.after:.1f} %{taken}"
        )

    def as_json(self) -> dict[str, Any]:
        """For a manifest."""
        return {name: value for name, value in asdict(self).items() if name != "rotation_DD"} | {"taken": self.helps}


def best(
    moment_DD: torch.Tensor,
    pairs: Pairs | None,
    logit_scale: float,
    dims: Sequence[int],
    keep: int = 0,
    steps: int = STEPS,
) -> tuple[torch.Tensor, LearnedRotation | None]:
    """The principal rotation, or a better one learnt from it; on every process that of the main one.

    Args:
        moment_DD: the mean of x xᵀ.
        pairs: what to learn from; nothing is learnt for None.
        logit_scale: the model's, of its whole vectors.
        keep: leave the first so many numbers as they are.
    """
    found = None
    if comm.world().is_rank_0:
        rotation_DD = nesting.principal_rotation(moment_DD, keep)
        with comm.single_process():
            learnt = None if pairs is None else learn(pairs, logit_scale, rotation_DD, dims, keep, steps)
        found = (rotation_DD, None) if learnt is None else (learnt.rotation_DD, learnt)
    found = comm.broadcast_object(found)
    assert found is not None
    return found


def learn(
    pairs: Pairs,
    logit_scale: float,
    begin_DD: torch.Tensor,
    dims: Sequence[int],
    keep: int = 0,
    steps: int = STEPS,
    seed: int = 0,
) -> LearnedRotation | None:
    """Turns `begin_DD` on, by the mean loss of all of `dims` that a rotation can change.

    Args:
        logit_scale: of the whole vectors' softmaxes, which prefixes are pulled to.
        begin_DD: orthogonal, float64 (D, D); the directions to begin with, such as the principal ones.
        keep: leave the first so many numbers as `begin_DD` has them.

    Returns: None where there is nothing to learn: no steps, too few pictures, or no dim between `keep` and D.
    """
    width = len(begin_DD)
    dims = sorted(dim for dim in dims if keep < dim < width)
    number_N = torch.arange(len(pairs.image_ND))
    judge_N = number_N % _HELD_OUT == _HELD_OUT - 1
    if not dims or not steps or not judge_N.any():
        return None
    begun = pairs.turned(begin_DD)
    own, judges = begun.of(number_N[~judge_N]), begun.of(number_N[judge_N][:_MOST_JUDGES])
    turn_DD = torch.eye(width, dtype=torch.float64)
    turn_DD[keep:, keep:] = _descend(own, logit_scale, dims, keep, steps, torch.Generator().manual_seed(seed))
    turn_DD = _ordered(own.turned(turn_DD), [keep, *dims, width]) @ turn_DD
    before, after = (mean_reciprocal_rank(one, dims) for one in (judges, judges.turned(turn_DD)))
    rotation_DD = turn_DD @ begin_DD if after > before else begin_DD
    return LearnedRotation(rotation_DD, len(own.image_ND), len(judges.image_ND), before, after)


def _descend(
    pairs: Pairs, logit_scale: float, dims: Sequence[int], keep: int, steps: int, draw: torch.Generator
) -> torch.Tensor:
    """The orthogonal matrix (R, R) of the numbers after `keep`, in float64."""
    width, texts = pairs.image_ND.shape[1] - keep, len(pairs.text_MD)
    free_RR = torch.zeros(width, width, requires_grad=True)
    log_scale_K = torch.full((len(dims),), math.log(logit_scale), requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [free_RR], "lr": _LR}, {"params": [log_scale_K], "lr": _SCALE_LR}])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step: (1 + math.cos(math.pi * step / steps)) / 2, lambda step: 1.0]
    )
    group_N = _groups(pairs)
    whole, weights = torch.tensor([logit_scale]), [1.0] * len(dims) + [0.0]
    for _ in range(steps):
        text_B = torch.randint(texts, (min(_BATCH, texts),), generator=draw)
        image_B = pairs.image_of_text_M[text_B]
        cayley_RR = _cayley(free_RR)
        image_BD, text_BD = (
            torch.cat([rows[:, :keep], rows[:, keep:] @ cayley_RR.T], 1)
            for rows in (pairs.image_ND[image_B], pairs.text_MD[text_B])
        )
        scale_K = torch.cat([log_scale_K.exp(), whole])
        loss = nested_info_nce(
            image_BD, text_BD, scale_K, [*dims, keep + width], weights, groups=group_N[image_B], options=_OPTIONS
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        schedule.step()
    return _cayley(free_RR.detach().double())


def _cayley(free_RR: torch.Tensor) -> torch.Tensor:
    """Orthogonal, of any square matrix, by its skew-symmetric part."""
    skew_RR, one_RR = (free_RR - free_RR.T) / 2, torch.eye(len(free_RR), dtype=free_RR.dtype)
    return torch.linalg.solve(one_RR - skew_RR, one_RR + skew_RR)


def _ordered(pairs: Pairs, edges: Sequence[int]) -> torch.Tensor:
    """Orthogonal (D, D) in float64, which turns the numbers between two edges among themselves: those in which pictures
    and their texts vary together the most come first, by the symmetric part of their covariance."""
    image_MD, text_MD = (
        rows.double() - rows.double().mean(0) for rows in (pairs.image_ND[pairs.image_of_text_M], pairs.text_MD)
    )
    order_DD = torch.eye(image_MD.shape[1], dtype=torch.float64)
    for first, last in itertools.pairwise(edges):
        shared = image_MD[:, first:last].T @ text_MD[:, first:last] / len(text_MD)
        order_DD[first:last, first:last] = nesting.principal_rotation(shared)
    return order_DD


def _groups(pairs: Pairs) -> torch.Tensor:
    """A group for each picture: its own where it has none, so that two of its texts are no negatives of each other."""
    _, group_N = pairs.group_N.unique(return_inverse=True)  # below N
    return torch.where(pairs.group_N >= 0, group_N, torch.arange(len(group_N)) + len(group_N))


def mean_reciprocal_rank(pairs: Pairs, dims: Sequence[int]) -> float:
    """Of each picture's first text among all pictures' first texts, and the other way; the mean over `dims` too. What
    scores as high as the right one comes before it."""
    text_N = _first_places(pairs.image_of_text_M, len(pairs.image_ND))
    group_N = _groups(pairs)
    masked_NN = (group_N[:, None] == group_N[None, :]).fill_diagonal_(False)
    found = []
    for dim in dims:
        image_Nd, text_Nd = (F.normalize(rows[:, :dim], dim=-1) for rows in (pairs.image_ND, pairs.text_MD[text_N]))
        score_NN = (image_Nd @ text_Nd.T).masked_fill(masked_NN, -math.inf)
        found += [1 / (one >= one.diagonal()[:, None]).sum(1) for one in (score_NN, score_NN.T)]
    return float(torch.stack(found).double().mean())


def _first_places(value_M: torch.Tensor, count: int) -> torch.Tensor:
    """Where each of 0 … count - 1 comes first."""
    return torch.full((count,), len(value_M)).scatter_reduce(0, value_M, torch.arange(len(value_M)), "amin")
