"""The only door to open_clip and transformers: a model's name -> two towers, image spec, tokenise callable.

open_clip takes seconds to import, so this file imports it where it is used.
"""

import gzip
import json
import logging
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmrl.errors import InputError, did_you_mean
from mmrl.images.image_spec import ImageSpec
from mmrl.model.model_cfg import check_config_folder, check_model_cfg
from mmrl.settings import Settings, machine

Side = Literal["image", "text"]

_BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
# open_clip's own unpacks to 3.2 MB.
_MOST_BPE_BYTES = 32 << 20
# Model configs of our own, in open_clip's format and found by name like open_clip's.
OWN_CONFIGS = Path(__file__).parent / "open_clip_configs"


class TowersConfig(Settings):
    """Which towers, and where their first weights come from."""

    name: str
    """An open_clip model config: its name (ViT-B-32, …, or the shipped mmrl-starter), or a JSON file of that form.
    `hf-hub:` and `local-dir:` names work as in open_clip."""
    pretrained: str | None = None
    """An open_clip tag (laion2b_s34b_b79k, fetched once) or a local weights file (.safetensors, .pt)."""
    pretrained_image: bool = False
    """Start a timm image tower from timm's own weights (fetched)."""
    pretrained_text: bool = False
    """Start a Hugging Face text tower from its own weights (fetched, unless its name is a local folder)."""
    lock_image: bool = False
    """Keep the image tower as it is, but for its projection (LiT, arXiv 2111.07991)."""
    lock_text: bool = False
    grad_checkpointing: bool = machine(False)
    """Recompute activations in the backward pass: less memory, about a third more time."""


class Tokenizer:
    """A list of texts -> int64 (M, L). A class, so that data workers can pickle it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(texts)

    @property
    def context_length(self) -> int:
        """So many tokens of a text are read; the others are cut off."""
        return self.tokenizer.context_length

    def lengths(self, texts: list[str]) -> list[int]:
        """The tokens of each text with the marks around it, before anything is cut off."""
        from open_clip import tokenizer as kinds

        if isinstance(self.tokenizer, kinds.SimpleTokenizer):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        adds_marks = self.tokenizer.tokenizer_mode != "clips"  # which come from open_clip there, three of them
        clean = [self.tokenizer.clean_fn(text) for text in texts]
        ids = self.tokenizer.tokenizer(clean, add_special_tokens=adds_marks, verbose=False)["input_ids"]
        return [len(one) + (0 if adds_marks else 3) for one in ids]

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the tokenizer's files; returns what `load_tokenise` needs beside them.

        Raises:
            InputError: a tokenizer of another kind than open_clip's BPE and Hugging Face's.
        """
        from open_clip import tokenizer as kinds

        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.tokenizer, kinds.SimpleTokenizer):
            shutil.copyfile(kinds.default_bpe(), folder / _BPE_FILE)
            kind = "open_clip_bpe"
        elif isinstance(self.tokenizer, kinds.HFTokenizer):
            self.tokenizer.save_pretrained(folder)
            kind = "huggingface"
        else:
            raise InputError(
                f"tokenizer: a {type(self.tokenizer).__name__} cannot be stored; name a Hugging Face tokenizer as "
                "text_cfg.hf_tokenizer_name in the model config."
            )
        return {"kind": kind, "context_length": self.tokenizer.context_length}


@dataclass(frozen=True)
class Towers:
    """Two encoders of equal width, and how their inputs are made."""

    image: nn.Module
    text: nn.Module
    logit_scale: float
    """The multiplier (already exponentiated) that the towers came with."""
    logit_bias: float | None
    """The sigmoid loss's bias, where the towers came with one."""
    embed_dim: int
    image_spec: ImageSpec
    tokenise: Tokenizer
    model_cfg: dict[str, Any]
    """open_clip's model config, from which both towers can be built again."""
    grad_checkpointing: bool
    """Whether the backward pass recomputes activations."""


