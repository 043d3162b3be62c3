"""Image files whose metadata is damaged and whose pixels are sound, of each format that has metadata."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageCms

_ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
_XMP = b'<x:xmpmeta><rdf tiff:Orientation="1"/></x:xmpmeta>'
_PHOTOSHOP = b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10\0H\0\0\0\1\0\1\0H\0\0\0\1\0\1"
_MPF = b"MPF\0II*\0\x08\0\0\0\x03\0\0\xb0\x07\0\x04\0\0\x000100\x01\xb0\x04\0\x01\0\0\0\x02\0\0\0" + bytes(40)


def noise(width: int = 30, height: int = 20, channels: int = 3) -> Image.Image:
    """Random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file's bytes, with options of Pillow's writer."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "hello"
    exif.get_ifd(0x8769)[0x9003] = "2020"
    exif.get_ifd(0x8825)[1] = "N"
    return exif


_EXIF = _exif().tobytes()  # begins with Exif\0\0


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes, perhaps cut, with some of them changed."""
    changed = bytearray(data if rng.random() < 0.7 else data[: rng.randrange(len(data) + 1)])
    for _ in range(rng.choice([0, 1, 2, 5, 20]) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.choice([0, 1, 128, 255, rng.randrange(256)])
    return bytes(changed)


def _jpeg(rng: random.Random) -> tuple[bytes, bytes]:
    sound, segments = saved(noise(), "JPEG", quality=90), b""
    kinds = [(0xE1, _EXIF), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + _XMP), (0xE2, b"ICC_PROFILE\0\1\1" + _ICC)]
    kinds += [
        (0xED, _PHOTOSHOP),
        (0xE2, _MPF),
        (0xE0, b"JFIF\0\1\1\1\0H\0H\0\0"),
        (0xFE, b"comment"),
        (0xEF, b"x" * 30),
    ]
    for _ in range(rng.choice([1, 1, 2, 3])):
        marker, payload = rng.choice(kinds)
        kept = payload.find(b"\0") + 1 if rng.random() < 0.8 else 0
        payload = (payload[:kept] + mutated(payload[kept:], rng))[:65_533]
        segments += bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload
    return sound[:2] + segments + sound[2:], sound


def png_chunk(kind: bytes, payload: bytes, checksum_error: int = 0) -> bytes:
    """A chunk of a PNG."""
    checksum = zlib.crc32(kind + payload) ^ checksum_error
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", checksum)


def _png(rng: random.Random) -> tuple[bytes, bytes]:
    sound, chunks = saved(noise(), "PNG"), b""
    kinds = [(b"eXIf", _EXIF[6:]), (b"iCCP", b"icc\0\0" + zlib.compress(_ICC)), (b"tEXt", b"Comment\0hello")]
    kinds += [(b"zTXt", b"Comment\0\0" + zlib.compress(b"hello")), (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP)]
    kinds += [(b"tEXt", b"Raw profile type exif\0\nexif\n   10\n" + _EXIF.hex().encode()), (b"cHRM", bytes(32))]
    kinds += [(b"gAMA", bytes(4)), (b"sRGB", b"\0"), (b"pHYs", bytes(9)), (b"tIME", bytes(7)), (b"bKGD", bytes(6))]
    kinds += [(b"acTL", struct.pack(">II", 2, 0)), (b"fcTL", bytes(26)), (b"vpAg", b"123")]
    for _ in range(rng.choice([1, 2, 3])):
        kind, payload = rng.choice(kinds)
        chunks += png_chunk(kind, mutated(payload, rng), int(rng.random() < 0.2))
    at = 33 if rng.random() < 0.6 else sound.rindex(b"IEND") - 4
    return sound[:at] + chunks + sound[at:], sound


def _webp(rng: random.Random) -> tuple[bytes, bytes]:
    sound = saved(noise(), "WEBP", lossless=True, exif=_EXIF, xmp=_XMP, icc_profile=_ICC)
    chunks, start = b"", 12
    while start < len(sound):
        kind, size = sound[start : start + 4], struct.unpack_from("<I", sound, start + 4)[0]
        payload = sound[start + 8 : start + 8 + size]
        if kind in (b"EXIF", b"XMP ", b"ICCP"):
            payload = mutated(payload, rng)
        chunks += kind + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)
        start += 8 + size + size % 2
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks, sound


def _tiff(rng: random.Random) -> tuple[bytes, bytes]:
    compression = rng.choice([None, "tiff_lzw", "tiff_adobe_deflate"])
    options: dict[str, object] = {} if compression is None else {"compression": compression}
    sound = saved(noise(), "TIFF", exif=_exif(), icc_profile=_ICC, **options)
    start = struct.unpack_from("<I", sound, 4)[0]
    entries = range(start + 2, start + 2 + 12 * struct.unpack_from("<H", sound, start)[0], 12)
    metadata = [at for at in entries if struct.unpack_from("<H", sound, at)[0] in (0x010E, 0x8769, 0x8825, 34_675)]
    damaged = bytearray(sound)
    for _ in range(rng.choice([1, 2, 3])):
        damaged[rng.choice(metadata) + rng.randrange(2, 12)] = rng.randrange(256)
    return bytes(damaged), sound


def _gif(rng: random.Random) -> tuple[bytes, bytes]:
    sound = saved(noise().convert("P"), "GIF")
    payload = rng.randbytes(rng.randrange(1, 20))
    extension = b"!" + rng.choice([b"\xfe", b"\xff", b"\x01", b"\x99"]) + bytes([len(payload)]) + payload + b"\0"
    at = 13 + 3 * 2 ** ((sound[10] & 7) + 1)  # after the palette
    return sound[:at] + extension + sound[at:], sound


BROKEN_METADATA: Sequence[Callable[[random.Random], tuple[bytes, bytes]]] = (_jpeg, _png, _webp, _tiff, _gif)
"""Functions of a random generator that return a file with damaged metadata and the same file without damage."""
