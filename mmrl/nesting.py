"""Nested (Matryoshka) embeddings: dims and weights, truncation to a prefix, and the PCA rotation of an encoder.

Shapes: N rows (of any number of leading axes), D full dim, d a nested dim, K number of nested dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from mmrl.durations import Duration
from mmrl.errors import InputError
from mmrl.settings import Settings


class PrefixGradientConfig(Settings):
    """The factor a on the gradient that the smaller dims send into the towers. It rises over the run:
    a = end * (step / steps) ** power."""

    end: float = Field(default=0.3, ge=0, le=1)
    """Value after the last step. 0: the towers learn from the full dim only."""
    power: float = Field(default=2.0, ge=0)
    """Exponent of the rise; 0 is constant."""
    duration: Duration | None = None
    """Length of the rise; from then on a stays at its end value. Default: the whole run. A run that is lengthened keeps
    its first duration here."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        """A number is a constant."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"end": value, "power": 0.0} if is_number else value

    def at(self, step: int, total: int) -> float:
        """The factor in optimizer step `step`, counted from 1, of `total`; from `total` on it stays at `end`."""
        return self.end * min(step / total, 1.0) ** self.power


class NestingConfig(Settings):
    """Which prefixes of the embedding are trained, and how."""

    dims: list[int] = Field(min_length=1)
    """Nested dims (prefix lengths) in any order, e.g. [512, 256, 128, 64]. The InfoNCE of each is computed and trained
    in every step."""
    weights: list[float] | None = None
    """One loss weight above 0 per dim, in the order of `dims` (default: all 1). With a rotation they weigh the smaller
    dims against each other; the full dim's loss always has its full gradient."""
    rotation: bool = True
    """Truncate prefixes from z = Q x, with Q a learnable orthogonal matrix shared by both towers. It does not change
    full-dim similarities and is folded into the projections of every checkpoint. The towers descend L_D + a P (D the
    full dim, P the weighted mean over the smaller dims); Q and the smaller dims' logit scales descend P. false: the
    published method, one weighted mean over all dims and no rotation."""
    prefix_gradient: PrefixGradientConfig = PrefixGradientConfig()
    """The factor a on the gradient that P sends into the towers. A number is a constant. Without a rotation it is 1."""
    rotate_at_start: bool = False
    """Rotate a pretrained model before the first step, as `mmrl rotate` does. Then its prefixes start with most of the
    full dim's recall, and training them costs the full dim nothing."""
    rotate_at_end: bool = False
    """Rotate the trained model after the last step, as `mmrl rotate` does."""

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, values: Any) -> Any:
        """Answers keys of earlier versions, and sets the default of `prefix_gradient`, which depends on `rotation`.

        Configs that earlier versions stored have these keys with null: such a run trained without a rotation.
        """
        if not isinstance(values, dict):
            return values
        for key, replacement in _REMOVED.items():
            if values.get(key) is not None:
                raise ValueError(f"{key} was removed: {replacement}")
        if values.keys() & _REMOVED.keys():
            values = {"rotation": False, **{key: value for key, value in values.items() if key not in _REMOVED}}
        return {"prefix_gradient": 1, **values} if values.get("rotation") is False else values

    @model_validator(mode="after")
    def _check(self) -> "NestingConfig":
        if not self.rotation and self.prefix_gradient.at(0, 1) != 1:
            raise ValueError(
                "prefix_gradient: without a rotation all dims have their full gradient; use 1 or remove the key"
            )
        return self

    @property
    def learns_rotation(self) -> bool:
        """Whether a rotation is learned: it serves the smaller dims, so a single dim needs none."""
        return self.rotation and len(self.dims) > 1

    @property
    def sweeps(self) -> int:
        """How many times a step computes the similarities of the global batch, at most."""
        return 2 if self.learns_rotation else 1


_REMOVED = {
    "start": "all dims are trained from the first step (nesting.rotation). Instead of start: 0 use "
    "nesting.rotate_at_start: true, instead of start: 1 nesting.rotate_at_end: true; else remove the key",
    "dims_per_step": "all dims are trained in every step, at nearly the cost of the full dim; remove the key",
}


@dataclass(frozen=True)
class Nesting:
    """Validated nested dims in ascending order, with loss weights that sum to 1."""

    dims: tuple[int, ...]
    weights: tuple[float, ...]

    @classmethod
    def from_dims(cls, dims: Sequence[int], weights: Sequence[float] | None, full_dim: int) -> "Nesting":
        """Validate and sort the nested dims of a `full_dim`-dimensional embedding, and normalise their weights.

        Raises:
            InputError: a dim is no whole number, repeated, below 1 or above `full_dim`; the number of weights differs
                from the number of dims; a weight is negative or not finite; all weights are zero.
        """
        check_dims(dims, full_dim)
        dims = [int(dim) for dim in dims]
        weights = [1.0] * len(dims) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(dims):
            raise InputError(f"weights: {len(weights)} given for {len(dims)} dims; give one weight per dim.")
        if not all(0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
            raise InputError(f"weights: {weights} must be finite, not negative and not all zero.")
        pairs = sorted(zip(dims, weights, strict=True))
        total = sum(weights)
        return cls(tuple(dim for dim, _ in pairs), tuple(weight / total for _, weight in pairs))


def check_dims(dims: Sequence[int], full_dim: int, name: str = "dims") -> None:
    """Raise InputError unless `dims` are distinct whole numbers between 1 and `full_dim`."""
    if not dims:
        raise InputError(f"{name}: empty; give at least one dim between 1 and {full_dim}.")
    for dim in dims:
        if not isinstance(dim, Integral):
            raise InputError(f"{name}: {dim!r} is no whole number; this embedding has dims 1 to {full_dim}.")
        if not 1 <= dim <= full_dim:
            raise InputError(f"{name}: {dim} is out of range; this embedding has dims 1 to {full_dim}.")
        if list(dims).count(dim) > 1:
            raise InputError(f"{name}: {dim} is given twice; name each dim once.")


def untrained_note(dims: Sequence[int], trained: Sequence[int]) -> str | None:
    """One note that names those of `dims` that are not among the `trained` dims of an encoder; None if all are.

    Every command that takes a dim takes any from 1 to D, and prints this note.
    """
    untrained = [dim for dim in dims if dim not in trained]
    if not untrained:
        return None
    verb = "is not a trained dim" if len(untrained) == 1 else "are not trained dims"
    note = f"Note: {', '.join(map(str, untrained))} {verb}"
    if not trained:
        return f"{note} (trained: none)."
    neighbours = {max((d for d in trained if d < dim), default=None) for dim in untrained}
    neighbours |= {min((d for d in trained if d > dim), default=None) for dim in untrained}
    compared = sorted({*untrained, *(dim for dim in neighbours if dim is not None)}, reverse=True)
    return (
        f"{note} (trained: {', '.join(map(str, sorted(trained, reverse=True)))}). Compare the recall: "
        f"mmrl eval --dims {','.join(map(str, compared))}"
    )


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
    """Multiply a weight by a matrix along `axis` (of length D); keeps its dtype.

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
