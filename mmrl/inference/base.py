"""The interface of the encoder that `mmrl.load` returns, whether torch or onnxruntime computes the embeddings.

Shapes: N inputs, d embedding dim, C channels, H and W image size.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

    from mmrl.images.image_spec import ImageSpec

ImageInput = Image.Image | str | Path | bytes
"""A Pillow image, the path of an image file, or its bytes."""


class LoadedEncoder(ABC):
    """Encodes images and texts as unit vectors of `dim` dims."""

    dim: int
    towers: tuple[str, ...]
    """Those that are loaded: 'image', 'text' or both."""
    nested_dims: tuple[int, ...]
    """The trained dims up to `dim`, ascending. `dim` is one of them unless it was not trained."""

    @property
    @abstractmethod
    def image_spec(self) -> "ImageSpec":
        """How images are resized and normalised."""

    @abstractmethod
    def encode_images(self, images: Sequence[ImageInput], batch_size: int = 64) -> np.ndarray:
        """Pillow images, paths or file contents -> float32 unit vectors (N, d). Raises InputError: an image cannot be
        read (the message names it), or there is no image tower, or it was not loaded."""

    @abstractmethod
    def encode_pixels(self, pixels_NCHW: "torch.Tensor", batch_size: int = 64) -> np.ndarray:
        """uint8 pixels (N, C, H, W), resized by `image_spec.pixels` -> float32 unit vectors (N, d)."""

    @abstractmethod
    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Texts -> float32 unit vectors (N, d). Texts are truncated to the tower's context length. Raises InputError:
        `texts` is a single string, or there is no text tower, or it was not loaded."""
