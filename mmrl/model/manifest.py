"""manifest.json: what a stored encoder is, in every layout that mmrl writes. No torch here, so that it opens at once.

The schema is `Manifest` below, versioned; what reads an encoder goes through `read_manifest` and `check_files`.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mmrl.errors import InputError
from mmrl.model.model_cfg import check_model_cfg
from mmrl.settings import Settings

FORMAT, VERSION = "mmrl-bundle", 2
MANIFEST, CARD = "manifest.json", "README.md"
Layout = Literal["bundle", "open_clip", "onnx", "sentence_transformers", "transformers", "transformers.js"]
GRAPH_LAYOUTS = ("onnx", "transformers.js")
"""Layouts that hold ONNX graphs: vectors, but no weights to cut or train."""

_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A file of the folder itself, never one that a changed manifest could reach elsewhere.
_File = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")]


class ImageSection(Settings):
    """How a picture is fitted and normalised, as mmrl.images.image_spec.ImageSpec."""

    height: int = Field(ge=1)
    width: int = Field(ge=1)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "longest", "squash"]
    fill_color: int
    orientation: Literal["exif"]


class TokenizerSection(Settings):
    """Which tokenizer made the ids."""

    kind: Literal["open_clip_bpe", "huggingface"]
    context_length: int = Field(ge=1)


class GraphsSection(Settings):
    """The ONNX graphs of a folder, and what is done with a text before the text graph."""

    image: dict[str, _File]
    """The file of each variant: fp32, fp16, int8. In `onnx`, its weights are in FILE.data."""
    text: dict[str, _File]
    default: str
    """The variant that is opened when none is named."""
    tokenizer: _File
    clean: Literal["lower", "whitespace", "canonicalize"]
    """open_clip's name of what happens to a text before it is tokenised."""
    pad_id: int
    zero_id: int | None = None
    """A token id that becomes 0 (open_clip's strip_sep_token)."""
    any_length: bool
    """Whether texts need padding only to the longest of their batch."""


class Manifest(Settings):
    """Version 2. Version 1 had bundles alone, without `layout` and `files`."""

    format: Literal["mmrl-bundle"]
    version: Literal[1, 2]
    layout: Layout = "bundle"
    dim: int = Field(ge=1)
    full_dim: int = Field(ge=1)
    nested_dims: list[int]
    normalisation: str
    image: ImageSection
    tokenizer: TokenizerSection
    model_cfg: dict[str, Any]
    weights_sha256: _Hash
    """The hash of the weights' file; in layouts of graphs, of the weights that they were made from."""
    source: dict[str, Any]
    """Where it comes from. Its own `weights_sha256` names the weights that a cut encoder was cut from."""
    files: dict[_File, _Hash] = Field(default={})
    """Every other file but the model card, with its SHA-256."""
    graphs: GraphsSection | None = None
    contract: dict[str, Any] | None = None
    """How far the vectors are from the source's prefix, measured at export."""
    rotation: dict[str, Any] | None = None
    """What a model was turned by, where `mmrl rotate` wrote it."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """The error of each variant of the graphs, and its recall where that was measured."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """A stored encoder's manifest, as `Manifest` describes it.

    Raises:
        InputError: the folder is no encoder, one of a version that this code does not read, or its manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is no encoder: it has no {MANIFEST}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); export the encoder again.") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path} holds no JSON object; export the encoder again.")
    if manifest.get("format") != FORMAT or manifest.get("version") not in range(1, VERSION + 1):
        found = f"{manifest.get('format')} version {manifest.get('version')}"
        raise InputError(f"{path} is {found}; this mmrl reads {FORMAT} up to version {VERSION}.")
    try:
        checked = Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {place}: {first['msg']}; export the encoder again.") from None
    check_model_cfg(checked.model_cfg, path)
    if (checked.layout in GRAPH_LAYOUTS) != (checked.graphs is not None):
        raise InputError(f"{path}: graphs: must be there for the layouts of ONNX graphs alone; export it again.")
    return {"layout": checked.layout, "files": {}, **manifest}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """(Re)writes an encoder's manifest."""
    Manifest.model_validate(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def hash_files(folder: Path, within: Iterable[str] = (".",)) -> dict[str, str]:
    """The `files` of a manifest: all that is in these files and folders but the manifest itself and the model card."""
    tops = [folder / name for name in within]
    paths = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*"))) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256(path) for name, path in names.items() if name not in (MANIFEST, CARD)}


def check_files(folder: Path, manifest: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Compares files with the manifest: those named, else all.

    Raises:
        InputError: one is missing, or is not the file that the manifest was written for.
    """
    for name in manifest["files"] if names is None else names:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder} is incomplete: {name} is missing.")
        if sha256(path) != manifest["files"].get(name):
            raise InputError(f"{path} is not the file that {MANIFEST} was written for; export the encoder again.")


def origin(manifest: dict[str, Any]) -> str:
    """The hash of the weights that this encoder was cut from (its own, if it was not cut)."""
    return manifest["source"].get("weights_sha256", manifest["weights_sha256"])


def find(model: str | Path) -> Path:
    """The folder that MODEL names: a run folder (its best checkpoint, else its last), a checkpoint, or an export.

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


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
