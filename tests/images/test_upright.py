"""No image file may end a command: sound pixels are used, whatever the metadata, and all else raises ValueError."""

import contextlib
import io
import itertools
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.broken_images import BROKEN_METADATA, mutated, noise, png_chunk, saved
from PIL import Image

from mmrl.images.decode import decode, decode_pixels, image_extensions
from mmrl.images.image_spec import ImageSpec
from mmrl.images.upright import FORMATS, fit, format_of, open_upright, readable_formats, upright


def spec(side: int = 32, **fields: object) -> ImageSpec:
    return ImageSpec(height=side, width=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **fields)  # pyright: ignore[reportArgumentType]


def both_paths(data: bytes) -> np.ndarray:
    """The pixels (C, H, W), asserted to be the same with simplejpeg and with Pillow alone, as in encoder.py."""
    pixels_CHW = decode_pixels(data).numpy()
    np.testing.assert_array_equal(np.asarray(open_upright(data)).transpose(2, 0, 1), pixels_CHW)
    return pixels_CHW


def check_broken_metadata(count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        for make in BROKEN_METADATA:
            damaged, sound = make(rng)
            pixels_CHW, want = both_paths(damaged), Image.fromarray(both_paths(sound).transpose(1, 2, 0))
            # The damage may have become a valid orientation.
            allowed = [want, *(want.transpose(method) for method in Image.Transpose)]
            assert any(np.array_equal(pixels_CHW.transpose(1, 2, 0), np.asarray(one)) for one in allowed)


def check_damaged_files(count: int) -> None:
    rng = random.Random(count)
    writable = [kind for kind in readable_formats() if kind in Image.SAVE]
    whole = [saved(noise(channels=channels), kind) for kind in writable for channels in _channels(kind)]
    whole += [make(rng)[0] for make in BROKEN_METADATA]
    whole += [
        saved(noise(), kind, save_all=True, append_images=[noise(30, 20)]) for kind in ("GIF", "WEBP", "PNG", "TIFF")
    ]
    for _ in range(count):
        data = mutated(rng.choice(whole), rng)
        with contextlib.suppress(ValueError):
            assert decode_pixels(data).shape[0] in (3, 4)
        with contextlib.suppress(ValueError):
            assert open_upright(data).mode in ("RGB", "RGBA")


def _channels(kind: str) -> list[int]:
    return [3, 4] if kind in ("PNG", "WEBP", "TIFF", "AVIF", "ICO", "TGA") else [3] if kind not in ("XBM",) else []


def test_sound_pixels_with_broken_metadata_are_used() -> None:
    check_broken_metadata(60)


def test_damaged_files_raise_value_error_or_are_decoded() -> None:
    check_damaged_files(400)


@pytest.mark.slow
def test_twenty_thousand_broken_images() -> None:
    check_broken_metadata(2_000)
    check_damaged_files(10_000)


def test_a_cut_tiff_header_in_exif_is_no_orientation() -> None:
    sound = saved(noise(), "JPEG", dpi=(72, 72))
    payload = b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03"
    data = sound[:20] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + sound[20:]
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(data)).getexif()
    np.testing.assert_array_equal(both_paths(data), both_paths(sound))


