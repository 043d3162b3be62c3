"""The idea of the project: an embedding each of whose prefixes is an embedding.

This is the only place that cuts a prefix, so that training, evaluation and export cut alike. An embedding that was not
trained so can be turned (`principal_rotation`), so that its prefixes hold as much of it as so many numbers can.

Shapes: N rows (of any number of leading axes), D full dim, d a nested dim, K number of nested dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field

from mmrl.errors import InputError
from mmrl.settings import Settings


class NestingConfig(Settings):
    """Which prefixes of the embedding are trained, and how much each counts."""

    dims: list[int] = Field(min_length=1)
    """Lengths of the prefixes, in any order, such as [512, 256, 128, 64]."""
    weights: list[float] | None = None
    """One weight a dim, in the order of `dims`; all 1 when left out. The loss is the weighted mean."""
    dims_per_step: int | None = Field(default=None, ge=1)
    """So many of the dims are trained at each step, drawn anew, the same on all processes; all when left out.
    Distillation is then from the largest of the drawn."""
    start: float | None = Field(default=None, ge=0, le=1)
    """The share of the run, such as 0.75, in which the full dim is trained alone. Then both towers' projections are
    turned by one orthogonal matrix, which changes no similarity and moves what tells pairs apart to the front: it is
    learnt by the loss of the smaller dims, all weighted alike, on vectors of the training set. From there on all dims
    are trained. 0 turns pretrained towers before the first step; 1 turns after the last one, so that the full dim is
    what it would be without nesting. When left out, nothing is turned, and all dims are trained from the first step
    on."""


@dataclass(frozen=True)
class Nesting:
    """Validated dims, ascending, each with its share of the loss (the shares sum to 1)."""

    dims: tuple[int, ...]
    shares: tuple[float, ...]

    def only(self, places: Sequence[int]) -> "Nesting":
        """Some of the dims, by their places; their shares sum to 1 again."""
        total = sum(self.shares[place] for place in places)
        places = sorted(places)
        return Nesting(
            tuple(self.dims[place] for place in places), tuple(self.shares[place] / total for place in places)
        )


def nesting(dims: Sequence[int], weights: Sequence[float] | None, full_dim: int) -> Nesting:
    """Sorts and checks the nested dims of an embedding of `full_dim` numbers.

    Raises:
        InputError: a dim is repeated, below 1 or beyond `full_dim`; the weights are not as many as the dims,
            negative, not finite or all zero.
    """
    dims = [int(dim) for dim in dims]
    check_dims(dims, full_dim)
    weights = [1.0] * len(dims) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(dims):
        raise InputError(f"weights: {len(weights)} given for {len(dims)} dims; give one weight a dim.")
    if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise InputError(f"weights: {weights} must be finite, not negative and not all zero.")
    pairs = sorted(zip(dims, weights, strict=True))
    total = sum(weights)
    return Nesting(tuple(dim for dim, _ in pairs), tuple(weight / total for _, weight in pairs))


def check_dims(dims: Sequence[int], full_dim: int, name: str = "dims") -> None:
    """Raises InputError unless `dims` are distinct and lie in 1..full_dim."""
    if not dims:
        raise InputError(f"{name}: empty; give at least one dim between 1 and {full_dim}.")
    for dim in dims:
        if not 1 <= dim <= full_dim:
            raise InputError(f"{name}: {dim} is out of range; this embedding has dims 1 to {full_dim}.")
        if list(dims).count(dim) > 1:
            raise InputError(f"{name}: {dim} is given twice; name each dim once.")


def cut(embedding_ND: torch.Tensor, dim: int) -> torch.Tensor:
    """The prefix of length `dim`, L2-normalised on its own, in float32 or wider: (…, D) -> (…, dim).

    A zero row stays zero (`F.normalize` divides by at least 1e-12). Source: Kusupati et al. 2022
    (arXiv 2205.13147), section 3; renormalised prefixes: appendix C.
    """
    prefix_Nd = embedding_ND[..., :dim]
    if prefix_Nd.dtype in (torch.float16, torch.bfloat16):
        prefix_Nd = prefix_Nd.float()
    return F.normalize(prefix_Nd, dim=-1)


def principal_rotation(moment_DD: torch.Tensor, keep: int = 0) -> torch.Tensor:
    """The orthogonal matrix R that moves what matters to the front: R x begins with the principal components of x.

    Its rows are the eigenvectors of `moment_DD`, the mean of x xᵀ, the strongest first: uncentred principal component
    analysis. R is orthogonal, so the similarity of any two vectors is what it was; and the first d numbers of R x
    keep more of the mean squared length than any other d directions would, for every d at once (Eckart and Young
    1936). Of the two signs of a direction the one is taken that makes its largest entry positive.

    Args:
        keep: leave the first so many numbers alone, and turn the others among themselves: every prefix up to that
            length is what it was.

    Returns: float64 (D, D), on the CPU.
    """
    moment_DD = moment_DD.double().cpu()
    rest = moment_DD[keep:, keep:]
    directions = torch.linalg.eigh((rest + rest.T) / 2).eigenvectors.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    rotation_DD = torch.eye(len(moment_DD), dtype=torch.float64)
    rotation_DD[keep:, keep:] = directions * largest.sign()
    return rotation_DD


def turned(weight: torch.Tensor, axis: int, matrix_DD: torch.Tensor) -> torch.Tensor:
    """A weight, or what an optimiser keeps of it, times a matrix along the axis of length D; in its own type."""
    first = weight.double().movedim(axis, 0)
    product = (matrix_DD.to(weight.device) @ first.reshape(len(first), -1)).view(first.shape)
    return product.movedim(0, axis).to(weight.dtype).contiguous()


def effective_rank(moment_DD: torch.Tensor) -> float:
    """How many dims an embedding really fills: exp of the entropy of its second moment's eigenvalues, from 1 to D.

    Source: Roy and Vetterli 2007, The effective rank, of the squared singular values.
    """
    share_D = torch.linalg.eigvalsh(moment_DD.double().cpu()).clamp(min=0)
    share_D = share_D / share_D.sum()
    return float(torch.special.entr(share_D).sum().exp())
