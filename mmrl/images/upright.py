"""Read image files of any kind with Pillow as upright RGB or RGBA, and resize them. Imports neither torch nor mmrl.

`mmrl export --format onnx` copies this file into encoder.py, so that both read and resize images alike.
"""

import contextlib
import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

try:
    from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
except ImportError:  # optional: .heic files
    pass
else:
    register_heif_opener()

# Larger images are rejected without decoding, as protection against decompression bombs. Product photos have fewer than
# 64 megapixels. Decoding takes up to 20 bytes per pixel, and resizing 64 per pixel of the longer side.
MAX_PIXELS, MAX_SIDE = 64_000_000, 1_000_000
# Bounds on the time of decoding, in counts, so that each machine refuses the same files. Within them a file takes a few
# seconds at the most. Each scan of a JPEG costs time for all its pixels, even if it has none of their data.
MAX_SCANS, MAX_SCAN_PIXELS = 100, 2_000_000_000
# Segments, chunks and strips that Pillow reads one by one; pixels and bytes of the kinds that it decodes in Python.
MAX_PIECES, MAX_SLOW_SIZE = 250_000, 4_000_000
_SLOW_DECODERS = ("bmp_rle", "fits_gzip", "ppm", "ppm_plain")
# An allow-list, in the order in which they are tried. It leaves out formats for which Pillow starts other programs
# (EPS), that have no signature, or whose decoder is slow Python code.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "DIB", "PPM", "ICO", "CUR", "ICNS"),
    *("PSD", "PCX", "DCX", "SGI", "SUN", "XBM", "FLI", "FITS", "TGA"),
)
_THIN = 8  # an image with a longer ratio of its sides is cropped before it is enlarged
_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_TAGS = (
    *range(254, 260), 262, 266, *range(273, 280), 284, 292, 293, 317, *range(320, 326), *range(338, 342), 347,
    *range(529, 533),
)  # fmt: skip
# A marker of a JPEG that is followed by a segment; in the data of scans FF stands before 00 and restart markers only.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class SlowImage(ValueError):
    """An image would take too long to decode."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"too slow a picture: {reason}; save it anew, as PNG or JPEG")


@functools.cache
def readable_formats() -> list[str]:
    """Those of FORMATS that this installation of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def format_of(data: bytes) -> str:
    """The format of an image file by its first bytes, as Pillow names it; empty if they are of none that is read."""
    start = data[:16].ljust(16, b"\0")
    signatures = ((name, Image.OPEN[name][1]) for name in readable_formats())
    return next((name for name, accept in signatures if accept is not None and accept(start) is True), "")


def open_upright(data: bytes, min_size: "tuple[int, int] | None" = None) -> Image.Image:
    """Decodes an image file to RGB, or to RGBA if a pixel is transparent, rotated upright. A JPEG may be decoded at
    1/2, 1/4 or 1/8 of its size, as long as neither side becomes smaller than `min_size` (height, width). Raises
    ValueError: not an image in one of FORMATS, damaged, larger than MAX_PIXELS or MAX_SIDE, or SlowImage."""
    try:
        try:
            return _open(data, min_size)
        except SlowImage:
            raise
        except Exception:
            sound = without_metadata(data)
            if sound == data:
                raise
            return _open(sound, min_size)
    except Image.UnidentifiedImageError:
        raise ValueError(f"no picture in a known format: not one of {', '.join(readable_formats())}") from None
    except ValueError as error:
        if "\n" not in str(error):
            raise
        raise ValueError(" ".join(str(error).split())) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"too large a picture: {error}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise many kinds
        raise ValueError(f"damaged picture: {error}") from error


