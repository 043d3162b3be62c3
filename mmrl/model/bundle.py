"""An encoder on disk: the folder that checkpoints hold, exports write and everything else reads.

    FOLDER/
        manifest.json       dims, image spec, tokenizer, model config, hashes, where it comes from
        model.safetensors   weights, float32; a cut encoder's projections really have `dim` rows
        tokenizer/          open_clip's BPE file, or Hugging Face tokenizer files
        text_model/         config.json of a Hugging Face text tower, where there is one

Reading it needs torch, open_clip and safetensors: no training code, no network, no pickles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrl.images.image_spec import ImageSpec
from mmrl.model import layouts, towers, two_tower
from mmrl.model.manifest import FORMAT, VERSION, check_files, find, hash_files, read_manifest, write_manifest
from mmrl.model.manifest import MANIFEST as MANIFEST
from mmrl.model.manifest import origin as origin
from mmrl.model.towers import Side, Tokenizer, Towers
from mmrl.model.two_tower import Encoder, LogitScaleConfig, MatryoshkaCLIP, added_projection
from mmrl.nesting import check_dims, turned

WEIGHTS = layouts.LAYOUTS["bundle"].weights
_TOKENIZER, _TEXT_MODEL = "tokenizer", "text_model"
_SCALE, _BIAS = "log_logit_scale", "logit_bias"


@dataclass(frozen=True)
class Bundle:
    """An encoder and all that is needed to use, cut and store it."""

    model: MatryoshkaCLIP
    tokenise: Tokenizer
    image_spec: ImageSpec
    model_cfg: dict[str, Any]
    """open_clip's config of the towers at their full width."""
    dim: int
    """Length of the vectors that the model gives."""
    nested_dims: tuple[int, ...]
    """Prefixes that were trained, ascending; those beyond `dim` are gone."""
    named_cfg: dict[str, Any]
    """`model_cfg` with a Hugging Face text tower's name as it was given; there it is a folder where its config lies."""

    def state(self) -> dict[str, torch.Tensor]:
        """The weights, on the CPU and apart from the model's own memory."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}


def of_towers(model: MatryoshkaCLIP, built: Towers, nested_dims: tuple[int, ...]) -> Bundle:
    """The bundle of a model just built (or trained since) from `built`."""
    dim = built.embed_dim
    return Bundle(model, built.tokenise, built.image_spec, built.model_cfg, dim, nested_dims, built.model_cfg)


def save(bundle: Bundle, folder: Path, state: dict[str, torch.Tensor], source: dict[str, Any]) -> dict[str, Any]:
    """Writes `bundle` with the weights `state`; returns the manifest. `source` is recorded as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    except SafetensorError as error:  # what a full disk raises
        raise OSError(str(error)) from error
    tokenizer = bundle.tokenise.save(folder / _TOKENIZER)
    towers.save_text_config(bundle.model.text.tower, folder / _TEXT_MODEL)
    files = hash_files(folder, (WEIGHTS, _TOKENIZER, _TEXT_MODEL))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "layout": "bundle",
        "dim": bundle.dim,
        "full_dim": bundle.named_cfg["embed_dim"],
        "nested_dims": list(bundle.nested_dims),
        "normalisation": "L2, after cutting to any of the dims",
        "image": bundle.image_spec.to_json(),
        "tokenizer": tokenizer,
        "model_cfg": bundle.named_cfg,
        "weights_sha256": files[WEIGHTS],
        "source": source,
        "files": files,
    }
    write_manifest(folder, manifest)
    return manifest


