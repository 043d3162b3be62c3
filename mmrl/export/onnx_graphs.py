"""Convert a tower to an ONNX graph that returns unit vectors, and to variants of lower precision.

Pitfalls, each reproduced: an example batch of one becomes a constant of the graph; a graph that computes in float16
crashes a default onnxruntime session on a CPU (so fp16 is a storage format only); int8 convolutions are slower than
float32 ones.

Shapes: B images, C channels, H and W their size, M texts, L tokens, W the text tower's width, D the embedding's.
"""

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
from mmrl.model.guards import quiet
from mmrl.model.two_tower import ProjectedTower

EXTERNAL_SUFFIX = ".data"
"""Graph NAME has its external weights in NAME.data. onnxruntime opens such a graph much faster, because it parses no
weights, and protobuf's limit of 2 GB does not apply."""
# For graphs with internal weights, below protobuf's limit.
_MAX_BYTES = 1_900_000_000
_MAX_BATCH = 4096
# Smaller tensors (biases, scales) stay float32: they need little space.
_MIN_FP16_SIZE = 1024


class UnitVectors(nn.Module):
    """An encoder with normalised embeddings: pixels (B, C, H, W) -> unit (B, D), or tokens (M, L) -> unit (M, D)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.encoder(x), dim=-1)


class VariableLengthText(nn.Module):
    """open_clip's text tower for texts shorter than its context length.

    Under a causal mask, tokens after a text's end do not affect the token that the embedding is read from, so the
    padding can be dropped without changing the embedding.
    """

    def __init__(self, encoder: ProjectedTower) -> None:
        super().__init__()
        self.tower: Any = encoder.tower
        self.projection = encoder.projection

    @staticmethod
    def supports(encoder: ProjectedTower) -> bool:
        """Whether the tower has a causal mask and reads the embedding from one token of the text."""
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
        # Not len(), which would make the example's batch size a constant of the graph.
        x = x_MLW[torch.arange(tokens_ML.shape[0]), read_ML.argmax(-1)]
        if isinstance(tower.text_projection, nn.Linear):
            x = tower.text_projection(x)
        elif tower.text_projection is not None:
            x = x @ tower.text_projection
        return x if self.projection is None else self.projection(x)


def write_image(encoder: ProjectedTower, spec: ImageSpec, path: Path, *, raw: bool) -> None:
    """Writes the image tower's graph, image_embeds. With `raw` it takes uint8 `pixels` and normalises them itself, and
    its weights are in a separate file (ONNX external data); else it takes normalised `pixel_values`."""
    graph = UnitVectors(ProjectedTower(encoder.tower, encoder.projection, spec.normalise if raw else None)).eval()
    example = torch.zeros(3, 3, spec.height, spec.width, dtype=torch.uint8 if raw else torch.float32)
    names = ("pixels" if raw else "pixel_values", "image_embeds")
    _export(graph, example, {0: _batch()}, path, names, external=raw)


def write_text(encoder: ProjectedTower, context_length: int, path: Path, *, external: bool) -> bool:
    """Writes the text tower's graph, input_ids -> text_embeds; returns whether it takes texts shorter than the context
    length."""
    any_length = VariableLengthText.supports(encoder)
    graph = UnitVectors(VariableLengthText(encoder) if any_length else encoder).eval()
    example = torch.ones(3, context_length, dtype=torch.int64)
    dynamic = {0: _batch()}
    if any_length:
        dynamic[1] = torch.export.Dim("length", min=2, max=context_length)
    _export(graph, example, dynamic, path, ("input_ids", "text_embeds"), external)
    return any_length


def add_dim_input(path: Path, dim: int) -> None:
    """Gives the graph in `path` the optional input `dim`, int64 (1,): the length of the embeddings' prefix that it
    returns, renormalised; by default all `dim` dims."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path, load_external_data=False)
    graph, output = model.graph, model.graph.output[0]
    name, full = output.name, f"{output.name}.full"
    producer = next(node for node in graph.node if name in node.output)
    producer.output[list(producer.output).index(name)] = full
    # An initializer that is an input too is the input's default.
    values = {"dim": dim, "dim.start": 0, "dim.axis": 1}
    graph.initializer.extend(numpy_helper.from_array(np.array([value]), key) for key, value in values.items())
    graph.input.append(helper.make_tensor_value_info("dim", TensorProto.INT64, [1]))
    graph.node.append(helper.make_node("Slice", [full, "dim.start", "dim", "dim.axis"], [f"{name}.prefix"]))
    graph.node.append(helper.make_node("LpNormalization", [f"{name}.prefix"], [name], axis=1, p=2))
    output.type.tensor_type.shape.dim[1].dim_param = "dim"
    onnx.save(model, path)


def check_size(full: Bundle, format: str) -> None:
    """Raises InputError if a tower is too large for a graph with internal weights."""
    for encoder in (full.model.image, full.model.text):
        size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.state_dict().values())
        if size > _MAX_BYTES:
            raise InputError(
                f"format: {format} needs each tower in one file, which protobuf limits to 2 GB, and this one has "
                f"{size / 1e9:.1f} GB; use onnx, which has separate weights files."
            )


def _batch() -> Any:
    return torch.export.Dim("batch", min=1, max=_MAX_BATCH)


def _export(
    graph: nn.Module, example: torch.Tensor, dynamic: dict[int, Any], path: Path, names: tuple[str, str], external: bool
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
            external_data=external,
            verbose=False,
        )
    assert Path(f"{path}{EXTERNAL_SUFFIX}").is_file() == external  # the exporter chooses this name


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's logs and its internal deprecation warnings."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def store_fp16(source: Path, target: Path, *, external: bool) -> None:
    """Writes a copy of a graph with weights in float16, which Cast nodes convert back: half the file size, computed in
    float32."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < _MIN_FP16_SIZE:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        limit = np.finfo(np.float16).max
        half = numpy_helper.from_array(np.clip(values, -limit, limit).astype(np.float16), f"{name}.half")
        tensor.CopyFrom(half)
        casts.append(helper.make_node("Cast", [half.name], [name], f"{name}.widened", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, target, save_as_external_data=external, location=f"{target.name}{EXTERNAL_SUFFIX}")


def store_int8(source: Path, target: Path, *, external: bool, embeddings: bool) -> None:
    """Writes a copy of a graph with int8 matrix products: weights quantised per channel, activations dynamically; with
    `embeddings`, the token embeddings are quantised too."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(source, load_external_data=False).graph.node
    # The final projection stays float32: it is small, and its error affects the embedding directly. (The quantiser
    # renames a Gemm.)
    last = next(node.name for node in reversed(nodes) if node.op_type in ("MatMul", "Gemm"))
    kinds = ["MatMul", "Gemm", *(["Gather"] if embeddings else [])]
    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=kinds,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
            nodes_to_exclude=[last, f"{last}_MatMul"],
        )
    assert Path(f"{target}{EXTERNAL_SUFFIX}").is_file() == external  # the quantiser chooses this name
