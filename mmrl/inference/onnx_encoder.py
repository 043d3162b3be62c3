"""`mmrl.load` for graphs of ONNX and OpenVINO. Encoding images and texts does not import torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmrl.errors import InputError
from mmrl.inference.base import LoadedEncoder
from mmrl.inference.extras import require_packages
from mmrl.inference.standalone import Encoder
from mmrl.model.manifest import read_manifest

if TYPE_CHECKING:
    import torch

    from mmrl.images.image_spec import ImageSpec


class OnnxEncoder(Encoder, LoadedEncoder):
    """A `LoadedEncoder` that runs on onnxruntime or OpenVINO."""

    @property
    def image_spec(self) -> "ImageSpec":
        from mmrl.images.image_spec import ImageSpec

        return ImageSpec.from_json(self.manifest["image"])


def open_onnx(
    folder: Path,
    dim: int | None = None,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    towers: str = "both",
    variant: str | None = None,
) -> OnnxEncoder:
    """Opens a folder of graphs; see `mmrl.load` for the arguments. Raises InputError: as `mmrl.load`, or the runtime is
    not installed."""
    if dtype is not None:
        raise InputError("dtype: graphs compute in the precision of their export; choose a variant instead of dtype.")
    require_packages("openvino" if read_manifest(folder)["layout"] == "openvino" else "onnxruntime")
    return OnnxEncoder(folder, dim, towers, variant, device=str(device or "cpu"))
