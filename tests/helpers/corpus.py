"""Inputs that are kept because one of their kind has done harm: damages of a file one by one, image files, tars."""

import gzip
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from conftest import drawing, encoded, sample_members
from PIL import Image

from helpers.broken_images import BROKEN_METADATA, noise, png_chunk, saved
from helpers.slow_images import OF_PIECES, OF_RARE_KINDS, of_scans

JUNK = (b"", b"\n", b"{}", b"null", b"[1, 2]", b'{"a": 1e999}', b"[" * 50_000, b"\xff\xfe\0\0", b"<html>error</html>")


def damages(sound: bytes, places: int) -> Iterator[tuple[str, bytes | None]]:
    """(kind, what is left of a file): at each of some places a changed byte, a cut, zeros, a missing and a repeated
    part; other contents; None: no file."""
    yield "deleted", None
    for content in (*JUNK, sound + b"\n", sound * 2, bytes(len(sound)), sound[::-1]):
        yield f"{content[:10]!r} of {len(content)} bytes", content
    for at in sorted({len(sound) * k // places for k in range(places)} | {len(sound) - 1}):
        end, found = min(at + 40, len(sound)), set[bytes]()
        for kind, left in (
            ("flipped", sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :]),
            ("cut", sound[:at]),
            ("zeroed", sound[:at] + bytes(end - at) + sound[end:]),
            ("missing", sound[:at] + sound[end:]),
            ("repeated", sound[:end] + sound[at:]),
        ):
            if left not in (sound, *found):
                found.add(left)
                yield f"{kind} at {at}", left


# ---------------------------------------------------------------------------------------------------------- pictures


def _png(width: int, height: int, *chunks: bytes, depth: int = 8, mode: int = 2, data: bytes | None = None) -> bytes:
    pixel = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(mode, 1) * max(1, depth // 8)
    data = bytes((width * pixel + 1) * height) if data is None else data
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
    image = png_chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + image + png_chunk(b"IEND", b"")


def _with_exif(exif: bytes) -> bytes:
    data, segment = saved(noise(), "JPEG"), b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def _endless_tiff() -> bytes:
    """Its directory names itself as the next one."""
    data = bytearray(saved(noise(), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    struct.pack_into("<I", data, start + 2 + 12 * struct.unpack_from("<H", data, start)[0], start)
    return bytes(data)


def _with_alpha(mode: str) -> Image.Image:
    image = noise(channels=4)
    image.putalpha(Image.new("L", image.size, 0))
    return image.convert(mode)


_JPEG = saved(noise(), "JPEG")
PICTURES: dict[str, tuple[bool | None, Callable[[], bytes]]] = {
    "EXIF whose TIFF header is cut": (True, lambda: _with_exif(b"")),
    "EXIF of an entry without its value": (True, lambda: _with_exif(b"\0\0\0\x08\0\x02\x01\x12\0\x03")),
    "EXIF of one letter": (True, lambda: _with_exif(b"I")),
    "EXIF whose directory is itself": (True, lambda: _with_exif(b"II*\0\x08\0\0\0\0\0\x08\0\0\0")),
    "EXIF of 65,535 entries": (True, lambda: _with_exif(b"II*\0\x08\0\0\0\xff\xff" + bytes(60_000))),
    "EXIF of a wrong type": (True, lambda: _with_exif(b"II*\0\x08\0\0\0\1\0\x12\1\2\0\1\0\0\0x\0\0\0\0\0\0\0")),
    "EXIF beyond the end": (True, lambda: _with_exif(b"II*\0\xff\xff\xff\x7f")),
    **{
        f"metadata of {make.__name__[1:]}, {seed}": (True, lambda make=make, seed=seed: make(random.Random(seed))[0])
        for make in BROKEN_METADATA
        for seed in range(4)
    },
    "thin PNG, 1 x 20,000": (True, lambda: _png(1, 20_000)),
    "thin PNG, 1 x 100,000": (True, lambda: _png(1, 100_000)),
    "thin PNG, 2,000,000 x 1": (False, lambda: _png(2_000_000, 1)),
    "thin JPEG, 3 x 65,000": (True, lambda: saved(Image.new("RGB", (3, 65_000)), "JPEG")),
    "JPEG of 4,000 scans": (False, lambda: of_scans(4_000)),
    **{
        f"pieces: {kind}": (None if kind == "JPEG segments" else False, partial(make, 1_200_000))
        for kind, make in OF_PIECES.items()
    },
    **{f"Python decodes {kind}": (False, partial(make, 2_500)) for kind, make in OF_RARE_KINDS.items()},
    "PNG of 2^31 x 2^31": (False, lambda: _png(2**31 - 1, 2**31 - 1, data=b"")),
    "PNG of 30,000 x 30,000": (False, lambda: _png(30_000, 30_000, data=b"")),
    "PNG of no width": (False, lambda: _png(0, 5, data=b"")),
    "PNG of text that unpacks to 100 MB": (
        True,
        lambda: _png(4, 4, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8), 1))),
    ),
    "PNG of a profile that unpacks to 100 MB": (
        True,
        lambda: _png(4, 4, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8), 1))),
    ),
    "PNG without pixels": (False, lambda: _png(8, 8, data=b"")),
    "PNG whose palette is missing": (False, lambda: _png(8, 8, mode=3)),
    "PNG of 16-bit grey": (True, lambda: saved(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)), "PNG")),
    "TIFF of 32-bit integers": (True, lambda: saved(Image.new("I", (8, 8), 70_000), "TIFF")),
    "TIFF of floats that are no numbers": (False, lambda: saved(Image.new("F", (8, 8), float("nan")), "TIFF")),
    "TIFF whose directory follows itself": (True, _endless_tiff),
    "GIF under alpha 0": (True, lambda: saved(_with_alpha("P"), "GIF", transparency=0)),
    "WebP under alpha 0": (True, lambda: saved(_with_alpha("RGBA"), "WEBP")),
    "PNG of grey and alpha 0": (True, lambda: saved(_with_alpha("LA"), "PNG")),
    "GIF of a 65,535 x 65,535 screen": (
        False,
        lambda: b"GIF89a" + b"\xff" * 4 + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2L\1\0;",
    ),
    "GIF of 2,000 frames": (
        True,
        lambda: saved(noise(4, 4), "GIF", save_all=True, append_images=[noise(4, 4)] * 2_000),
    ),
    "JPEG cut in its header": (False, lambda: _JPEG[:100]),
    "JPEG of its first two bytes": (False, lambda: _JPEG[:2]),
    "JPEG inside HTML": (False, lambda: b"<html>" + _JPEG),
    "EPS, for which Pillow starts a program": (False, lambda: saved(noise(), "EPS")),
    "SVG": (False, lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "PDF": (False, lambda: saved(noise(), "PDF")),
    "nothing": (False, lambda: b""),
    "zeros": (False, lambda: bytes(100_000)),
}
"""Name -> (whether it is decoded, None: that depends on the libraries; a function that makes the file)."""


