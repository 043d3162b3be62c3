"""Image augmentation, seeded per sample and epoch, so that its result does not depend on ranks or workers.

The random crop is cut from the full-size image, and degraded before it is resized, as `mmrl eval --degrade` does it.
The other changes are applied to whole batches.

Shapes: B images, C = 3 channels, H and W the spec's size, P random numbers per sample.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field

from mmrl.data import draws
from mmrl.images import degrade
from mmrl.images.image_spec import ImageSpec, resize
from mmrl.settings import Settings


def _check_range(maximum: float) -> Callable[[list[Any] | None], list[Any] | None]:
    def check(values: list[Any] | None) -> list[Any] | None:
        if values is not None and (len(values) != 2 or not 0 < values[0] <= values[1] <= maximum):
            raise ValueError(f"must be [minimum, maximum], both above 0 and at most {maximum:g}")
        return values

    return check


_FRACTION = Field(default=0.0, ge=0, le=1)


def _check_second(second: "AugmentConfig | None") -> "AugmentConfig | None":
    if second is not None and second.second is not None:
        raise ValueError("second images have no second image of their own; remove the key `second` from this section")
    return second


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
    downscale: Annotated[list[int] | None, AfterValidator(_check_range(10_000))] = None
    """Minimum and maximum pixels of the shorter side to which a degraded image is reduced before it is resized to the
    model's input, e.g. [48, 256]. This and the next two are drawn log-uniformly."""
    blur: Annotated[list[float] | None, AfterValidator(_check_range(0.5))] = None
    """Minimum and maximum radius of a degraded image's Gaussian blur, as a share of the shorter side, e.g.
    [0.003, 0.03]."""
    jpeg: Annotated[list[int] | None, AfterValidator(_check_range(100))] = None
    """Minimum and maximum quality of a degraded image's JPEG compression, e.g. [10, 90]. It is applied at the image's
    own size, with `scaled_decode` at the size to which it was decoded."""
    degrade: float = Field(default=0.5, ge=0, le=1)
    """Probability of each of `downscale`, `blur` and `jpeg`, drawn separately for each that is set."""
    background: float = _FRACTION
    """Probability that an image with transparent pixels is put on a smooth gradient of random colours instead of
    image.background."""
    second: Annotated["AugmentConfig | None", AfterValidator(_check_second)] = None
    """The changes of second images (see loss.image_image), e.g. those of a shopper's photos (default: as the first
    images)."""


# Times the model's input: at that size, pixels from a reduced JPEG have a PSNR of about 48 dB to those from the full
# one.
_MARGIN = 1.5
# Images that are changed at a time: in float32 they take 16 times their memory.
_ROWS = 32
# Indices into a sample's random numbers. Append new ones at the end, so that the old ones keep their values.
_AUGMENT_DRAW = 1 << 22
_CROP_AREA, _CROP_RATIO, _CROP_Y, _CROP_X, _FLIP, _ROTATE, _ZOOM, _SHIFT_Y, _SHIFT_X = range(9)
_BRIGHTNESS, _CONTRAST, _SATURATION, _GAIN, _GREY = 9, 10, 11, slice(12, 15), 15
_DOWNSCALE, _BLUR, _JPEG = slice(16, 18), slice(18, 20), slice(20, 22)  # each: whether, and how much
_BACKGROUND, _STRENGTH, _COLOURS, _COUNT = 22, 23, slice(24, 39), 39


