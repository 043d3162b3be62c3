"""The names that weights have: ours, open_clip's, and those of transformers' CLIPModel, each way.

Shapes: D the embedding's width, W a tower's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmrl.errors import InputError

State = dict[str, torch.Tensor]
_SCALE, _BIAS = "log_logit_scale", "logit_bias"
_QKV = ("q_proj", "k_proj", "v_proj")
# open_clip's name of a part of a residual block -> transformers'.
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
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelt there
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
    """The file that holds the weights, and the two ways between our names and its."""

    weights: str
    to_theirs: Callable[[State], State]
    to_ours: Callable[[State], State]


def _to_open_clip(state: State) -> State:
    """Both towers must end in their own projection. Of several logit scales it takes that of the largest dim."""
    renamed = {"image.tower.": "visual.", "text.tower.": "text."}
    theirs = {}
    for name, tensor in state.items():
        old = next((old for old in renamed if name.startswith(old)), None)
        if old is not None:
            theirs[renamed[old] + name.removeprefix(old)] = tensor
    theirs["logit_scale"] = state[_SCALE][-1].clone()
    if _BIAS in state:
        theirs["logit_bias"] = state[_BIAS][-1].clone()
    return theirs


def _from_open_clip(state: State) -> State:
    ours = {}
    for name, tensor in state.items():
        if name.startswith("visual."):
            ours[f"image.tower.{name.removeprefix('visual.')}"] = tensor
        elif name.startswith("text."):
            ours[f"text.tower.{name.removeprefix('text.')}"] = tensor
    ours[_SCALE] = state["logit_scale"].reshape(1)
    if "logit_bias" in state:
        ours[_BIAS] = state["logit_bias"].reshape(1)
    return ours


def _to_transformers(state: State) -> State:
    theirs: State = {"logit_scale": state[_SCALE][-1].clone()}
    for side, names, model in (("image", _IMAGE, "vision_model"), ("text", _TEXT, "text_model")):
        prefix = f"{side}.tower."
        for name, tensor in state.items():
            part = name.removeprefix(prefix)
            if not name.startswith(prefix) or part in ("proj", "text_projection"):
                continue
            if part in names:
                theirs[names[part]] = tensor
                continue
            number, _, rest = part.removeprefix("transformer.resblocks.").partition(".")
            block = f"{model}.encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")  # weight (3W, W) or bias (3W,)
                for one, share in zip(_QKV, tensor.chunk(3), strict=True):
                    theirs[f"{block}self_attn.{one}.{kind}"] = share.contiguous()
                continue
            inner, _, kind = rest.rpartition(".")
            theirs[f"{block}{_BLOCK[inner]}.{kind}"] = tensor
    theirs["visual_projection.weight"] = state["image.tower.proj"].T.contiguous()  # (W, D) -> (D, W)
    theirs["text_projection.weight"] = state["text.tower.text_projection"].T.contiguous()
    return theirs


def _from_transformers(state: State) -> State:
    ours: State = {
        _SCALE: state["logit_scale"].reshape(1),
        "image.tower.proj": state["visual_projection.weight"].T.contiguous(),
        "text.tower.text_projection": state["text_projection.weight"].T.contiguous(),
    }
    back = {theirs: inner for inner, theirs in _BLOCK.items()}
    for side, names, model in (("image", _IMAGE, "vision_model"), ("text", _TEXT, "text_model")):
        prefix = f"{side}.tower."
        ours |= {prefix + part: state[theirs] for part, theirs in names.items()}
        layers = f"{model}.encoder.layers."
        for name, tensor in state.items():
            if not name.startswith(layers):
                continue
            number, _, rest = name.removeprefix(layers).partition(".")
            inner, _, kind = rest.rpartition(".")
            block = f"{prefix}transformer.resblocks.{number}."
            if inner in back:
                ours[f"{block}{back[inner]}.{kind}"] = tensor
            elif inner == "self_attn.q_proj":
                shares = [state[f"{layers}{number}.self_attn.{one}.{kind}"] for one in _QKV]
                ours[f"{block}attn.in_proj_{kind}"] = torch.cat(shares)
    return ours


def _same(state: State) -> State:
    return state


_CLIP_MODEL = Layout("model.safetensors", _to_transformers, _from_transformers)
LAYOUTS = {
    "bundle": Layout("model.safetensors", _same, _same),
    "open_clip": Layout("open_clip_model.safetensors", _to_open_clip, _from_open_clip),
    "transformers": _CLIP_MODEL,
    "sentence_transformers": _CLIP_MODEL,
}


def of_manifest(manifest: dict[str, Any], folder: Any) -> Layout:
    """The layout of a stored encoder that has weights.

    Raises:
        InputError: it has ONNX graphs instead.
    """
    layout = LAYOUTS.get(manifest["layout"])
    if layout is None:
        raise InputError(
            f"model: {folder} holds ONNX graphs, which give vectors but no weights; name the run, checkpoint or "
            "bundle that it was exported from."
        )
    return layout
