"""Builds the image tower and the text tower of an open_clip model, and its tokenizer and image spec.

open_clip takes seconds to import, so it is imported inside the functions.
"""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmrl.errors import InputError, did_you_mean
from mmrl.images.image_spec import ImageSpec
from mmrl.model.guards import library_code_only, quiet
from mmrl.model.model_cfg import check_config_folder, check_model_cfg
from mmrl.model.tokenizer import Tokenizer
from mmrl.settings import Settings, machine_field

Modality = Literal["image", "text"]

# Model configs of mmrl, in open_clip's format and found by name like open_clip's.
OWN_CONFIGS = Path(__file__).parent / "open_clip_configs"


class TowersConfig(Settings):
    """The architecture of both towers, and their initial weights."""

    name: str
    """An open_clip model config: its name (ViT-B-32, …, or mmrl-starter, which mmrl ships), a JSON file of that form,
    or `hf-hub:ORG/NAME` or `local-dir:PATH` as in open_clip."""
    pretrained: str | None = None
    """An open_clip tag (laion2b_s34b_b79k, downloaded once) or a local weights file (.safetensors, .pt)."""
    pretrained_image: bool = False
    """Initialise a timm image tower with timm's weights (downloaded)."""
    pretrained_text: bool = False
    """Initialise a Hugging Face text tower with its own weights (downloaded, unless its name is a local folder)."""
    lock_image: bool = False
    """Freeze the image tower except for its projection (LiT, arXiv 2111.07991)."""
    lock_text: bool = False
    """Freeze the text tower except for its projection."""
    grad_checkpointing: bool = machine_field(False)
    """Recompute activations in the backward pass (gradient checkpointing): less memory, about a third more time."""


@dataclass(frozen=True)
class Towers:
    """Two towers with embeddings of equal width, and how their inputs are prepared."""

    image: nn.Module
    text: nn.Module
    logit_scale: float
    """The multiplier of the loaded weights, already exponentiated."""
    logit_bias: float | None
    """The sigmoid loss's bias; None if the loaded weights have none."""
    embed_dim: int
    image_spec: ImageSpec
    tokenise: Tokenizer
    model_cfg: dict[str, Any]
    """open_clip's model config, from which both towers can be rebuilt."""
    grad_checkpointing: bool
    """Whether the backward pass recomputes activations."""


def build(config: TowersConfig, require_weights: bool = False) -> Towers:
    """Builds the towers of a config with their initial weights.

    Args:
        require_weights: raise an error instead of initialising randomly.

    Raises:
        InputError: an unknown name, a JSON file that is not a model config, weights that are missing or do not fit.
    """
    import open_clip

    name = _register(config.name)
    model_cfg = read_model_cfg(config.name)
    with quiet(), library_code_only():
        try:
            model = open_clip.create_model(
                name,
                pretrained=_existing_weights(config.pretrained),
                force_custom_text=True,
                pretrained_image=config.pretrained_image,
                pretrained_text=config.pretrained_text,
                require_pretrained=require_weights,
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, torch and timm raise many kinds for a wrong config or file
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"model.name {config.name!r}, model.pretrained {config.pretrained!r}: {reason}") from error
    state = model.state_dict()
    towers: dict[Modality, nn.Module] = {"image": model.visual, "text": model.text}  # pyright: ignore[reportAssignmentType]
    _lock(towers, model_cfg, config)
    if config.grad_checkpointing:
        _enable_grad_checkpointing(towers)
    return Towers(
        image=towers["image"],
        text=towers["text"],
        logit_scale=math.exp(state["logit_scale"]),
        logit_bias=float(state["logit_bias"]) if "logit_bias" in state else None,
        embed_dim=model_cfg["embed_dim"],
        image_spec=ImageSpec.from_open_clip(open_clip.get_model_preprocess_cfg(model)),
        tokenise=Tokenizer(tokenizer),
        model_cfg=model_cfg,
        grad_checkpointing=config.grad_checkpointing,
    )


