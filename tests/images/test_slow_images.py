"""No image takes long to decode: what would is refused, by counts, and files of ordinary shape are not."""

import contextlib
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers.broken_images import noise, saved
from helpers.slow_images import OF_PIECES, OF_RARE_KINDS, of_scans, of_strips
from PIL import Image

from mmrl.images import decode, upright
from mmrl.images.decode import decode_pixels
from mmrl.images.upright import SlowImage, check_scans, open_upright


def refused(data: bytes, why: str, *, by: Sequence[Callable[[bytes], object]] = (decode_pixels, open_upright)) -> None:
    began = time.process_time()
    for opened in by:
        with pytest.raises(SlowImage, match=f"^too slow a picture: .*{why}"):
            opened(data)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("with_simplejpeg", [True, False])
def test_a_jpeg_of_many_scans_is_refused(with_simplejpeg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_simplejpeg:
        monkeypatch.setattr(decode, "simplejpeg", None)
    refused(of_scans(3600), "more than 100 scans of 64x64 pixels")
    assert torch.equal(decode_pixels(of_scans(90)), decode_pixels(of_scans(0)))
    monkeypatch.setattr(upright, "MAX_SCAN_PIXELS", 64 * 64 * 20)
    refused(of_scans(20), "more than 20 scans of 64x64 pixels")
    decode_pixels(of_scans(14))
    refused(saved(noise(2000, 1000), "JPEG", progressive=True), "more than 1 scans")
    decode_pixels(saved(noise(2000, 1000), "JPEG"))  # the one scan that each has


def test_bytes_that_look_like_scans_are_none() -> None:
    """In metadata and after the image, where phones append films."""
    plain = saved(noise(64, 64), "JPEG")
    comment = b"\xff\xfe\xff\xf0" + b"\xff\xda" * 0x7FF7
    data = plain[:2] + comment + plain[2:] + b"\xff\xda" * 1000
    assert torch.equal(decode_pixels(data), decode_pixels(plain))
    # A marker without a segment, behind which libjpeg goes on, must not hide the scans.
    bomb = of_scans(200)
    first = bomb.index(b"\xff\xda")
    with pytest.raises(SlowImage, match="more than 100 scans"):
        check_scans(bomb[:first] + b"\xff\x01\xff\xff" + bomb[first:], 64, 64)


@pytest.mark.parametrize("kind", OF_PIECES)
def test_a_file_of_many_pieces_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = OF_PIECES[kind]
    with contextlib.suppress(ValueError):  # there is no image behind some of the pieces
        assert decode_pixels(make(40)).shape[0] == 3
    monkeypatch.setattr(upright, "MAX_PIECES", 1000)
    monkeypatch.setattr(upright.LimitedFile, "reads_left", 4000)
    # simplejpeg passes over segments without Python's help.
    refused(
        make(20_000), "more than 1,000", by=[open_upright] if kind.startswith("JPEG") else [decode_pixels, open_upright]
    )


@pytest.mark.parametrize("kind", OF_RARE_KINDS)
def test_kinds_that_are_decoded_in_python_are_smaller(kind: str) -> None:
    make: Callable[[int], bytes] = OF_RARE_KINDS[kind]
    refused(make(2001), r"a rare kind of \w+ with more than 4,000,000 pixels or bytes")
    assert decode_pixels(make(60)).shape == (3, 60, 60)


def test_ordinary_large_files_are_decoded() -> None:
    image = Image.new("RGB", (2000, 1500), (1, 2, 3))
    for kind, options in (("JPEG", {"progressive": True}), ("PNG", {}), ("TIFF", {}), ("BMP", {}), ("PPM", {})):
        assert decode_pixels(saved(image, kind, **options)).shape == (3, 1500, 2000)
    assert decode_pixels(of_strips(2)).shape == (3, 2, 2)