def test_orientation_is_read_from_xmp_too() -> None:
    payload = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>'
    sound = saved(noise(), "JPEG")
    data = sound[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + sound[2:]
    np.testing.assert_array_equal(both_paths(data), np.rot90(both_paths(sound), -1, (1, 2)))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *itertools.product(["PNG", "TIFF", "JPEG2000"], ["<u2", ">u2"]),
        *itertools.product(["TIFF", "PPM"], ["<i4", "<f4"]),
    ],
)
def test_grey_of_16_bits_keeps_its_levels(kind: str, dtype: str) -> None:
    ramp_HW = np.linspace(0, 65_535, 256).round().astype(dtype)[None].repeat(4, 0)
    np.testing.assert_array_equal(np.asarray(upright(Image.fromarray(ramp_HW)))[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(both_paths(saved(Image.fromarray(ramp_HW), kind))[:, 0], [np.arange(256)] * 3)


def test_the_range_of_integers_and_floats_is_the_smallest_that_holds_them() -> None:
    for values, levels in (([0, 7, 255], [0, 7, 255]), ([0, 2**30, 2**31 - 1], [0, 128, 255])):
        assert np.asarray(upright(Image.fromarray(np.array([values], np.int32))))[0, :, 0].tolist() == levels
    for values, levels in (([0, 0.5, 1], [0, 128, 255]), ([0, 7, 255], [0, 7, 255])):
        tiff = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
        assert both_paths(tiff)[0, 0].tolist() == levels
    for values in ([0, -1], [0, np.nan], [0, np.inf], [0, 1e6]):
        with pytest.raises(ValueError, match=r"grey values from .* to .*, where 0 to 65,535 are allowed; convert"):
            decode(saved(Image.fromarray(np.array([values], np.float32)), "TIFF"))


def shape_on_nothing(mode: str) -> Image.Image:
    """A black square on transparent black."""
    alpha_HW = np.zeros((32, 32), np.uint8)
    alpha_HW[8:24, 8:24] = 255
    image = Image.new("L" if mode == "LA" else "RGB", (32, 32))
    image.putalpha(Image.fromarray(alpha_HW))
    if mode == "P":
        image = Image.fromarray(alpha_HW // 255).convert("P")
        image.putpalette(bytes(6))
        image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *itertools.product(["RGBA"], ["PNG", "WEBP", "GIF", "TIFF", "AVIF"]),
        *itertools.product(["LA"], ["PNG", "WEBP", "TIFF", "AVIF"]),
        *itertools.product(["P"], ["PNG", "GIF"]),
    ],
)
def test_transparent_images_are_composited_on_the_background(mode: str, kind: str) -> None:
    options: dict[str, object] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    data = saved(shape_on_nothing(mode), kind, **options)
    atol = 3 if kind == "AVIF" else 0
    for background in ((255, 255, 255), (10, 20, 30)):
        want_CHW = np.repeat(np.array(background).reshape(3, 1, 1), 32, 1).repeat(32, 2)
        want_CHW[:, 8:24, 8:24] = 0
        assert np.abs(spec(background=background).pixels(decode_pixels(data)).numpy() - want_CHW).max() <= atol
    # Specs of manifests without a background, and other tools, show what alpha hides.
    assert spec(background=None).pixels(decode_pixels(data)).max() <= atol
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 255, 255]


def test_half_transparent_pixels_are_mixed_and_opaque_ones_have_no_alpha() -> None:
    half = Image.new("RGBA", (4, 4), (0, 100, 200, 128))
    assert spec(4).pixels(decode_pixels(saved(half, "PNG")))[:, 0, 0].tolist() == [127, 177, 227]
    assert decode_pixels(saved(noise().convert("RGBA"), "PNG")).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "key", "alpha"),
    [
        (16, 0, struct.pack(">HHH", 0, 256, 65535), struct.pack(">H", 256), [255, 0, 255]),
        (16, 2, struct.pack(">6H", 256, 0, 0, 65535, 65535, 65535), struct.pack(">HHH", 256, 0, 0), [0, 255]),
        (8, 0, bytes([0, 1, 2]), struct.pack(">H", 1), [255, 0, 255]),
        (4, 0, bytes([0x5F]), struct.pack(">H", 5), [0, 255]),
        (2, 0, bytes([0b00011011]), struct.pack(">H", 1), [255, 0, 255, 255]),
        (1, 0, bytes([0b01000000]), struct.pack(">H", 1), [255, 0, *[255] * 6]),
    ],
)
def test_a_colour_declared_transparent_is_so_at_every_depth(
    depth: int, colour_type: int, row: bytes, key: bytes, alpha: list[int]
) -> None:
    head = struct.pack(">IIBBBBB", len(alpha), 1, depth, colour_type, 0, 0, 0)
    chunks = png_chunk(b"IHDR", head) + png_chunk(b"tRNS", key) + png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    assert both_paths(b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b""))[3, 0].tolist() == alpha


