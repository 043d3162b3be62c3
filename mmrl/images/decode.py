"""An image file's bytes -> an upright RGB picture, the same for training, evaluation and export.

Pillow is the measure: what it refuses is refused, and its pixels are the pixels. Plain JPEGs go through simplejpeg
where that is installed, which reads the same pixels from the same libjpeg-turbo without Pillow's copies.

Shapes: C = 3 colour channels, H and W the picture's own size in pixels.
"""

import io
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # there is no build for every machine
    simplejpeg = None

# A picture of more pixels than this is refused, not decoded: 64 megapixels are above any camera that a catalogue
# sees, and far below what a crafted file can unfold to.
MAX_PIXELS = 64_000_000
# Named, because Pillow would also open formats that start other programs, such as EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112


def decode(data: bytes) -> Image.Image:
    """An image file's bytes -> RGB picture, turned upright by its EXIF orientation.

    Raises:
        ValueError: not a picture in one of FORMATS, damaged, or of more than MAX_PIXELS.
    """
    return _by_pillow(data, None)


def decode_pixels(data: bytes, least: tuple[int, int] | None = None) -> torch.Tensor:
    """An image file's bytes -> uint8 (C, H, W) with channels-last memory, which the uint8 resize is fast on.

    Args:
        least: height and width in pixels. A JPEG may then come at 1/2, 1/4 or 1/8 of its size, which costs less, so
            long as neither side falls below these.

    Raises:
        ValueError: as `decode`.
    """
    pixels_HWC = _by_simplejpeg(data, least) if data[:2] == b"\xff\xd8" else None
    return to_tensor(_by_pillow(data, least)) if pixels_HWC is None else torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB picture -> uint8 (C, H, W) with channels-last memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_picture(pixels_CHW: torch.Tensor) -> Image.Image:
    """uint8 (C, H, W) -> RGB picture."""
    return Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())


def upright_rgb(image: Image.Image) -> Image.Image:
    """A Pillow picture of any mode -> RGB, upright."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _by_pillow(data: bytes, least: tuple[int, int] | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it gets over
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"too large a picture: {image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed"
                )
            reduction = _reduction(image.height, image.width, least)
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            return upright_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"no picture in a known format: it is none of {', '.join(FORMATS)}") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders and EXIF reader let many kinds through on damaged files
        raise ValueError(f"damaged picture: {error}") from error


def _by_simplejpeg(data: bytes, least: tuple[int, int] | None) -> Any:
    """(H, W, C), or None for what is Pillow's to decode or to refuse: turned, CMYK, damaged, too large."""
    if simplejpeg is None:
        return None
    try:
        tall, wide, colours, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(tall), int(wide)
        if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS or _is_turned(data):
            return None
        reduction = _reduction(height, width, least)
        options = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)} if reduction > 1 else {}
        return simplejpeg.decode_jpeg(data, "RGB", **options)  # pyright: ignore[reportArgumentType]
    except (ValueError, RuntimeError, MemoryError):
        return None


def _is_turned(data: bytes) -> bool:
    # Most pictures on the web have no EXIF at all, which is seen at once.
    if b"Exif\0\0" not in data:
        return False
    return Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(_ORIENTATION, 1) != 1


def _reduction(height: int, width: int, least: tuple[int, int] | None) -> int:
    if least is None:
        return 1
    return next((n for n in (8, 4, 2) if height // n >= least[0] and width // n >= least[1]), 1)
