"""`mmrl.load`: opens a stored encoder for use. Neither torch nor training code is imported here, so that an encoder of
ONNX graphs is ready in a fraction of a second."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmrl.errors import InputError
from mmrl.inference.base import LoadedEncoder
from mmrl.model.manifest import GRAPH_LAYOUTS, find, read_manifest

if TYPE_CHECKING:
    import torch


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
            from mmrl.inference.onnx_encoder import open_onnx

            return open_onnx(folder, dim, device, dtype, towers, variant)
    if variant is not None:
        raise InputError(f"variant: {path} has weights, no ONNX graphs; leave variant out, or give dtype.")
    from mmrl.inference.torch_encoder import open_torch

    return open_torch(path, dim, device, dtype, ["image", "text"] if towers == "both" else [towers])
