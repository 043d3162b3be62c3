"""The encoder that `mmrl eval` evaluates: torch weights, or ONNX graphs wrapped as a torch module.

Shapes: B batch size, C channels, H and W image size, L tokens per text, D embedding dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmrl.errors import InputError
from mmrl.images.image_spec import ImageSpec
from mmrl.model import bundle
from mmrl.model.manifest import GRAPH_LAYOUTS, read_manifest
from mmrl.model.source import StoredModel, parse_model
from mmrl.model.towers import SIDES, Modality
from mmrl.model.two_tower import MatryoshkaCLIP

Tokenise = Callable[[list[str]], Tensor]
"""Texts -> int64 token ids (B, L)."""


@dataclass(frozen=True)
class EvaluatedEncoder:
    """A model with its preprocessing, tokenizer and dims."""

    model: "MatryoshkaCLIP | OnnxModel"
    image_spec: ImageSpec
    tokenise: Tokenise
    dim: int
    nested_dims: tuple[int, ...]
    graphs: str = ""
    """The variant of ONNX graphs: fp32, fp16 or int8. Empty for torch weights."""


class OnnxModel(nn.Module):
    """ONNX graphs with the interface of a torch model: encode_image and encode_text."""

    def __init__(
        self,
        pixels: Callable[[Tensor], np.ndarray],
        tokens: Callable[[Tensor], np.ndarray],
        sides: tuple[Modality, ...] = SIDES,
    ) -> None:
        """Args: functions that encode uint8 pixels (B, C, H, W) and int64 token ids (B, L) as (B, D); which of them
        there are."""
        super().__init__()
        self.sides = sides
        self._pixels, self._tokens = pixels, tokens
        self._device = nn.Parameter(torch.empty(0), requires_grad=False)  # evaluation reads the device of a parameter

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Pixels -> (B, D)."""
        return torch.from_numpy(self._pixels(image_BCHW.cpu()))

    def encode_text(self, text_BL: Tensor) -> Tensor:
        """Token ids -> (B, D)."""
        return torch.from_numpy(self._tokens(text_BL.cpu()))


def sides_of(model: str) -> tuple[Modality, ...]:
    """The towers of MODEL, without opening it; raises InputError as `open_encoder`."""
    source = parse_model(model)
    return tuple(read_manifest(source.folder)["towers"]) if isinstance(source, StoredModel) else SIDES


def require_both_towers(model: str, purpose: str) -> None:
    """Raises InputError if MODEL lacks a tower, which `purpose` needs, or as `sides_of`."""
    if len(sides := sides_of(model)) < 2:
        absent = "text" if "image" in sides else "image"
        raise InputError(f"{purpose}: needs both towers, and {model} has no {absent} tower; give another model.")


def open_encoder(model: str) -> EvaluatedEncoder:
    """Opens MODEL for evaluation. Raises InputError: there is no such encoder, it is damaged, or the library that runs
    its graphs is not installed."""
    source = parse_model(model)
    if isinstance(source, StoredModel) and read_manifest(source.folder)["layout"] in GRAPH_LAYOUTS:
        from mmrl.inference.onnx_encoder import open_onnx

        onnx = open_onnx(source.folder)
        graphs = OnnxModel(onnx.encode_pixels, onnx.encode_tokens, sides_of(model))

        def tokenise(texts: list[str]) -> Tensor:
            return torch.from_numpy(onnx.tokenise(texts))

        return EvaluatedEncoder(graphs, onnx.image_spec, tokenise, onnx.dim, onnx.nested_dims, onnx.variant)
    opened = bundle.open_model(source)
    return EvaluatedEncoder(opened.model, opened.image_spec, opened.tokenise, opened.dim, opened.nested_dims)
