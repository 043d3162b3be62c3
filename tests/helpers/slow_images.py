"""Small image files that would take their decoder seconds, minutes or hours."""

import gzip
import io
import struct
from collections.abc import Callable

from PIL import Image

from helpers.broken_images import png_chunk, saved


def of_scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated; 117 bytes each."""
    data = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    return data[:-2] + count * data[data.rindex(b"\xff\xda") : -2] + data[-2:]


def run_length_bmp(side: int) -> bytes:
    """Of lines of one pixel, four bytes each, which Pillow fills up pixel by pixel in Python."""
    body = b"\1\0\0\0" * side + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 1078 + len(body), 0, 0, 1078) + header + bytes(1024) + body


def compressed_fits(side: int) -> bytes:
    """Of zeros, each of which Pillow copies in Python, twice."""
    first = {"SIMPLE": "T", "BITPIX": 8, "NAXIS": 0}
    table = {"XTENSION": "'BINTABLE'", "BITPIX": 8, "NAXIS": 2, "NAXIS1": 8, "NAXIS2": 1, "ZIMAGE": "T"}
    table |= {"ZCMPTYPE": "'GZIP_1  '", "ZBITPIX": 8, "ZNAXIS": 2, "ZNAXIS1": side, "ZNAXIS2": side}
    blocks = [
        "".join([*(f"{key:8}= {value:>20}".ljust(80) for key, value in header.items()), "END"]).ljust(2880).encode()
        for header in (first, table)
    ]
    return b"".join(blocks) + bytes(8) + gzip.compress(bytes(4 * side**2), 1)


def of_strips(count: int, order: str = "<", is_big: bool = False) -> bytes:
    """A TIFF of 2 x 2 pixels that names so many strips."""
    tags = [(256, 1, 2), (257, 1, 2), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, count, 16), (278, 1, 1)]
    kind, first, entry = ("Q", "Q", "HHQQ") if is_big else ("I", "H", "HHII")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if is_big else 42)
    head += struct.pack(order + "HH", 8, 0) if is_big else b""
    body = struct.pack(order + "I", 16) * count
    directory = struct.pack(order + first, len(tags))
    directory += b"".join(struct.pack(order + entry, tag, 4, number, value) for tag, number, value in tags)
    return (head + struct.pack(order + kind, 16 + len(body))).ljust(16, b"\0") + body + directory + bytes(8)


def _in_front(data: bytes, length: int, pieces: bytes) -> bytes:
    return data[:length] + pieces + data[length:]


_GIF, _PNG, _JPEG = (saved(Image.new("L", (8, 8)), kind) for kind in ("GIF", "PNG", "JPEG"))
OF_PIECES: dict[str, Callable[[int], bytes]] = {
    "GIF comment": lambda count: _in_front(_GIF, _GIF.rindex(b",\0\0\0\0"), b"\x21\xfe" + b"\1a" * count + b"\0"),
    "GIF extensions": lambda count: b"GIF89a\x08\0\x08\0\0\0\0" + b"\x21\x01\0" * count,
    "PNG texts": lambda count: _in_front(_PNG, 33, png_chunk(b"tEXt", b"a\0b") * count),
    "PNG data": lambda count: _in_front(_PNG, len(_PNG) - 12, png_chunk(b"IDAT", b"") * count),
    "JPEG segments": lambda count: _in_front(_JPEG, 2, b"\xff\xe5\0\2" * count),
    "PPM comment": lambda count: b"P6 #" + b"a" * count + b"\n2 2 255\n" + bytes(12),
    "TIFF": of_strips,
    "TIFF, big-endian": lambda count: of_strips(count, ">"),
    "BigTIFF": lambda count: of_strips(count, is_big=True),
}
"""Kind -> a file of so many pieces."""


def plain_ppm(side: int) -> bytes:
    """Of numbers as text, which Pillow parses in Python."""
    return b"P3 %d %d 255\n" % (side, side) + b"7 " * (3 * side**2)


def deep_ppm(side: int) -> bytes:
    """Of levels up to 100, which Pillow scales in Python."""
    return io.BytesIO(b"P6 %d %d 100\n" % (side, side) + bytes(3 * side**2)).getvalue()


OF_RARE_KINDS = {"BMP": run_length_bmp, "FITS": compressed_fits, "PPM, plain": plain_ppm, "PPM, deep": deep_ppm}
"""Kind -> a square image of this side."""
