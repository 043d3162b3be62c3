"""`sentence_transformers`: the folder of `transformers` and the config file of SentenceTransformer; with a Hugging Face
text tower, the modules of SentenceTransformer for each modality."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mmrl.errors import InputError
from mmrl.export import tokenizer_json
from mmrl.export.contract import Reopened
from mmrl.export.formats import transformers
from mmrl.export.formats.base import Format, Truncated
from mmrl.images.image_spec import ImageSpec
from mmrl.model import layouts
from mmrl.model.bundle import Bundle
from mmrl.model.manifest import INNER, read_manifest

_NAME = "sentence_transformers"
_POOLING = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls"}


def _has_hf_text(model_cfg: dict[str, Any]) -> bool:
    return bool(model_cfg["text_cfg"].get("hf_model_name"))


def _check(full: Bundle) -> None:
    if not _has_hf_text(full.named_cfg):
        transformers.check_architecture(full, _NAME)
        return
    transformers.check_architecture(full, _NAME, ["vision_cfg"])
    text = full.named_cfg["text_cfg"]
    for key, default, allowed in (
        ("hf_pooler_type", "mean_pooler", [*_POOLING]),
        ("hf_proj_type", "mlp", ["linear"]),
    ):
        if text.get(key, default) not in allowed:
            raise InputError(
                f"format: {_NAME} supports Hugging Face text towers with {key} {' or '.join(allowed)} only, and this "
                f"model has {text.get(key, default)}; allowed: bundle, open_clip, onnx, openvino."
            )
    if (text.get("tokenizer_kwargs") or {}).get("strip_sep_token"):
        raise InputError(f"format: {_NAME} cannot hold this tokenizer (strip_sep_token is set); allowed: bundle, onnx.")


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> None:
    if _has_hf_text(truncated.manifest["model_cfg"]):
        _write_modules(truncated, folder)
    else:
        transformers.write(truncated, folder, variants)
    settings = {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "truncate_dim": None,
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings, indent=2) + "\n")


def _write_modules(truncated: Truncated, folder: Path) -> None:
    """Writes a Router with the modules of each modality."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer

    bundle = truncated.bundle
    tower: Any = bundle.model.text.tower
    state = layouts.LAYOUTS["transformers"].export_state(bundle.state())
    pooling: Any = _POOLING[bundle.named_cfg["text_cfg"].get("hf_pooler_type", "mean_pooler")]

    def dense(weight_DW: torch.Tensor) -> Dense:
        module = Dense(weight_DW.shape[1], weight_DW.shape[0], bias=False, activation_function=torch.nn.Identity())
        module.linear.weight.data.copy_(weight_DW)
        return module

    with tempfile.TemporaryDirectory() as scratch:
        image, text = Path(scratch) / "image", Path(scratch) / "text"
        tower.transformer.save_pretrained(text)
        tokenizer_json.write(bundle, truncated.folder, text, cleans=True)
        tokenizer_json.write_config(bundle, text)
        image.mkdir()
        vision = {name: tensor for name, tensor in state.items() if name.startswith("vision_model.")}
        save_file(vision, image / "model.safetensors", metadata={"format": "pt"})
        config = transformers.vision_config(truncated)
        (image / "config.json").write_text(json.dumps({**config, "architectures": ["CLIPVisionModel"]}))
        transformers.write_preprocessing(bundle.image_spec, image)
        pooled: Any = {"image": {"method": "forward", "method_output_name": "pooler_output"}}
        words = Transformer(str(text), max_seq_length=bundle.tokenise.context_length)
        modules = {
            "image": [
                Transformer(str(image), modality_config=pooled, module_output_name="sentence_embedding"),
                dense(state["visual_projection.weight"]),
            ],
            "text": [words, Pooling(tower.proj.weight.shape[1], pooling), dense(tower.proj.weight)],
        }
        model = SentenceTransformer(modules=[Router(modules), Normalize()], device="cpu")
        model.save(str(folder), create_model_card=False)
    # For mmrl.load.
    save_file({"logit_scale": state["logit_scale"].reshape(1)}, folder / layouts.SCALE_FILE)
    for name in INNER:
        shutil.copytree(truncated.folder / name, folder / name)


def _reopen(folder: Path, variant: str | None) -> Reopened:
    import sentence_transformers

    model: Any = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    manifest = read_manifest(folder)

    def encode(inputs: list[Any]) -> np.ndarray:
        return model.encode(inputs, normalize_embeddings=True, show_progress_bar=False)

    def images(images: list[Image.Image]) -> np.ndarray:
        return encode(images)

    @torch.inference_mode()
    def features(**inputs: Any) -> np.ndarray:
        return model(inputs)["sentence_embedding"].numpy()

    def pixels(pixels_BCHW: torch.Tensor) -> np.ndarray:
        return features(pixel_values=ImageSpec.from_json(manifest["image"]).normalise(pixels_BCHW), modality="image")

    def tokens(tokens_BL: torch.Tensor) -> np.ndarray:
        mask_BL = torch.ones_like(tokens_BL)
        if _has_hf_text(manifest["model_cfg"]):
            mask_BL = (tokens_BL != model.tokenizer.pad_token_id).long()
        return features(input_ids=tokens_BL, attention_mask=mask_BL, modality="text")

    def token_ids(texts: list[str]) -> list[list[int]]:
        inputs = model.preprocess(texts)
        pairs = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True)
        return [ids[:length] for ids, length in pairs]

    tool = f"sentence-transformers {sentence_transformers.__version__}"
    return Reopened(tool, pixels, tokens, images, encode, token_ids)


FORMAT = Format(
    name=_NAME,
    check=_check,
    write=_write,
    reopen=_reopen,
    tolerance=1e-5,
    library="sentence-transformers",
    needs=("sentence_transformers",),
)
