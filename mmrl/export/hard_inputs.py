"""Texts and images that tools tokenise and resize differently; every export is checked on them."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

_MOJIBAKE = 4


def texts() -> list[str]:
    """200 texts: typographic quotes, HTML entities, all scripts, emoji, control characters, long ones and others. The
    last four are mojibake."""
    listed: list[str] = json.loads(Path(__file__).with_name("hard_texts.json").read_text(encoding="utf-8"))
    long = ["word " * 300, " ".join(f"word{i}" for i in range(300)), "a" * 2000, "犬" * 300, "!" * 300]
    return [*listed[:-_MOJIBAKE], *long, "0123456789" * 30, *listed[-_MOJIBAKE:]]


def images(height: int, width: int) -> dict[str, Image.Image]:
    """Ten images of a smooth random pattern, by kind; sizes are relative to those of a tower, in pixels."""

    def image(scale_h: float, scale_w: float, channels: int = 3) -> Image.Image:
        size = max(1, round(width * scale_w)), max(1, round(height * scale_h))
        coarse = np.random.default_rng(0).integers(0, 256, (9, 9, channels), np.uint8)
        resized = [Image.fromarray(coarse[..., i]).resize(size, Image.Resampling.BICUBIC) for i in range(channels)]
        return Image.merge({1: "L", 3: "RGB", 4: "RGBA"}[channels], resized)

    rotated, grey = image(1.5, 2.5), image(2.2, 1.7, channels=1)
    exif = rotated.getexif()
    exif[0x0112] = 6
    jpeg = io.BytesIO()
    rotated.save(jpeg, "JPEG", quality=90, exif=exif)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "landscape": image(2.4, 3.5),
        "portrait": image(3.55, 1.9),
        "enlarged": image(0.4, 0.55),
        "panorama": image(1.3, 7.1),
        "grey": grey,
        "palette": image(2.6, 2.3).quantize(64),
        "CMYK": image(1.9, 2.1).convert("CMYK"),
        "16-bit": deep,
        "transparent": image(2.1, 2.7, channels=4),
        "rotated by EXIF": Image.open(jpeg),
    }