class Augmentation:
    """Applies an AugmentConfig to images of one ImageSpec."""

    def __init__(self, config: AugmentConfig, spec: ImageSpec, second: bool = False) -> None:
        """`second`: for second images, with `config.second` and other random numbers than those of the first."""
        self.config = config.second or config if second else config
        self.spec = spec
        self._draw = _AUGMENT_DRAW + second
        config = self.config
        self._degrades = bool(config.degrade and (config.downscale or config.blur or config.jpeg))
        self._has_affine = bool(config.flip or config.rotate or config.shift or config.zoom != [1.0, 1.0])
        self._has_colour = bool(
            config.brightness or config.contrast or config.saturation or config.channel_gain or config.grey
        )

    def random_params(self, seed: int, epoch: int, samples_B: np.ndarray) -> np.ndarray:
        """Random numbers in [0, 1) for these samples in this epoch: (B, P)."""
        return draws.uniform(seed, epoch, self._draw, samples_B[:, None], np.arange(_COUNT))

    def crop_and_resize(self, image_CHW: torch.Tensor, params_P: np.ndarray) -> torch.Tensor:
        """The random crop, if configured, degraded and resized: uint8 (3 or 4, any size) -> (C, H, W)."""
        if self.config.random_resized_crop is not None:
            _, full_h, full_w = image_CHW.shape
            top, left, height, width = self._crop_box(full_h, full_w, params_P)
            image_CHW = image_CHW[:, top : top + height, left : left + width]
        if len(image_CHW) == 4 and params_P[_BACKGROUND] < self.config.background:
            image_CHW = degrade.on_gradient(image_CHW, _corner_colours(params_P))
        image_CHW = self.spec.opaque(image_CHW)
        if self._degrades:
            image_CHW = self._degrade(image_CHW, params_P)
        if self.config.random_resized_crop is None:
            return self.spec.pixels(image_CHW)
        return resize(image_CHW, self.spec.height, self.spec.width, self.spec.interpolation)

    def _degrade(self, image_CHW: torch.Tensor, params_P: np.ndarray) -> torch.Tensor:
        """A shopper's photo, in the order in which a camera makes it: few pixels, out of focus, compressed."""
        config = self.config
        min_size = math.ceil(_MARGIN * self.spec.height), math.ceil(_MARGIN * self.spec.width)
        if side := self._severity(config.downscale, params_P[_DOWNSCALE]):
            image_CHW = degrade.downscale(image_CHW, side)
        if share := self._severity(config.blur, params_P[_BLUR]):
            image_CHW = degrade.fast_blur(image_CHW, share, 2 * max(self.spec.height, self.spec.width))
        if quality := self._severity(config.jpeg, params_P[_JPEG]):
            image_CHW = degrade.jpeg(image_CHW, round(quality), min_size)
        return image_CHW

    def _severity(self, values: list[int] | list[float] | None, params_2: np.ndarray) -> float | None:
        """Log-uniform between the two values; None if they are not set, or this degradation is not drawn."""
        if values is None or params_2[0] >= self.config.degrade:
            return None
        return float(values[0] * (values[1] / values[0]) ** params_2[1])

    def kept(self, image_CHW: torch.Tensor) -> torch.Tensor:
        """What `crop_and_resize` needs of an image in all epochs, to be cached: all of it, or what it makes of it if it
        always does the same."""
        varies = self.config.random_resized_crop or self._degrades or (self.config.background and len(image_CHW) == 4)
        return image_CHW if varies else self.spec.pixels(image_CHW).clone()

    def min_source_size(self) -> tuple[int, int]:
        """Height and width down to which a source may be decoded at a lower resolution: _MARGIN times what the smallest
        crop needs."""
        smallest = math.sqrt(self.config.random_resized_crop[0] * 3 / 4) if self.config.random_resized_crop else 1.0
        return math.ceil(_MARGIN * self.spec.height / smallest), math.ceil(_MARGIN * self.spec.width / smallest)

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


def _corner_colours(params_P: np.ndarray) -> np.ndarray:
    """Four random colours, uint8 (2, 2, C): from equal ones, a plain background, to independent ones."""
    plain_C, corners_22C = np.split(params_P[_COLOURS], [3])
    mixed_22C = plain_C + params_P[_STRENGTH] * (corners_22C.reshape(2, 2, 3) - plain_C)
    return (256 * mixed_22C).astype(np.uint8)