def _open(data: bytes, min_size: "tuple[int, int] | None") -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage that it can repair
        if _tiff_strips(data) > MAX_PIECES:
            raise SlowImage(f"more than {MAX_PIECES:,} strips or tiles")
        file = LimitedFile(data)
        image = Image.open(file, formats=readable_formats())
        check_size(*image.size)
        if image.format in ("JPEG", "MPO"):
            check_scans(data, *image.size)
        if any(tile[0] in _SLOW_DECODERS for tile in getattr(image, "tile", ())):
            if max(image.width * image.height, len(data)) > MAX_SLOW_SIZE:
                raise SlowImage(f"a rare kind of {image.format} with more than {MAX_SLOW_SIZE:,} pixels or bytes")
            file.reads_left = 2 * MAX_SLOW_SIZE
        # For an image inside another one (ICO), whose size is not known before.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if min_size is not None:
            reduction = max_reduction(image.height, image.width, min_size)
            image.draft(None, (image.width // reduction, image.height // reduction))
        return upright(image)


class LimitedFile(io.BytesIO):
    """A file in memory of which only a number of pieces can be read. Raises SlowImage for more."""

    reads_left = 4 * MAX_PIECES

    def read(self, size: "int | None" = -1) -> bytes:
        """As BytesIO.read."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise SlowImage(f"more than {MAX_PIECES:,} segments, chunks or strips")
        return super().read(size)


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raises SlowImage if a JPEG of this size has more scans than MAX_SCANS, or MAX_SCAN_PIXELS in all of them."""
    limit = min(MAX_SCANS, max(1, MAX_SCAN_PIXELS // (width * height)))
    if data.count(b"\xff\xda") <= limit:  # an upper bound: metadata and what follows the image count too
        return
    scans, start = 0, 2
    for _ in range(MAX_PIECES):
        found = _JPEG_MARKER.search(data, start)
        if found is None or found[1] == b"\xd9":  # end of the image
            return
        scans += found[1] == b"\xda"
        if scans > limit:
            raise SlowImage(f"more than {limit:,} scans of {width}x{height} pixels")
        start = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2]))
    raise SlowImage(f"more than {MAX_PIECES:,} segments")


def _tiff_strips(data: bytes) -> int:
    """The number of strips or tiles that the first page of a TIFF names; 0 for malformed and other files."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    with contextlib.suppress(struct.error):
        if order and data[2:4] in (b"*\0", b"\0*"):
            start, first, entry = struct.unpack_from(order + "I", data, 4)[0], "H", "HHI4x"
        elif order and data[2:4] in (b"+\0", b"\0+"):  # BigTIFF
            start, first, entry = struct.unpack_from(order + "Q", data, 8)[0], "Q", "HHQ8x"
        else:
            return 0
        count = struct.unpack_from(order + first, data, start)[0]
        size = struct.calcsize(order + entry)
        start += struct.calcsize(order + first)
        entries = struct.iter_unpack(
            order + entry, data[start : start + size * min(count, (len(data) - start) // size)]
        )
        return max((number for tag, _, number in entries if tag in (273, 324)), default=0)
    return 0


def without_metadata(data: bytes) -> bytes:
    """A JPEG, PNG or TIFF without the metadata that Pillow may fail on; other and unparsable files as they are."""
    with contextlib.suppress(struct.error, IndexError):
        if data[:2] == b"\xff\xd8":
            return data[:2] + b"".join(_jpeg_segments(data))
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return data[:8] + b"".join(_png_chunks(data))
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff_of_image_tags(data, "<" if data[:1] == b"I" else ">")
    return data


def _jpeg_segments(data: bytes) -> "Iterator[bytes]":
    """All segments except comments, APP2 … APP13 and APP15, and too short ones of JFIF (APP0) and Adobe (APP14)."""
    start = 2
    while data[start + 1] != 0xDA:  # start of scan
        end = start + 2 + struct.unpack_from(">H", data, start + 2)[0]
        marker, too_short = data[start + 1], end - start < 16
        if marker not in (*range(0xE2, 0xEE), 0xEF, 0xFE) and not (marker in (0xE0, 0xEE) and too_short):
            yield data[start:end]
        start = end
    yield data[start:]


def _png_chunks(data: bytes) -> "Iterator[bytes]":
    """The critical chunks, and transparency and EXIF if their checksum is right."""
    start = 8
    while start < len(data):
        end = start + 12 + struct.unpack_from(">I", data, start)[0]
        kind, checksum = data[start + 4 : start + 8], data[end - 4 : end]
        intact = zlib.crc32(data[start + 4 : end - 4]).to_bytes(4, "big") == checksum
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and intact):
            yield data[start:end]
        start = end


def _tiff_of_image_tags(data: bytes, order: str) -> bytes:
    """The file with a directory of the tags that describe pixels, at its end, instead of its first one."""
    start = struct.unpack_from(order + "I", data, 4)[0]
    count = struct.unpack_from(order + "H", data, start)[0]
    entries = [data[i : i + 12] for i in range(start + 2, start + 2 + 12 * count, 12)]
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in _TIFF_TAGS]
    header = data[:4] + struct.pack(order + "I", len(data))
    return header + data[8:] + struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)


def check_size(width: int, height: int) -> None:
    """Raises ValueError if an image has more than MAX_PIXELS or a side of more than MAX_SIDE."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(
            f"too large a picture: {width}x{height} pixels, more than the {MAX_PIXELS:,} in all or {MAX_SIDE:,} per "
            "side that are allowed"
        )


