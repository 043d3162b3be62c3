"""Reads a CLIPModel, SiglipModel or ChineseCLIPModel of transformers as an open_clip model: config, weights, images.

A folder holds config.json, safetensors or .bin weights, preprocessor_config.json and the tokenizer's files. Nothing in
it is run. transformers takes seconds to import, so it is imported inside the functions.
"""

import atexit
import json
import math
import pickle
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmrl.errors import InputError
from mmrl.model import layouts
from mmrl.model.guards import quiet, shortened
from mmrl.model.model_cfg import check_config_folder, check_model_cfg
from mmrl.model.source import HUB, OPEN_CLIP_CONFIG, read_hugging_face_config
from mmrl.output.files import parse_json, path_inside

# (quick_gelu, act_kwargs) of open_clip.
_ACTIVATIONS: dict[str, tuple[bool, dict[str, str]]] = {
    "quick_gelu": (True, {}),
    "gelu": (False, {"approximate": "none"}),
    "gelu_pytorch_tanh": (False, {"approximate": "tanh"}),
}
# timm's name of SigLIP's image towers: {(width, layers, heads, MLP width): size}.
_SIGLIP_SIZES = {
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1536, 40, 16, 6144): "giantopt",
}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's codes
_FILES = ("*.json", "*.txt", "*.model", "tokenizer*", "*/*.json", "*/*.txt", "*/*.model")


def find_folder(name: str) -> Path | None:
    """The folder of a model in transformers' format, for a path or `hf-hub:ORG/NAME`, which is downloaded once; None
    for other names. Raises InputError: the repository cannot be fetched."""
    if not name.startswith(HUB):
        path = Path(name)
        if ":" in name or not path.is_dir():
            return None
        found = read_hugging_face_config(path)
        return None if found is None else found[0]
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository = name.removeprefix(HUB)
    try:
        hf_hub_download(repository, OPEN_CLIP_CONFIG)
        return None
    except (EntryNotFoundError, LocalEntryNotFoundError):
        pass  # no repository of open_clip
    except Exception:  # huggingface_hub raises many kinds; open_clip reports them
        return None
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*_FILES, "*.safetensors", "*/*.safetensors"]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=[*_FILES, "*.bin", "*/*.bin"]))
    except Exception as error:
        raise InputError(f"model: {name} cannot be fetched ({shortened(error)}).") from error
    found = read_hugging_face_config(folder)
    if found is None:
        raise InputError(f"model: {name} has neither {OPEN_CLIP_CONFIG} nor config.json.")
    return found[0]


def read_model_cfg(folder: Path) -> dict[str, Any]:
    """open_clip's model config of the model in a folder of transformers. Raises InputError: another kind of model, or a
    setting that open_clip's towers do not have."""
    check_config_folder(folder)
    config = _full_config(folder)
    vision, text, source = config["vision_config"], config["text_config"], folder / "config.json"
    build = {"clip": _clip_cfg, "siglip": _siglip_cfg, "chinese_clip": _chinese_clip_cfg}[config["model_type"]]
    model_cfg = build(config, vision, text, source)
    model_cfg["text_cfg"] |= {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "none"}}
    return check_model_cfg({**model_cfg, "custom_text": True}, source)


def read_preprocess_cfg(folder: Path) -> dict[str, Any]:
    """open_clip's preprocess_cfg of the image processor in a folder of transformers. Raises InputError: the file is
    missing, or images are prepared in a way that ImageSpec cannot hold."""
    path, config = _image_processor(folder)
    model_side = _full_config(folder)["vision_config"]["image_size"]
    crop = _sides(config.get("crop_size"), path)
    crops = bool(config.get("do_center_crop", crop is not None))
    size = _sides(config.get("size"), path, is_edge=crops)
    result = crop if crops else size
    problem = None
    if config.get("resample", 3) not in _RESAMPLE:
        problem = f"resample: {config['resample']}; allowed: 2 (bilinear) and 3 (bicubic)"
    elif not all(config.get(key, True) for key in ("do_resize", "do_rescale", "do_normalize")):
        problem = "do_resize, do_rescale and do_normalize must be true"
    elif abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        problem = f"rescale_factor: {config['rescale_factor']}; allowed: 1/255"
    elif result != (model_side, model_side):
        problem = f"images of {result} pixels, and the model in config.json wants {model_side} x {model_side}"
    elif crops and size not in ((model_side, None), (model_side, model_side)):
        problem = f"size: {config['size']} is cropped to {model_side}; allowed: a shortest edge of {model_side}"
    if problem:
        raise InputError(f"{path}: {problem}.")
    return {
        "size": result,
        "mean": config["image_mean"],
        "std": config["image_std"],
        "interpolation": _RESAMPLE[config.get("resample", 3)],
        "resize_mode": "shortest" if crops and size == (model_side, None) else "squash",
    }


