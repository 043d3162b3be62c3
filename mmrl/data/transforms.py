"""Augmentation: seeded per sample, never per worker, so that every division of the work sees the same pictures.

The random crop is cut from the full picture while it is fitted; all else is done on the batch at once.

Shapes: B pictures, C = 3 channels, H and W the spec's size, P the random numbers of one sample.
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


def _check_range(most: float) -> Callable[[list[float] | None], list[float] | None]:
    def check(values: list[float] | None) -> list[float] | None:
        if values is not None and (len(values) != 2 or not 0 < values[0] <= values[1] <= most):
            raise ValueError(f"want two numbers, [least, greatest], above 0 and at most {most:g}")
        return values

    return check


Share = Field(default=0.0, ge=0, le=1)


class AugmentConfig(Settings):
    """Random changes of the training pictures; all off by default, and always off in evaluation."""

    random_resized_crop: Annotated[list[float] | None, AfterValidator(_check_range(1.0))] = None
    """Least and greatest share of the area that is kept, such as [0.9, 1.0]; its shape varies from 3:4 to 4:3."""
    flip: float = Share
    """Probability of a mirror image. Off where left and right mean something: text, arrows."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Greatest angle either way, in degrees."""
    zoom: Annotated[list[float], AfterValidator(_check_range(10.0))] = [1.0, 1.0]  # noqa: RUF012 (pydantic copies)
    """Least and greatest magnification."""
    shift: float = Share
    """Greatest shift either way, as a share of half the side."""
    brightness: float = Share
    """Greatest relative change either way; likewise the next three."""
    contrast: float = Share
    saturation: float = Share
    channel_gain: float = Share
    """Each colour channel on its own: a change of white balance."""
    grey: float = Share
    """Probability of a grey picture."""
    fill: int = Field(default=255, ge=0, le=255)
    """Grey level of what comes into the picture from outside it: white by default, as behind a product."""


# Which of a sample's random numbers decides what. New ones go to the end: the old ones keep their places.
_DRAW = 1 << 22
_CROP_AREA, _CROP_RATIO, _CROP_Y, _CROP_X, _FLIP, _ROTATE, _ZOOM, _SHIFT_Y, _SHIFT_X = range(9)
_BRIGHTNESS, _CONTRAST, _SATURATION, _GAIN, _GREY, _COUNT = 9, 10, 11, slice(12, 15), 15, 16