def max_reduction(height: int, width: int, min_size: "tuple[int, int]") -> int:
    """8, 4, 2 or 1: the largest by which both sides can be divided without falling below `min_size`."""
    return next((n for n in (8, 4, 2) if height // n >= min_size[0] and width // n >= min_size[1]), 1)


def orientation(image: Image.Image) -> "Image.Transpose | None":
    """How to make an image upright, by its EXIF or XMP; None if it is upright or its metadata is malformed."""
    try:
        return _TRANSPOSE.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # SyntaxError, struct.error, KeyError, …
        return None


def upright(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, or to RGBA if a pixel is transparent, rotated upright. Raises ValueError:
    its values are out of the range of its mode."""
    if image.format == "PNG":
        _scale_transparent_colour(image)
    image.load()
    transpose = orientation(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode != "RGB" and (image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255):
        image = image.convert("RGB")
    return image if transpose is None else image.transpose(transpose)


def _scale_transparent_colour(image: Image.Image) -> None:
    """Pillow scales the pixels of a PNG to 8 bits, but not the colour that the file declares transparent."""
    stored, colour = getattr(image, "tile", None), image.info.get("transparency")
    depth = str(stored[0][3]) if stored else ""
    if depth in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (85 if depth == "L;2" else 17)
    elif depth == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _eight_bit(image: Image.Image) -> Image.Image:
    """An image of mode I;16, I or F as grey of 8 bits. 16-bit files are divided by 257. I and F do not say their range:
    it is the smallest of 0-1 (F only), 0-255, 0-65,535 and 0-2,147,483,647 (I only) that holds all values."""
    values_HW = np.asarray(image)
    is_16_bit = image.mode.startswith("I;16") or image.format == "PNG"
    ranges = [65_535] if is_16_bit else [1, 255, 65_535] if image.mode == "F" else [255, 65_535, 2**31 - 1]
    low, high = float(values_HW.min()), float(values_HW.max())
    if not 0 <= low <= high <= ranges[-1]:  # NaN fails too
        raise ValueError(
            f"grey values from {low:g} to {high:g}, where 0 to {ranges[-1]:,} are allowed; convert the picture to 8 or "
            "16 bits"
        )
    scaled_HW = values_HW.astype(np.float32)
    scaled_HW *= 255 / next(maximum for maximum in ranges if high <= maximum)
    scaled_HW += 0.5
    grey = Image.fromarray(scaled_HW.astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey


def composite(image: Image.Image, background: "Sequence[int] | None") -> Image.Image:
    """An RGBA image on a background of this RGB colour; with None, the colours that its transparent pixels hide."""
    if image.mode == "RGB" or background is None:
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, tuple(background))
    canvas.paste(image, (0, 0), image)
    return canvas


def is_thin(height: int, width: int) -> bool:
    """Whether a resize to a tower's size would enlarge far more pixels than it keeps."""
    return max(height, width) > _THIN * min(height, width)


def fit(image: Image.Image, spec: "dict[str, Any]") -> Image.Image:
    """Resizes an RGB image, then crops or pads it around its centre, as the fields of a manifest's `image` say."""
    height, width, mode = spec["height"], spec["width"], spec["resize_mode"]
    if image.size == (width, height):
        return image
    resampling = _RESAMPLING[spec["interpolation"]]
    if mode == "squash":
        if image.height > _THIN * image.width:  # Pillow resizes the width first, here at the full height
            image = image.resize((image.width, height), resampling)
        return image.resize((width, height), resampling)
    choose = max if mode == "shortest" else min
    scale = choose(height / image.height, width / image.width)
    # open_clip resizes to squares with torchvision, which truncates the longer side, else like timm, which rounds.
    to_int = int if mode == "shortest" and height == width else round
    min_width, min_height = (width, height) if mode == "shortest" else (1, 1)
    resized_w = max(min_width, to_int(image.width * scale))
    resized_h = max(min_height, to_int(image.height * scale))
    left, top = round((resized_w - width) / 2), round((resized_h - height) / 2)
    if mode == "longest":
        canvas = Image.new("RGB", (width, height), (spec["fill_color"],) * 3)
        canvas.paste(
            image.resize((resized_w, resized_h), resampling), ((width - resized_w) // 2, (height - resized_h) // 2)
        )
        return canvas
    if is_thin(image.height, image.width):  # the same pixels without enlarging those outside of the crop
        x, y = image.width / resized_w, image.height / resized_h
        right, bottom = min((left + width) * x, image.width), min((top + height) * y, image.height)
        return image.resize((width, height), resampling, (left * x, top * y, right, bottom))
    return image.resize((resized_w, resized_h), resampling).crop((left, top, left + width, top + height))
