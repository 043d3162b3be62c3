"""The `mmrl` command line. Each command imports what it needs when it runs, so that --help is quick."""

import errno
import io
import sys
from typing import Annotated

import typer

from mmrl.cli import evaluation, exporting, searching, shards, training
from mmrl.cli.options import check_patterns
from mmrl.errors import InputError, RunStopped
from mmrl.output.console import visible
from mmrl.version import __version__

_PATH_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EACCES)
"""Errors of paths that no command can open, whichever looks at one first."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmrl {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="mmrl",
    help="Train, evaluate and export image-text encoders with nested (Matryoshka) embeddings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    training.train,
    training.plan,
    evaluation.eval_,
    evaluation.compare,
    exporting.export,
    exporting.rotate,
    shards.pack,
    shards.check,
    searching.embed,
    searching.index,
    searching.search,
    searching.serve,
    searching.mine,
):
    app.command(command.__name__.rstrip("_"))(command)
config_app = typer.Typer(help="Print a preset's config, or describe the keys of config files.", no_args_is_help=True)
config_app.command()(training.init)
config_app.command()(training.schema)
config_app.command()(training.reference)
app.add_typer(config_app, name="config")


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `mmrl` itself."""


def main() -> None:
    """Entry point. Exit codes: 0 for success, 2 for invalid input, 1 for any other failure."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        if "" in sys.argv[1:]:  # as a path it would mean the folder that the command runs in
            number = sys.argv.index("", 1)
            raise InputError(f"Argument {number} is empty, as of a shell variable that is not set; give its value.")
        check_patterns(sys.argv[1:])
        app()
    except InputError as error:
        print(visible(f"mmrl: {error}"), file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        if not error.shown:
            print(visible(f"mmrl: {error}"), file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _PATH_ERRORS or error.filename is None:
            raise
        name = str(error.filename)
        shown = name if len(name) <= 100 else f"{name[:100]}…"
        print(visible(f"mmrl: {shown!r} cannot be opened ({error.strerror}); correct the path."), file=sys.stderr)
        sys.exit(2)
