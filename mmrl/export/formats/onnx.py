"""`onnx`: graphs image.onnx and text.onnx from pixels and token ids to unit vectors, each with its weights in
NAME.onnx.data, a tokenizer.json, and an encoder.py that needs neither torch nor mmrl."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmrl.export import onnx_graphs, tokenizer_json
from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Format, Truncated

_PACKAGE = Path(__file__).parents[2]


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    write_encoder(folder)
    files = {
        modality: {"fp32": f"{modality}.onnx", **{variant: f"{modality}.{variant}.onnx" for variant in variants}}
        for modality in truncated.bundle.model.sides
    }
    return write_graphs(truncated, folder, files, raw=True, dim_input=True)


def write_encoder(folder: Path) -> None:
    """Writes FOLDER/encoder.py: standalone.py with upright.py and ValueError in place of its imports from mmrl."""
    source = (_PACKAGE / "inference" / "standalone.py").read_text()
    before, _, after = re.split(r"^(from mmrl\.errors .*\nfrom mmrl\.images\.upright .*\n)", source, flags=re.MULTILINE)
    upright = (_PACKAGE / "images" / "upright.py").read_text()
    (folder / "encoder.py").write_text(f"{before}InputError = ValueError\n{upright}{after}")


def write_graphs(
    truncated: Truncated, folder: Path, files: dict[str, dict[str, str]], *, raw: bool, dim_input: bool = False
) -> dict[str, Any]:
    """Writes the towers' graphs and the tokenizer; returns the manifest's `graphs`.

    Args:
        files: {modality: {variant: file}} of the towers that there are.
        raw: for encoder.py: the image graph takes uint8 pixels and normalises them itself, tokenizer.json takes clean
            texts, and each graph's weights are in a separate file. Else for transformers.js.
        dim_input: the graphs have the prefix's length as an optional input.
    """
    model, bundle = truncated.bundle.model, truncated.bundle
    graphs: dict[str, Any] = {**files, "default": "fp32"}
    if "image" in files:
        onnx_graphs.write_image(model.image, bundle.image_spec, folder / files["image"]["fp32"], raw=raw)
    if "text" in files:
        path, length = folder / files["text"]["fp32"], bundle.tokenise.context_length
        graphs["any_length"] = onnx_graphs.write_text(model.text, length, path, external=raw)
        graphs |= tokenizer_json.write(bundle, truncated.folder, folder, cleans=not raw)
    for modality, of_variant in files.items():
        source = folder / of_variant["fp32"]
        for variant, name in of_variant.items():
            if variant == "fp16":
                onnx_graphs.store_fp16(source, folder / name, external=raw)
            elif variant == "int8":
                onnx_graphs.store_int8(source, folder / name, external=raw, embeddings=modality == "text")
    for name in (name for of_variant in files.values() for name in of_variant.values() if dim_input):
        onnx_graphs.add_dim_input(folder / name, bundle.dim)
    return graphs


def reopen(folder: Path, variant: str | None) -> Reopened:
    """Opens a folder of graphs with onnxruntime or OpenVINO."""
    from mmrl.inference.standalone import Encoder

    encoder = Encoder(folder, variant=variant)

    def tokens(tokens_BL: torch.Tensor) -> Any:
        if encoder.graphs["any_length"]:
            # Drops the padding after the longest text but for one token, which may be the text's end: some tokenizers
            # pad with it. The padding id can also be a word inside a text ("!" is 0).
            tokens_BL = tokens_BL[:, : int((tokens_BL != encoder.graphs["pad_id"]).nonzero()[:, 1].max()) + 2]
        return encoder.encode_tokens(tokens_BL.numpy())

    runtime = "openvino" if encoder.manifest["layout"] == "openvino" else "onnxruntime"
    return Reopened(
        f"{runtime} {version(runtime)}",
        pixels=lambda pixels_BCHW: encoder.encode_pixels(pixels_BCHW.numpy()),
        tokens=tokens,
        images=encoder.encode_images,
        texts=encoder.encode_texts,
        token_ids=lambda texts: encoder.tokenise(texts).tolist(),
    )


FORMAT = Format(
    name="onnx",
    one_tower=True,
    check=lambda full: tokenizer_json.check(full, "onnx"),
    write=_write,
    reopen=reopen,
    tolerance=1e-5,
    library="onnx",
    needs=("onnx", "onnxscript", "onnxruntime"),
    variants=("fp16", "int8"),
)