# -------------------------------------------------------------------------------------------------------------- tars

_IMAGE = encoded(drawing(0, 8)[0])
_A, _B = ([(name.replace("00000", key), data) for name, data in sample_members(0)] for key in "ab")


def _header(name: bytes, kind: bytes = b"0", size: bytes = b"00000000000\0", **fields: bytes) -> bytes:
    """A header whose checksum is right."""
    block = bytearray(512)
    at = {"link": 157, "magic": 257, "device": 329, "prefix": 345, "sparse": 386, "real_size": 483, "mode": 100}
    block[: len(name)], block[124:136], block[156:157] = name, size, kind
    block[257:265] = b"ustar\x0000"
    for field, value in fields.items():
        block[at[field] : at[field] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _octal(number: int) -> bytes:
    return b"%011o\0" % number


def _binary(number: int) -> bytes:
    return b"\x80" + number.to_bytes(11, "big") if number >= 0 else b"\xff" + (2**88 + number).to_bytes(11, "big")


def _member(name: str, data: bytes) -> bytes:
    return _header(name.encode(), size=_octal(len(data))) + data + bytes(-len(data) % 512)


def _pax(records: bytes) -> bytes:
    return _header(b"pax", b"x", _octal(len(records))) + records + bytes(-len(records) % 512)


def _record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode(errors="surrogateescape")
    length = len(body)
    while len(f"{length}") + len(body) != length:
        length = len(f"{length}") + len(body)
    return f"{length}".encode() + body


def _tar(*blocks: bytes) -> bytes:
    """Sample a, these blocks, sample b, and the end."""
    return b"".join([*(_member(*one) for one in _A), *blocks, *(_member(*one) for one in _B), bytes(1024)])


_PNG = _member("c.png", _IMAGE)
_SOUND = _tar()
_LONG = _header(b"././@LongLink", b"L", _octal(200)) + b"c" * 196 + b".png" + bytes(312)
TARS: dict[str, bytes] = {
    "sound": _SOUND,
    "nothing": b"",
    "one zero block": bytes(512),
    "only the end": bytes(10_240),
    "an error page": b"<html>" + b"x" * 5000,
    "gzip": gzip.compress(_SOUND),
    "no end": _SOUND[:-1024],
    "half an end": _SOUND[:-512],
    "cut in a header": _SOUND[: -1024 - 700],
    "cut in the first header": _SOUND[:300],
    "cut in data": _SOUND[:600],
    "data beyond the end": _SOUND + b"x" * 700,
    "two tars, joined": _SOUND + _SOUND,
    "zeros between members": _tar(bytes(512)),
    "the end between samples": _tar(bytes(1024)),
    "garbage between members": _tar(b"\xaa" * 512),
    "a checksum that is wrong": _tar(_PNG[:148] + b"000000\0 " + _PNG[156:]),
    "a checksum that is no number": _tar(_PNG[:148] + b"xxxxxxxx" + _PNG[156:]),
    "a size of -512": _tar(_header(b"c.png", size=_binary(-512))),
    "a size of -1": _tar(_header(b"c.png", size=_binary(-1))),
    "a size of 2^63": _tar(_header(b"c.png", size=_binary(2**63))),
    "a size of 2^87": _tar(_header(b"c.png", size=_binary(2**87))),
    "a size of 8 GB": _tar(_header(b"c.png", size=_octal(8**11 - 1))),
    "a size that is no number": _tar(_header(b"c.png", size=b"zzzzzzzzzzz\0")),
    "a folder with a size": _tar(_header(b"c/", b"5", _octal(2**30))),
    "a sparse member of -512 bytes": _tar(_header(b"c.png", b"S", _octal(0), real_size=_binary(-512))),
    "a sparse member that steps back": _tar(_header(b"c.png", b"S", _binary(-1536), real_size=_octal(8))),
    "a sparse member with a map of garbage": _tar(_header(b"c.png", b"S", _octal(0), sparse=b"x" * 96)),
    "a sparse member of 8 GB": _tar(_header(b"c.png", b"S", _octal(0), real_size=_octal(8**11 - 1))),
    "a sparse map without end": _tar(_header(b"c.png", b"S", _octal(0), real_size=_octal(1))[:482] + b"\1" + bytes(29)),
    "PAX, sparse 1.0 with a map of garbage": _tar(
        _pax(_record("GNU.sparse.major", "1") + _record("GNU.sparse.minor", "0") + _record("GNU.sparse.realsize", "9")),
        _member("c.png", b"x\n" * 100),
    ),
    "PAX, sparse 0.1 with a map of garbage": _tar(_pax(_record("GNU.sparse.map", "0,x,-1")), _PNG),
    "PAX, sparse 0.0 of -1 blocks": _tar(_pax(_record("GNU.sparse.numblocks", "-1")), _PNG),
    "PAX, a size of -1": _tar(_pax(_record("size", "-1")), _PNG),
    "PAX, a size that is no number": _tar(_pax(_record("size", "many")), _PNG),
    "PAX, a size of 2^80": _tar(_pax(_record("size", f"{2**80}")), _PNG),
    "PAX, a record of length 0": _tar(_pax(b"0 a=b\n"), _PNG),
    "PAX, a record of a billion bytes": _tar(_pax(b"1000000000 a=b\n"), _PNG),
    "PAX, a length of 5,000 digits": _tar(_pax(b"9" * 5_000 + b" a=b\n"), _PNG),
    "PAX, garbage": _tar(_pax(b"\xff" * 300), _PNG),
    "PAX of PAX": _tar(*[_pax(_record("path", "c.png"))] * 50, _PNG),
    "PAX, 2,000 headers without a member": _tar(*[_pax(_record("path", "c.png"))] * 2_000),
    "PAX, a charset that is unknown": _tar(_pax(_record("hdrcharset", "none") + _record("path", "c.png")), _PNG),
    "PAX, a path that is no UTF-8": _tar(_pax(_record("path", "c\udcff.png")), _PNG),
    "PAX, a path of control characters": _tar(_pax(_record("path", "c\x1b[2J\r.png")), _PNG),
    "PAX, a time of 1e999": _tar(_pax(_record("mtime", "1e999")), _PNG),
    "PAX, a global header": _tar(_header(b"g", b"g", _octal(20)) + _record("a", "b").ljust(512, b"\0"), _PNG),
    "PAX, a global path": _tar(_header(b"g", b"g", _octal(15)) + _record("path", "c.png").ljust(512, b"\0"), _PNG),
    "a long name": _tar(_LONG, _PNG),
    "a long name of no bytes": _tar(_header(b"././@LongLink", b"L", _octal(0)), _PNG),
    "a long name of a terabyte": _tar(_header(b"././@LongLink", b"L", _binary(2**40)), _PNG),
    "a long name of -1 bytes": _tar(_header(b"././@LongLink", b"L", _binary(-1)), _PNG),
    "long names without a member": _tar(*[_LONG] * 2_000),
    "a hard link": _tar(_header(b"c.png", b"1", link=b"a.png")),
    "a hard link to itself": _tar(_header(b"c.png", b"1", link=b"c.png")),
    "a symbolic link out of the tar": _tar(_header(b"c.png", b"2", link=b"/etc/passwd")),
    "a device": _tar(_header(b"c.png", b"3", device=b"0000001\0000003\0")),
    "a pipe": _tar(_header(b"c.png", b"6")),
    "an unknown type": _tar(_header(b"c.png", b"Z", _octal(len(_IMAGE))), _PNG[512:]),
    "a path upwards": _tar(_member("../../c.png", _IMAGE)),
    "an absolute path": _tar(_member("/c.png", _IMAGE)),
    "an empty name": _tar(_member("", _IMAGE)),
    "a name of dots": _tar(_member("...", _IMAGE)),
    "a name of a null": _tar(_header(b"c\0d.png", size=_octal(len(_IMAGE))), _PNG[512:]),
    "a name of control characters": _tar(_member("c\x1b[31m\n.png", _IMAGE)),
    "a name that is no UTF-8": _tar(_header(b"c\xff.png", size=_octal(len(_IMAGE))), _PNG[512:]),
    "dots in names": _tar(_member("Nr. 1.png", _IMAGE), _member("Nr. 2.png", _IMAGE)),
    "members apart": _tar(_member("b.jpg", _IMAGE), _PNG),
    "a key twice": _tar(*(_member(*one) for one in _A)),
    "hidden members": _tar(_member(".c.png", _IMAGE), _member("._a.png", _IMAGE), _member("./.d/a.txt", b"c")),
    "upper case": _tar(_member("c.PNG", _IMAGE), _member("c.TXT", b"c")),
    "an image without caption": _tar(_PNG),
    "a caption without image": _tar(_member("c.txt", b"c")),
    "JSON that is nested deeply": _tar(_PNG, _member("c.json", b"[" * 100_000)),
    "JSON of a number of 5,000 digits": _tar(_PNG, _member("c.json", b"1" * 5_000)),
    "a caption that is no UTF-8": _tar(_PNG, _member("c.txt", b"\xff\xfe\0")),
    "a caption of 10 MB": _tar(_PNG, _member("c.txt", b"x" * 10**7)),
    "an empty image": _tar(_member("c.png", b""), _member("c.txt", b"c")),
    "a tar in a tar": _tar(_member("c.tar", _SOUND)),
}
"""Name -> the tar's bytes, of two sound samples and what has done harm."""
