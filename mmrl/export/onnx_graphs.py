"""A tower -> an ONNX graph with unit vectors at its end, and its smaller variants.

Traps that this file steps around, each reproduced: an example batch of one is baked into the graph; a graph that
computes in float16 ends the process of a default onnxruntime session on a CPU (so half precision is only how weights
are stored); integer convolutions are slower than float ones.

Shapes: B pictures, C channels, H and W their size, M texts, L tokens, W the text tower's width, D the embedding's.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmrl.errors import InputError
from mmrl.images.image_spec import ImageSpec
from mmrl.model.bundle import Bundle
from mmrl.model.two_tower import Encoder

WEIGHTS = ".data"
"""What follows a graph's name in that of the file of its weights, where they lie beside it: onnxruntime then opens it
in a fraction of the time, since it parses no weights, and protobuf's limit of 2 GB is none."""
# Of a graph that holds its weights itself.
_MOST_BYTES = 1_900_000_000
_LARGEST_BATCH = 4096
# Smaller tensors stay float32: they are biases and scales, and weigh nothing.
_LEAST_HALVED = 1024


class ImageGraph(nn.Module):
    """uint8 (B, C, H, W) -> unit (B, D); or, with `raw` false, from pixels that were normalised before."""

    def __init__(self, encoder: Encoder, spec: ImageSpec, raw: bool = True) -> None:
        super().__init__()
        self.encoder = Encoder(encoder.tower, encoder.projection)
        self._normalise = spec.normalise if raw else None

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        x = pixels_BCHW if self._normalise is None else self._normalise(pixels_BCHW)
        return F.normalize(self.encoder(x), dim=-1)


class TextGraph(nn.Module):
    """int64 (M, L) -> unit (M, D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens_ML: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.encoder(tokens_ML), dim=-1)


class AnyLength(nn.Module):
    """open_clip's text tower without its demand for texts of full length.

    Under a causal mask what stands after a text's end cannot reach the token that the embedding is read from, so a
    text may be cut behind it without any difference.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.tower: Any = encoder.tower
        self.projection = encoder.projection

    @staticmethod
    def fits(encoder: Encoder) -> bool:
        """Whether the tower reads one token of its own, from left to right."""
        tower: Any = encoder.tower
        return (
            isinstance(getattr(tower, "attn_mask", None), torch.Tensor)
            and getattr(tower, "pool_type", None) in ("argmax", "eos")
            and tower.cls_emb is None
            and not tower.use_pad_mask
        )

    def forward(self, tokens_ML: torch.Tensor) -> torch.Tensor:
        tower, length = self.tower, tokens_ML.shape[1]
        x_MLW = tower.token_embedding(tokens_ML) + tower.positional_embedding[:length]
        x_MLW = tower.transformer(x_MLW, attn_mask=tower.attn_mask[:length, :length])
        x_MLW = tower.ln_final(x_MLW)
        read_ML = tokens_ML if tower.pool_type == "argmax" else (tokens_ML == tower.eos_id).int()
        # Not len(), which would bake the example's batch into the graph.
        x = x_MLW[torch.arange(tokens_ML.shape[0]), read_ML.argmax(-1)]
        if isinstance(tower.text_projection, nn.Linear):
            x = tower.text_projection(x)
        elif tower.text_projection is not None:
            x = x @ tower.text_projection
        return x if self.projection is None else self.projection(x)


def write_image(
    encoder: Encoder, spec: ImageSpec, path: Path, *, raw: bool, names: tuple[str, str], beside: bool
) -> None:
    """Writes the image tower's graph; `names` are those of its input and output.

    Args:
        beside: the weights go into a file of their own, here and in what follows.
    """
    graph = ImageGraph(encoder, spec, raw).eval()
    example = torch.zeros(3, 3, spec.height, spec.width, dtype=torch.uint8 if raw else torch.float32)
    _export(graph, example, {0: _batch()}, path, names, beside)


def write_text(encoder: Encoder, context_length: int, path: Path, *, names: tuple[str, str], beside: bool) -> bool:
    """Writes the text tower's graph; returns whether it takes texts of any length."""
    any_length = AnyLength.fits(encoder)
    graph = TextGraph(AnyLength(encoder) if any_length else encoder).eval()
    example = torch.ones(3, context_length, dtype=torch.int64)
    dynamic = {0: _batch()}
    if any_length:
        dynamic[1] = torch.export.Dim("length", min=2, max=context_length)
    _export(graph, example, dynamic, path, names, beside)
    return any_length


def check_size(whole: Bundle, format: str) -> None:
    """Raises:
    InputError: a tower is too large for a graph that holds its weights.
    """
    for encoder in (whole.model.image, whole.model.text):
        size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.state_dict().values())
        if size > _MOST_BYTES:
            raise InputError(
                f"format: {format} wants a tower in one file, which protobuf ends at 2 GB, and this one has "
                f"{size / 1e9:.1f} GB; use onnx, which keeps weights beside the graph."
            )


def _batch() -> Any:
    return torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)


def _export(
    graph: nn.Module, example: torch.Tensor, dynamic: dict[int, Any], path: Path, names: tuple[str, str], beside: bool
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            graph,
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=(dynamic,),
            input_names=[names[0]],
            output_names=[names[1]],
            external_data=beside,
            verbose=False,
        )
    assert Path(f"{path}{WEIGHTS}").is_file() == beside  # the name is the exporter's


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports each step, and warns of deprecations within itself."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def store_halved(source: Path, target: Path, *, beside: bool) -> None:
    """The same graph with its weights stored as float16, each widened by a Cast at the start: half the file, computed
    in float32 as before."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < _LEAST_HALVED:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        limit = np.finfo(np.float16).max
        half = numpy_helper.from_array(np.clip(values, -limit, limit).astype(np.float16), f"{name}.half")
        tensor.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], f"{name}.widened", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, target, save_as_external_data=beside, location=f"{target.name}{WEIGHTS}")


def store_int8(source: Path, target: Path, *, beside: bool, embeddings: bool) -> None:
    """Matrix products in 8 bits: weights by channel, activations by the range that each run finds.

    Args:
        embeddings: the token table too.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(source, load_external_data=False).graph.node
    # The last product is small, and its error goes straight into the vector: it stays float32. (A Gemm is renamed.)
    last = next(node.name for node in reversed(nodes) if node.op_type in ("MatMul", "Gemm"))
    kinds = ["MatMul", "Gemm", *(["Gather"] if embeddings else [])]
    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=kinds,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=beside,
            nodes_to_exclude=[last, f"{last}_MatMul"],
        )
    assert Path(f"{target}{WEIGHTS}").is_file() == beside  # the name is the quantiser's
