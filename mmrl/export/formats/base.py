"""The interface of an export format, and the registry of formats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from mmrl.errors import InputError, did_you_mean
from mmrl.export.contract import Reopened
from mmrl.model.bundle import Bundle
from mmrl.model.manifest import Layout
from mmrl.model.towers import SIDES


@dataclass(frozen=True)
class Truncated:
    """The encoder of one dim, from which a format is written."""

    bundle: Bundle
    folder: Path
    """The same encoder as files, in the bundle format."""
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """A folder layout that another tool loads."""

    name: str
    one_tower: bool
    """Whether it holds one tower alone."""
    check: Callable[[Bundle], None]
    """Raises InputError, before any work, if the format cannot hold this architecture or its preprocessing."""
    write: Callable[[Truncated, Path, Sequence[str]], dict[str, Any] | None]
    """Writes the folder with the given variants; returns the manifest's `graphs`, or None if it has no graphs."""
    reopen: Callable[[Path, str | None], Reopened]
    """Opens a written folder (one variant of it) with the tool that it is for."""
    tolerance: float
    """Maximum absolute difference of an embedding on equal inputs: the rounding of float32 sums in another order."""
    library: str
    """The model card's library_name."""
    needs: tuple[str, ...] = ()
    """Optional packages that it needs."""
    variants: tuple[str, ...] = ()
    """What --quantize may be."""


def get_format(name: str) -> Format:
    """The format called `name`. Raises InputError: an unknown name."""
    names = get_args(Layout)
    if name not in names:
        raise InputError(f"format: {name!r} is unknown.{did_you_mean(name, names)}")
    return import_module(f"mmrl.export.formats.{name.replace('.', '_')}").FORMAT


def check_towers(chosen: Format, towers: Sequence[str], model: str) -> None:
    """Raises InputError if an encoder has one tower and the format needs both."""
    if len(towers) == 1 and not chosen.one_tower:
        absent = next(side for side in SIDES if side not in towers)
        allowed = [name for name in get_args(Layout) if get_format(name).one_tower]
        raise InputError(
            f"format: {chosen.name} holds encoders with both towers only, and {model} has no {absent} tower; allowed: "
            f"{', '.join(allowed)}."
        )
