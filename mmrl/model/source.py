"""Parse MODEL, the argument of every command that opens an encoder.

No torch here: `mmrl.load` opens ONNX encoders without it.
"""

from dataclasses import dataclass
from pathlib import Path

from mmrl.errors import InputError
from mmrl.model.manifest import MANIFEST

FORMS = (
    "a run folder, a checkpoint, an exported folder, open_clip:NAME[:PRETRAINED], open_clip:hf-hub:ORG/NAME or "
    "open_clip:local-dir:PATH"
)
_OPEN_CLIP = "open_clip:"
_HUB, _LOCAL = "hf-hub:", "local-dir:"


@dataclass(frozen=True)
class StoredModel:
    """An encoder in a folder: a checkpoint of a run, or an export."""

    text: str
    """MODEL as the user wrote it."""
    folder: Path
    """The folder that holds manifest.json; of a run, its best checkpoint, else its last."""


@dataclass(frozen=True)
class OpenClipModel:
    """A model that open_clip builds."""

    text: str
    """MODEL as the user wrote it."""
    name: str
    """As `model.name` of a config: an open_clip model, a JSON file, hf-hub:ORG/NAME or local-dir:PATH."""
    pretrained: str | None = None
    """An open_clip tag or a weights file."""

    @property
    def brings_weights(self) -> bool:
        """Whether the name includes weights, as hf-hub: and local-dir: do."""
        return self.name.startswith((_HUB, _LOCAL))

    @property
    def is_random(self) -> bool:
        """Whether the towers have random weights."""
        return self.pretrained is None and not self.brings_weights


ModelSource = StoredModel | OpenClipModel


def parse_model(model: str | Path) -> ModelSource:
    """Parses MODEL and finds its folder; builds and fetches nothing.

    Raises:
        InputError: MODEL has none of the allowed forms, or its folder holds no encoder.
    """
    text = str(model)
    if not text.startswith(_OPEN_CLIP):
        return StoredModel(text, _encoder_folder(Path(model)))
    name = text.removeprefix(_OPEN_CLIP)
    if name.startswith((_HUB, _LOCAL)):  # a path may contain colons; neither form takes PRETRAINED
        _, _, location = name.partition(":")
        if not location or (name.startswith(_HUB) and ":" in location):
            raise InputError(f"model: {text} is incomplete or has too many parts; allowed: {FORMS}.")
        return OpenClipModel(text, name)
    name, _, pretrained = name.partition(":")
    if not name:
        raise InputError(f"model: {text} names no model; allowed: {FORMS}.")
    return OpenClipModel(text, name, pretrained or None)


def _encoder_folder(path: Path) -> Path:
    for candidate in (path, path / "checkpoints" / "best", path / "checkpoints" / "last"):
        if (candidate / MANIFEST).is_file():
            return candidate
    if not path.exists():
        raise InputError(f"model: {path} does not exist; allowed: {FORMS}.")
    if (path / "config.yaml").is_file():
        raise InputError(f"model: the run {path} has no checkpoint yet.")
    raise InputError(f"model: {path} is neither a run folder, a checkpoint nor an exported encoder; allowed: {FORMS}.")