def build_empty(config: TowersConfig) -> dict[Modality, nn.Module]:
    """Builds the towers of a config without loading weights: for counting parameters, memory and operations.

    Raises:
        InputError: an unknown name or a JSON file that is not a model config.
    """
    model_cfg = read_model_cfg(config.name)
    try:
        built: dict[Modality, nn.Module] = {
            "image": build_tower(model_cfg, "image", model_cfg["embed_dim"]),
            "text": build_tower(model_cfg, "text", model_cfg["embed_dim"]),
        }
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        raise InputError(f"model.name {config.name!r}: {' '.join(str(error).split())}") from error
    _lock(built, model_cfg, config)
    if config.grad_checkpointing:
        _enable_grad_checkpointing(built)
    return built


def build_tokenizer(name: str) -> Tokenizer:
    """Builds the tokenizer of a model config, without the towers.

    Raises:
        InputError: as read_model_cfg; or the Hugging Face tokenizer cannot be loaded.
    """
    import open_clip

    read_model_cfg(name)
    with quiet(), library_code_only():
        try:
            return Tokenizer(open_clip.get_tokenizer(_register(name)))
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"model.name {name!r}: its tokenizer cannot be loaded ({reason}).") from error


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1,000 classes, in the order of their indices."""
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def imagenet_templates(class_name: str, simple: bool = False) -> list[str]:
    """OpenAI's 80 prompts for a class, or with `simple` 7 of them, such as "a photo of a {class_name}."."""
    import open_clip

    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES if simple else open_clip.OPENAI_IMAGENET_TEMPLATES
    return [template(class_name) for template in templates]


