"""What `mmrl.load` returns, whatever computes the vectors: the calls, their shapes and errors.

Shapes: N inputs, d the encoder's dim, C channels, H and W the image's size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mmrl.errors import InputError

if TYPE_CHECKING:
    import torch

    from mmrl.images.image_spec import ImageSpec

Picture = Image.Image | str | Path | bytes


class LoadedEncoder(ABC):
    """Pictures and texts -> unit vectors of one dim."""

    dim: int
    nested_dims: tuple[int, ...]
    """Prefixes that were trained, ascending."""

    @property
    @abstractmethod
    def image_spec(self) -> "ImageSpec":
        """How pictures are fitted and normalised."""

    @abstractmethod
    def encode_images(self, images: Sequence[Picture], batch_size: int = 64) -> np.ndarray:
        """Pillow pictures, paths or file contents -> float32 (N, d), rows of length 1.

        Raises:
            InputError: a picture that cannot be read, named; the image tower was not loaded.
        """

    @abstractmethod
    def encode_pixels(self, pixels_NCHW: "torch.Tensor", batch_size: int = 64) -> np.ndarray:
        """uint8 (N, C, H, W), fitted by `image_spec.pixels` -> float32 (N, d), rows of length 1."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Texts -> float32 (N, d), rows of length 1. Longer texts than the tower takes are cut.

        Raises:
            InputError: one text given as a bare string; the text tower was not loaded.
        """


def check_list(texts: Sequence[str]) -> None:
    """Raises InputError where a bare string stands for a list of texts."""
    if isinstance(texts, str):
        raise InputError(f"encode_texts: want a list of texts, got the single text {texts[:40]!r}; wrap it in [ ].")


def not_loaded(side: str) -> InputError:
    """What a tower that was left out answers."""
    return InputError(f"encode_{side}s: this tower was not loaded; load with towers='both' or {side!r}.")
