"""A stored encoder in use: `mmrl.load` and what it returns. Neither torch nor training code is imported here, so that
an encoder of ONNX graphs is ready in a fraction of a second.

Shapes: N inputs, d the encoder's dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from mmrl.errors import InputError
from mmrl.model.manifest import GRAPH_LAYOUTS, find, read_manifest

if TYPE_CHECKING:
    import torch

    from mmrl.image_spec import ImageSpec

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


def load(
    path: str | Path,
    dim: int | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    towers: Literal["both", "image", "text"] = "both",
    variant: str | None = None,
) -> LoadedEncoder:
    """Opens an encoder for use, offline.

    Args:
        path: a run folder (its best checkpoint, else its last), a checkpoint, an exported folder of any format, or
            `open_clip:NAME[:PRETRAINED]`.
        dim: length of the vectors, at most the stored encoder's own, which is the default. Best one of the trained
            dims (`nested_dims`).
        device: 'cuda' or 'cpu'; a GPU is used where there is one (by ONNX graphs only where 'cuda' is named).
        dtype: torch.bfloat16 or torch.float16 to compute in; float32 when left out. Vectors are float32 in any case.
        towers: 'image' or 'text' loads one tower alone, as online serving wants it.
        variant: which ONNX graphs: 'fp32', 'fp16' or 'int8'; the manifest's default when left out.

    Raises:
        InputError: no encoder at `path`, a damaged one, a dim or a variant that it does not have.
    """
    if towers not in ("both", "image", "text"):
        raise InputError(f"towers: {towers!r}; want 'both', 'image' or 'text'.")
    if not str(path).startswith("open_clip:"):
        folder = find(path)
        if read_manifest(folder)["layout"] in GRAPH_LAYOUTS:
            from mmrl.export.onnx_encoder import open_onnx

            return open_onnx(folder, dim, device, dtype, towers, variant)
    if variant is not None:
        raise InputError(f"variant: {path} has weights, no ONNX graphs; leave variant out, or give dtype.")
    from mmrl.export.torch_encoder import open_torch

    return open_torch(path, dim, device, dtype, ["image", "text"] if towers == "both" else [towers])


def check_list(texts: Sequence[str]) -> None:
    """Raises InputError where a bare string stands for a list of texts."""
    if isinstance(texts, str):
        raise InputError(f"encode_texts: want a list of texts, got the single text {texts[:40]!r}; wrap it in [ ].")


def not_loaded(side: str) -> InputError:
    """What a tower that was left out answers."""
    return InputError(f"encode_{side}s: this tower was not loaded; load with towers='both' or {side!r}.")
