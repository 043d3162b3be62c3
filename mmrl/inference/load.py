"""`mmrl.load`: opens a stored encoder for inference. This module imports neither torch nor training code, so an encoder
of ONNX graphs opens in a fraction of a second."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmrl.errors import InputError
from mmrl.inference.base import LoadedEncoder
from mmrl.model.manifest import GRAPH_LAYOUTS, read_manifest
from mmrl.model.source import StoredModel, parse_model

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
    """Opens an encoder for inference, offline.

    Args:
        path: MODEL: a run folder (its best checkpoint, else its last), a checkpoint, an exported folder of any format,
            `open_clip:NAME:TAG`, a folder of transformers, …; mmrl/model/README.md lists the forms.
        dim: embedding dim, 1 to the stored encoder's dim (default: that dim). Recall was optimised at the encoder's
            `nested_dims` only.
        device: 'cuda' or 'cpu'. Default: a GPU if available; ONNX graphs run on the CPU unless 'cuda' is given.
        dtype: compute dtype, torch.bfloat16 or torch.float16 (default: float32). Embeddings are always float32.
        towers: 'image' or 'text' loads only that tower, e.g. to encode queries online; 'both' loads all that there are.
        variant: variant of ONNX graphs, 'fp32', 'fp16' or 'int8' (default: as in the manifest).

    Raises:
        InputError: `path` holds no encoder or a damaged one, or the encoder lacks this tower, dim or variant.
    """
    if towers not in ("both", "image", "text"):
        raise InputError(f"towers: {towers!r}; want 'both', 'image' or 'text'.")
    source = parse_model(path)
    if isinstance(source, StoredModel) and read_manifest(source.folder)["layout"] in GRAPH_LAYOUTS:
        from mmrl.inference.onnx_encoder import open_onnx

        return open_onnx(source.folder, dim, device, dtype, towers, variant)
    if variant is not None:
        raise InputError(f"variant: {path} has weights, no ONNX graphs; omit variant or use dtype.")
    from mmrl.inference.torch_encoder import open_torch

    return open_torch(source, dim, device, dtype, towers)
