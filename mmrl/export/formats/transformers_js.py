"""`transformers.js`: ONNX graphs, tokenizer and preprocessing where JavaScript's CLIP classes look for them. The graphs
may be any towers; what must fit is CLIP's tokenizer and its way of fitting pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrl.errors import InputError
from mmrl.export import onnx_graphs, tokenizer_json
from mmrl.export.formats import onnx
from mmrl.export.formats.base import Cut, Format
from mmrl.export.formats.transformers import check_preprocessing, write_preprocessing
from mmrl.model.bundle import Bundle

# transformers.js's names of the variants, which it asks for by dtype: 'fp32', 'fp16', 'q8'.
_SUFFIX = {"fp32": "", "fp16": "_fp16", "int8": "_quantized"}


def _check(whole: Bundle) -> None:
    tokenizer_json.check(whole, "transformers.js")
    onnx_graphs.check_size(whole, "transformers.js")
    check_preprocessing(whole.image_spec, "transformers.js")
    if not tokenizer_json.is_bpe(whole):
        raise InputError(
            "format: transformers.js's CLIP classes want CLIP's own tokenizer, and this text tower has another; "
            "allowed: bundle, onnx."
        )


def _write(cut: Cut, folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    files = {
        side: {one: f"onnx/{model}_model{_SUFFIX[one]}.onnx" for one in ("fp32", *variants)}
        for side, model in (("image", "vision"), ("text", "text"))
    }
    graphs = onnx.write_graphs(cut, folder, files, raw=False, inputs=("pixel_values", "input_ids"), beside=False)
    length, dim = cut.bundle.tokenise.context_length, cut.bundle.dim
    config = {
        "model_type": "clip",
        "projection_dim": dim,
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": dim},
        "text_config": {"model_type": "clip_text_model", "projection_dim": dim, "max_position_embeddings": length},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer_json.write_config(length, folder)
    write_preprocessing(cut.bundle.image_spec, folder)
    return graphs


FORMAT = Format(
    name="transformers.js",
    check=_check,
    write=_write,
    reopen=onnx.reopen,
    allowed=1e-5,
    usage="""```js
import { AutoTokenizer, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env }
  from '@huggingface/transformers';

env.allowRemoteModels = false;
env.localModelPath = 'PARENT OF FOLDER/';
const tokenizer = await AutoTokenizer.from_pretrained('FOLDER');
const model = await CLIPTextModelWithProjection.from_pretrained('FOLDER', { dtype: 'fp32' });
const inputs = tokenizer(['a red shoe'], { padding: 'max_length', truncation: true });
const { text_embeds } = await model(inputs);  // of length 1; CLIPVisionModelWithProjection likewise
```
""",
    library="transformers.js",
    needs=("onnx", "onnxscript", "onnxruntime"),
    variants=True,
)
