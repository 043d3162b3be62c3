"""Arguments and options shared by several commands: MODEL, lists of integers, --json."""

from typing import Annotated

import typer

from mmrl.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[
    str,
    typer.Argument(
        help="Run folder, checkpoint, exported folder, open_clip:NAME[:PRETRAINED], open_clip:hf-hub:ORG/NAME or "
        "open_clip:local-dir:PATH."
    ),
]


def parse_ints(option: str, text: str | None) -> list[int] | None:
    """Parses a list of integers: 512,128 -> [512, 128]. None if the option is not given."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a list of integers; write e.g. 512,128.") from None
