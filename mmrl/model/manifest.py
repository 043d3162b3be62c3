"""manifest.json: the versioned description of a stored encoder, in every layout that mmrl writes.

Readers of an encoder call `read_manifest` and `check_files`. No torch here: ONNX encoders open without it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from mmrl.errors import InputError
from mmrl.model.model_cfg import check_model_cfg
from mmrl.output.files import check_out_folder, parse_json, path_inside
from mmrl.settings import Settings

FORMAT, VERSION = "mmrl-bundle", 2
MANIFEST, CARD = "manifest.json", "README.md"
INNER = TOKENIZER, TEXT_MODEL = "tokenizer", "text_model"
"""Folders of an encoder with the files of its tokenizer, and the config.json of its Hugging Face text tower."""
Layout = Literal["bundle", "open_clip", "onnx", "openvino", "sentence_transformers", "transformers", "transformers.js"]
_KEYS_OF = {"image": ("image",), "text": ("text", "tokenizer", "clean", "pad_id", "any_length")}
"""What `graphs` must have for a tower."""
GRAPH_LAYOUTS = ("onnx", "openvino", "transformers.js")
"""Layouts of graphs: they give embeddings but hold no weights that could be truncated or trained."""

_Level = Annotated[int, Field(ge=0, le=255)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A relative path inside the folder, so that a tampered manifest cannot name files elsewhere.
_File = Annotated[str, Field(pattern=r"^[\w-][\w.-]*(/[\w-][\w.-]*)*$")]


class ImageSection(Settings):
    """How an image is composited, resized and normalised: the fields of mmrl.images.image_spec.ImageSpec."""

    height: int = Field(ge=1, le=8192)
    width: int = Field(ge=1, le=8192)
    mean: list[FiniteFloat] = Field(min_length=3, max_length=3)
    std: list[Annotated[FiniteFloat, Field(gt=0)]] = Field(min_length=3, max_length=3)
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "longest", "squash"]
    fill_color: _Level
    background: list[_Level] | None = Field(default=None, min_length=3, max_length=3)
    orientation: Literal["exif"]


class TokenizerSection(Settings):
    """The kind of tokenizer and its length."""

    kind: Literal["open_clip_bpe", "huggingface"]
    context_length: int = Field(ge=1, le=1_000_000)


class GraphsSection(Settings):
    """The graphs of a folder, and how texts are prepared for the text graph."""

    image: dict[str, _File] | None = None
    """{variant: file} with the variants fp32, fp16 and int8. The weights are in FILE.data (layout `onnx`) or in a
    .bin file of the same name (`openvino`). None, as `text`, for a tower that the encoder does not have."""
    text: dict[str, _File] | None = None
    default: str
    """The variant that is opened by default."""
    tokenizer: _File | None = None
    """None without a text tower, as are `clean`, `pad_id` and `any_length`."""
    clean: Literal["lower", "whitespace", "canonicalize", "none"] | None = None
    """open_clip's name of the text cleaning before tokenisation, or none."""
    pad_id: int | None = Field(default=None, ge=0, le=1_000_000)
    zero_id: int | None = None
    """A token id that is replaced by 0 (open_clip's strip_sep_token)."""
    any_length: bool | None = None
    """Whether texts may be padded to the longest of their batch instead of the context length."""


