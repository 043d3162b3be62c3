"""State dicts in the names of mmrl, of open_clip and of transformers' CLIPModel, converted both ways; those of
SiglipModel and ChineseCLIPModel are read.

Shapes: D the embedding's width, W a tower's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmrl.errors import InputError

State = dict[str, torch.Tensor]
SCALE_FILE = "logit_scale.safetensors"
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
_TIMM_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TIMM_IMAGE = {
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "norm.weight": "vision_model.post_layernorm.weight",
    "norm.bias": "vision_model.post_layernorm.bias",
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
    others: tuple[str, ...] = ()
    """Further weights files, whose tensors' names get the name of their folder as a prefix."""


def _renamed(state: State, prefixes: dict[str, str]) -> State:
    """The tensors whose names begin with one of `prefixes`, {old: new}."""
    names = {name: old for name in state for old in prefixes if name.startswith(old)}
    return {prefixes[old] + name.removeprefix(old): state[name] for name, old in names.items()}


def _to_open_clip(state: State) -> State:
    """Requires towers with their own projections. Of several logit scales the full dim's is kept."""
    converted = _renamed(state, {"image.tower.": "visual.", "text.tower.": "text."})
    scalars = {_SCALE: "logit_scale", _BIAS: "logit_bias"}
    return converted | {foreign: state[name][-1].clone() for name, foreign in scalars.items() if name in state}


def _from_open_clip(state: State) -> State:
    converted = _renamed(state, {"visual.": "image.tower.", "text.": "text.tower."})
    scalars = {"logit_scale": _SCALE, "logit_bias": _BIAS}
    return converted | {name: state[foreign].reshape(1) for foreign, name in scalars.items() if foreign in state}


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
            if not inner.startswith("transformer.resblocks."):
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
    for name, tensor in (("visual", "image.tower.proj"), ("text", "text.tower.text_projection")):
        if tensor in state:  # not of a Hugging Face text tower
            converted[f"{name}_projection.weight"] = state[tensor].T.contiguous()  # (W, D) -> (D, W)
    return converted


def _from_transformers(state: State) -> State:
    """From the names of CLIPModel."""
    return {**_import_image(state), **_import_text(state)}


def _from_chinese_clip(state: State) -> State:
    """From the names of ChineseCLIPModel: CLIP's image tower, and a BERT as a Hugging Face text tower."""
    return {
        **_import_image(state),
        **_import_bert(state, "text_model."),
        "text.tower.proj.weight": state["text_projection.weight"],
    }


def _from_modules(state: State) -> State:
    """From the modules of a SentenceTransformer, whose names begin with their modality."""
    converted: State = {_SCALE: state["logit_scale"].reshape(1)}
    if "image_1_Dense.linear.weight" in state:
        tower = _of_transformer(state, "image", "vision_model")
        projection = {"visual_projection.weight": state["image_1_Dense.linear.weight"]}
        converted |= _import_image({**tower, **projection, "logit_scale": state["logit_scale"]})
    if "text_1_Dense.linear.weight" in state:
        tower = _of_transformer(state, "text", "text_model")
        converted |= _import_text({**tower, "text_projection.weight": state["text_1_Dense.linear.weight"]})
    if "text_2_Dense.linear.weight" in state:  # after a module that pools: a Hugging Face text tower
        converted |= _import_bert(state, "text_0_Transformer.")
        converted["text.tower.proj.weight"] = state["text_2_Dense.linear.weight"]
    return converted


def _of_transformer(state: State, modality: str, model: str) -> State:
    """The tensors of a modality's Transformer module; the names of `model` may lack its own."""
    renamed = _renamed(state, {f"{modality}_0_Transformer.": ""})
    return {f"{model}.{name.removeprefix(f'{model}.')}": tensor for name, tensor in renamed.items()}


def _from_one_modality(modality: str, state: State) -> State:
    """From the modules of a SentenceTransformer with one tower: the Transformer in the folder itself, then 1_Dense or
    2_Dense, and the logit scale."""

    def with_modality(name: str) -> str:
        if name == ".logit_scale":
            return "logit_scale"
        return f"{modality}_{name}" if name[0].isdigit() else f"{modality}_0_Transformer.{name}"

    return _from_modules({with_modality(name): tensor for name, tensor in state.items()})


def _import_image(state: State) -> State:
    """The logit scale and CLIP's image tower with its projection."""
    return {
        _SCALE: state["logit_scale"].reshape(1),
        "image.tower.proj": state["visual_projection.weight"].T.contiguous(),
        **_import_tower(state, "vision_model", "image.tower.", _IMAGE),
    }


def _import_text(state: State) -> State:
    """CLIP's text tower with its projection."""
    return {
        "text.tower.text_projection": state["text_projection.weight"].T.contiguous(),
        **_import_tower(state, "text_model", "text.tower.", _TEXT),
    }


