"""`bundle`: our own folder, for mmrl.load; see mmrl/model/bundle.py."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Cut, Format
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.version import __version__


def _write(cut: Cut, folder: Path, variants: Sequence[str]) -> None:
    shutil.copytree(cut.folder, folder, dirs_exist_ok=True)


def _reopen(folder: Path, variant: str | None) -> Reopened:
    one = bundle.load(folder)

    @torch.inference_mode()
    def pixels(pixels_BCHW: torch.Tensor) -> np.ndarray:
        return one.model.encode_image(pixels_BCHW).numpy()

    @torch.inference_mode()
    def tokens(tokens_BL: torch.Tensor) -> np.ndarray:
        return one.model.encode_text(tokens_BL).numpy()

    def images(pictures: list[Image.Image]) -> np.ndarray:
        return pixels(torch.stack([one.image_spec.pixels(picture) for picture in pictures]))

    return Reopened(f"mmrl {__version__}", pixels, tokens, images, lambda texts: tokens(one.tokenise(texts)))


def _check(whole: Bundle) -> None:
    """Every encoder has its place in a bundle."""


FORMAT = Format(
    name="bundle",
    check=_check,
    write=_write,
    reopen=_reopen,
    allowed=1e-6,
    usage="""```python
import mmrl

encoder = mmrl.load("FOLDER")
vectors = encoder.encode_texts(["a red shoe"])  # encode_images(["shoe.jpg"]) likewise
```
""",
    library="mmrl",
)
