"""Image preprocessing for a tower, in training, evaluation and export: composite, resize, crop or pad, and normalise.

Shapes: B images, C = 3 colour channels, H and W the spec's size in pixels.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import nn

from mmrl.errors import InputError
from mmrl.images.decode import WHITE, to_pil, to_tensor
from mmrl.images.upright import fit, is_thin
from mmrl.settings import Settings

_Level = Annotated[int, Field(ge=0, le=255)]


class ImageConfig(Settings):
    """How images are prepared, in training and evaluation and by `mmrl.load`."""

    background: list[_Level] | None = Field(default=[*WHITE], min_length=3, max_length=3)
    """RGB colour behind transparent pixels. null shows the colours that they hide, often black, as open_clip does, and
    as runs do that began before this key existed."""

    def applied_to(self, spec: "ImageSpec") -> "ImageSpec":
        """The spec with these settings."""
        if self.background is None:
            return replace(spec, background=None)
        red, green, blue = self.background
        return replace(spec, background=(red, green, blue))


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Size, resize mode and normalisation of an image tower's input; fields are named as in open_clip's preprocess_cfg.

    `resize_mode`: 'shortest' scales the shorter side to the size and crops the centre; 'longest' scales the longer
    side and pads with `fill_color`; 'squash' ignores the aspect ratio. `background` is the colour behind transparent
    pixels; None shows the colours that they hide.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0
    background: tuple[int, int, int] | None = WHITE

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dict for manifests; the inverse of `from_json`."""
        lists = {name: list(value) for name, value in asdict(self).items() if isinstance(value, tuple)}
        return {**asdict(self), **lists, "orientation": "exif"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ImageSpec":
        """The spec of a dict that `to_json` made; dicts of earlier versions have no background."""
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        del fields["orientation"]
        return cls(**{"background": None, **fields})

    @classmethod
    def from_open_clip(cls, preprocess_cfg: dict[str, Any]) -> "ImageSpec":
        """The spec for an open_clip model's `open_clip.get_model_preprocess_cfg(model)`. Raises InputError: the
        interpolation is neither bicubic nor bilinear, or mean or std is out of range."""
        size = preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        interpolation = preprocess_cfg.get("interpolation", "bicubic")
        if interpolation == "random":  # open_clip trains with either at random and evaluates with bicubic
            interpolation = "bicubic"
        if interpolation not in ("bicubic", "bilinear"):
            raise InputError(f"interpolation: {interpolation!r} is not supported; use bicubic or bilinear.")
        mean, std = tuple(preprocess_cfg["mean"]), tuple(preprocess_cfg["std"])
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise InputError(f"mean, std: {mean} and {std}; want three finite numbers each, those of std above 0.")
        return cls(
            height=height,
            width=width,
            mean=mean,
            std=std,
            interpolation=interpolation,
            resize_mode=preprocess_cfg.get("resize_mode") or "shortest",
            fill_color=preprocess_cfg.get("fill_color") or 0,
        )

    def pixels(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Composites and resizes an RGB or RGBA image, Pillow or uint8 (3 or 4, any size), to uint8 (C, H, W).

        Memory: see upright.MAX_PIXELS.
        """
        image_CHW = self.opaque(to_tensor(image) if isinstance(image, Image.Image) else image)
        height, width = image_CHW.shape[1:]
        if (height, width) == (self.height, self.width):
            return image_CHW
        if is_thin(height, width):
            return to_tensor(fit(to_pil(image_CHW), vars(self)))
        if self.resize_mode == "squash":
            return resize(image_CHW, self.height, self.width, self.interpolation)
        if self.resize_mode == "shortest":
            scale = max(self.height / height, self.width / width)
            # As open_clip: torchvision's resize truncates the longer side of squares, timm's rounds for other shapes.
            to_int = int if self.height == self.width else round
            resized_h = max(self.height, to_int(height * scale))
            resized_w = max(self.width, to_int(width * scale))
        else:
            scale = min(self.height / height, self.width / width)
            resized_h, resized_w = max(1, round(height * scale)), max(1, round(width * scale))
        resized_CHW = resize(image_CHW, resized_h, resized_w, self.interpolation)
        return _crop_or_pad(resized_CHW, self.height, self.width, self.fill_color)

    def opaque(self, image_CHW: torch.Tensor) -> torch.Tensor:
        """Composites an image with alpha, uint8 (4, any height, any width), on the background; others are unchanged."""
        return image_CHW if len(image_CHW) == 3 else to_tensor(to_pil(image_CHW, self.background))

    def normalise(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) on any device -> (x / 255 - mean) / std: float32, or autocast's dtype inside autocast."""
        return Normaliser(self).to(pixels_BCHW.device)(pixels_BCHW)


class Normaliser(nn.Module):
    """`ImageSpec.normalise` with its constants as buffers, which a model moves to its device once."""

    scale_C11: torch.Tensor
    shift_C11: torch.Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        scale_C = torch.tensor([1 / (255 * s) for s in spec.std])
        shift_C = torch.tensor([-m / s for m, s in zip(spec.mean, spec.std, strict=True)])
        self.register_buffer("scale_C11", scale_C.view(-1, 1, 1), persistent=False)
        self.register_buffer("shift_C11", shift_C.view(-1, 1, 1), persistent=False)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, C, H, W) -> float32, or autocast's dtype inside autocast."""
        kind = pixels_BCHW.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        if pixels_BCHW.is_cuda:
            return self.in_one_kernel(pixels_BCHW, dtype)
        # In place: memory traffic, not arithmetic, takes the time.
        return pixels_BCHW.float().mul_(self.scale_C11).add_(self.shift_C11).to(dtype)

    def in_one_kernel(self, pixels_BCHW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """On a GPU one kernel reads the bytes, computes in float32 and writes `dtype`.

        A CPU would convert the bytes to a temporary first, which takes twice as long as the operations in place.
        """
        out_BCHW = torch.empty_like(pixels_BCHW, dtype=dtype)
        return torch.addcmul(self.shift_C11, pixels_BCHW, self.scale_C11, out=out_BCHW)


def resize(image_CHW: torch.Tensor, height: int, width: int, interpolation: str) -> torch.Tensor:
    """Antialiased resize of a uint8 image; within 1-2 levels (of 255) of Pillow's."""
    return F.interpolate(image_CHW[None], size=(height, width), mode=interpolation, antialias=True)[0]


def _crop_or_pad(image_CHW: torch.Tensor, height: int, width: int, fill: int) -> torch.Tensor:
    """Crops or pads each side to the size, keeping the centre."""
    missing_h, missing_w = max(height - image_CHW.shape[1], 0), max(width - image_CHW.shape[2], 0)
    if missing_h or missing_w:
        left, top = missing_w // 2, missing_h // 2
        image_CHW = F.pad(image_CHW, (left, missing_w - left, top, missing_h - top), value=fill)
    # As torchvision's centre crop, which open_clip uses: round half to even.
    top = round((image_CHW.shape[1] - height) / 2)
    left = round((image_CHW.shape[2] - width) / 2)
    return image_CHW[:, top : top + height, left : left + width]
