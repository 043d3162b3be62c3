"""`mmrl.load` for graphs of ONNX and OpenVINO. Encoding images and texts does not import torch.

Shapes: N inputs, L tokens per text, d embedding dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrl.errors import InputError
from mmrl.inference.base import ImageInput, LoadedEncoder
from mmrl.inference.extras import require_packages
from mmrl.model.manifest import read_manifest

if TYPE_CHECKING:
    import torch

    from mmrl.images.image_spec import ImageSpec
    from mmrl.inference.standalone import Encoder


class OnnxEncoder(LoadedEncoder):
    """A `LoadedEncoder` that runs on onnxruntime or OpenVINO."""

    def __init__(self, encoder: "Encoder") -> None:
        self._encoder = encoder
        self.dim = encoder.dim
        self.variant = encoder.variant
        self.nested_dims = tuple(d for d in encoder.manifest["nested_dims"] if d <= encoder.dim)

    @property
    def image_spec(self) -> "ImageSpec":
        from mmrl.images.image_spec import ImageSpec

        return ImageSpec.from_json(self._encoder.manifest["image"])

    def encode_images(self, images: Sequence[ImageInput], batch_size: int = 64) -> np.ndarray:
        return self._run(self._encoder.encode_images, images, batch_size)

    def encode_pixels(self, pixels_NCHW: "torch.Tensor", batch_size: int = 64) -> np.ndarray:
        return self._run(self._encoder.encode_pixels, np.ascontiguousarray(pixels_NCHW), batch_size)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        return self._run(self._encoder.encode_texts, texts, batch_size)

    def encode_tokens(self, tokens_NL: "torch.Tensor", batch_size: int = 64) -> np.ndarray:
        """int64 token ids (N, L) from `tokenise` -> float32 unit vectors (N, d)."""
        return self._run(self._encoder.encode_tokens, np.ascontiguousarray(tokens_NL), batch_size)

    def tokenise(self, texts: list[str]) -> "torch.Tensor":
        """Texts -> int64 token ids (N, L)."""
        import torch

        return torch.from_numpy(self._encoder.tokenise(texts))

    def _run(self, encode: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
        with _input_errors():
            return encode(*arguments)


def open_onnx(
    folder: Path,
    dim: int | None,
    device: "str | torch.device | None",
    dtype: "torch.dtype | None",
    towers: str,
    variant: str | None,
) -> OnnxEncoder:
    """Opens a folder of graphs; see `mmrl.load` for the arguments.

    Raises:
        InputError: as `mmrl.load`, or the runtime is not installed.
    """
    if dtype is not None:
        raise InputError("dtype: graphs compute in the precision of their export; choose a variant instead of dtype.")
    require_packages("openvino" if read_manifest(folder)["layout"] == "openvino" else "onnxruntime")
    from mmrl.inference.standalone import Encoder

    with _input_errors():
        return OnnxEncoder(Encoder(folder, dim, towers, variant, device=str(device or "cpu")))


@contextmanager
def _input_errors() -> Iterator[None]:
    """Re-raises a ValueError of `standalone`, which does not import mmrl, as InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None
