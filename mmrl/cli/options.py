"""Arguments and options shared by several commands: MODEL, lists of integers, --json."""

from typing import Annotated

import typer

from mmrl.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Model = Annotated[
    str,
    typer.Argument(
        help="Run folder, checkpoint, exported folder, open_clip:NAME:TAG, open_clip:NAME:FILE, hf-hub:ORG/NAME, "
        "local-dir:PATH, or a folder of Hugging Face's transformers or sentence-transformers."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace earlier output of this command that is in OUT.")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Let open_clip:NAME without a tag have random weights.")
]


def parse_ints(option: str, text: str | None) -> list[int] | None:
    """Parses a list of integers: 512,128 -> [512, 128]. None if the option is not given."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a list of integers; write e.g. 512,128.") from None
