"""`bundle`: mmrl's own format, for mmrl.load; see mmrl/model/bundle.py."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Format, Truncated
from mmrl.images.upright import upright
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.version import __version__


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> None:
    shutil.copytree(truncated.folder, folder, dirs_exist_ok=True)


def _reopen(folder: Path, variant: str | None) -> Reopened:
    opened = bundle.load(folder)

    @torch.inference_mode()
    def pixels(pixels_BCHW: torch.Tensor) -> np.ndarray:
        return opened.model.encode_image(pixels_BCHW).numpy()

    @torch.inference_mode()
    def tokens(tokens_BL: torch.Tensor) -> np.ndarray:
        return opened.model.encode_text(tokens_BL).numpy()

    def images(images: list[Image.Image]) -> np.ndarray:
        return pixels(torch.stack([opened.image_spec.pixels(upright(image)) for image in images]))

    def token_ids(texts: list[str]) -> list[list[int]]:
        return opened.tokenise(texts).tolist()

    def texts(texts: list[str]) -> np.ndarray:
        return tokens(opened.tokenise(texts))

    return Reopened(f"mmrl {__version__}", pixels, tokens, images, texts, token_ids)


def _check(full: Bundle) -> None:
    """A bundle can hold every encoder."""


FORMAT = Format(
    name="bundle",
    check=_check,
    write=_write,
    reopen=_reopen,
    tolerance=1e-6,
    usage="""```python
import mmrl

encoder = mmrl.load("FOLDER")
vectors = encoder.encode_texts(["a red shoe"])  # images: encoder.encode_images(["shoe.jpg"])
```
""",
    library="mmrl",
)
