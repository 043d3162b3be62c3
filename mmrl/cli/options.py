"""What several commands take: a model, lists of numbers, --json."""

from typing import Annotated

import typer

from mmrl.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]
Model = Annotated[str, typer.Argument(help="Run folder, checkpoint, bundle, or open_clip:NAME[:PRETRAINED]")]


def numbers(option: str, text: str | None) -> list[int] | None:
    """512,128 -> [512, 128]; None where the option is left out."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: {text!r} is no list of numbers such as 512,128.") from None