class Manifest(Settings):
    """Schema of version 2. Version 1 had the layout `bundle` only, without `layout` and `files`."""

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
    towers: list[Literal["image", "text"]] = Field(default=["image", "text"], min_length=1, max_length=2)
    """The towers that the encoder has."""
    weights_sha256: _Hash
    """SHA-256 of the weights file; for ONNX graphs, of the weights that they were converted from."""
    source: dict[str, Any]
    """Where the encoder comes from. `weights_sha256` in here is the hash of the weights that were truncated."""
    files: dict[_File, _Hash] = Field(default={})
    """{file: SHA-256} of all files except the manifest and the model card."""
    graphs: GraphsSection | None = None
    contract: dict[str, Any] | None = None
    """The measured difference between the embeddings and the source's prefixes."""
    rotation: dict[str, Any] | None = None
    """How `mmrl rotate` found the rotation."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """{variant: its size, error and, if measured, recall}."""


def is_rotated(manifest: Mapping[str, Any]) -> bool:
    """Whether `mmrl rotate` made the encoder, or the one that it was truncated from, of a trained model."""
    return manifest.get("rotation") is not None or "rotated_from" in manifest.get("source", {})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads and validates the manifest of a stored encoder. Raises InputError: the folder holds no encoder, the version
    is not supported, or the manifest is damaged."""
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is not an encoder: it has no {MANIFEST}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); export the encoder again.") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path} is not a JSON object; export the encoder again.")
    if manifest.get("format") != FORMAT or manifest.get("version") not in range(1, VERSION + 1):
        found = f"{manifest.get('format')!s:.50} version {manifest.get('version')!s:.50}"
        raise InputError(f"{path} is {found}; this version of mmrl reads {FORMAT} up to version {VERSION}.")
    try:
        checked = Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {key}: {first['msg']}; export the encoder again.") from None
    check_model_cfg(checked.model_cfg, path)
    if checked.version > 1 and not checked.files:
        raise InputError(f"{path}: files: the list of hashes is empty; export the encoder again.")
    if (checked.layout in GRAPH_LAYOUTS) != (checked.graphs is not None):
        raise InputError(
            f"{path}: graphs: required for the layouts {', '.join(GRAPH_LAYOUTS)}, not allowed for others; "
            "export the encoder again."
        )
    needed = [key for side in checked.towers for key in _KEYS_OF[side]]
    if missing := [key for key in needed if checked.graphs and getattr(checked.graphs, key) is None]:
        raise InputError(f"{path}: graphs.{missing[0]}: Field required; export the encoder again.")
    return {"layout": checked.layout, "files": {}, "towers": checked.towers, **manifest}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Validates and writes the manifest of an encoder, or replaces it."""
    Manifest.model_validate(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def check_encoder_out(out: Path, force: bool, source: Path | None) -> None:
    """Checks the folder of a new encoder by the rule of `check_out_folder`: --force replaces exported and rotated ones,
    but not `source`, the folder that is read. Raises InputError: the folder is not new or empty, and holds other files
    or `force` is not given."""
    own = set()
    if (out / MANIFEST).is_file() and (source is None or out.resolve() != source.resolve()):
        manifest = read_manifest(out)
        if "contract" in manifest:  # not a checkpoint
            own = {MANIFEST, CARD, *(name.partition("/")[0] for name in manifest["files"])}
    check_out_folder(out, own, "an encoder", force=force)


def hash_files(folder: Path, within: Iterable[str] = (".",)) -> dict[str, str]:
    """{file: SHA-256} of all files under the paths `within`, without the manifest and the model card."""
    tops = [folder / name for name in within]
    paths = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*"))) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: sha256(path) for name, path in names.items() if name not in (MANIFEST, CARD)}


def check_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Checks the hashes of the files `names` and of all files of the tokenizer and of the text tower's config. Raises
    InputError: a file is missing, leads out of the folder, has no hash in the manifest or another one."""
    inner = {path.relative_to(folder).as_posix() for name in INNER for path in (folder / name).rglob("*")}
    for name in dict.fromkeys([*names, *sorted(inner)]):
        path, expected = path_inside(folder, name), manifest["files"].get(name)
        if name in inner and (path.is_dir() or manifest["version"] == 1):
            continue
        if not path.is_file():
            raise InputError(f"{folder} is incomplete: {name} is missing.")
        if expected is None:
            raise InputError(f"{folder / MANIFEST} has no hash of {name}; export the encoder again.")
        if sha256(path) != expected:
            raise InputError(f"{path} is not the file that {MANIFEST} was written for; export the encoder again.")


def origin(manifest: dict[str, Any]) -> str:
    """SHA-256 of the weights that this encoder was truncated from; its own hash if it was not truncated."""
    return manifest["source"].get("weights_sha256", manifest["weights_sha256"])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
