"""Image augmentation, seeded per sample and epoch, so that its result does not depend on ranks or workers.

The random crop is cut from the full-size image before it is resized; the other changes are applied to whole batches.

Shapes: B images, C = 3 channels, H and W the spec's size, P random numbers per sample.
"""

import math
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field

from mmrl.data import draws
from mmrl.images.image_spec import ImageSpec, resize
from mmrl.settings import Settings


def _check_range(maximum: float) -> Callable[[list[float] | None], list[float] | None]:
    def check(values: list[float] | None) -> list[float] | None:
        if values is not None and (len(values) != 2 or not 0 < values[0] <= values[1] <= maximum):
            raise ValueError(f"must be [minimum, maximum], both above 0 and at most {maximum:g}")
        return values

    return check


_FRACTION = Field(default=0.0, ge=0, le=1)


class AugmentConfig(Settings):
    """Random changes of training images. All are off by default, and evaluation never uses them."""

    random_resized_crop: Annotated[list[float] | None, AfterValidator(_check_range(1.0))] = None
    """Minimum and maximum fraction of the area that is kept, e.g. [0.9, 1.0]; the aspect ratio is from 3:4 to 4:3."""
    flip: float = _FRACTION
    """Probability of a horizontal flip. Leave it off if left and right matter, e.g. for text or arrows."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Maximum angle in degrees, in either direction."""
    zoom: Annotated[list[float], AfterValidator(_check_range(10.0))] = [1.0, 1.0]  # noqa: RUF012 (pydantic copies)
    """Minimum and maximum magnification."""
    shift: float = _FRACTION
    """Maximum shift in either direction, as a fraction of half the side."""
    brightness: float = _FRACTION
    """Maximum relative change in either direction."""
    contrast: float = _FRACTION
    """Maximum relative change in either direction."""
    saturation: float = _FRACTION
    """Maximum relative change in either direction."""
    channel_gain: float = _FRACTION
    """Maximum relative change of each colour channel separately, i.e. of the white balance."""
    grey: float = _FRACTION
    """Probability of conversion to greyscale."""
    fill: int = Field(default=255, ge=0, le=255)
    """Grey level of the area outside the source image; white by default, as in product photos."""


# Images that are changed at a time: in float32 they take 16 times their memory.
_ROWS = 32
# Indices into a sample's random numbers. Append new ones at the end, so that the old ones keep their values.
_AUGMENT_DRAW = 1 << 22
_CROP_AREA, _CROP_RATIO, _CROP_Y, _CROP_X, _FLIP, _ROTATE, _ZOOM, _SHIFT_Y, _SHIFT_X = range(9)
_BRIGHTNESS, _CONTRAST, _SATURATION, _GAIN, _GREY, _COUNT = 9, 10, 11, slice(12, 15), 15, 16