def open_model(model: str | Path) -> Bundle:
    """The encoder that MODEL names: what `find` finds, or `open_clip:NAME[:PRETRAINED]`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not str(model).startswith("open_clip:"):
        return load(find(model))
    name, _, pretrained = str(model).removeprefix("open_clip:").partition(":")
    built = towers.build(towers.TowersConfig(name=name, pretrained=pretrained or None))
    encoder = two_tower.from_towers(built, LogitScaleConfig(), num_dims=1)
    return of_towers(encoder.eval(), built, (built.embed_dim,))


def load(folder: Path) -> Bundle:
    """The encoder in `folder`, on the CPU, in evaluation mode.

    Raises:
        InputError: a file is missing, or the weights are not those that the manifest was written for.
    """
    manifest = read_manifest(folder)
    state = read_weights(folder, manifest)
    encoders = load_encoders(folder, manifest, state, ["image", "text"])
    model = MatryoshkaCLIP(encoders["image"], encoders["text"], state[_SCALE].exp(), state.get(_BIAS))
    model.load_state_dict(state)  # the scale's logarithm to the bit
    return Bundle(
        model=model.eval(),
        tokenise=load_tokenise(folder, manifest),
        image_spec=ImageSpec.from_json(manifest["image"]),
        model_cfg=towers.with_local_text_config(manifest["model_cfg"], folder / _TEXT_MODEL),
        dim=manifest["dim"],
        nested_dims=tuple(manifest["nested_dims"]),
        named_cfg=manifest["model_cfg"],
    )


def load_encoders(
    folder: Path, manifest: dict[str, Any], state: dict[str, torch.Tensor], sides: Sequence[Side]
) -> dict[Side, Encoder]:
    """The towers of a bundle that are asked for, with their part of its weights."""
    encoders: dict[Side, Encoder] = {}
    for side in sides:
        encoder = _build_encoder(folder, manifest, side)
        prefix = f"{side}."
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        encoders[side] = encoder
    return encoders


def load_tokenise(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a bundle."""
    return towers.load_tokenise(folder / _TOKENIZER, manifest["tokenizer"], manifest["model_cfg"])


def _build_encoder(folder: Path, manifest: dict[str, Any], side: Side) -> Encoder:
    """One tower of a bundle, with unset weights."""
    model_cfg, dim = towers.with_local_text_config(manifest["model_cfg"], folder / _TEXT_MODEL), manifest["dim"]
    with towers.library_code_only(), towers.offline():
        projection = added_projection(model_cfg, side, dim)
        tower = towers.build_tower(model_cfg, side, dim if projection is None else model_cfg["embed_dim"])
    prepare = ImageSpec.from_json(manifest["image"]).normalise if side == "image" else None
    return Encoder(tower, projection, prepare)


def read_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """An encoder's weights under our names, after the check of its files.

    Raises:
        InputError: a file is missing or another than it was, or the layout has no weights.
    """
    layout = layouts.of_manifest(manifest, folder)
    # Of version 1 the weights' hash is the only one.
    check_files(folder, {"files": {layout.weights: manifest["weights_sha256"], **manifest["files"]}})
    return layout.to_ours(load_file(folder / layout.weights))


def cut_state(bundle: Bundle, dim: int) -> dict[str, torch.Tensor]:
    """The weights of the encoder whose vectors are the first `dim` numbers of this one's.

    Raises:
        InputError: dim is not in 1 … bundle.dim.
    """
    check_dims([dim], bundle.dim, "dim")
    state = bundle.state()
    for name, axis in embedding_axes(bundle.model_cfg).items():
        state[name] = state[name].narrow(axis, 0, dim).contiguous()
    kept = max(1, len(kept_dims(bundle.nested_dims, dim)))
    for name in (_SCALE, _BIAS):
        if name in state and len(state[name]) > 1:
            state[name] = state[name][:kept]
    return state


def rotated_state(bundle: Bundle, rotation_DD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of the encoder whose vectors are `rotation_DD @ x` for every vector x of this one; float64 (D, D)."""
    state = bundle.state()
    for name, axis in embedding_axes(bundle.model_cfg).items():
        state[name] = turned(state[name], axis, rotation_DD)
    for name in (_SCALE, _BIAS):
        if name in state:  # one of each dim's: the prefixes that they were learnt for are gone, but for the last
            state[name] = state[name][-1:]
    return state


def embedding_axes(model_cfg: dict[str, Any]) -> dict[str, int]:
    """The weights of both towers that end in the embedding, each with the axis that runs along it."""
    axes: dict[str, int] = {}
    for side in ("image", "text"):
        own = towers.projection_axes(model_cfg, side)
        if own is None:
            axes[f"{side}.projection.weight"] = 0
        else:
            axes |= {f"{side}.tower.{name}": axis for name, axis in own.items()}
    return axes


def kept_dims(nested_dims: Sequence[int], dim: int) -> tuple[int, ...]:
    """The trained prefixes that a cut to `dim` leaves."""
    return tuple(d for d in nested_dims if d <= dim)
