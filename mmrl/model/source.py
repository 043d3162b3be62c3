"""Parse MODEL, the argument of every command that opens an encoder. `model.name` and `model.pretrained` take it, too.

No torch here: `mmrl.load` opens ONNX encoders without it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl.errors import InputError
from mmrl.model.manifest import MANIFEST
from mmrl.output.files import parse_json, path_inside

FORMS = (
    "a run folder, a checkpoint, an exported folder, open_clip:NAME[:TAG or FILE], [open_clip:]hf-hub:ORG/NAME, "
    "[open_clip:]local-dir:PATH or a folder of Hugging Face's transformers or sentence-transformers"
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
RANDOM = "random"
"""In place of a tag: random weights, as `--random-weights` writes it."""
HUB, LOCAL = "hf-hub:", "local-dir:"
_OPEN_CLIP = "open_clip:"
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")


@dataclass(frozen=True)
class StoredModel:
    """An encoder in a folder: a checkpoint of a run, or an export."""

    text: str
    """MODEL as the user wrote it."""
    folder: Path
    """The folder that holds manifest.json; of a run, its best checkpoint, else its last."""


@dataclass(frozen=True)
class OpenClipModel:
    """A model that `towers.build` builds from open_clip's architectures."""

    text: str
    """MODEL as the user wrote it."""
    name: str
    """As `model.name` of a config: an open_clip model, a JSON file, hf-hub:ORG/NAME, local-dir:PATH or a folder of
    Hugging Face's transformers."""
    pretrained: str | None = None
    """An open_clip tag, a weights file, a folder with an encoder, or RANDOM."""

    @property
    def brings_weights(self) -> bool:
        """Whether the name includes weights, as hf-hub:, local-dir: and folders do."""
        return self.name.startswith((HUB, LOCAL)) or Path(self.name).is_dir()

    @property
    def is_random(self) -> bool:
        """Whether the towers have random weights."""
        return self.pretrained in (None, RANDOM) and not self.brings_weights


ModelSource = StoredModel | OpenClipModel


def parse_model(model: str | Path, key: str = "model") -> ModelSource:
    """Parses MODEL, the argument or config key `key`, and finds its folder; builds and fetches nothing. Raises
    InputError: MODEL has none of the allowed forms, its folder holds no encoder, or it names no weights."""
    text = str(model)
    name = text.removeprefix(_OPEN_CLIP)
    if name.startswith((HUB, LOCAL)):  # a path may contain colons; neither form takes PRETRAINED
        _, _, location = name.partition(":")
        if not location or (name.startswith(HUB) and ":" in location):
            raise InputError(f"{key}: {text} is incomplete or has too many parts; allowed: {FORMS}.")
        return OpenClipModel(text, name)
    if name == text:
        return _in_folder(text, Path(model), key)
    name, _, pretrained = name.partition(":")
    if not name:
        raise InputError(f"{key}: {text} names no model; allowed: {FORMS}.")
    if not pretrained and not Path(name).is_dir():
        raise InputError(
            f"{key}: {text} names no weights, so its towers would be random; append a tag or a file, as in "
            f"open_clip:{name}:TAG, or add --random-weights (in Python: open_clip:{name}:{RANDOM})."
        )
    return OpenClipModel(text, name, pretrained or None)


def with_random_weights(model: str) -> str:
    """MODEL with random weights if it is `open_clip:NAME` without a tag or a file; else MODEL."""
    name = model.removeprefix(_OPEN_CLIP)
    is_bare = name != model and ":" not in name.rstrip(":") and not Path(name).is_dir()
    return f"{model.rstrip(':')}:{RANDOM}" if is_bare and name else model


def parse_name(name: str, key: str = "model.name") -> ModelSource:
    """Parses `model.name` of a config: MODEL, or the name of an open_clip model without `open_clip:`. Raises
    InputError: as parse_model."""
    is_model = name.startswith((_OPEN_CLIP, HUB, LOCAL)) or Path(name).is_dir()
    return parse_model(with_random_weights(name), key) if is_model else OpenClipModel(name, name)


def read_hugging_face_config(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder that holds the model and its config.json, for a folder of Hugging Face's transformers or a
    sentence-transformers folder; None for other folders.

    Raises:
        InputError: a JSON file is damaged, or the sentence-transformers folder has modules behind the model.
    """
    modules = folder / "modules.json"
    if modules.is_file():
        entries = _read_json(modules)
        are_objects = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
        names = [str(entry.get("type", "")).rpartition(".")[2] for entry in entries] if are_objects else []
        if not names or any(name != "Normalize" for name in names[1:]):
            raise InputError(
                f"{modules}: the modules {', '.join(names) or 'of this file'} are more than a CLIP model; allowed: "
                "one model, followed by Normalize at most."
            )
        folder = path_inside(folder, str(entries[0].get("path", "")))
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = _read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object; save the model again.")
    return folder, config


def _in_folder(text: str, path: Path, key: str) -> ModelSource:
    for candidate in (path, path / "checkpoints" / "best", path / "checkpoints" / "last"):
        if (candidate / MANIFEST).is_file():
            return StoredModel(text, candidate)
    if not path.exists():
        raise InputError(f"{key}: {path} does not exist; allowed: {FORMS}.")
    if path.is_file():
        use = "it holds weights without an architecture; write open_clip:NAME:" + str(path)
        raise InputError(f"{key}: {path} is a file; {use if path.suffix in _WEIGHTS else 'allowed: ' + FORMS}.")
    if (path / OPEN_CLIP_CONFIG).is_file():
        return OpenClipModel(text, f"{LOCAL}{path}")
    if read_hugging_face_config(path) is not None:
        return OpenClipModel(text, str(path))
    if (path / "config.yaml").is_file():
        raise InputError(f"{key}: the run {path} has no checkpoint yet.")
    if epochs := sorted((path / "checkpoints").glob("epoch_*.pt")):
        raise InputError(
            f"{key}: {path} is a run of open_clip's trainer, whose checkpoints lack the architecture; write "
            f"open_clip:NAME:{epochs[-1]}."
        )
    raise InputError(f"{key}: {path} is neither a run folder, a checkpoint nor an exported encoder; allowed: {FORMS}.")


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); save the model again.") from None
