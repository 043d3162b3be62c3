"""Decode an image file to upright pixels, the same way for training, evaluation and export.

Pillow is the reference: it decides which files are valid, and its pixels are the result. Plain JPEGs are decoded with
simplejpeg if that is installed: the same pixels, since both use libjpeg-turbo, without Pillow's copies.

Shapes: C = 3 colour channels, or 4 with alpha if a pixel is transparent; H and W the image's own size in pixels.
"""

import functools
import warnings
from mimetypes import MimeTypes
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrl.images import upright
from mmrl.images.upright import composite, open_upright

try:
    import simplejpeg
except ImportError:  # optional: it has no wheel for some platforms
    simplejpeg = None

WHITE = (255, 255, 255)
# Formats that Pillow registers beside images.
_NO_IMAGES = ("BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF")


@functools.cache
def image_extensions() -> tuple[str, ...]:
    """Extensions of image files, lower case: all that Pillow or Python's `mimetypes` knows, the most common ones first.

    A file with one of them counts as an image even if it cannot be decoded (EPS, SVG): it is listed, not passed over.
    """
    Image.init()
    known = [one for one, name in Image.registered_extensions().items() if name not in _NO_IMAGES]
    known += [one for types in MimeTypes().types_map for one, kind in types.items() if kind.startswith("image/")]
    return tuple(dict.fromkeys(["jpg", "jpeg", "png", "webp", *sorted(one[1:] for one in known)]))


def decode(data: bytes) -> Image.Image:
    """Decode an image file to a Pillow RGB image on white, rotated upright by its EXIF orientation. Raises ValueError:
    as `open_upright`."""
    return composite(open_upright(data), WHITE)


def decode_pixels(data: bytes, min_size: tuple[int, int] | None = None) -> torch.Tensor:
    """Decode an image file to uint8 (C, H, W) in channels-last memory, for which torch's uint8 resize is fast. A JPEG
    may be decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper, as long as neither side becomes smaller than
    `min_size` (height, width). Raises ValueError: as `open_upright`."""
    pixels_HWC = _by_simplejpeg(data, min_size) if data[:2] == b"\xff\xd8" else None
    if pixels_HWC is None:
        return to_tensor(open_upright(data, min_size))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Pillow RGB or RGBA image -> uint8 (C, H, W) in channels-last memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_pil(pixels_CHW: torch.Tensor, background: tuple[int, int, int] | None = WHITE) -> Image.Image:
    """uint8 (C, H, W) -> Pillow RGB image; `background` as in `composite`."""
    return composite(with_alpha(pixels_CHW), background)


def with_alpha(pixels_CHW: torch.Tensor) -> Image.Image:
    """uint8 (C, H, W) -> Pillow RGB image, or RGBA if it has 4 channels."""
    return Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())


def _by_simplejpeg(data: bytes, min_size: tuple[int, int] | None) -> Any:
    """(H, W, C) pixels, or None for what is left to Pillow: JPEGs that are rotated, CMYK, damaged or too large."""
    if simplejpeg is None:
        return None
    try:
        tall, wide, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(tall), int(wide)
        if colour_space not in ("YCbCr", "Gray") or height * width > upright.MAX_PIXELS or _is_rotated(data):
            return None
        upright.check_scans(data, width, height)
        reduction = 1 if min_size is None else upright.max_reduction(height, width, min_size)
        options = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)} if reduction > 1 else {}
        return simplejpeg.decode_jpeg(data, "RGB", **options)  # pyright: ignore[reportArgumentType]
    except Exception:  # Pillow decides whether the file is damaged, and open_upright whether it is refused
        return None


def _is_rotated(data: bytes) -> bool:
    # Fast path: most images on the web have neither EXIF nor XMP.
    if b"Exif\0\0" not in data and b"tiff:Orientation" not in data:
        return False
    with warnings.catch_warnings(action="ignore"):
        return upright.orientation(Image.open(upright.LimitedFile(data), formats=("JPEG",))) is not None
