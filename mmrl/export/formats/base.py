"""What a format is to the export, and the registry of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mmrl.errors import InputError, did_you_mean
from mmrl.export.contract import Reopened
from mmrl.model.bundle import Bundle

_MODULE_OF = {
    "bundle": "bundle",
    "open_clip": "open_clip",
    "onnx": "onnx",
    "sentence_transformers": "sentence_transformers",
    "transformers": "transformers",
    "transformers.js": "transformers_js",
}
VARIANTS = ("fp16", "int8")


@dataclass(frozen=True)
class Cut:
    """The encoder of one dim that a format is made of."""

    bundle: Bundle
    folder: Path
    """Where it lies as a bundle of ours: weights, tokenizer, manifest."""
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One layout of a folder that some tool loads."""

    name: str
    check: Callable[[Bundle], None]
    """Raises InputError, before any work, where the architecture or its preprocessing has no place in this format."""
    write: Callable[[Cut, Path, Sequence[str]], dict[str, Any] | None]
    """Writes the folder, with the variants named; returns the manifest's `graphs` where there are any."""
    reopen: Callable[[Path, str | None], Reopened]
    """Opens a written folder (one variant of it) with the tool that it is for."""
    allowed: float
    """The greatest difference of a number on equal inputs: what the order of float32's sums explains."""
    usage: str
    """Python (or JavaScript) that loads FOLDER, for the model card."""
    library: str
    """The model card's library_name."""
    needs: tuple[str, ...] = ()
    """Libraries beyond mmrl's own."""
    variants: bool = False
    """Whether --quantize is possible."""


def named(name: str) -> Format:
    """The format `name`.

    Raises:
        InputError: there is none.
    """
    if name not in _MODULE_OF:
        raise InputError(f"format: there is no {name!r}.{did_you_mean(name, _MODULE_OF)}")
    return import_module(f"mmrl.export.formats.{_MODULE_OF[name]}").FORMAT