def build(config: TowersConfig) -> Towers:
    """The towers that a config names, with their first weights.

    Raises:
        InputError: an unknown name, a JSON file that is no model config, weights that are not there or do not fit.
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
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, torch and timm raise many kinds for a wrong config or file
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"model.name {config.name!r}, model.pretrained {config.pretrained!r}: {reason}") from error
    state = model.state_dict()
    towers: dict[Side, nn.Module] = {"image": model.visual, "text": model.text}  # pyright: ignore[reportAssignmentType]
    _lock(towers, model_cfg, config)
    if config.grad_checkpointing:
        _checkpoint_gradients(towers)
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


def build_empty(config: TowersConfig) -> dict[Side, nn.Module]:
    """The towers of a config, locked and recomputing as it says, with unset weights: for counting.

    Raises:
        InputError: as `build`, but for weights.
    """
    model_cfg = read_model_cfg(config.name)
    try:
        built: dict[Side, nn.Module] = {
            "image": build_tower(model_cfg, "image", model_cfg["embed_dim"]),
            "text": build_tower(model_cfg, "text", model_cfg["embed_dim"]),
        }
    except (ValueError, RuntimeError, AssertionError, OSError) as error:
        raise InputError(f"model.name {config.name!r}: {' '.join(str(error).split())}") from error
    _lock(built, model_cfg, config)
    if config.grad_checkpointing:
        _checkpoint_gradients(built)
    return built


def tokenise_of(name: str) -> Tokenizer:
    """The tokenizer of a model config, without its towers.

    Raises:
        InputError: as read_model_cfg; or a Hugging Face tokenizer that cannot be had.
    """
    import open_clip

    read_model_cfg(name)
    with quiet(), library_code_only():
        try:
            return Tokenizer(open_clip.get_tokenizer(_register(name)))
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"model.name {name!r}: its tokenizer cannot be had ({reason}).") from error


def imagenet_classes() -> list[str]:
    """The names of ImageNet's 1,000 classes, in the order of their numbers."""
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def imagenet_templates(place: str, simple: bool = False) -> list[str]:
    """What is said of a picture of a class, `place` standing for its name: OpenAI's 80 sentences, or 7 of them."""
    import open_clip

    templates = open_clip.SIMPLE_IMAGENET_TEMPLATES if simple else open_clip.OPENAI_IMAGENET_TEMPLATES
    return [template(place) for template in templates]


def input_side(model_cfg: dict[str, Any]) -> int:
    """The shorter side of the pictures that a model takes, in pixels."""
    size = model_cfg["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else min(size)


def read_model_cfg(name: str) -> dict[str, Any]:
    """open_clip's config of a model, with the text tower as a module of its own. Every command that opens a model by
    name reads its config here first, so that no key is handed on unchecked.

    Raises:
        InputError: an unknown name, a JSON file that is no model config, or one with a key that is not allowed.
    """
    import open_clip

    try:
        model_cfg = open_clip.get_model_config(_register(name))
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"model.name {name!r}: {error}") from error
    model_cfg = check_model_cfg(model_cfg, f"model.name {name!r}")
    text_cfg = model_cfg["text_cfg"]
    if "siglip" in Path(name).stem.lower() and ":" not in name and not text_cfg.get("hf_tokenizer_name"):
        raise InputError(  # by such a file name alone, open_clip would fetch a tokenizer from an address of its own
            f"model.name: {name} has 'siglip' in its name, so it must name its tokenizer as text_cfg.hf_tokenizer_name."
        )
    named = [text_cfg.get("hf_model_name"), text_cfg.get("hf_tokenizer_name"), name.removeprefix("local-dir:")]
    for folder in filter(None, named):
        if Path(folder).is_dir():
            check_config_folder(Path(folder))
    return {**model_cfg, "custom_text": True}


def build_tower(model_cfg: dict[str, Any], side: Side, embed_dim: int) -> nn.Module:
    """One tower of a known config, `embed_dim` wide, with unset weights: for loading."""
    from open_clip import model as open_clip_model

    quick_gelu = model_cfg.get("quick_gelu", False)
    with quiet():
        if side == "image":
            vision_cfg = open_clip_model.CLIPVisionCfg(**{**model_cfg["vision_cfg"], "timm_model_pretrained": False})
            return open_clip_model._build_vision_tower(embed_dim, vision_cfg, quick_gelu)
        text_cfg = open_clip_model.CLIPTextCfg(**{**model_cfg["text_cfg"], "hf_model_pretrained": False})
        return open_clip_model._build_text_tower(embed_dim, text_cfg, quick_gelu)


