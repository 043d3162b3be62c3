"""Save, load, truncate and rotate an encoder: the folder format of checkpoints and exports.

    FOLDER/
        manifest.json       dims, image spec, tokenizer, model config, hashes, source
        model.safetensors   weights, float32; a truncated encoder's projections have `dim` outputs
        tokenizer/          open_clip's BPE file, or Hugging Face tokenizer files
        text_model/         config.json of a Hugging Face text tower, if it has one

Loading needs torch, open_clip and safetensors: no training code, no network, no pickles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrl.errors import InputError
from mmrl.images.image_spec import ImageSpec, Normaliser
from mmrl.model import layouts, registry, tokenizer, towers, two_tower
from mmrl.model.guards import library_code_only, offline, shortened
from mmrl.model.manifest import (
    FORMAT,
    TEXT_MODEL,
    TOKENIZER,
    VERSION,
    check_files,
    hash_files,
    read_manifest,
    write_manifest,
)
from mmrl.model.manifest import MANIFEST as MANIFEST
from mmrl.model.manifest import origin as origin
from mmrl.model.source import RANDOM, ModelSource, StoredModel, parse_model, parse_name
from mmrl.model.tokenizer import Tokenizer
from mmrl.model.towers import SIDES, AbsentTower, Modality, Towers, TowersConfig
from mmrl.model.trainable import prepare_training
from mmrl.model.two_tower import LogitScaleConfig, MatryoshkaCLIP, ProjectedTower, added_projection
from mmrl.nesting import check_dims, rotate_weight

WEIGHTS = layouts.LAYOUTS["bundle"].weights
SCALE, BIAS = "log_logit_scale", "logit_bias"


@dataclass(frozen=True)
class Bundle:
    """A model with all that is needed to use, truncate and store it."""

    model: MatryoshkaCLIP
    tokenise: Tokenizer
    image_spec: ImageSpec
    model_cfg: dict[str, Any]
    """open_clip's config of the towers, at the full embedding width."""
    dim: int
    """Embedding width of `model`."""
    nested_dims: tuple[int, ...]
    """Trained dims up to `dim`, ascending."""
    named_cfg: dict[str, Any]
    """`model_cfg` with a Hugging Face text tower's name on the hub, or `text_model`, instead of its local folder;
    stored in manifests."""

    def state(self) -> dict[str, torch.Tensor]:
        """The weights, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}


def make_bundle(model: MatryoshkaCLIP, built: Towers, nested_dims: tuple[int, ...]) -> Bundle:
    """The bundle of a model that was built from the towers `built`."""
    named_cfg = registry.with_portable_text_name(built.model_cfg)
    return Bundle(model, built.tokenise, built.image_spec, built.model_cfg, built.embed_dim, nested_dims, named_cfg)


def save(bundle: Bundle, folder: Path, state: dict[str, torch.Tensor], source: dict[str, Any]) -> dict[str, Any]:
    """Writes `bundle` with the weights `state` to `folder`; returns the manifest, which has `source` unchanged: where
    the weights come from. Raises OSError: the disk is full, or the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    except SafetensorError as error:  # what a full disk raises
        raise OSError(str(error)) from error
    tokenizer_info = bundle.tokenise.save(folder / TOKENIZER)
    registry.save_text_config(bundle.model.text.tower, folder / TEXT_MODEL)
    files = hash_files(folder, (WEIGHTS, TOKENIZER, TEXT_MODEL))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "layout": "bundle",
        "dim": bundle.dim,
        "full_dim": bundle.named_cfg["embed_dim"],
        "nested_dims": list(bundle.nested_dims),
        "normalisation": "L2, after cutting to any of the dims",
        "image": bundle.image_spec.to_json(),
        "tokenizer": tokenizer_info,
        "model_cfg": bundle.named_cfg,
        "towers": list(bundle.model.sides),
        "weights_sha256": files[WEIGHTS],
        "source": source,
        "files": files,
    }
    write_manifest(folder, manifest)
    return manifest


def open_model(model: str | Path | ModelSource) -> Bundle:
    """Opens the encoder that MODEL names, on the CPU, in evaluation mode. Raises InputError: MODEL names no encoder, or
    the encoder is damaged or has no weights."""
    source = parse_model(model) if isinstance(model, str | Path) else model
    if isinstance(source, StoredModel):
        return load(source.folder)
    with torch.random.fork_rng(devices=[], enabled=source.is_random):
        if source.is_random:  # the same random weights in every process
            torch.manual_seed(0)
        built = initial_towers(TowersConfig(name=source.name, pretrained=source.pretrained))
    encoder = two_tower.from_towers(built, LogitScaleConfig(), num_dims=1)
    return make_bundle(encoder.eval(), built, (built.embed_dim,))


