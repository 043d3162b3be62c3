"""Decode an image file to upright RGB pixels, the same way for training, evaluation and export.

Pillow is the reference: it decides which files are valid, and its pixels are the result. Plain JPEGs are decoded with
simplejpeg if that is installed: the same pixels, since both use libjpeg-turbo, without Pillow's copies.

Shapes: C = 3 colour channels, H and W the image's own size in pixels.
"""

import io
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # optional: it has no wheel for some platforms
    simplejpeg = None

# Larger images are rejected without decoding, as protection against decompression bombs. Product photos have fewer than
# 64 megapixels.
MAX_PIXELS = 64_000_000
# An allow-list, since for some formats, such as EPS, Pillow starts other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112


def decode(data: bytes) -> Image.Image:
    """Decode an image file to a Pillow RGB image, rotated upright by its EXIF orientation.

    Raises:
        ValueError: not an image in one of FORMATS, damaged, or of more than MAX_PIXELS.
    """
    return _by_pillow(data, None)


def decode_pixels(data: bytes, min_size: tuple[int, int] | None = None) -> torch.Tensor:
    """Decode an image file to uint8 (C, H, W) in channels-last memory, for which torch's uint8 resize is fast.

    Args:
        min_size: (height, width). A JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper, as long
            as neither side becomes smaller than this.

    Raises:
        ValueError: as `decode`.
    """
    pixels_HWC = _by_simplejpeg(data, min_size) if data[:2] == b"\xff\xd8" else None
    if pixels_HWC is None:
        return to_tensor(_by_pillow(data, min_size))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Pillow RGB image -> uint8 (C, H, W) in channels-last memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_pil(pixels_CHW: torch.Tensor) -> Image.Image:
    """uint8 (C, H, W) -> Pillow RGB image."""
    return Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())


def upright_rgb(image: Image.Image) -> Image.Image:
    """Converts a Pillow image of any mode to RGB, rotated upright by its EXIF orientation."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _by_pillow(data: bytes, min_size: tuple[int, int] | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it can repair
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"too large a picture: {image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed"
                )
            reduction = _reduction(image.height, image.width, min_size)
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            return upright_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"no picture in a known format: not one of {', '.join(FORMATS)}") from None
    except ValueError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders and EXIF reader raise many kinds
        raise ValueError(f"damaged picture: {error}") from error


def _by_simplejpeg(data: bytes, min_size: tuple[int, int] | None) -> Any:
    """(H, W, C) pixels, or None for what is left to Pillow: JPEGs that are rotated, CMYK, damaged or too large."""
    if simplejpeg is None:
        return None
    try:
        tall, wide, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(tall), int(wide)
        if colour_space not in ("YCbCr", "Gray") or height * width > MAX_PIXELS or _is_rotated(data):
            return None
        reduction = _reduction(height, width, min_size)
        options = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)} if reduction > 1 else {}
        return simplejpeg.decode_jpeg(data, "RGB", **options)  # pyright: ignore[reportArgumentType]
    except (ValueError, RuntimeError, MemoryError):
        return None


def _is_rotated(data: bytes) -> bool:
    # Fast path: most images on the web have no EXIF.
    if b"Exif\0\0" not in data:
        return False
    return Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(_ORIENTATION, 1) != 1


def _reduction(height: int, width: int, min_size: tuple[int, int] | None) -> int:
    if min_size is None:
        return 1
    return next((n for n in (8, 4, 2) if height // n >= min_size[0] and width // n >= min_size[1]), 1)
