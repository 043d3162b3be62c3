"""`transformers.js`: ONNX graphs, tokenizer and preprocessing in the layout of transformers.js's CLIP classes. Any
towers are possible, with CLIP's tokenizer and CLIP's way of resizing."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrl.errors import InputError
from mmrl.export import onnx_graphs, tokenizer_json
from mmrl.export.contract import Reopened
from mmrl.export.formats import onnx
from mmrl.export.formats.base import Format, Truncated
from mmrl.export.formats.transformers import check_preprocessing, write_preprocessing
from mmrl.model.bundle import Bundle

# File name suffixes of transformers.js for the dtypes 'fp32', 'fp16' and 'q8'.
_SUFFIX = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}


def _check(full: Bundle) -> None:
    tokenizer_json.check(full, "transformers.js")
    onnx_graphs.check_size(full, "transformers.js")
    check_preprocessing(full, "transformers.js")
    if not tokenizer_json.is_bpe(full):
        raise InputError(
            "format: transformers.js's CLIP classes need CLIP's tokenizer, and this text tower has another; allowed: "
            "bundle, onnx."
        )


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    files = {
        modality: {variant: f"onnx/{model}_model{_SUFFIX[variant]}.onnx" for variant in ("fp32", *variants)}
        for modality, model in (("image", "vision"), ("text", "text"))
    }
    graphs = onnx.write_graphs(truncated, folder, files, raw=False)
    length, dim = truncated.bundle.tokenise.context_length, truncated.bundle.dim
    config = {
        "model_type": "clip",
        "projection_dim": dim,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": dim},
        "text_config": {"model_type": "clip_text_model", "projection_dim": dim, "max_position_embeddings": length},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer_json.write_config(truncated.bundle, folder)
    write_preprocessing(truncated.bundle.image_spec, folder)
    return graphs


def _reopen(folder: Path, variant: str | None) -> Reopened:
    """Opens the graphs with onnxruntime and tokenizer.json as transformers.js does, without cleaning texts before."""
    from tokenizers import Tokenizer

    opened = onnx.reopen(folder, variant)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / tokenizer_json.FILE))
    length, end = config["model_max_length"], config["pad_token"]
    tokenizer.enable_truncation(length)

    def token_ids(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    def texts(texts: list[str]) -> np.ndarray:
        padded = [ids + [tokenizer.token_to_id(end)] * (length - len(ids)) for ids in token_ids(texts)]
        return opened.tokens(torch.tensor(padded))

    return replace(opened, texts=texts, token_ids=token_ids)


FORMAT = Format(
    name="transformers.js",
    one_tower=False,
    check=_check,
    write=_write,
    reopen=_reopen,
    tolerance=1e-5,
    library="transformers.js",
    needs=("onnx", "onnxscript", "onnxruntime"),
    variants=("fp16", "int8"),
)