def initial_towers(config: TowersConfig) -> Towers:
    """The towers that a training starts from: built by open_clip, or those of an encoder that model.name or
    model.pretrained names. What does not train is frozen, and towers that model.towers leaves out are absent.

    Raises:
        InputError: as `towers.build` and `prepare_training`; the encoder is damaged, lacks a tower, or its
            architecture is not that of model.name.
    """
    check_towers(config)
    built = _source_towers(config)
    absent: dict[str, Any] = {side: AbsentTower(side) for side in SIDES if side not in config.sides}
    random = tuple(one for one in built.random if not any(f"the {side} " in one for side in absent))
    return prepare_training(replace(built, **absent, random=random), config)


def check_towers(config: TowersConfig) -> None:
    """Raises InputError if the encoder that training starts from lacks a tower. Nothing is loaded but its manifest."""
    for key, name in (("model.name", config.name), ("model.pretrained", config.pretrained)):
        source = parse_model(name, key) if name and Path(name).is_dir() else None
        available = read_manifest(source.folder)["towers"] if isinstance(source, StoredModel) else SIDES
        for side in config.sides:
            if side not in available:
                raise InputError(
                    f"model.towers: {config.towers}, but {name} has no {side} tower; set model.towers: {available[0]}."
                )


def _source_towers(config: TowersConfig) -> Towers:
    source = parse_name(config.name)
    if isinstance(source, StoredModel):
        named = config.name
    else:
        pretrained = config.pretrained or source.pretrained
        pretrained = None if pretrained == RANDOM else pretrained
        if pretrained is None or not Path(pretrained).is_dir():
            config = config.model_copy(update={"name": source.name, "pretrained": pretrained})
            return towers.build(config, require_weights=source.brings_weights)
        named = pretrained
    if config.pretrained is not None and named == config.name:
        raise InputError(f"model.pretrained: model.name, {config.name}, has weights; remove one of the two keys.")
    found = parse_model(named, "model.pretrained" if named != config.name else "model.name")
    if isinstance(found, StoredModel):
        built = _stored_towers(found.folder)
    else:
        built = towers.build(config.model_copy(update={"name": found.name, "pretrained": None}), require_weights=True)
    if named != config.name:
        _check_same_architecture(config.name, named, built)
    return built


def _stored_towers(folder: Path) -> Towers:
    stored = load(folder)
    clip = stored.model
    if stored.dim != stored.named_cfg["embed_dim"] and not (clip.image.projection is clip.text.projection is None):
        raise InputError(
            f"model: {folder} has {stored.dim} of {stored.named_cfg['embed_dim']} dims by a projection that mmrl added "
            "to a tower without one; start from the encoder with all dims."
        )
    added: dict[Modality, Any] = {"image": clip.image.projection, "text": clip.text.projection}
    return Towers(
        image=clip.image.tower,
        text=clip.text.tower,
        logit_scale=clip.logit_scale[-1].item(),
        logit_bias=None if clip.logit_bias is None else clip.logit_bias[-1].item(),
        embed_dim=stored.dim,
        image_spec=stored.image_spec,
        tokenise=stored.tokenise,
        model_cfg={**stored.model_cfg, "embed_dim": stored.dim},
        projections={modality: linear.weight.detach() for modality, linear in added.items() if linear is not None},
    )


def _check_same_architecture(name: str, named: str, built: Towers) -> None:
    with torch.device("meta"):
        expected = towers.build_empty(name)
    for modality in SIDES:
        if isinstance(getattr(built, modality), AbsentTower):
            continue
        shapes = {name: tensor.shape for name, tensor in expected[modality].state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in getattr(built, modality).state_dict().items()}:
            raise InputError(
                f"model.pretrained: the {modality} tower of {named} is not that of model.name {name!r}; set "
                f"model.name={named} and remove model.pretrained."
            )


def load(folder: Path) -> Bundle:
    """Loads the encoder in `folder`, on the CPU, in evaluation mode. Raises InputError: a file is missing or does not
    have the hash in the manifest, or the layout has no weights."""
    manifest = read_manifest(folder)
    state = read_weights(folder, manifest)
    loaded = load_towers(folder, manifest, state, manifest["towers"])
    image, text = (loaded.get(side) or ProjectedTower(AbsentTower(side)) for side in SIDES)
    model = MatryoshkaCLIP(image, text, state[SCALE].exp(), state.get(BIAS))
    model.load_state_dict(state)  # restores the log scale exactly; exp and log above round
    return Bundle(
        model=model.eval(),
        tokenise=load_tokenizer(folder, manifest),
        image_spec=ImageSpec.from_json(manifest["image"]),
        model_cfg=_local_cfg(folder, manifest),
        dim=manifest["dim"],
        nested_dims=tuple(manifest["nested_dims"]),
        named_cfg=manifest["model_cfg"],
    )


