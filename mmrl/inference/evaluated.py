"""An encoder that is evaluated: weights that torch computes, or ONNX graphs, opened by name as `mmrl.load` does.

Shapes: B pictures or texts of a batch, C channels, H and W the picture's size, L tokens of a text, D the embedding's
width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmrl.images.image_spec import ImageSpec
from mmrl.model import bundle
from mmrl.model.manifest import GRAPH_LAYOUTS, find, read_manifest

Tokenise = Callable[[list[str]], Tensor]
"""Texts -> int64 (B, L)."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation asks of an encoder."""

    model: nn.Module
    """Has encode_image and encode_text."""
    image_spec: ImageSpec
    tokenise: Tokenise
    dim: int
    nested_dims: tuple[int, ...]
    graphs: str = ""
    """Which ONNX graphs: fp32, fp16 or int8; empty where there are weights."""


class Graphs(nn.Module):
    """ONNX graphs in the form of a model."""

    def __init__(self, pixels: Callable[[Tensor], np.ndarray], tokens: Callable[[Tensor], np.ndarray]) -> None:
        """Args: what gives the vectors of uint8 (B, C, H, W) and of int64 (B, L): (B, D)."""
        super().__init__()
        self._pixels, self._tokens = pixels, tokens
        self._device = nn.Parameter(torch.empty(0), requires_grad=False)  # an evaluation asks where the weights are

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Pictures -> (B, D)."""
        return torch.from_numpy(self._pixels(image_BCHW.cpu()))

    def encode_text(self, text_BL: Tensor) -> Tensor:
        """Tokens -> (B, D)."""
        return torch.from_numpy(self._tokens(text_BL.cpu()))


def open_encoder(model: str) -> Evaluated:
    """The encoder that MODEL names: a run folder, a checkpoint, an export of any format, or open_clip:NAME.

    Raises:
        InputError: there is none, it is damaged, or what runs its graphs is not installed.
    """
    if not model.startswith("open_clip:"):
        folder = find(model)
        if read_manifest(folder)["layout"] in GRAPH_LAYOUTS:
            from mmrl.inference.onnx_encoder import open_onnx

            graphs = open_onnx(folder, dim=None, device=None, dtype=None, towers="both", variant=None)
            return Evaluated(
                Graphs(graphs.encode_pixels, graphs.encode_tokens),
                graphs.image_spec,
                graphs.tokenise,
                graphs.dim,
                graphs.nested_dims,
                graphs.variant,
            )
    opened = bundle.open_model(model)
    return Evaluated(opened.model, opened.image_spec, opened.tokenise, opened.dim, opened.nested_dims)