def read_state(folder: Path) -> layouts.State:
    """The weights in a folder of transformers, float32, in mmrl's names. Raises InputError: no weights, a damaged or
    foreign file, or weights of another model."""
    config = _full_config(folder)
    state: layouts.State = {}
    for path in _weights_files(folder):
        state |= read_weights(path)
    try:
        converted = layouts.FROM_HUGGING_FACE[config["model_type"]](state)
    except KeyError as error:
        raise InputError(f"{folder}: the weights lack {error}, so they are not those of config.json.") from None
    return {name: tensor.float() for name, tensor in converted.items()}


def read_weights(path: Path) -> layouts.State:
    """The tensors of a .safetensors file, or of a file of torch.save, which is read without running code. Raises
    InputError: the file is damaged, or holds Python objects."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise unreadable_weights(path, error) from error
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def unreadable_weights(path: str | Path, error: Exception) -> InputError:
    """The error for a weights file that torch or safetensors refused."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) or "TorchScript" in text:
        return InputError(
            f"{path} holds Python objects or code besides tensors, which are never loaded; save its state_dict as "
            ".safetensors."
        )
    return InputError(f"{path} cannot be read as weights ({' '.join(text.split())[:200]}).")


def _weights_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(parse_json(index.read_text())["weight_map"].values()))
            paths = [path_inside(folder, one) for one in names]
            if missing := [path.name for path in paths if not path.is_file()]:
                raise InputError(f"{index}: its file {missing[0]} is missing.")
            return paths
    raise InputError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin.")


@cache
def _full_config(folder: Path) -> dict[str, Any]:
    """config.json with the defaults of its keys."""
    found = read_hugging_face_config(folder)
    config: dict[str, Any] = {} if found is None else found[1]
    kind = config.get("model_type")
    if kind == "siglip2":
        raise InputError(
            f"{folder}: a Siglip2Model takes images of any aspect ratio (NaFlex), which no tower here does; use a "
            "SigLIP 2 of one resolution, such as google/siglip2-base-patch16-256, which is a SiglipModel."
        )
    if kind not in layouts.FROM_HUGGING_FACE:
        raise InputError(
            f"{folder / 'config.json'}: model_type: {kind!r} is no image-text model that mmrl reads; allowed: "
            f"{', '.join(layouts.FROM_HUGGING_FACE)} (a text model can be text_cfg.hf_model_name of a model config)."
        )
    from transformers import AutoConfig

    with quiet():
        return AutoConfig.for_model(**config).to_dict()


def _activation(config: dict[str, Any], key: str, source: Path) -> tuple[bool, dict[str, str]]:
    name = config["hidden_act"]
    if name not in _ACTIVATIONS:
        raise InputError(f"{source}: {key}.hidden_act: {name!r}; allowed: {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


def _clip_cfg(config: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], source: Path) -> dict[str, Any]:
    quick, text_act = _activation(text, "text_config", source)
    if quick != _activation(vision, "vision_config", source)[0]:
        raise InputError(f"{source}: hidden_act: open_clip's towers have quick_gelu both or none.")
    text_cfg = _text_cfg(text, text_act)
    end = text["eos_token_id"]
    # Id 2 means the largest id (old configs); the last id of the vocabulary is the largest as well.
    if end not in (2, text["vocab_size"] - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": end}
    return {**_vit_cfg(config, vision, source), "text_cfg": text_cfg}


def _chinese_clip_cfg(
    config: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], source: Path
) -> dict[str, Any]:
    bert = _bert_folder(json.dumps({**text, "model_type": "bert", "architectures": ["BertModel"]}, sort_keys=True))
    text_cfg = {
        "context_length": min(_longest_text(source.parent), text["max_position_embeddings"]),
        "vocab_size": text["vocab_size"],
        "hf_model_name": bert,
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_proj_type": "linear",
    }
    return {**_vit_cfg(config, vision, source), "text_cfg": text_cfg}