def load_towers(
    folder: Path, manifest: dict[str, Any], state: dict[str, torch.Tensor], modalities: Sequence[Modality]
) -> dict[Modality, ProjectedTower]:
    """Builds the requested towers of a bundle and loads their weights from `state`. Raises InputError: the manifest's
    model config cannot be built, or the weights do not fit it."""
    model_cfg, dim = _local_cfg(folder, manifest), manifest["dim"]
    loaded: dict[Modality, ProjectedTower] = {}
    try:
        for modality in modalities:
            with library_code_only(), offline():
                projection = added_projection(model_cfg, modality, dim)
                tower = towers.build_tower(model_cfg, modality, dim if projection is None else model_cfg["embed_dim"])
            prepare = Normaliser(ImageSpec.from_json(manifest["image"])) if modality == "image" else None
            loaded[modality] = ProjectedTower(tower, projection, prepare)
            prefix = f"{modality}."
            weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            loaded[modality].load_state_dict(weights)
    except InputError:
        raise
    except Exception as error:  # open_clip, timm, transformers and torch raise many kinds for a damaged model config
        raise InputError(
            f"{folder / MANIFEST}: model_cfg cannot be built, or does not fit the weights "
            f"({shortened(error)}); export the encoder again."
        ) from error
    return loaded


def _local_cfg(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The model config, with the folder of a Hugging Face text tower instead of its name on the hub."""
    model_cfg = manifest["model_cfg"]
    has_text = "text" in manifest["towers"]
    return registry.with_local_text_config(model_cfg, folder / TEXT_MODEL) if has_text else model_cfg


def load_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """Loads the tokenizer of a bundle."""
    return tokenizer.load_tokenizer(folder / TOKENIZER, manifest["tokenizer"], manifest["model_cfg"])


def read_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Checks an encoder's files against its manifest and reads its weights, under mmrl's names. Raises InputError: a
    file is missing or does not have the hash in the manifest, or the layout has no weights."""
    layout = layouts.layout_of_manifest(manifest, folder)
    if manifest["version"] == 1:  # which has no hash but that of the weights
        manifest = {**manifest, "files": {layout.weights: manifest["weights_sha256"]}}
    check_files(folder, manifest, [layout.weights, *layout.others, *manifest["files"]])
    state = load_file(folder / layout.weights)
    for other in map(Path, layout.others):
        state |= {f"{other.parent.name}.{name}": tensor for name, tensor in load_file(folder / other).items()}
    return layout.import_state(state)


def truncated_state(bundle: Bundle, dim: int) -> dict[str, torch.Tensor]:
    """The weights of `bundle` with both projections truncated to the first `dim` dims. Raises InputError: dim is not in
    1 … bundle.dim."""
    check_dims([dim], bundle.dim, "dim")
    state = bundle.state()
    for name, axis in embedding_axes(bundle).items():
        state[name] = state[name].narrow(axis, 0, dim).contiguous()
    kept = max(1, len(dims_up_to(bundle.nested_dims, dim)))
    for name in (SCALE, BIAS):
        if name in state and len(state[name]) > 1:
            state[name] = state[name][:kept]
    return state


def rotated_state(bundle: Bundle, rotation_DD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of `bundle` with a rotation folded into both projections: each embedding x becomes `rotation_DD @ x`.

    Of several logit scales and biases only the full dim's is kept: the others belong to prefixes before the rotation.

    Args:
        rotation_DD: orthogonal, float64 (D, D).
    """
    state = bundle.state()
    for name, axis in embedding_axes(bundle).items():
        state[name] = rotate_weight(state[name], axis, rotation_DD)
    for name in (SCALE, BIAS):
        if name in state:
            state[name] = state[name][-1:]
    return state


def embedding_axes(bundle: Bundle) -> dict[str, int]:
    """The weights of the towers' final projections: {name: the axis that indexes embedding dims}."""
    axes: dict[str, int] = {}
    for modality in bundle.model.sides:
        of_tower = towers.projection_axes(bundle.model_cfg, modality)
        if of_tower is None:
            axes[f"{modality}.projection.weight"] = 0
        else:
            axes |= {f"{modality}.tower.{name}": axis for name, axis in of_tower.items()}
    return axes


def dims_up_to(nested_dims: Sequence[int], dim: int) -> tuple[int, ...]:
    """The trained dims up to `dim`."""
    return tuple(d for d in nested_dims if d <= dim)
