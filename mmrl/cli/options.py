"""Arguments and options shared by several commands: MODEL, KEY=VALUE, lists of integers, --json."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
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
Captions = Annotated[int | None, typer.Option(min=1, help="Captions to use per sample (default: all).")]
GroupKey = Annotated[str, typer.Option(help="Key of the group in a sample's JSON")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch")]
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


# Commands whose SHARDS are one argument, or where several are several sets.
_ONE_PATTERN = ("train", "embed", "rotate", "mine")


def check_patterns(arguments: Sequence[str]) -> None:
    """Raises InputError, with the line to type, if a shell has expanded a pattern of shards that is one argument."""
    if not arguments or arguments[0] not in _ONE_PATTERN:
        return
    tars = [argument for argument in arguments if argument.endswith(".tar") and "=" not in argument]
    folders = {tar.rpartition("/")[0] for tar in tars}
    if len(tars) > 1 and len(folders) == 1:
        pattern = f"{tars[0].rpartition('/')[0] or '.'}/*.tar"
        raise InputError(
            f"{tars[1]}: the shell has expanded a pattern to {len(tars)} arguments; quote it: "
            f"{_quoted_line(tars, pattern)}"
        )


_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def is_override(argument: str) -> bool:
    """Whether an argument begins with KEY=."""
    return _OVERRIDE.match(argument) is not None


def is_path(argument: str) -> bool:
    """Whether an argument is a file or a folder that exists. Longer arguments than names of files can be are not."""
    return os.path.exists(argument)  # noqa: PTH110 (Path.exists raises OSError for them)


def check_overrides(arguments: Sequence[str]) -> list[str]:
    """The KEY=VALUE arguments of a command.

    Raises:
        InputError: one has another form; if it is the rest of a value with spaces, the message has the quoted line.
    """
    for number, stray in enumerate(arguments):
        if is_override(stray):
            continue
        end = next((i for i in range(number + 1, len(arguments)) if is_override(arguments[i])), len(arguments))
        starts_here = any(one.startswith("=") for one in arguments[number + 1 : number + 2])  # KEY = VALUE
        first = max(number - 1, 0) if not starts_here else number
        words = list(arguments[first:end])
        joined = re.sub(r"\s*=\s*", "=", " ".join(words), count=1)
        if not is_override(joined):
            raise InputError(
                f"{stray!r}: write KEY=VALUE, e.g. train.batch_size=128; besides its options this command takes a "
                "config and such arguments only."
            )
        raise InputError(f"{stray!r} is not KEY=VALUE; quote a value with spaces: {_quoted_line(words, joined)}")
    return list(arguments)


def _quoted_line(words: list[str], joined: str) -> str:
    """This process's command line, with `words` as the one argument `joined`."""
    line, left = ["mmrl"], list(words)
    for argument in sys.argv[1:]:
        if not left or argument != left[0]:
            line.append(argument)
            continue
        if len(left) == len(words):
            line.append(joined)
        left.pop(0)
    return shlex.join(line)
