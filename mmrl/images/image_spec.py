"""How a picture becomes the tensor that a tower sees; the one definition for training, evaluation and export.

Shapes: C = 3 colour channels, H and W the spec's size in pixels, B pictures.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image

from mmrl.errors import InputError
from mmrl.images.decode import to_tensor


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Size, fit and normalisation of a tower's input. The names are those of open_clip's preprocess_cfg.

    `resize_mode`: 'shortest' scales the shorter side to the size and crops the centre; 'longest' scales the longer
    side and fills the rest with `fill_color`; 'squash' ignores the aspect ratio.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def to_json(self) -> dict[str, Any]:
        """A plain dict for manifests; `from_json` reads it back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "orientation": "exif"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ImageSpec":
        """The spec that `to_json` wrote."""
        fields = {name: value for name, value in values.items() if name != "orientation"}
        return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})

    @classmethod
    def from_open_clip(cls, preprocess_cfg: dict[str, Any]) -> "ImageSpec":
        """The spec of an open_clip model (`open_clip.get_model_preprocess_cfg(model)`).

        Raises:
            InputError: an interpolation that the tensor resize does not have.
        """
        size = preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        interpolation = preprocess_cfg.get("interpolation", "bicubic")
        if interpolation == "random":  # open_clip's word for "either, in training"; it evaluates with bicubic
            interpolation = "bicubic"
        if interpolation not in ("bicubic", "bilinear"):
            raise InputError(f"interpolation: {interpolation!r} is not supported; use bicubic or bilinear.")
        fill_color = preprocess_cfg.get("fill_color") or 0
        return cls(
            height=height,
            width=width,
            mean=tuple(preprocess_cfg["mean"]),
            std=tuple(preprocess_cfg["std"]),
            interpolation=interpolation,
            resize_mode=preprocess_cfg.get("resize_mode") or "shortest",
            fill_color=fill_color,
        )

    def pixels(self, picture: Image.Image | torch.Tensor) -> torch.Tensor:
        """The whole picture, RGB of Pillow or uint8 (C, any height, any width), fitted: uint8 (C, H, W)."""
        picture_CHW = to_tensor(picture) if isinstance(picture, Image.Image) else picture
        height, width = picture_CHW.shape[1:]
        if (height, width) == (self.height, self.width):
            return picture_CHW
        if self.resize_mode == "squash":
            return resize(picture_CHW, self.height, self.width, self.interpolation)
        fit = max if self.resize_mode == "shortest" else min
        scale = fit(self.height / height, self.width / width)
        # open_clip fits by torchvision, which truncates the free side, for squares; else by timm's rule, which rounds.
        whole = int if self.resize_mode == "shortest" and self.height == self.width else round
        fitted_h = max(self.height, whole(height * scale)) if fit is max else max(1, round(height * scale))
        fitted_w = max(self.width, whole(width * scale)) if fit is max else max(1, round(width * scale))
        fitted_CHW = resize(picture_CHW, fitted_h, fitted_w, self.interpolation)
        return _centre(fitted_CHW, self.height, self.width, self.fill_color)

    def normalise(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) on any device -> float32, scaled to 0..1, less the mean, over the deviation."""
        scale_C11 = torch.tensor([1 / (255 * s) for s in self.std], device=pixels_BCHW.device).view(-1, 1, 1)
        shift_C11 = torch.tensor(
            [-m / s for m, s in zip(self.mean, self.std, strict=True)], device=pixels_BCHW.device
        ).view(-1, 1, 1)
        # In place: at this size the memory costs more than the sums.
        return pixels_BCHW.float().mul_(scale_C11).add_(shift_C11)


def resize(picture_CHW: torch.Tensor, height: int, width: int, interpolation: str) -> torch.Tensor:
    """Antialiased resize of a uint8 picture; within 1-2 levels of Pillow's."""
    return F.interpolate(picture_CHW[None], size=(height, width), mode=interpolation, antialias=True)[0]


def _centre(picture_CHW: torch.Tensor, height: int, width: int, fill: int) -> torch.Tensor:
    """Crops what is too large and pads what is too small, about the centre."""
    missing_h, missing_w = max(height - picture_CHW.shape[1], 0), max(width - picture_CHW.shape[2], 0)
    if missing_h or missing_w:
        left, top = missing_w // 2, missing_h // 2
        picture_CHW = F.pad(picture_CHW, (left, missing_w - left, top, missing_h - top), value=fill)
    # torchvision's centre crop, which open_clip uses, rounds half to even.
    top = round((picture_CHW.shape[1] - height) / 2)
    left = round((picture_CHW.shape[2] - width) / 2)
    return picture_CHW[:, top : top + height, left : left + width]
