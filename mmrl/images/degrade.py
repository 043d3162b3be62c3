"""Degraded copies of an image, for queries of an evaluation and for training: small, blurred, compressed, on another
background.

Shapes: C = 3 colour channels, H and W the image's own size in pixels; all images are uint8.
"""

import io

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from mmrl.images.decode import decode_pixels, to_pil, to_tensor, with_alpha
from mmrl.images.image_spec import resize

# A blur of this radius in pixels leaves no finer detail, so a larger one can be applied to a reduced image.
_RADIUS = 1.5


def jpeg(image_CHW: Tensor, quality: float, min_size: tuple[int, int] | None = None) -> Tensor:
    """The image after JPEG compression; `min_size` as in `decode_pixels`."""
    file = io.BytesIO()
    image = to_pil(image_CHW)
    image.thumbnail((65_500, 65_500))  # the largest JPEG
    image.save(file, "JPEG", quality=int(quality))
    return decode_pixels(file.getvalue(), min_size)


def blur(image_CHW: Tensor, share: float) -> Tensor:
    """The image after a Gaussian blur whose radius is this share of its shorter side."""
    radius = share * min(image_CHW.shape[1:])
    return to_tensor(to_pil(image_CHW).filter(ImageFilter.GaussianBlur(radius)))


def fast_blur(image_CHW: Tensor, share: float, max_side: int) -> Tensor:
    """`blur`, applied to a reduced copy where that shows the same: up to 15 times as fast, at a PSNR above 45 dB. Finer
    detail than that of an image with the shorter side `max_side` may be lost."""
    height, width = image_CHW.shape[1:]
    side = min(_RADIUS / share, max_side)
    scale = side / min(height, width)
    if scale >= 1:
        return blur(image_CHW, share)
    small_CHW = resize(image_CHW, max(1, round(height * scale)), max(1, round(width * scale)), "bilinear")
    # The antialiased reduction is itself a blur, with a variance of 1/6 square pixel.
    radius = max((share * side) ** 2 - 1 / 6, 0) ** 0.5
    return resize(blur(small_CHW, radius / side), height, width, "bicubic")


def downscale(image_CHW: Tensor, side: float) -> Tensor:
    """The image reduced to a shorter side of this many pixels; unchanged if it is smaller."""
    height, width = image_CHW.shape[1:]
    scale = min(1.0, side / min(height, width))
    return resize(image_CHW, max(1, round(height * scale)), max(1, round(width * scale)), "bilinear")


def on_gradient(image_4HW: Tensor, colours_22C: np.ndarray) -> Tensor:
    """An image with alpha on a smooth gradient between the colours of the four corners, uint8 (2, 2, C): (C, H, W)."""
    image = with_alpha(image_4HW)
    box = (0.5, 0.5, 1.5, 1.5)  # between the centres of the 2 x 2 pixels
    canvas = Image.fromarray(colours_22C).resize(image.size, Image.Resampling.BILINEAR, box)
    canvas.paste(image, (0, 0), image)
    return to_tensor(canvas)