def _import_bert(state: State, prefix: str) -> State:
    """A BERT as a Hugging Face text tower."""
    renamed = _renamed(state, {prefix: "text.tower.transformer."})
    return {name: renamed[name] for name in renamed if ".pooler." not in name and "position_ids" not in name}


def _from_siglip(state: State) -> State:
    """From the names of SiglipModel: timm's ViT with attention pooling, and open_clip's text transformer."""
    head, pool = "vision_model.head.", "image.tower.trunk.attn_pool."
    converted: State = {
        _SCALE: state["logit_scale"].reshape(1),
        _BIAS: state["logit_bias"].reshape(1),
        **_import_tower(state, "vision_model", "image.tower.trunk.", _TIMM_IMAGE, _TIMM_BLOCK),
        **_import_tower(state, "text_model", "text.tower.", _TEXT),
        **{f"text.tower.text_projection.{kind}": state[f"text_model.head.{kind}"] for kind in ("weight", "bias")},
    }
    positions = "image.tower.trunk.pos_embed"
    converted[positions] = converted[positions][None]  # (1, N, W)
    converted[f"{pool}latent"] = state[f"{head}probe"]
    names = {"attention.out_proj": "proj", "layernorm": "norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        in_proj = state[f"{head}attention.in_proj_{kind}"]  # (3W, W) or (3W,)
        converted[f"{pool}q.{kind}"], converted[f"{pool}kv.{kind}"] = in_proj.split(
            [len(in_proj) // 3, 2 * len(in_proj) // 3]
        )
        converted |= {f"{pool}{name}.{kind}": state[f"{head}{foreign}.{kind}"] for foreign, name in names.items()}
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def _import_tower(
    state: State, model: str, prefix: str, names: dict[str, str], block: dict[str, str] = _BLOCK
) -> State:
    """A transformer of transformers in the names of open_clip or timm.

    Args:
        model: `vision_model` or `text_model`.
        prefix: of the names in the result.
        names: {name in the result: name in `state`} of the parameters outside of the blocks.
        block: {name in the result: name in `state`} of the modules in a block.
    """
    blocks, in_proj = ("blocks", "attn.qkv.") if block is _TIMM_BLOCK else ("transformer.resblocks", "attn.in_proj_")
    modules = {foreign: name for name, foreign in block.items()}
    converted = {prefix + name: state[foreign] for name, foreign in names.items()}
    layers = f"{model}.encoder.layers."
    for name, tensor in state.items():
        if not name.startswith(layers):
            continue
        layer, _, rest = name.removeprefix(layers).partition(".")
        module, _, kind = rest.rpartition(".")
        into = f"{prefix}{blocks}.{layer}."
        if module in modules:
            converted[f"{into}{modules[module]}.{kind}"] = tensor
        elif module == "self_attn.q_proj":
            chunks = [state[f"{layers}{layer}.self_attn.{projection}.{kind}"] for projection in _QKV]
            converted[f"{into}{in_proj}{kind}"] = torch.cat(chunks)
    return converted


def _unchanged(state: State) -> State:
    return state


_CLIP_MODEL = Layout("model.safetensors", _to_transformers, _from_transformers)
FROM_HUGGING_FACE = {"clip": _from_transformers, "siglip": _from_siglip, "chinese_clip": _from_chinese_clip}
"""{model_type of config.json: conversion of its state dict to mmrl's names}"""
LAYOUTS = {
    "bundle": Layout("model.safetensors", _unchanged, _unchanged),
    "open_clip": Layout("open_clip_model.safetensors", _to_open_clip, _from_open_clip),
    "transformers": _CLIP_MODEL,
    "sentence_transformers": _CLIP_MODEL,
}
_MODULES = Layout(
    SCALE_FILE,
    _unchanged,
    _from_modules,
    tuple(
        f"{name}/model.safetensors"
        for name in ("image_0_Transformer", "image_1_Dense", "text_0_Transformer", "text_2_Dense")
    ),
)


def layout_of_manifest(manifest: dict[str, Any], folder: Path) -> Layout:
    """The weights layout of a stored encoder. Raises InputError: the encoder consists of ONNX graphs."""
    layout, sides = LAYOUTS.get(manifest["layout"]), manifest["towers"]
    if manifest["layout"] == "sentence_transformers":
        pools = "text" in sides and bool(manifest["model_cfg"]["text_cfg"].get("hf_model_name"))
        if len(sides) == 1:
            others = (f"{2 if pools else 1}_Dense/model.safetensors", SCALE_FILE)
            layout = Layout("model.safetensors", _unchanged, partial(_from_one_modality, sides[0]), others)
        elif pools:
            layout = _MODULES
    if layout is None:
        raise InputError(
            f"model: {folder} holds ONNX graphs, which have no weights; give the run, checkpoint or bundle that "
            "it was exported from."
        )
    return layout
