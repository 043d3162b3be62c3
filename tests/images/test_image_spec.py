import contextlib
import io
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawing, encoded
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from mmrl.images.decode import decode
from mmrl.images.image_spec import ImageSpec, Normaliser

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def photo(width: int, height: int) -> Image.Image:
    """A smooth image with some noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / (17 + 9 * c) + y / (23 + 5 * c)) for c in range(3)]
    noise = np.random.default_rng(0).normal(0, 6, (height, width, 3))
    return Image.fromarray((np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


# Without shortest + bilinear + non-square, which open_clip resizes with bicubic in spite of its config.
@pytest.mark.parametrize(
    ("resize_mode", "interpolation", "target"),
    [
        *itertools.product(["longest", "squash"], ["bicubic", "bilinear"], [64, (48, 80)]),
        ("shortest", "bicubic", 64), ("shortest", "bilinear", 64), ("shortest", "bicubic", (48, 80)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(500, 401), (333, 500), (64, 64), (40, 90)])
def test_preprocessing_equals_open_clips_within_rounding(
    resize_mode: str, interpolation: str, size: tuple[int, int], target: int | tuple[int, int]
) -> None:
    cfg = PreprocessCfg(target, "RGB", MEAN, STD, interpolation, resize_mode, fill_color=0)
    spec = ImageSpec.from_open_clip(cfg.__dict__)
    transform: Any = image_transform_v2(cfg, is_train=False)
    theirs_CHW = transform(photo(*size))
    ours_CHW = spec.normalise(spec.pixels(photo(*size))[None])[0]
    levels_CHW = (ours_CHW - theirs_CHW).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels_CHW.max() < 2.5
    assert levels_CHW.mean() < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpus_single_kernel_rounds_the_normalised_pixels_once(dtype: torch.dtype) -> None:
    spec = ImageSpec(height=4, width=64, mean=MEAN, std=STD)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 64).expand(1, 3, 4, 64)
    expected = (levels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    normaliser = Normaliser(spec)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        here = normaliser(levels)
    for pixels in (here, normaliser.in_one_kernel(levels, dtype), spec.normalise(levels).to(dtype)):
        assert pixels.dtype == dtype
        torch.testing.assert_close(pixels.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert not normaliser.state_dict(), "checkpoints do not contain the constants"


def test_a_spec_is_equal_after_json() -> None:
    for background in ((1, 2, 3), None):
        spec = ImageSpec(height=32, width=48, mean=MEAN, std=STD, resize_mode="longest", background=background)
        assert ImageSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_of_an_earlier_version_has_no_background() -> None:
    values = ImageSpec(height=32, width=32, mean=MEAN, std=STD).to_json()
    assert values.pop("background") == [255, 255, 255]
    assert ImageSpec.from_json(values).background is None


def test_decode_gives_upright_rgb_images() -> None:
    image, _, _ = drawing(2)
    rotated, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # upright after a clockwise rotation by 90 degrees
    image.rotate(90).save(rotated, "PNG", exif=exif)
    assert np.array_equal(np.array(decode(rotated.getvalue())), np.array(image))
    for mode in ("L", "P", "RGBA", "LA", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert decode(encoded(image.convert("L").convert(mode), kind)).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_damaged_file_raises_value_error_or_is_decoded(kind: str) -> None:
    whole = encoded(drawing(1)[0], kind)
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for offset in rng.integers(0, len(data), 3):
            data[offset] = rng.integers(0, 256)
        with contextlib.suppress(ValueError):
            assert decode(bytes(data)).mode == "RGB"


def test_other_files_and_too_large_images_raise_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(drawing(1)[0])
    for data in (b"", b"<html>", good[:60], good[: len(good) // 2]):
        with pytest.raises(ValueError, match=r".+"):
            decode(data)
    with pytest.raises(ValueError, match="no picture in a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    monkeypatch.setattr("mmrl.images.upright.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="32x32 pixels, more than the 1,000"):
        decode(good)
