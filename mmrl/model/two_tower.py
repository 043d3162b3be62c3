"""MatryoshkaCLIP: an image tower and a text tower that meet in one nested embedding.

Shapes: B pictures, C channels, H and W the image's size, M texts, L tokens, D the embedding's width, K nested dims.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmrl.model.towers import Side, Towers, TowersConfig, projection_axes
from mmrl.settings import Settings

MIN_LOGIT_SCALE, MAX_LOGIT_SCALE = 0.01, 100.0


# Where the sigmoid loss starts (arXiv 2303.15343, section 3.2): most pairs are negatives, and scored so.
_SIGMOID_SCALE, _SIGMOID_BIAS = 10.0, -10.0


class LogitScaleConfig(Settings):
    """The multiplier of the similarities, learnt as its logarithm and held within 0.01 and 100, and the sigmoid
    loss's bias."""

    init: float | None = Field(default=None, ge=MIN_LOGIT_SCALE, le=MAX_LOGIT_SCALE)
    """Where it starts; left out, where the towers come from (1 / 0.07 for new ones; 10 with a new bias)."""
    bias_init: float | None = None
    """Where the bias starts; left out, where the towers come from (-10 for those without). Only loss.name: sigmoid
    has a bias."""
    per_dim: bool = False
    """One of each for each nested dim instead of one for all."""


class ModelConfig(TowersConfig):
    """The towers, and how their similarities are scaled."""

    logit_scale: LogitScaleConfig = LogitScaleConfig()


class Encoder(nn.Module):
    """A tower, and a projection of ours where the tower has none that can be cut."""

    def __init__(
        self,
        tower: nn.Module,
        projection: nn.Linear | None = None,
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.projection = projection
        self._prepare = prepare

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) or token ids (M, L) -> embeddings (B or M, D), not normalised."""
        if self._prepare is not None:
            x = self._prepare(x)
        x = self.tower(x)
        return x if self.projection is None else self.projection(x)


Outputs = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


class MatryoshkaCLIP(nn.Module):
    """Two encoders and a logit scale. It knows pixels and tokens, no loss and no dims: every prefix of what it
    returns is an embedding because the loss makes it so."""

    def __init__(
        self,
        image: Encoder,
        text: Encoder,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        recomputes: bool = False,
    ) -> None:
        super().__init__()
        self._recomputes = recomputes
        self.image = image
        self.text = text
        # One axis at least: DeepSpeed cannot broadcast a scalar parameter.
        self.log_logit_scale = nn.Parameter(logit_scale.reshape(-1).log())
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias.reshape(-1))

    def forward(self, image_BCHW: torch.Tensor | None, text_ML: torch.Tensor | None) -> Outputs:
        """Image (B, D) and text (M, D) embeddings, not normalised, None for None; the logit scale, (1,) or (K,), and
        such a bias or None."""
        image_BD = None if image_BCHW is None else self.encode_image(image_BCHW)
        text_MD = None if text_ML is None else self.encode_text(text_ML)
        return image_BD, text_MD, self.logit_scale, self.logit_bias

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) -> (B, D)."""
        return self.image(image_BCHW)

    def encode_text(self, text_ML: torch.Tensor) -> torch.Tensor:
        """Token ids (M, L) -> (M, D)."""
        # The CPU's flash attention would take half of the text tower's backward in bfloat16. Not where activations are
        # recomputed: that happens after this context has ended, and must make the same choice.
        if self.training and text_ML.device.type == "cpu" and not self._recomputes:
            with sdpa_kernel(SDPBackend.MATH):
                return self.text(text_ML)
        return self.text(text_ML)

    @property
    def logit_scale(self) -> torch.Tensor:
        """The multiplier, within 0.01 and 100: (1,) or (K,)."""
        return clamp_outward(self.log_logit_scale, math.log(MIN_LOGIT_SCALE), math.log(MAX_LOGIT_SCALE)).exp()


def from_towers(towers: Towers, scale: LogitScaleConfig, num_dims: int, with_bias: bool = False) -> MatryoshkaCLIP:
    """The model to train; `with_bias` for the sigmoid loss."""
    new_bias = with_bias and towers.logit_bias is None
    init = scale.init or (_SIGMOID_SCALE if new_bias else towers.logit_scale)
    bias_init = scale.bias_init if scale.bias_init is not None else towers.logit_bias
    count = num_dims if scale.per_dim else 1
    return MatryoshkaCLIP(
        Encoder(towers.image, added_projection(towers.model_cfg, "image"), towers.image_spec.normalise),
        Encoder(towers.text, added_projection(towers.model_cfg, "text")),
        torch.full((count,), init),
        torch.full((count,), _SIGMOID_BIAS if bias_init is None else bias_init) if with_bias else None,
        recomputes=towers.grad_checkpointing,
    )


def added_projection(model_cfg: dict[str, Any], side: Side, dim: int | None = None) -> nn.Linear | None:
    """The projection that this tower lacks, or None. It starts as the identity, so that a pretrained model stands
    where it stood."""
    if projection_axes(model_cfg, side) is not None:
        return None
    projection = nn.Linear(model_cfg["embed_dim"], dim or model_cfg["embed_dim"], bias=False)
    nn.init.eye_(projection.weight)
    return projection


class _ClampOutward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, least: float, most: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.limits = least, most
        return x.clamp(least, most)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        least, most = ctx.limits
        # Descent moves against the gradient: a negative one at the upper limit would push further out.
        outward = ((x >= most) & (grad < 0)) | ((x <= least) & (grad > 0))
        return torch.where(outward, torch.zeros_like(grad), grad), None, None


def clamp_outward(x: torch.Tensor, least: float, most: float) -> torch.Tensor:
    """x held within [least, most] that lets it come back: at a limit only the gradient that points outward is dropped.

    Clamping in the forward pass is what holds under ZeRO, where an in-place clamp of the parameter is undone by the
    next step from the optimiser's own copy.
    """
    return _ClampOutward.apply(x, least, most)  # pyright: ignore[reportReturnType]