def input_side(model_cfg: dict[str, Any]) -> int:
    """The shorter side of the model's input images, in pixels."""
    size = model_cfg["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else min(size)


def read_model_cfg(name: str) -> dict[str, Any]:
    """Reads and checks open_clip's config of a model; the text tower is a separate module (`custom_text`).

    Every model that is opened by name goes through this check before open_clip, timm or transformers see its config.

    Raises:
        InputError: an unknown name, a JSON file that is not a model config, or a key that is not allowed.
    """
    import open_clip

    try:
        model_cfg = open_clip.get_model_config(_register(name))
    except (RuntimeError, OSError, ValueError, AttributeError) as error:  # AttributeError: JSON that is not an object
        raise InputError(f"model.name {name!r}: {error}") from error
    model_cfg = check_model_cfg(model_cfg, f"model.name {name!r}")
    text_cfg = model_cfg["text_cfg"]
    if "siglip" in Path(name).stem.lower() and ":" not in name and not text_cfg.get("hf_tokenizer_name"):
        raise InputError(  # for such a file name open_clip would download a tokenizer that the config does not name
            f"model.name: {name} has 'siglip' in its name, so it must name its tokenizer as text_cfg.hf_tokenizer_name."
        )
    named = [text_cfg.get("hf_model_name"), text_cfg.get("hf_tokenizer_name"), name.removeprefix("local-dir:")]
    for folder in filter(None, named):
        if Path(folder).is_dir():
            check_config_folder(Path(folder))
    return {**model_cfg, "custom_text": True}


def build_tower(model_cfg: dict[str, Any], modality: Modality, embed_dim: int) -> nn.Module:
    """Builds one tower with embeddings of `embed_dim` dims, without loading weights."""
    from open_clip import model as open_clip_model

    quick_gelu = model_cfg.get("quick_gelu", False)
    with quiet():
        if modality == "image":
            vision_cfg = open_clip_model.CLIPVisionCfg(**{**model_cfg["vision_cfg"], "timm_model_pretrained": False})
            return open_clip_model._build_vision_tower(embed_dim, vision_cfg, quick_gelu)
        text_cfg = open_clip_model.CLIPTextCfg(**{**model_cfg["text_cfg"], "hf_model_pretrained": False})
        return open_clip_model._build_text_tower(embed_dim, text_cfg, quick_gelu)


def projection_axes(model_cfg: dict[str, Any], modality: Modality) -> dict[str, int] | None:
    """The weights of a tower's final projection: {name: the axis that indexes embedding dims}.

    Truncating these axes to d entries truncates the embedding to its first d dims. None if the tower has no such
    projection, or one whose inner layers depend on the embedding's width as well (an MLP). Found by building the tower
    at two widths on the meta device and comparing shapes, since names differ between architectures.
    """
    embed_dim = model_cfg["embed_dim"]
    try:
        with torch.device("meta"):
            full = build_tower(model_cfg, modality, embed_dim).state_dict()
            half = build_tower(model_cfg, modality, max(embed_dim // 2, 1)).state_dict()
    except (ValueError, RuntimeError, AssertionError):
        return None
    axes: dict[str, int] = {}
    for name in full:
        differ = [i for i, (m, n) in enumerate(zip(full[name].shape, half[name].shape, strict=True)) if m != n]
        if not differ:
            continue
        if len(differ) > 1 or full[name].shape[differ[0]] != embed_dim:
            return None
        axes[name] = differ[0]
    return axes or None


def save_text_config(text_tower: nn.Module, folder: Path) -> None:
    """Saves a Hugging Face text tower's config.json, which is needed to build it offline; nothing for other towers."""
    config = getattr(text_tower, "config", None)
    if config is not None:
        config.save_pretrained(folder)


def with_local_text_config(model_cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of the model config in which a Hugging Face text tower's name is `folder`, written by `save_text_config`.

    Raises:
        InputError: config.json is missing or names code to run.
    """
    if not model_cfg["text_cfg"].get("hf_model_name"):
        return model_cfg
    if not (folder / "config.json").is_file():  # transformers would read the path as the name of a hub repository
        raise InputError(f"{folder / 'config.json'} is missing: it describes the text tower; export the encoder again.")
    check_config_folder(folder)
    return {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], "hf_model_name": str(folder)}}


def _register(name: str) -> str:
    """Registers mmrl's configs or a user's JSON file with open_clip; returns its name there.

    Raises:
        InputError: an unknown name, or a JSON file that is missing or not a model config.
    """
    import open_clip

    if ":" in name:
        return name
    path = Path(name)
    if path.suffix == ".json":
        try:
            settings = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"model.name: the file {name} does not exist.") from None
        except json.JSONDecodeError as error:
            raise InputError(f"model.name: {name} is not JSON ({error}).") from None
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(settings)
        if missing:
            raise InputError(f"model.name: {name} lacks {', '.join(sorted(missing))}; see open_clip's model configs.")
        open_clip.add_model_config(path)
        return path.stem
    if name not in open_clip.list_models():
        open_clip.add_model_config(OWN_CONFIGS)
    if name not in open_clip.list_models():
        raise InputError(f"model.name: open_clip has no model {name!r}.{did_you_mean(name, open_clip.list_models())}")
    return name


def _existing_weights(pretrained: str | None) -> str | None:
    if pretrained is not None and ("/" in pretrained or "." in pretrained) and not Path(pretrained).is_file():
        raise InputError(f"model.pretrained: the file {pretrained} does not exist.")
    return pretrained


def _lock(towers: dict[Modality, nn.Module], model_cfg: dict[str, Any], config: TowersConfig) -> None:
    """Freezes the locked towers except for their projections, which have to learn nested dims."""
    from open_clip.utils import freeze_batch_norm_2d

    locked: dict[Modality, bool] = {"image": config.lock_image, "text": config.lock_text}
    for modality, tower in towers.items():
        if locked[modality]:
            projection = projection_axes(model_cfg, modality) or {}
            for name, parameter in tower.named_parameters():
                parameter.requires_grad = name in projection
            freeze_batch_norm_2d(tower)


def _enable_grad_checkpointing(towers: dict[Modality, nn.Module]) -> None:
    """Raises InputError if a tower does not support it."""
    from open_clip.modified_resnet import ModifiedResNet

    for modality, tower in towers.items():
        # timm's own module: open_clip's wrapper ignores models that do not support it.
        trunk: Any = getattr(tower, "trunk", tower)
        try:
            if isinstance(tower, ModifiedResNet):
                raise ValueError("ModifiedResNet accepts the call and ignores it")
            with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # transformers renamed the method
                trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, TypeError, ValueError):
            kind = type(getattr(trunk, "transformer", trunk) if modality == "text" else trunk).__name__
            raise InputError(
                f"model.grad_checkpointing: the {modality} tower, a {kind}, cannot recompute its activations; set it "
                "to false, and set a smaller train.micro_batch to save memory."
            ) from None