def projection_axes(model_cfg: dict[str, Any], side: Side) -> dict[str, int] | None:
    """The tensors of a tower that end in the embedding, each with the axis that runs along it.

    Cutting these axes to their first d entries cuts the embedding to its first d numbers. None if the tower has no
    such projection, or one whose inner layers depend on the embedding's width as well (an MLP). Found by
    construction, not by name: the same tower is built at two widths, without memory, and compared.
    """
    embed_dim = model_cfg["embed_dim"]
    try:
        with torch.device("meta"):
            full = build_tower(model_cfg, side, embed_dim).state_dict()
            half = build_tower(model_cfg, side, max(embed_dim // 2, 1)).state_dict()
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


def load_tokenise(folder: Path, info: dict[str, Any], model_cfg: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote, from its files alone: no network, no code of the folder's.

    Raises:
        InputError: a file is missing, too large, damaged, or names code to run.
    """
    from open_clip import tokenizer as kinds

    settings = model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    length = info["context_length"]
    check_config_folder(folder)
    try:
        if info["kind"] == "open_clip_bpe":
            with gzip.open(folder / _BPE_FILE) as file:
                if len(file.read(_MOST_BPE_BYTES + 1)) > _MOST_BPE_BYTES:
                    raise ValueError(f"{_BPE_FILE} unpacks to more than {_MOST_BPE_BYTES:,} bytes")
            return Tokenizer(kinds.SimpleTokenizer(str(folder / _BPE_FILE), context_length=length, **settings))
        if not folder.is_dir():  # transformers would take its path for the name of a hub repository
            raise FileNotFoundError("the folder is missing")
        mode = model_cfg["text_cfg"].get("tokenizer_mode")
        with library_code_only(), offline():
            theirs = kinds.HFTokenizer(
                str(folder),
                context_length=length,
                tokenizer_mode=mode,
                trust_remote_code=False,
                local_files_only=True,
                **settings,
            )
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason}); export the encoder again.") from error
    return Tokenizer(theirs)


def save_text_config(text_tower: nn.Module, folder: Path) -> None:
    """A Hugging Face text tower's own config, without which it cannot be built offline; nothing for others."""
    config = getattr(text_tower, "config", None)
    if config is not None:
        config.save_pretrained(folder)


def with_local_text_config(model_cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The model config, with the name of a Hugging Face text tower replaced by the folder of `save_text_config`."""
    if not model_cfg["text_cfg"].get("hf_model_name"):
        return model_cfg
    if not (folder / "config.json").is_file():  # transformers would take its path for the name of a hub repository
        raise InputError(f"{folder / 'config.json'} is missing: it describes the text tower; export the encoder again.")
    check_config_folder(folder)
    return {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], "hf_model_name": str(folder)}}


def _register(name: str) -> str:
    """Makes open_clip know our configs and a user's JSON file; returns the name that open_clip knows it by."""
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


def _lock(towers: dict[Side, nn.Module], model_cfg: dict[str, Any], config: TowersConfig) -> None:
    """Locks a tower but not its projection, which must learn to nest."""
    from open_clip.utils import freeze_batch_norm_2d

    sides: dict[Side, bool] = {"image": config.lock_image, "text": config.lock_text}
    for side, locked in sides.items():
        if locked:
            projection = projection_axes(model_cfg, side) or {}
            for name, parameter in towers[side].named_parameters():
                parameter.requires_grad = name in projection
            freeze_batch_norm_2d(towers[side])


def _checkpoint_gradients(towers: dict[Side, nn.Module]) -> None:
    from open_clip.modified_resnet import ModifiedResNet

    for side, tower in towers.items():
        trunk: Any = getattr(tower, "trunk", tower)  # timm's own: open_clip's wrapper would go on without
        try:
            if isinstance(tower, ModifiedResNet):
                raise ValueError("it takes the switch and does nothing")
            with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # transformers has a new name for it
                trunk.set_grad_checkpointing(True)
        except (AttributeError, AssertionError, TypeError, ValueError):
            kind = type(getattr(trunk, "transformer", trunk) if side == "text" else trunk).__name__
            raise InputError(
                f"model.grad_checkpointing: the {side} tower, a {kind}, cannot recompute its activations; set it to "
                "false, and take a smaller train.micro_batch for memory."
            ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip reports each step of a build, and warns of random weights even where they are wanted."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


@contextmanager
def library_code_only() -> Iterator[None]:
    """Has transformers refuse Python files that lie in a model's folder or hub repository. By itself it asks on the
    terminal whether to run them."""
    from transformers import dynamic_module_utils

    seconds, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


@contextmanager
def offline() -> Iterator[None]:
    """No hub is asked, whatever a name says; what its cache holds is used. For names that a stored file gives, which
    its reader did not choose."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
