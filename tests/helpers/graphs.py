"""Encoders of ONNX and OpenVINO graphs that are made in milliseconds, without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import TINY_MODEL

from mmrl.model.manifest import MANIFEST, hash_files, write_manifest

_SIDE, _DIM, _LENGTH = 8, 4, 6


def save_graph_encoder(folder: Path, layout: str) -> Path:
    """Writes an encoder of the layout onnx or openvino: of mean colours, and of bags of words."""
    folder.mkdir(parents=True)
    for name in ("image", "text"):
        _write_graph(folder / f"{name}.onnx", is_image=name == "image")
    vocabulary = {word: number for number, word in enumerate(["x", "a", "red", "square", "green", "stripes"])}
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "x"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ending = ".onnx"
    if layout == "openvino":
        import openvino

        ending = ".xml"
        for name in ("image", "text"):
            source = folder / f"{name}.onnx"
            openvino.save_model(openvino.convert_model(source), folder / f"{name}.xml", compress_to_fp16=False)
            source.unlink()
            Path(f"{source}.data").unlink()
    image = {"height": _SIDE, "width": _SIDE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    graphs = {name: {"fp32": f"{name}{ending}"} for name in ("image", "text")}
    texts = {"default": "fp32", "tokenizer": "tokenizer.json", "clean": "lower", "pad_id": 0, "any_length": False}
    manifest = {
        "format": "mmrl-bundle", "version": 2, "layout": layout, "dim": _DIM, "full_dim": _DIM, "nested_dims": [2, 4],
        "normalisation": "l2", "image": image | {"resize_mode": "shortest", "fill_color": 0, "orientation": "exif"},
        "tokenizer": {"kind": "huggingface", "context_length": _LENGTH}, "model_cfg": TINY_MODEL,
        "weights_sha256": "0" * 64, "source": {}, "files": hash_files(folder), "graphs": graphs | texts,
    }  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def update_hashes(folder: Path) -> None:
    """Makes the manifest's hashes those of the files, as a stranger would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": hash_files(folder)}))


def _write_graph(path: Path, is_image: bool) -> None:
    from onnx import TensorProto, checker, helper, numpy_helper, save

    rng, float32 = np.random.default_rng(0), TensorProto.FLOAT
    weight = numpy_helper.from_array(rng.normal(size=(3 if is_image else 6, _DIM)).astype(np.float32), "weight")
    axes = numpy_helper.from_array(np.array([2, 3] if is_image else [1]), "axes")
    if is_image:
        kind, shape = TensorProto.UINT8, ["N", 3, _SIDE, _SIDE]
        nodes = [
            helper.make_node("Cast", ["input"], ["pixels"], to=float32),
            helper.make_node("ReduceMean", ["pixels", "axes"], ["colour"], keepdims=0),
            helper.make_node("MatMul", ["colour", "weight"], ["sum"]),
        ]
    else:
        kind, shape = TensorProto.INT64, ["N", _LENGTH]
        nodes = [
            helper.make_node("Gather", ["weight", "input"], ["words"]),
            helper.make_node("ReduceMean", ["words", "axes"], ["sum"], keepdims=0),
        ]
    nodes.append(helper.make_node("LpNormalization", ["sum"], ["output"], axis=-1, p=2))
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("output", float32, ["N", _DIM])],
        [weight, axes],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model)
    save(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=60
    )  # of the weights alone
