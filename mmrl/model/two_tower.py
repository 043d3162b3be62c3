"""MatryoshkaCLIP: an image tower and a text tower with one shared, nested embedding, and the logit scale.

Shapes: B images, C channels, H and W the image's size, M texts, L tokens, D the embedding's width, K nested dims.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmrl.images.image_spec import Normaliser
from mmrl.model.towers import SIDES, AbsentTower, Modality, Towers, TowersConfig, projection_axes
from mmrl.settings import Settings

Precision = Literal["fp32", "bf16", "fp16"]
MIN_LOGIT_SCALE, MAX_LOGIT_SCALE = 0.01, 100.0
# Initial values for the sigmoid loss (arXiv 2303.15343, section 3.2): the bias offsets the many negatives.
_SIGMOID_SCALE, _SIGMOID_BIAS = 10.0, -10.0


class LogitScaleConfig(Settings):
    """The multiplier of the similarities, learned as its logarithm and clamped to 0.01 … 100, and the sigmoid loss's
    bias."""

    init: float | None = Field(default=None, ge=MIN_LOGIT_SCALE, le=MAX_LOGIT_SCALE)
    """Initial scale. Default: that of the loaded weights; 1 / 0.07 for random weights; 10 with a new bias."""
    bias_init: float | None = None
    """Initial bias, for loss.name: sigmoid only. Default: that of the loaded weights, else -10."""
    per_dim: bool = False
    """Learn a scale (and bias) per nested dim instead of one for all dims. Applies without nesting.rotation; with it,
    every dim has its own scale."""


class ModelConfig(TowersConfig):
    """The towers and the logit scale."""

    logit_scale: LogitScaleConfig = LogitScaleConfig()


class ProjectedTower(nn.Module):
    """A tower, preceded by pixel normalisation and followed by a projection where it has none that can be truncated."""

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

    @property
    def is_absent(self) -> bool:
        """Whether the encoder has no such tower."""
        return isinstance(self.tower, AbsentTower)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) or token ids (M, L) -> embeddings (B or M, D), not normalised."""
        if self._prepare is not None:
            x = self._prepare(x)
        x = self.tower(x)
        return x if self.projection is None else self.projection(x)


Outputs = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None]


class MatryoshkaCLIP(nn.Module):
    """Both towers and the logit scale. The model depends on neither loss nor dims: the prefixes of its embeddings are
    usable because the loss trains them."""

    def __init__(
        self,
        image: ProjectedTower,
        text: ProjectedTower,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        recomputes: bool = False,
    ) -> None:
        super().__init__()
        self._recomputes, self._autocast_dtype = recomputes, None
        self.image = image
        self.text = text
        # Never 0-d: DeepSpeed cannot broadcast a scalar parameter.
        self.log_logit_scale = nn.Parameter(logit_scale.reshape(-1).log())
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias.reshape(-1))

    @property
    def sides(self) -> tuple[Modality, ...]:
        """The towers that are not absent."""
        return tuple(side for side in SIDES if not getattr(self, side).is_absent)

    def forward(self, image_BCHW: torch.Tensor | None, text_ML: torch.Tensor | None) -> Outputs:
        """Image (B, D) and text (M, D) embeddings, not normalised, None for an input of None; the logit scale, (1,) or
        (K,); the bias, (1,) or (K,), or None."""
        image_BD = None if image_BCHW is None else self.encode_image(image_BCHW)
        text_MD = None if text_ML is None else self.encode_text(text_ML)
        return image_BD, text_MD, self.logit_scale, self.logit_bias

    @contextmanager
    def encoding_in(self, precision: Precision) -> Iterator[None]:
        """Within, `encode_image` and `encode_text` compute as in training in this precision."""
        self._autocast_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        try:
            yield
        finally:
            self._autocast_dtype = None

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) -> (B, D)."""
        with self._autocast(image_BCHW):
            return self.image(image_BCHW)

    def encode_text(self, text_ML: torch.Tensor) -> torch.Tensor:
        """Token ids (M, L) -> (M, D)."""
        # On CPUs flash attention takes half of the text tower's backward time in bfloat16. Not with gradient
        # checkpointing: the recomputation runs outside this context and must choose the same kernel.
        is_plain = self.training and text_ML.device.type == "cpu" and not self._recomputes
        with self._autocast(text_ML), sdpa_kernel(SDPBackend.MATH) if is_plain else nullcontext():
            return self.text(text_ML)

    def _autocast(self, x: torch.Tensor) -> AbstractContextManager[object]:
        dtype = self._autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)

    @property
    def logit_scale(self) -> torch.Tensor:
        """The multiplier, clamped to 0.01 … 100: (1,) or (K,)."""
        return clamp_log_scale(self.log_logit_scale).exp()


def from_towers(towers: Towers, scale: LogitScaleConfig, num_dims: int, with_bias: bool = False) -> MatryoshkaCLIP:
    """Builds the model from its towers.

    Args:
        num_dims: the number of nested dims, for a logit scale per dim.
        with_bias: add the sigmoid loss's bias.
    """
    new_bias = with_bias and towers.logit_bias is None
    init = scale.init or (_SIGMOID_SCALE if new_bias else towers.logit_scale)
    bias_init = scale.bias_init if scale.bias_init is not None else towers.logit_bias
    count = num_dims if scale.per_dim else 1
    projections: dict[Modality, nn.Linear | None] = {
        side: None if isinstance(getattr(towers, side), AbsentTower) else added_projection(towers.model_cfg, side)
        for side in SIDES
    }
    for modality, weight_DD in towers.projections.items():
        projection = projections[modality]
        assert projection is not None, "the same tower had an added projection when it was stored"
        projection.load_state_dict({"weight": weight_DD})
    return MatryoshkaCLIP(
        ProjectedTower(towers.image, projections["image"], Normaliser(towers.image_spec)),
        ProjectedTower(towers.text, projections["text"]),
        torch.full((count,), init),
        torch.full((count,), _SIGMOID_BIAS if bias_init is None else bias_init) if with_bias else None,
        recomputes=towers.grad_checkpointing,
    )


def added_projection(model_cfg: dict[str, Any], modality: Modality, dim: int | None = None) -> nn.Linear | None:
    """A linear projection for a tower without one that can be truncated, else None. Initialised to the identity, so
    that a pretrained model's embeddings do not change."""
    if projection_axes(model_cfg, modality) is not None:
        return None
    projection = nn.Linear(model_cfg["embed_dim"], dim or model_cfg["embed_dim"], bias=False)
    nn.init.eye_(projection.weight)
    return projection


class _ClampOutward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        # Descent moves against the gradient: at the upper limit a negative gradient points outward.
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return torch.where(outward, torch.zeros_like(grad), grad), None, None


def clamp_log_scale(log_scale: torch.Tensor) -> torch.Tensor:
    """The logarithm of a logit scale, clamped to that of 0.01 … 100 by `clamp_outward`."""
    return clamp_outward(log_scale, math.log(MIN_LOGIT_SCALE), math.log(MAX_LOGIT_SCALE))


def clamp_outward(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """x clamped to [low, high]; beyond a limit only the gradient that points outward is dropped, so x can return.

    Clamped in the forward pass because under ZeRO an in-place clamp of the parameter is undone by the next step, which
    starts from the optimiser's copy.
    """
    return _ClampOutward.apply(x, low, high)  # pyright: ignore[reportReturnType]