class Augmentation:
    """Applies an AugmentConfig to images of one ImageSpec."""

    def __init__(self, config: AugmentConfig, spec: ImageSpec) -> None:
        self.config = config
        self.spec = spec
        self._has_affine = bool(config.flip or config.rotate or config.shift or config.zoom != [1.0, 1.0])
        self._has_colour = bool(
            config.brightness or config.contrast or config.saturation or config.channel_gain or config.grey
        )

    def random_params(self, seed: int, epoch: int, samples_B: np.ndarray) -> np.ndarray:
        """Random numbers in [0, 1) for these samples in this epoch: (B, P)."""
        return draws.uniform(seed, epoch, _AUGMENT_DRAW, samples_B[:, None], np.arange(_COUNT))

    def crop_and_resize(self, image_CHW: torch.Tensor, params_P: np.ndarray) -> torch.Tensor:
        """The random crop, if configured, else the spec's own resize: uint8 (3 or 4, any size) -> (C, H, W)."""
        if self.config.random_resized_crop is None:
            return self.spec.pixels(image_CHW)
        image_CHW = self.spec.opaque(image_CHW)
        _, full_h, full_w = image_CHW.shape
        top, left, height, width = self._crop_box(full_h, full_w, params_P)
        crop_CHW = image_CHW[:, top : top + height, left : left + width]
        return resize(crop_CHW, self.spec.height, self.spec.width, self.spec.interpolation)

    def kept(self, image_CHW: torch.Tensor) -> torch.Tensor:
        """What `crop_and_resize` needs of an image in all epochs, to be cached: all of it, or what it makes of it if it
        always does the same."""
        return image_CHW if self.config.random_resized_crop else self.spec.pixels(image_CHW).clone()

    def min_source_size(self) -> tuple[int, int]:
        """Height and width down to which a source may be decoded at a lower resolution.

        1.5 times what the smallest crop needs: there, pixels from a reduced JPEG have a PSNR of about 48 dB to those
        from the full one.
        """
        smallest = math.sqrt(self.config.random_resized_crop[0] * 3 / 4) if self.config.random_resized_crop else 1.0
        return math.ceil(1.5 * self.spec.height / smallest), math.ceil(1.5 * self.spec.width / smallest)

    def _crop_box(self, height: int, width: int, params_P: np.ndarray) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the random crop."""
        low, high = self.config.random_resized_crop or [1.0, 1.0]
        area = height * width * (low + (high - low) * params_P[_CROP_AREA])
        ratio = math.exp(math.log(4 / 3) * (2 * params_P[_CROP_RATIO] - 1))
        crop_w = max(1, min(round(math.sqrt(area * ratio)), width))
        crop_h = max(1, min(round(math.sqrt(area / ratio)), height))
        top = int(params_P[_CROP_Y] * (height - crop_h + 1))
        left = int(params_P[_CROP_X] * (width - crop_w + 1))
        return top, left, crop_h, crop_w

    def apply(self, pixels_BCHW: torch.Tensor, params_BP: np.ndarray) -> torch.Tensor:
        """All changes except the crop, on a uint8 batch (B, C, H, W)."""
        if not (self._has_affine or self._has_colour):
            return pixels_BCHW
        params = torch.from_numpy(params_BP).float()
        parts = zip(pixels_BCHW.split(_ROWS), params.split(_ROWS), strict=True)
        return torch.cat([self._change(pixels_bCHW, params_bP) for pixels_bCHW, params_bP in parts])

    def _change(self, pixels_BCHW: torch.Tensor, params_BP: torch.Tensor) -> torch.Tensor:
        x_BCHW = pixels_BCHW.float()
        if self._has_affine:
            x_BCHW = self._affine(x_BCHW, params_BP)
        if self._has_colour:
            x_BCHW = self._colour_jitter(x_BCHW, params_BP)
        return x_BCHW.round_().clamp_(0, 255).to(torch.uint8)

    def _affine(self, x_BCHW: torch.Tensor, params_BP: torch.Tensor) -> torch.Tensor:
        """Flip, rotation, zoom and shift in one resampling."""
        config = self.config
        angle_B = _symmetric(params_BP[:, _ROTATE]) * math.radians(config.rotate)
        low, high = config.zoom
        shrink_B = 1 / (low + (high - low) * params_BP[:, _ZOOM])
        mirror_B = torch.where(params_BP[:, _FLIP] < config.flip, -1.0, 1.0)
        cos_B, sin_B = torch.cos(angle_B) * shrink_B, torch.sin(angle_B) * shrink_B
        shift_BX = config.shift * _symmetric(params_BP[:, [_SHIFT_X, _SHIFT_Y]])
        matrix_B23 = torch.stack(
            [
                torch.stack([mirror_B * cos_B, -mirror_B * sin_B, shift_BX[:, 0]], dim=-1),
                torch.stack([sin_B, cos_B, shift_BX[:, 1]], dim=-1),
            ],
            dim=1,
        )
        grid_BHWX = F.affine_grid(matrix_B23, list(x_BCHW.shape), align_corners=False)
        # grid_sample pads with zeros, so the fill colour is made zero.
        moved_BCHW = F.grid_sample(x_BCHW - config.fill, grid_BHWX, mode="bilinear", align_corners=False)
        return moved_BCHW + config.fill

    def _colour_jitter(self, x_BCHW: torch.Tensor, params_BP: torch.Tensor) -> torch.Tensor:
        config = self.config

        def factor(indices: int | slice, strength: float) -> torch.Tensor:
            return 1 + strength * _symmetric(params_BP[:, indices]).reshape(len(params_BP), -1, 1, 1)

        x_BCHW = x_BCHW * factor(_BRIGHTNESS, config.brightness) * factor(_GAIN, config.channel_gain)
        grey_B1HW = (x_BCHW * x_BCHW.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        saturation_B111 = factor(_SATURATION, config.saturation)
        saturation_B111[params_BP[:, _GREY] < config.grey] = 0
        x_BCHW = torch.lerp(grey_B1HW, x_BCHW, saturation_B111)
        return torch.lerp(grey_B1HW.mean((2, 3), keepdim=True), x_BCHW, factor(_CONTRAST, config.contrast))


def _symmetric(uniform: torch.Tensor) -> torch.Tensor:
    """Maps [0, 1) to [-1, 1)."""
    return 2 * uniform - 1
