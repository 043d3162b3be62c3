"""An encoder on disk: the folder that checkpoints hold, exports write and everything else reads.

    FOLDER/
        manifest.json       dims, image spec, tokenizer, model config, hashes, where it comes from
        model.safetensors   weights, float32; a cut encoder's projections really have `dim` rows
        tokenizer/          open_clip's BPE file, or Hugging Face tokenizer files
        text_model/         config.json of a Hugging Face text tower, where there is one

Reading it needs torch, open_clip and safetensors: no training code, no network, no pickles.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrl.errors import InputError
from mmrl.image_spec import ImageSpec
from mmrl.model import towers, two_tower
from mmrl.model.towers import Side, TokeniseList, Towers
from mmrl.model.two_tower import Encoder, LogitScaleConfig, MatryoshkaCLIP, added_projection
from mmrl.nesting import check_dims

FORMAT, VERSION = "mmrl-bundle", 1
MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
_TOKENIZER, _TEXT_MODEL = "tokenizer", "text_model"
_SCALE, _BIAS = "log_logit_scale", "logit_bias"


@dataclass(frozen=True)
class Bundle:
    """An encoder and all that is needed to use, cut and store it."""

    model: MatryoshkaCLIP
    tokenise: TokeniseList
    image_spec: ImageSpec
    model_cfg: dict[str, Any]
    """open_clip's config of the towers at their full width."""
    dim: int
    """Length of the vectors that the model gives."""
    nested_dims: tuple[int, ...]
    """Prefixes that were trained, ascending; those beyond `dim` are gone."""

    def state(self) -> dict[str, torch.Tensor]:
        """The weights, on the CPU and apart from the model's own memory."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}


def of_towers(model: MatryoshkaCLIP, built: Towers, nested_dims: tuple[int, ...]) -> Bundle:
    """The bundle of a model just built (or trained since) from `built`."""
    dim = built.embed_dim
    return Bundle(model, built.tokenise, built.image_spec, built.model_cfg, dim, nested_dims)


def save(bundle: Bundle, folder: Path, state: dict[str, torch.Tensor], source: dict[str, Any]) -> dict[str, Any]:
    """Writes `bundle` with the weights `state`; returns the manifest. `source` is recorded as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    except SafetensorError as error:  # what a full disk raises
        raise OSError(str(error)) from error
    tokenizer = bundle.tokenise.save(folder / _TOKENIZER)
    towers.save_text_config(bundle.model.text.tower, folder / _TEXT_MODEL)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dim": bundle.dim,
        "full_dim": bundle.model_cfg["embed_dim"],
        "nested_dims": list(bundle.nested_dims),
        "normalisation": "L2, after cutting to any of the dims",
        "image": bundle.image_spec.to_json(),
        "tokenizer": tokenizer,
        "model_cfg": bundle.model_cfg,
        "weights_sha256": sha256(folder / WEIGHTS),
        "source": source,
    }
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """(Re)writes a bundle's manifest."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A bundle's manifest.

    Raises:
        InputError: the folder is no bundle, or one of a version that this code does not read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is no encoder: it has no {MANIFEST}.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / MANIFEST} is not JSON ({error}); export the encoder again.") from None
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')} version {manifest.get('version')}"
        raise InputError(f"{folder / MANIFEST} is {found}; this mmrl reads {FORMAT} version {VERSION}.")
    return manifest


def origin(manifest: dict[str, Any]) -> str:
    """The hash of the weights that this encoder was cut from (its own, if it was not cut)."""
    return manifest["source"].get("weights_sha256", manifest["weights_sha256"])


def find(model: str | Path) -> Path:
    """The bundle that MODEL names: a run folder (its best checkpoint, else its last), a checkpoint, or a bundle.

    Raises:
        InputError: there is none.
    """
    path = Path(model)
    for candidate in (path, path / "checkpoints" / "best", path / "checkpoints" / "last"):
        if (candidate / MANIFEST).is_file():
            return candidate
    if not path.exists():
        raise InputError(f"model: {path} does not exist; give a run folder, a checkpoint or an exported folder.")
    if (path / "config.yaml").is_file():
        raise InputError(f"model: the run {path} has no checkpoint yet.")
    raise InputError(f"model: {path} is neither a run folder, a checkpoint nor an exported encoder.")


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


def load_tokenise(folder: Path, manifest: dict[str, Any]) -> TokeniseList:
    """The tokenizer of a bundle."""
    return towers.load_tokenise(folder / _TOKENIZER, manifest["tokenizer"], manifest["model_cfg"])


def _build_encoder(folder: Path, manifest: dict[str, Any], side: Side) -> Encoder:
    """One tower of a bundle, with unset weights."""
    model_cfg, dim = towers.with_local_text_config(manifest["model_cfg"], folder / _TEXT_MODEL), manifest["dim"]
    projection = added_projection(model_cfg, side, dim)
    tower = towers.build_tower(model_cfg, side, dim if projection is None else model_cfg["embed_dim"])
    prepare = ImageSpec.from_json(manifest["image"]).normalise if side == "image" else None
    return Encoder(tower, projection, prepare)


def read_weights(folder: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A bundle's weights, after the check of their hash."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder} is incomplete: {WEIGHTS} is missing.")
    if sha256(path) != manifest["weights_sha256"]:
        raise InputError(f"{path} is not the file that {MANIFEST} was written for; export the encoder again.")
    return load_file(path)


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
        turned = rotation_DD @ state[name].double().movedim(axis, 0)
        state[name] = turned.movedim(0, axis).to(state[name].dtype).contiguous()
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


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
