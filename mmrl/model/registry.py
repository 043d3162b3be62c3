"""Finds a model config and its tokenizer by name: of open_clip, of mmrl, a JSON file, a repository, an encoder on disk.

open_clip takes seconds to import, so it is imported inside the functions.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from mmrl.errors import InputError
from mmrl.model import hugging_face
from mmrl.model.guards import damage_as_errors, library_code_only, quiet, shortened
from mmrl.model.manifest import TEXT_MODEL, TOKENIZER, check_files, read_manifest
from mmrl.model.model_cfg import check_config_folder, check_model_cfg
from mmrl.model.source import HUB, LOCAL, StoredModel, parse_name
from mmrl.model.tokenizer import Tokenizer, load_tokenizer
from mmrl.output.files import parse_json

# Model configs of mmrl, in open_clip's format and found by name like open_clip's.
OWN_CONFIGS = Path(__file__).parent / "open_clip_configs"


def read_model_cfg(name: str) -> dict[str, Any]:
    """Reads and checks open_clip's config of a model; the text tower is a separate module (`custom_text`).

    Every model that is opened by name goes through this check before open_clip, timm or transformers see its config.

    Raises:
        InputError: an unknown name, a JSON file that is not a model config, or a key that is not allowed.
    """
    import open_clip

    source = parse_name(name)
    if isinstance(source, StoredModel):
        manifest = read_manifest(source.folder)
        check_files(source.folder, manifest, ())
        stored_cfg = with_local_text_config(manifest["model_cfg"], source.folder / TEXT_MODEL)
        return {**stored_cfg, "embed_dim": manifest["dim"]}
    name = source.name
    if folder := hugging_face.find_folder(name):
        with damage_as_errors(folder):
            return hugging_face.read_model_cfg(folder)
    registered = register(name)
    try:
        model_cfg = open_clip.get_model_config(registered)
    except (RuntimeError, OSError, ValueError, AttributeError) as error:  # AttributeError: JSON that is not an object
        raise InputError(f"model.name {name!r}: {error}") from error
    model_cfg = check_model_cfg(model_cfg, f"model.name {name!r}")
    # Of CoCa the contrastive towers are used, without the tokens and the decoder for captions.
    model_cfg.pop("multimodal_cfg", None)
    text_cfg = model_cfg["text_cfg"]
    for section in (model_cfg["vision_cfg"], text_cfg):
        section.pop("output_tokens", None)
    if "siglip" in Path(name).stem.lower() and ":" not in name and not text_cfg.get("hf_tokenizer_name"):
        raise InputError(  # for such a file name open_clip would download a tokenizer that the config does not name
            f"model.name: {name} has 'siglip' in its name, so it must name its tokenizer as text_cfg.hf_tokenizer_name."
        )
    named = [text_cfg.get("hf_model_name"), text_cfg.get("hf_tokenizer_name"), name.removeprefix(LOCAL)]
    for folder in filter(None, named):
        if Path(folder).is_dir():
            check_config_folder(Path(folder))
    return {**model_cfg, "custom_text": True}


def input_side(model_cfg: dict[str, Any]) -> int:
    """The shorter side of the model's input images, in pixels."""
    size = model_cfg["vision_cfg"].get("image_size", 224)
    return size if isinstance(size, int) else min(size)


def build_tokenizer(name: str) -> Tokenizer:
    """Builds the tokenizer of a model config, without the towers. Raises InputError: as read_model_cfg; or the Hugging
    Face tokenizer cannot be loaded."""
    model_cfg = read_model_cfg(name)
    source = parse_name(name)
    if isinstance(source, StoredModel):
        return load_tokenizer(source.folder / TOKENIZER, read_manifest(source.folder)["tokenizer"], model_cfg)
    name = source.name
    if hugging_face.find_folder(name):
        return tokenizer_of(name, model_cfg)
    with quiet(), library_code_only():
        try:
            return tokenizer_of(register(name), model_cfg)
        except Exception as error:  # transformers raises many kinds
            raise InputError(f"model.name {name!r}: its tokenizer cannot be loaded ({shortened(error)}).") from error


def tokenizer_of(name: str, model_cfg: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a model config that is registered as `name`, or of a folder of transformers."""
    import open_clip

    text_cfg = model_cfg["text_cfg"]
    if (text_cfg.get("tokenizer_kwargs") or {}).get("clean") == "none":  # open_clip knows no such cleaning
        folder = name.removeprefix(LOCAL) if name.startswith(LOCAL) else text_cfg["hf_tokenizer_name"]
        length = text_cfg.get("context_length", 77)
        return load_tokenizer(Path(folder), {"kind": "huggingface", "context_length": length}, model_cfg)
    return Tokenizer(open_clip.get_tokenizer(name))


def save_text_config(text_tower: nn.Module, folder: Path) -> None:
    """Saves a Hugging Face text tower's config.json, which is needed to build it offline; nothing for other towers."""
    config = getattr(text_tower, "config", None)
    if config is not None:
        config.save_pretrained(folder)


def with_local_text_config(model_cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A copy of the model config in which a Hugging Face text tower's name is `folder`, written by `save_text_config`.
    Raises InputError: config.json is missing or names code to run."""
    if not model_cfg["text_cfg"].get("hf_model_name"):
        return model_cfg
    if not (folder / "config.json").is_file():  # transformers would read the path as the name of a hub repository
        raise InputError(f"{folder / 'config.json'} is missing: it describes the text tower; export the encoder again.")
    check_config_folder(folder)
    return {**model_cfg, "text_cfg": {**model_cfg["text_cfg"], "hf_model_name": str(folder)}}


def with_portable_text_name(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """A copy of the model config in which a Hugging Face text tower's name is TEXT_MODEL if it is a local folder."""
    text_cfg = model_cfg["text_cfg"]
    name = text_cfg.get("hf_model_name")
    if not name or not Path(name).is_dir():
        return model_cfg
    return {**model_cfg, "text_cfg": {**text_cfg, "hf_model_name": TEXT_MODEL}}


def register(name: str) -> str:
    """Registers mmrl's configs or a user's JSON file with open_clip; returns its name there. Raises InputError: an
    unknown name, or a JSON file that is missing or not a model config."""
    import open_clip

    if name.startswith((HUB, LOCAL)):
        return name
    path = Path(name)
    if path.suffix == ".json":
        try:
            settings = parse_json(path.read_text())
        except FileNotFoundError:
            raise InputError(f"model.name: the file {name} does not exist.") from None
        except (OSError, ValueError) as error:
            raise InputError(f"model.name: {name} is not JSON ({error}).") from None
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(settings if isinstance(settings, dict) else ())
        if missing:
            raise InputError(f"model.name: {name} lacks {', '.join(sorted(missing))}; see open_clip's model configs.")
        open_clip.add_model_config(path)
        return path.stem
    if name not in open_clip.list_models():
        open_clip.add_model_config(OWN_CONFIGS)
    if name not in open_clip.list_models():
        raise InputError(f"model.name: open_clip has no model {name!r}; {nearest(name, open_clip.list_models())}.")
    return name


def nearest(word: str, names: Iterable[str]) -> str:
    """The end of an error's sentence: the three names that are most like `word`."""
    return f"the nearest: {', '.join(difflib.get_close_matches(word, [*names], n=3, cutoff=0))}"