class Augmentation:
    """What the config says, on pictures of one spec."""

    def __init__(self, config: AugmentConfig, spec: ImageSpec) -> None:
        self.config = config
        self.spec = spec
        self._moves = bool(config.flip or config.rotate or config.shift or config.zoom != [1.0, 1.0])
        self._colours = bool(
            config.brightness or config.contrast or config.saturation or config.channel_gain or config.grey
        )

    def draw(self, seed: int, epoch: int, samples_B: np.ndarray) -> np.ndarray:
        """The random numbers of these samples in this epoch: (B, P)."""
        return draws.uniform(seed, epoch, _DRAW, samples_B[:, None], np.arange(_COUNT))

    def pixels(self, picture_CHW: torch.Tensor, drawn_P: np.ndarray) -> torch.Tensor:
        """uint8 (C, any height, any width) -> uint8 (C, H, W): the random crop where there is one, else the spec's own
        fit."""
        if self.config.random_resized_crop is None:
            return self.spec.pixels(picture_CHW)
        _, full_h, full_w = picture_CHW.shape
        top, left, height, width = self._crop_box(full_h, full_w, drawn_P)
        crop_CHW = picture_CHW[:, top : top + height, left : left + width]
        return resize(crop_CHW, self.spec.height, self.spec.width, self.spec.interpolation)

    def least_source(self) -> tuple[int, int]:
        """Height and width above which a source has more detail than is kept: half as much again as the smallest crop
        needs, at which a reduced JPEG's pixels are still within some 48 dB of the whole one's."""
        smallest = math.sqrt(self.config.random_resized_crop[0] * 3 / 4) if self.config.random_resized_crop else 1.0
        return math.ceil(1.5 * self.spec.height / smallest), math.ceil(1.5 * self.spec.width / smallest)

    def _crop_box(self, height: int, width: int, drawn_P: np.ndarray) -> tuple[int, int, int, int]:
        least, most = self.config.random_resized_crop or [1.0, 1.0]
        area = height * width * (least + (most - least) * drawn_P[_CROP_AREA])
        ratio = math.exp(math.log(4 / 3) * (2 * drawn_P[_CROP_RATIO] - 1))
        crop_w = max(1, min(round(math.sqrt(area * ratio)), width))
        crop_h = max(1, min(round(math.sqrt(area / ratio)), height))
        top = int(drawn_P[_CROP_Y] * (height - crop_h + 1))
        left = int(drawn_P[_CROP_X] * (width - crop_w + 1))
        return top, left, crop_h, crop_w

    def change(self, pixels_BCHW: torch.Tensor, drawn_BP: np.ndarray) -> torch.Tensor:
        """The changes that are made on the whole batch: uint8 (B, C, H, W) -> the same."""
        if not (self._moves or self._colours):
            return pixels_BCHW
        drawn = torch.from_numpy(drawn_BP).float()
        x_BCHW = pixels_BCHW.float()
        if self._moves:
            x_BCHW = self._move(x_BCHW, drawn)
        if self._colours:
            x_BCHW = self._colour(x_BCHW, drawn)
        return x_BCHW.round_().clamp_(0, 255).to(torch.uint8)

    def _move(self, x_BCHW: torch.Tensor, drawn_BP: torch.Tensor) -> torch.Tensor:
        """Mirror, turn, magnify and shift in one resampling."""
        config = self.config
        angle_B = _either_way(drawn_BP[:, _ROTATE]) * math.radians(config.rotate)
        least, most = config.zoom
        shrink_B = 1 / (least + (most - least) * drawn_BP[:, _ZOOM])
        mirror_B = torch.where(drawn_BP[:, _FLIP] < config.flip, -1.0, 1.0)
        cos_B, sin_B = torch.cos(angle_B) * shrink_B, torch.sin(angle_B) * shrink_B
        shift_BX = config.shift * _either_way(drawn_BP[:, [_SHIFT_X, _SHIFT_Y]])
        matrix_B23 = torch.stack(
            [
                torch.stack([mirror_B * cos_B, -mirror_B * sin_B, shift_BX[:, 0]], dim=-1),
                torch.stack([sin_B, cos_B, shift_BX[:, 1]], dim=-1),
            ],
            dim=1,
        )
        grid_BHWX = F.affine_grid(matrix_B23, list(x_BCHW.shape), align_corners=False)
        # Zeros come in from outside, so the fill colour is made the zero.
        moved_BCHW = F.grid_sample(x_BCHW - config.fill, grid_BHWX, mode="bilinear", align_corners=False)
        return moved_BCHW + config.fill

    def _colour(self, x_BCHW: torch.Tensor, drawn_BP: torch.Tensor) -> torch.Tensor:
        config = self.config

        def factor(name: int | slice, strength: float) -> torch.Tensor:
            return 1 + strength * _either_way(drawn_BP[:, name]).reshape(len(drawn_BP), -1, 1, 1)

        x_BCHW = x_BCHW * factor(_BRIGHTNESS, config.brightness) * factor(_GAIN, config.channel_gain)
        grey_B1HW = (x_BCHW * x_BCHW.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        saturation_B111 = factor(_SATURATION, config.saturation)
        saturation_B111[drawn_BP[:, _GREY] < config.grey] = 0
        x_BCHW = torch.lerp(grey_B1HW, x_BCHW, saturation_B111)
        return torch.lerp(grey_B1HW.mean((2, 3), keepdim=True), x_BCHW, factor(_CONTRAST, config.contrast))


def _either_way(uniform: torch.Tensor) -> torch.Tensor:
    """0 … 1 -> -1 … 1."""
    return 2 * uniform - 1