def _siglip_cfg(config: dict[str, Any], vision: dict[str, Any], text: dict[str, Any], source: Path) -> dict[str, Any]:
    shape = tuple(
        vision[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    quick, image_act = _activation(vision, "vision_config", source)
    text_quick, text_act = _activation(text, "text_config", source)
    if shape not in _SIGLIP_SIZES or quick or text_quick or not vision.get("vision_use_head", True):
        raise InputError(
            f"{source}: vision_config: timm has no SigLIP tower of this kind; allowed: GELU, attention pooling and "
            f"(width, layers, heads, MLP width) of {', '.join(map(str, _SIGLIP_SIZES))}."
        )
    name = f"vit_{_SIGLIP_SIZES[shape]}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    vision_cfg = {
        "image_size": vision["image_size"],
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        "act_kwargs": image_act,
    }
    text_cfg = _text_cfg(text, text_act) | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    width = text.get("projection_size") or text["hidden_size"]
    return {"embed_dim": width, "init_logit_bias": -10, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _vit_cfg(config: dict[str, Any], vision: dict[str, Any], source: Path) -> dict[str, Any]:
    """All but `text_cfg` of a model with CLIP's image tower."""
    quick, act = _activation(vision, "vision_config", source)
    vision_cfg = _transformer_cfg(vision, act) | {
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "image_size": vision["image_size"],
    }
    return {"embed_dim": config["projection_dim"], "quick_gelu": quick, "vision_cfg": vision_cfg}


def _text_cfg(text: dict[str, Any], act: dict[str, str]) -> dict[str, Any]:
    return _transformer_cfg(text, act) | {
        "heads": text["num_attention_heads"],
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
    }


def _transformer_cfg(config: dict[str, Any], act: dict[str, str]) -> dict[str, Any]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    ratio = inner / width
    eps = config["layer_norm_eps"]
    return {
        "width": width,
        "layers": config["num_hidden_layers"],
        "mlp_ratio": ratio if int(width * ratio) == inner else (inner + 0.5) / width,
        **({"act_kwargs": act} if act.get("approximate") == "tanh" else {}),
        **({"norm_kwargs": {"eps": eps}} if eps != 1e-5 else {}),
    }


@cache
def _bert_folder(config: str) -> str:
    """A folder, kept until the process ends, with a text tower's config.json: open_clip takes it as a name only."""
    folder = tempfile.mkdtemp(prefix="mmrl-text-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (Path(folder) / "config.json").write_text(config)
    return folder


def _longest_text(folder: Path) -> int:
    """model_max_length of the tokenizer."""
    path = folder / "tokenizer_config.json"
    return int(parse_json(path.read_text()).get("model_max_length", 512)) if path.is_file() else 512


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if path.is_file():
            try:
                config = parse_json(path.read_text())
                config = config.get("image_processor", config)
                mean, std = config["image_mean"], config["image_std"]
                if len(mean) == len(std) == 3 and all(map(math.isfinite, [*mean, *std])) and min(std) > 0:
                    return path, config
            except (ValueError, KeyError, AttributeError, TypeError):
                pass
            raise InputError(f"{path} is damaged or not an image processor; save the processor again.")
    raise InputError(
        f"{folder} has no preprocessor_config.json, which says how images are prepared; save the processor to the "
        "folder: processor.save_pretrained(FOLDER)."
    )


def _sides(size: Any, path: Path, is_edge: bool = False) -> tuple[int, int | None] | None:
    """(height, width) of a size in a processor's config; (shortest edge, None). With `is_edge`, a bare number, as old
    files have it, is the shortest edge."""
    if isinstance(size, int):
        return size, None if is_edge else size
    if isinstance(size, dict) and isinstance(size.get("shortest_edge"), int):
        return size["shortest_edge"], None
    if isinstance(size, dict) and isinstance(size.get("height"), int) and isinstance(size.get("width"), int):
        return size["height"], size["width"]
    if size is None:
        return None
    raise InputError(f"{path}: size: {size!r}; allowed: shortest_edge, or height and width.")
