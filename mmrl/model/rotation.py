"""The learnable orthogonal matrix Q of nested training: prefixes are truncated from z = Q x instead of from x.

Full-dim similarities do not depend on Q, because (Q x) . (Q y) = x . y. So Q can order the directions of the embedding
for the prefixes without any cost at the full dim. It is shared by both towers and folds into both projections
(W <- Q W), so nothing that reads a checkpoint or an export knows of it.

Shapes: N rows, D embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize


class NestedRotation(nn.Module):
    """z = Q x, with Q orthogonal: the Cayley map of a skew-symmetric parameter, identity at the start.

    Train it by an optimizer of its own (Adam, no weight decay), outside of the towers' gradient clipping.

    Args:
        dim: the embedding's width D.
        dims: the nested dims. A rotation among the dims between two of them changes no loss, so Adam would turn the
            rounding error of its gradient into a random walk. Its parameters stay 0. Default: all parameters are free.
    """

    def __init__(self, dim: int, dims: Sequence[int] | None = None) -> None:
        super().__init__()
        linear = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(linear.weight)
        if dims is not None:
            parametrize.register_parametrization(linear, "weight", _BetweenBlocks(dim, dims), unsafe=True)
        parametrize.register_parametrization(linear, "weight", _Cayley())
        linear.weight = torch.eye(dim)  # initialises a chain of parametrizations
        self.linear = linear

    @property
    def weight(self) -> torch.Tensor:
        """Q with its gradient: float32 (D, D), computed from the parameter at each access."""
        weight_DD = self.linear.weight
        assert isinstance(weight_DD, torch.Tensor)
        return weight_DD

    def forward(self, embedding_ND: torch.Tensor) -> torch.Tensor:
        """Rotates embeddings (N, D); Q and the product are float32 under autocast, the result has the input's dtype."""
        with torch.autocast(embedding_ND.device.type, enabled=False):
            weight_DD = self.weight
            return F.linear(embedding_ND.to(weight_DD.dtype), weight_DD).to(embedding_ND.dtype)

    @torch.no_grad()
    def matrix(self) -> torch.Tensor:
        """Q for folding into the projections: float64 (D, D), on the CPU, orthogonal to 1e-12.

        The parametrization's own float32 value is orthogonal to 1e-6 only, which would show in full-dim similarities.
        """
        left_DD, singular_D, right_DD = torch.linalg.svd(self.weight.detach().cpu().double())
        assert (singular_D - 1).abs().max() < 1e-3, "the Cayley map keeps the matrix orthogonal"
        return left_DD @ right_DD


class _Cayley(nn.Module):
    """Maps a (D, D) parameter, by its entries below the diagonal, to an orthogonal matrix; 0 to the identity.

    Unlike torch's parametrization it does not ask the device whether the system was solvable: I + A always is.
    """

    def forward(self, parameter_DD: torch.Tensor) -> torch.Tensor:
        lower_DD = parameter_DD.tril(-1)
        half_DD = (lower_DD - lower_DD.T) / 2
        identity_DD = torch.eye(len(parameter_DD), dtype=parameter_DD.dtype, device=parameter_DD.device)
        return torch.linalg.solve_ex(identity_DD - half_DD, identity_DD + half_DD).result

    def right_inverse(self, value_DD: torch.Tensor) -> torch.Tensor:
        """The initial parameter; the value must be the identity."""
        return torch.zeros_like(value_DD)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] (torch passes all by position)
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        state_dict.pop(f"{prefix}base", None)  # the identity; torch's parametrization, used before, had it
        super()._load_from_state_dict(state_dict, prefix, *others)


class _BetweenBlocks(nn.Module):
    """Sets the entries of a (D, D) parameter to 0 that couple two dims between the same nested dims."""

    _is_free_DD: torch.Tensor

    def __init__(self, dim: int, dims: Sequence[int]) -> None:
        super().__init__()
        block_D = torch.bucketize(torch.arange(dim), torch.tensor(sorted(dims)), right=True)
        self.register_buffer("_is_free_DD", block_D[:, None] != block_D, persistent=False)

    def forward(self, parameter_DD: torch.Tensor) -> torch.Tensor:
        return parameter_DD * self._is_free_DD

    def right_inverse(self, value_DD: torch.Tensor) -> torch.Tensor:
        """The initial parameter of a value."""
        return value_DD
