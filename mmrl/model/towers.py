"""Builds the image tower and the text tower of an open_clip model, and its tokenizer and image spec.

open_clip takes seconds to import, so it is imported inside the functions.
"""

import math
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from mmrl.errors import InputError
from mmrl.images.image_spec import ImageSpec
from mmrl.model import hugging_face
from mmrl.model.guards import damage_as_errors, library_code_only, quiet, shortened
from mmrl.model.lora import LoraConfig
from mmrl.model.registry import nearest, read_model_cfg, register, tokenizer_of
from mmrl.model.source import HUB, LOCAL
from mmrl.model.tokenizer import Tokenizer
from mmrl.settings import Settings, machine_field

Modality = Literal["image", "text"]
SIDES: tuple[Modality, ...] = ("image", "text")


class LastBlocksConfig(Settings):
    """How many of the last blocks of each tower train, with its final norm and its projection: transformer blocks, or
    stages of a network of stages such as ResNet. The rest is frozen. A number is for both towers."""

    image: int | None = Field(default=None, ge=0)
    """Blocks of the image tower. Default: all, and what is before them."""
    text: int | None = Field(default=None, ge=0)
    """Blocks of the text tower. Default: all, and what is before them."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return value if isinstance(value, dict | LastBlocksConfig) else {"image": value, "text": value}


class TowersConfig(Settings):
    """The architecture of both towers, and their initial weights."""

    name: str
    """An open_clip model config: its name (ViT-B-32, …, or mmrl-starter, which mmrl ships), a JSON file of that form,
    or `hf-hub:ORG/NAME` or `local-dir:PATH` as in open_clip. Or an encoder with its weights: a run, a checkpoint, an
    exported folder, or a CLIPModel, SiglipModel or ChineseCLIPModel of transformers, a folder or `hf-hub:ORG/NAME`."""
    towers: Literal["both", "image", "text"] = "both"
    """`text` or `image`: train that tower alone, on two texts (a question and its passage) or two images of an item, by
    loss.text_text or loss.image_image. The encoder then has this tower only."""
    pretrained: str | None = None
    """Initial weights: an open_clip tag (laion2b_s34b_b79k, downloaded once), a weights file (.safetensors, .pt, the
    epoch_N.pt of open_clip's trainer), or an encoder of the same architecture, such as a run."""
    pretrained_image: bool = False
    """Initialise a timm image tower with timm's weights (downloaded)."""
    pretrained_text: bool = False
    """Initialise a Hugging Face text tower with its own weights (downloaded, unless its name is a local folder)."""
    lock_image: bool = False
    """Freeze the image tower except for its projection (LiT, arXiv 2111.07991)."""
    lock_text: bool = False
    """Freeze the text tower except for its projection."""
    train_last_blocks: LastBlocksConfig = LastBlocksConfig()
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the weights (default: none)."""
    grad_checkpointing: bool = machine_field(False)
    """Recompute activations in the backward pass (gradient checkpointing): less memory, about a third more time."""

    @model_validator(mode="after")
    def _check(self) -> "TowersConfig":
        for side in SIDES:
            set_keys = {
                f"lock_{side}": getattr(self, f"lock_{side}"),
                f"train_last_blocks.{side}": getattr(self.train_last_blocks, side) is not None,
                "lora": self.adapts(side),
            }
            if len(chosen := [key for key, is_set in set_keys.items() if is_set]) > 1:
                raise ValueError(f"{' and '.join(chosen)}: each says what of the {side} tower trains; keep one of them")
            if side not in self.sides:
                self._check_absent(side)
        return self

    def _check_absent(self, side: Modality) -> None:
        """Raises ValueError if a key is about a tower that towers leaves out."""
        set_keys = {
            f"lock_{side}": getattr(self, f"lock_{side}"),
            f"pretrained_{side}": getattr(self, f"pretrained_{side}"),
            f"train_last_blocks.{side}": getattr(self.train_last_blocks, side) is not None,
            "lora.towers": self.lora is not None and self.lora.towers == side,
        }
        for key, is_set in set_keys.items():
            if is_set:
                raise ValueError(f"{key}: there is no {side} tower, since towers is {self.towers}; remove the key")

    @property
    def sides(self) -> tuple[Modality, ...]:
        """The towers that the model has."""
        return SIDES if self.towers == "both" else (self.towers,)

    def adapts(self, side: Modality) -> bool:
        return self.lora is not None and self.lora.towers in ("both", side)


class AbsentTower(nn.Module):
    """Stands for a tower that an encoder does not have. It has no weights."""

    def __init__(self, side: Modality) -> None:
        super().__init__()
        self._side = side

    def forward(self, _x: torch.Tensor) -> torch.Tensor:
        """Raises InputError."""
        raise InputError(f"model: this encoder has no {self._side} tower, so it cannot encode {self._side}s.")


@dataclass(frozen=True)
class Towers:
    """Towers with embeddings of equal width, an AbsentTower where there is none, and how their inputs are prepared."""

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
    grad_checkpointing: bool = False
    random: tuple[str, ...] = ()
    """What was initialised at random, e.g. "the image tower"."""
    projections: dict[Modality, torch.Tensor] = field(default_factory=dict)
    """Trained weights (D, D) of projections that mmrl added to towers; see `two_tower.added_projection`."""


def build(config: TowersConfig, require_weights: bool = False) -> Towers:
    """Builds the towers of a config with their initial weights. `bundle.initial_towers` opens stored encoders, too, and
    freezes what does not train.

    Args:
        require_weights: raise an error instead of initialising randomly.

    Raises:
        InputError: an unknown name, a JSON file that is not a model config, weights that are missing or do not fit.
    """
    import open_clip

    if folder := hugging_face.find_folder(config.name):
        return _build_hugging_face(config, folder)
    name = register(config.name)
    model_cfg = read_model_cfg(config.name)
    with quiet(), library_code_only():
        try:
            model = open_clip.create_model(
                name,
                pretrained=_existing_weights(name, config.pretrained),
                force_custom_text=True,
                pretrained_image=config.pretrained_image,
                pretrained_text=config.pretrained_text,
                require_pretrained=require_weights,
            )
            tokenise = tokenizer_of(name, model_cfg)
            spec = ImageSpec.from_open_clip(open_clip.get_model_preprocess_cfg(model))
        except InputError:
            raise
        except pickle.UnpicklingError as error:
            raise hugging_face.unreadable_weights(config.pretrained or config.name, error) from error
        except Exception as error:  # open_clip, torch and timm raise many kinds for a wrong config or file
            reason = shortened(error)
            raise InputError(f"model.name {config.name!r}, model.pretrained {config.pretrained!r}: {reason}") from error
    state = model.state_dict()
    towers: dict[Modality, nn.Module] = {"image": model.visual, "text": model.text}  # pyright: ignore[reportAssignmentType]
    for modality, tower in towers.items():
        _adjust(tower, model_cfg, modality)
    return Towers(
        image=towers["image"],
        text=towers["text"],
        logit_scale=math.exp(state["logit_scale"]),
        logit_bias=float(state["logit_bias"]) if "logit_bias" in state else None,
        embed_dim=model_cfg["embed_dim"],
        image_spec=spec,
        tokenise=tokenise,
        model_cfg=model_cfg,
        random=_random_parts(config, model_cfg),
    )


def _build_hugging_face(config: TowersConfig, folder: Path) -> Towers:
    """The towers of a model in a folder of transformers."""
    model_cfg = read_model_cfg(config.name)
    with damage_as_errors(folder):
        spec = ImageSpec.from_open_clip(hugging_face.read_preprocess_cfg(folder))
        state = hugging_face.read_state(folder)
    tokenise = tokenizer_of(config.name, model_cfg)
    towers: dict[Modality, nn.Module] = {}
    for modality in SIDES:
        towers[modality] = _built_or_refused(config.name, model_cfg, modality)
        prefix = f"{modality}.tower."
        weights = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
        try:
            towers[modality].load_state_dict(weights)
        except RuntimeError as error:
            raise InputError(f"{folder}: the weights do not fit config.json: {shortened(error)}") from None
    bias = state.get("logit_bias")
    return Towers(
        image=towers["image"],
        text=towers["text"],
        logit_scale=state["log_logit_scale"].exp().item(),
        logit_bias=None if bias is None else bias.item(),
        embed_dim=model_cfg["embed_dim"],
        image_spec=spec,
        tokenise=tokenise,
        model_cfg=model_cfg,
    )


def build_empty(name: str) -> dict[Modality, nn.Module]:
    """Builds the towers of `model.name` without loading weights: for counting parameters, memory and operations. Raises
    InputError: an unknown name or a JSON file that is not a model config."""
    model_cfg = read_model_cfg(name)
    return {"image": _built_or_refused(name, model_cfg, "image"), "text": _built_or_refused(name, model_cfg, "text")}


def _built_or_refused(name: str, model_cfg: dict[str, Any], modality: Modality) -> nn.Module:
    try:
        return build_tower(model_cfg, modality, model_cfg["embed_dim"])
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        raise InputError(f"model.name {name!r}: the {modality} tower cannot be built: {shortened(error)}") from error


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1,000 classes, in the order of their indices."""
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def imagenet_templates(class_name: str, simple: bool = False) -> list[str]:
    """OpenAI's 80 prompts for a class, or with `simple` 7 of them, such as "a photo of a {class_name}."."""
    import open_clip

    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES if simple else open_clip.OPENAI_IMAGENET_TEMPLATES
    return [template(class_name) for template in templates]


def build_tower(model_cfg: dict[str, Any], modality: Modality, embed_dim: int) -> nn.Module:
    """Builds one tower with embeddings of `embed_dim` dims, without loading weights."""
    from open_clip import model as open_clip_model

    quick_gelu = model_cfg.get("quick_gelu", False)
    with quiet():
        if modality == "image":
            vision_cfg = open_clip_model.CLIPVisionCfg(**{**model_cfg["vision_cfg"], "timm_model_pretrained": False})
            tower = open_clip_model._build_vision_tower(embed_dim, vision_cfg, quick_gelu)
        else:
            text_cfg = open_clip_model.CLIPTextCfg(**{**model_cfg["text_cfg"], "hf_model_pretrained": False})
            tower = open_clip_model._build_text_tower(embed_dim, text_cfg, quick_gelu)
    _adjust(tower, model_cfg, modality)
    return tower


def _adjust(tower: nn.Module, model_cfg: dict[str, Any], modality: Modality) -> None:
    """Leaves out the tokens that CoCa's towers return as well, and sets the GELU of a timm tower as act_kwargs says,
    which open_clip applies to its own towers only."""
    if getattr(tower, "output_tokens", False):
        vars(tower)["output_tokens"] = False
    act_kwargs = model_cfg["vision_cfg"].get("act_kwargs")
    if modality == "image" and act_kwargs and hasattr(tower, "trunk"):
        for module in [*tower.modules()]:
            for name, child in module.named_children():
                if type(child).__name__ in ("GELU", "GELUTanh"):
                    setattr(module, name, nn.GELU(**act_kwargs))


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


def _existing_weights(name: str, pretrained: str | None) -> str | None:
    """Raises InputError if `pretrained` is neither a file nor one of the model's tags."""
    import open_clip

    if pretrained is None or Path(pretrained).is_file():
        return pretrained
    if Path(pretrained).is_dir():
        raise InputError(f"model.pretrained: {pretrained} is a folder; give a weights file, or an encoder's folder.")
    if "/" in pretrained or "." in pretrained:
        raise InputError(f"model.pretrained: the file {pretrained} does not exist.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.get_pretrained_cfg(name, pretrained):
        allowed = nearest(pretrained, tags) if tags else "it has none; give a weights file"
        raise InputError(f"model.pretrained: {name} has no weights {pretrained!r}; {allowed}.")
    return pretrained


def _random_parts(config: TowersConfig, model_cfg: dict[str, Any]) -> tuple[str, ...]:
    """What `build` initialised at random."""
    if config.pretrained or config.name.startswith((HUB, LOCAL)):
        return ()
    loaded: dict[Modality, bool] = {
        "image": config.pretrained_image and bool(model_cfg["vision_cfg"].get("timm_model_name")),
        "text": config.pretrained_text and bool(model_cfg["text_cfg"].get("hf_model_name")),
    }
    has_projection = {one: projection_axes(model_cfg, one) is not None for one in loaded}
    return tuple(
        f"the {one} {'projection' if loaded[one] else 'tower'}"
        for one in loaded
        if not loaded[one] or has_projection[one]
    )
