"""Nested (Matryoshka) embeddings: dims and weights, truncation to a prefix, and the PCA rotation of an encoder.

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
    """Which prefixes of the embedding are trained, and the weight of each in the loss."""

    dims: list[int] = Field(min_length=1)
    """Nested dims (prefix lengths) in any order, e.g. [512, 256, 128, 64]."""
    weights: list[float] | None = None
    """One loss weight per dim, in the order of `dims` (default: all 1). The loss is the weighted mean."""
    dims_per_step: int | None = Field(default=None, ge=1)
    """Number of dims to train at each step, sampled at random, the same on all ranks (default: all dims).
    Distillation then uses the largest sampled dim as its teacher."""
    start: float | None = Field(default=None, ge=0, le=1)
    """Share of the run, e.g. 0.75, in which the full dim only is trained (null: all dims from the first step).
    Then one orthogonal matrix rotates both projections; it leaves full-dim similarities unchanged and moves the
    directions that separate matching pairs to the front. From there on all dims are trained. 0 rotates pretrained
    towers before the first step, 1 rotates after the last one."""


@dataclass(frozen=True)
class Nesting:
    """Validated nested dims in ascending order, with loss weights that sum to 1."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def from_dims(cls, dims: Sequence[int], weights: Sequence[float] | None, full_dim: int) -> "Nesting":
        """Validate and sort the nested dims of a `full_dim`-dimensional embedding, and normalise their weights.

        Raises:
            InputError: a dim is repeated, below 1 or above `full_dim`; the number of weights differs from the number
                of dims; a weight is negative or not finite; all weights are zero.
        """
        dims = [int(dim) for dim in dims]
        check_dims(dims, full_dim)
        weights = [1.0] * len(dims) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(dims):
            raise InputError(f"weights: {len(weights)} given for {len(dims)} dims; give one weight per dim.")
        if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
            raise InputError(f"weights: {weights} must be finite, not negative and not all zero.")
        pairs = sorted(zip(dims, weights, strict=True))
        total = sum(weights)
        return cls(tuple(dim for dim, _ in pairs), tuple(weight / total for _, weight in pairs))

    def subset(self, indices: Sequence[int]) -> "Nesting":
        """The dims at these indices, with their weights renormalised to sum to 1."""
        total = sum(self.weights[i] for i in indices)
        indices = sorted(indices)
        return Nesting(tuple(self.dims[i] for i in indices), tuple(self.weights[i] / total for i in indices))


def check_dims(dims: Sequence[int], full_dim: int, name: str = "dims") -> None:
    """Raise InputError unless `dims` are distinct and between 1 and `full_dim`."""
    if not dims:
        raise InputError(f"{name}: empty; give at least one dim between 1 and {full_dim}.")
    for dim in dims:
        if not 1 <= dim <= full_dim:
            raise InputError(f"{name}: {dim} is out of range; this embedding has dims 1 to {full_dim}.")
        if list(dims).count(dim) > 1:
            raise InputError(f"{name}: {dim} is given twice; name each dim once.")


def truncate(embedding_ND: torch.Tensor, dim: int) -> torch.Tensor:
    """Truncate embeddings to their first `dim` dims and L2-normalise them: (…, D) -> (…, dim), float32 or float64.

    A zero row stays zero (`F.normalize` divides by at least 1e-12). Source: Kusupati et al. 2022
    (arXiv 2205.13147), section 3; renormalised prefixes: appendix C.
    """
    prefix_Nd = embedding_ND[..., :dim]
    if prefix_Nd.dtype in (torch.float16, torch.bfloat16):
        prefix_Nd = prefix_Nd.float()
    return F.normalize(prefix_Nd, dim=-1)


def principal_rotation(moment_DD: torch.Tensor, keep: int = 0) -> torch.Tensor:
    """The PCA rotation R of embeddings: the first d dims of R x are the d strongest principal components of x.

    The rows of R are the eigenvectors of the uncentred second moment, by descending eigenvalue. R is orthogonal, so
    full-dim similarities are unchanged. For every d, no other projection to d dims keeps more of the mean squared
    norm (Eckart and Young 1936). The sign of each row is the one that makes its largest entry positive.

    Args:
        moment_DD: the uncentred second moment, the mean of x xᵀ.
        keep: leave the first `keep` dims as they are and rotate only the rest, so that prefixes of up to `keep` dims
            are unchanged.

    Returns: float64 (D, D), on the CPU.
    """
    moment_DD = moment_DD.double().cpu()
    rest = moment_DD[keep:, keep:]
    directions = torch.linalg.eigh((rest + rest.T) / 2).eigenvectors.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    rotation_DD = torch.eye(len(moment_DD), dtype=torch.float64)
    rotation_DD[keep:, keep:] = directions * largest.sign()
    return rotation_DD


def rotate_weight(weight: torch.Tensor, axis: int, matrix_DD: torch.Tensor) -> torch.Tensor:
    """Multiply a weight, or a tensor of the optimizer's state, by a matrix along `axis` (of length D); keeps its dtype.

    Computed in float64.
    """
    first = weight.double().movedim(axis, 0)
    product = (matrix_DD.to(weight.device) @ first.reshape(len(first), -1)).view(first.shape)
    return product.movedim(0, axis).to(weight.dtype).contiguous()


def effective_rank(moment_DD: torch.Tensor) -> float:
    """The effective rank, 1 to D: exp of the entropy of the second moment's eigenvalues, normalised to sum to 1.

    Source: Roy and Vetterli 2007, "The effective rank", there of the singular values of a matrix; these eigenvalues
    are the squared singular values of the embedding matrix, up to a factor.
    """
    share_D = torch.linalg.eigvalsh(moment_DD.double().cpu()).clamp(min=0)
    share_D = share_D / share_D.sum()
    return float(torch.special.entr(share_D).sum().exp())
