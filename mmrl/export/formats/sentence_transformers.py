"""`sentence_transformers`: the folder of `transformers` and the config file of SentenceTransformer; with a Hugging Face
text tower, or one tower alone, the modules of SentenceTransformer for each modality."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

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
    pools = "text" in full.model.sides and _has_hf_text(full.named_cfg)
    transformers.check_architecture(full, _NAME, [side for side in full.model.sides if side == "image" or not pools])
    if not pools:
        return
    text = full.named_cfg["text_cfg"]
    for key, default, allowed in (("hf_pooler_type", "mean_pooler", [*_POOLING]), ("hf_proj_type", "mlp", ["linear"])):
        if text.get(key, default) not in allowed:
            raise InputError(
                f"format: {_NAME} supports Hugging Face text towers with {key} {' or '.join(allowed)} only, and this "
                f"model has {text.get(key, default)}; allowed: {tokenizer_json.allowed(full)}, onnx, openvino."
            )
    if (text.get("tokenizer_kwargs") or {}).get("strip_sep_token"):
        raise InputError(f"format: {_NAME} cannot hold this tokenizer (strip_sep_token is set); allowed: bundle, onnx.")


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> None:
    if len(truncated.bundle.model.sides) == 1 or _has_hf_text(truncated.manifest["model_cfg"]):
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
    """Writes the modules of the tower, or with both towers a Router with those of each modality."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Router

    state = layouts.LAYOUTS["transformers"].export_state(truncated.bundle.state())
    make = {"image": _image_modules, "text": _text_modules}
    with tempfile.TemporaryDirectory() as scratch:
        modules = {}
        for side in truncated.bundle.model.sides:
            (Path(scratch) / side).mkdir()
            modules[side] = make[side](truncated, state, Path(scratch) / side)
        first = [Router(modules)] if len(modules) == 2 else next(iter(modules.values()))
        SentenceTransformer(modules=[*first, Normalize()], device="cpu").save(str(folder), create_model_card=False)
    # For mmrl.load.
    save_file({"logit_scale": state["logit_scale"].reshape(1)}, folder / layouts.SCALE_FILE)
    for name in INNER:
        if (truncated.folder / name).is_dir():
            shutil.copytree(truncated.folder / name, folder / name)


def _image_modules(truncated: Truncated, state: layouts.State, folder: Path) -> list[nn.Module]:
    config = {**transformers.vision_config(truncated), "architectures": ["CLIPVisionModel"]}
    transformers.write_preprocessing(truncated.bundle.image_spec, folder)
    return [_clip_module("image", config, state, folder), _dense(state["visual_projection.weight"])]


def _text_modules(truncated: Truncated, state: layouts.State, folder: Path) -> list[nn.Module]:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    bundle = truncated.bundle
    tokenizer_json.write(bundle, truncated.folder, folder, cleans=True)
    tokenizer_json.write_config(bundle, folder)
    if not _has_hf_text(truncated.manifest["model_cfg"]):
        config = {**transformers.text_config(truncated), "architectures": ["CLIPTextModel"]}
        return [_clip_module("text", config, state, folder), _dense(state["text_projection.weight"])]
    tower: Any = bundle.model.text.tower
    pooling: Any = _POOLING[bundle.named_cfg["text_cfg"].get("hf_pooler_type", "mean_pooler")]
    tower.transformer.save_pretrained(folder)
    words = Transformer(str(folder), max_seq_length=bundle.tokenise.context_length)
    return [words, Pooling(tower.proj.weight.shape[1], pooling), _dense(tower.proj.weight)]


def _clip_module(side: str, config: dict[str, Any], state: layouts.State, folder: Path) -> nn.Module:
    """CLIP's image or text tower, without its projection."""
    from sentence_transformers.sentence_transformer.modules import Transformer

    prefix = {"image": "vision_model.", "text": "text_model."}[side]
    weights = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    pooled: Any = {side: {"method": "forward", "method_output_name": "pooler_output"}}
    return Transformer(str(folder), modality_config=pooled, module_output_name="sentence_embedding")


def _dense(weight_DW: torch.Tensor) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Dense

    module = Dense(weight_DW.shape[1], weight_DW.shape[0], bias=False, activation_function=nn.Identity())
    module.linear.weight.data.copy_(weight_DW)
    return module


def _reopen(folder: Path, variant: str | None) -> Reopened:
    import sentence_transformers

    model: Any = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    manifest = read_manifest(folder)

    def encode(inputs: list[Any]) -> np.ndarray:
        return model.encode(inputs, normalize_embeddings=True, show_progress_bar=False)

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
    return Reopened(tool, pixels, tokens, images=encode, texts=encode, token_ids=token_ids)


FORMAT = Format(
    name=_NAME,
    one_tower=True,
    check=_check,
    write=_write,
    reopen=_reopen,
    tolerance=1e-5,
    library="sentence-transformers",
    needs=("sentence_transformers",),
)