@pytest.mark.parametrize("size", [(700, 40), (40, 701), (9, 400), (1, 300)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_thin_images_are_resized_as_others_are(size: tuple[int, int], mode: str) -> None:
    image = Image.fromarray(np.linspace(0, 255, size[0] * size[1] * 3).reshape(*size[::-1], 3).astype(np.uint8))
    fields = {**vars(spec(30, resize_mode=mode))}
    got = np.asarray(fit(image, fields), np.int16)
    scale = {"shortest": max, "longest": min}.get(mode, max)(30 / size[0], 30 / size[1])
    resized = image.resize((30, 30), Image.Resampling.BICUBIC)
    if mode != "squash":
        width, height = (
            max(1 if mode == "longest" else 30, (int if mode == "shortest" else round)(n * scale)) for n in size
        )
        whole = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 30) / 2), round((height - 30) / 2)
        resized = whole.crop((left, top, left + 30, top + 30))
        if mode == "longest":
            resized = Image.new("RGB", (30, 30))
            resized.paste(whole, ((30 - width) // 2, (30 - height) // 2))
    assert np.abs(got - np.asarray(resized, np.int16)).max() <= 1
    np.testing.assert_array_equal(spec(30, resize_mode=mode).pixels(image).permute(1, 2, 0), got)


def peak_memory(call: Callable[[], object]) -> int:
    """The bytes by which this process grew at most."""
    Path("/proc/self/clear_refs").write_text("5")

    def of(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    before = of("VmRSS")
    call()
    return of("VmHWM") - before


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 100_000), (3, 65_000), (1, 1_000_000), (9, 8_000)])
def test_memory_of_thin_images_is_bounded(size: tuple[int, int], mode: str) -> None:
    one, data = spec(224, resize_mode=mode), saved(Image.new("L", size), "PNG")
    one.pixels(noise())  # allocates what every image needs
    pixels, longest = size[0] * size[1], max(size)
    assert peak_memory(lambda: one.pixels(decode_pixels(data))) < 20 * pixels + 64 * longest + 24e6


@pytest.mark.parametrize("side", [9_000, 14_000])
def test_an_image_inside_an_icon_is_not_larger_than_allowed(side: int) -> None:
    large = saved(Image.new("1", (side, side)), "PNG")
    head = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(large), 22)
    for data in (large, head + large):
        with pytest.raises(ValueError, match="too large a picture: "):
            decode(data)


def test_too_long_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"too large a picture: 1000001x1 pixels"):
        decode(saved(Image.new("1", (1_000_001, 1)), "PNG"))


@pytest.mark.parametrize("kind", [kind for kind in readable_formats() if kind in Image.SAVE])
def test_every_format_is_recognised_and_decoded(kind: str) -> None:
    data = saved(noise(64, 64).convert("1" if kind == "XBM" else "RGB"), kind)
    assert decode_pixels(data).shape == ((3, 1024, 1024) if kind == "ICNS" else (3, 64, 64))
    if kind != "TGA":  # has no signature
        assert format_of(data) == kind
        assert format_of(data[:4]) in (kind, "")


def test_endings_of_images_come_from_the_library() -> None:
    known = image_extensions()
    assert known[:4] == ("jpg", "jpeg", "png", "webp")
    assert {"jfif", "jpe", "avif", "tif", "bmp", "jp2", "mpo", "heic", "svg", "eps", "tga"} < set(known)
    assert not {"txt", "json", "pdf", "mpg", "h5", "npy", "cls"} & set(known)
    readable = {one[1:] for one, kind in Image.registered_extensions().items() if kind in readable_formats()}
    assert readable <= set(known)
    assert "EPS" not in FORMATS


def test_a_plugin_adds_its_format(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"....ftypheic" + saved(noise(), "PNG")
    with pytest.raises(ValueError, match="no picture in a known format"):
        decode(data)

    def opened(file: io.BytesIO, _: str) -> Image.Image:
        return Image.open(io.BytesIO(file.getvalue()[12:]))

    Image.init()
    monkeypatch.setitem(Image.OPEN, "HEIF", (opened, lambda start: start[4:12] == b"ftypheic"))
    readable_formats.cache_clear()
    try:
        np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(noise()))
        assert format_of(data) == "HEIF"
    finally:
        readable_formats.cache_clear()


def test_heic_photos_of_phones_are_read() -> None:
    pytest.importorskip("pillow_heif")
    image, exif = noise(96, 64).resize((12, 8)).resize((96, 64), Image.Resampling.NEAREST), Image.Exif()
    exif[0x0112] = 6  # ignored in HEIF, whose container has the rotation, applied by the plugin
    file = io.BytesIO()
    image.save(file, "HEIF", quality=100, exif=exif)
    assert format_of(file.getvalue()) == "HEIF"
    found = np.asarray(decode(file.getvalue())).astype(int)
    assert np.abs(found - np.asarray(image)).mean() < 12


def test_a_crop_of_a_transparent_image_is_composited() -> None:
    from mmrl.data.transforms import Augmentation, AugmentConfig

    augmentation = Augmentation(AugmentConfig(random_resized_crop=[0.9, 1.0]), spec(background=(1, 2, 3)))
    params_P = augmentation.random_params(0, 0, np.array([0]))[0]
    image_CHW = torch.zeros(4, 40, 40, dtype=torch.uint8)
    assert augmentation.crop_and_resize(image_CHW, params_P)[:, 5, 5].tolist() == [1, 2, 3]
