"""State dicts in the names of mmrl, of open_clip and of transformers' CLIPModel, converted both ways.

Shapes: D the embedding's width, W a tower's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmrl.errors import InputError

State = dict[str, torch.Tensor]
_SCALE, _BIAS = "log_logit_scale", "logit_bias"
_QKV = ("q_proj", "k_proj", "v_proj")
# Submodules of a residual block: open_clip's name -> transformers' name.
_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IMAGE = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelled so in transformers
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


@dataclass(frozen=True)
class Layout:
    """The weights file of a folder layout, and the conversion of its state dict."""

    weights: str
    """File name."""
    export_state: Callable[[State], State]
    """From mmrl's names."""
    import_state: Callable[[State], State]
    """To mmrl's names."""


def _to_open_clip(state: State) -> State:
    """Requires towers with their own projections. Of several logit scales the full dim's is kept."""
    renamed = {"image.tower.": "visual.", "text.tower.": "text."}
    converted = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), None)
        if prefix is not None:
            converted[renamed[prefix] + name.removeprefix(prefix)] = tensor
    converted["logit_scale"] = state[_SCALE][-1].clone()
    if _BIAS in state:
        converted["logit_bias"] = state[_BIAS][-1].clone()
    return converted


def _from_open_clip(state: State) -> State:
    converted = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            converted[f"image.tower.{name.removeprefix('visual.')}"] = tensor
        elif name.startswith("text."):
            converted[f"text.tower.{name.removeprefix('text.')}"] = tensor
    converted[_SCALE] = state["logit_scale"].reshape(1)
    if "logit_bias" in state:
        converted[_BIAS] = state["logit_bias"].reshape(1)
    return converted


def _to_transformers(state: State) -> State:
    """For towers that `formats.transformers.check_architecture` accepts."""
    converted: State = {"logit_scale": state[_SCALE][-1].clone()}
    for modality, names, model in (("image", _IMAGE, "vision_model"), ("text", _TEXT, "text_model")):
        prefix = f"{modality}.tower."
        for name, tensor in state.items():
            inner = name.removeprefix(prefix)
            if not name.startswith(prefix) or inner in ("proj", "text_projection"):
                continue
            if inner in names:
                converted[names[inner]] = tensor
                continue
            layer, _, rest = inner.removeprefix("transformer.resblocks.").partition(".")
            block = f"{model}.encoder.layers.{layer}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")  # weight (3W, W) or bias (3W,)
                for projection, chunk in zip(_QKV, tensor.chunk(3), strict=True):
                    converted[f"{block}self_attn.{projection}.{kind}"] = chunk.contiguous()
                continue
            module, _, kind = rest.rpartition(".")
            converted[f"{block}{_BLOCK[module]}.{kind}"] = tensor
    converted["visual_projection.weight"] = state["image.tower.proj"].T.contiguous()  # (W, D) -> (D, W)
    converted["text_projection.weight"] = state["text.tower.text_projection"].T.contiguous()
    return converted


def _from_transformers(state: State) -> State:
    converted: State = {
        _SCALE: state["logit_scale"].reshape(1),
        "image.tower.proj": state["visual_projection.weight"].T.contiguous(),
        "text.tower.text_projection": state["text_projection.weight"].T.contiguous(),
    }
    modules = {transformers_name: name for name, transformers_name in _BLOCK.items()}
    for modality, names, model in (("image", _IMAGE, "vision_model"), ("text", _TEXT, "text_model")):
        prefix = f"{modality}.tower."
        converted |= {prefix + name: state[transformers_name] for name, transformers_name in names.items()}
        layers = f"{model}.encoder.layers."
        for name, tensor in state.items():
            if not name.startswith(layers):
                continue
            layer, _, rest = name.removeprefix(layers).partition(".")
            module, _, kind = rest.rpartition(".")
            block = f"{prefix}transformer.resblocks.{layer}."
            if module in modules:
                converted[f"{block}{modules[module]}.{kind}"] = tensor
            elif module == "self_attn.q_proj":
                chunks = [state[f"{layers}{layer}.self_attn.{projection}.{kind}"] for projection in _QKV]
                converted[f"{block}attn.in_proj_{kind}"] = torch.cat(chunks)
    return converted


def _unchanged(state: State) -> State:
    return state


_CLIP_MODEL = Layout("model.safetensors", _to_transformers, _from_transformers)
LAYOUTS = {
    "bundle": Layout("model.safetensors", _unchanged, _unchanged),
    "open_clip": Layout("open_clip_model.safetensors", _to_open_clip, _from_open_clip),
    "transformers": _CLIP_MODEL,
    "sentence_transformers": _CLIP_MODEL,
}


def layout_of_manifest(manifest: dict[str, Any], folder: Path) -> Layout:
    """The weights layout of a stored encoder.

    Raises:
        InputError: the encoder consists of ONNX graphs.
    """
    layout = LAYOUTS.get(manifest["layout"])
    if layout is None:
        raise InputError(
            f"model: {folder} holds ONNX graphs, which have no weights; give the run, checkpoint or bundle that "
            "it was exported from."
        )
    return layout
