"""`mmrl …`: parse, call, print. Each command imports what it needs, so that --help is quick."""

import sys

import typer

from mmrl.cli import evaluation, exporting, searching, shards, training
from mmrl.errors import InputError, RunStopped

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
):
    app.command(command.__name__.rstrip("_"))(command)
config_app = typer.Typer(help="About config files.", no_args_is_help=True)
config_app.command()(training.schema)
app.add_typer(config_app, name="config")


def main() -> None:
    """The entry point: exit 0 for success, 2 for a mistake of the user's, 1 for anything else."""
    try:
        app()
    except InputError as error:
        print(f"mmrl: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"mmrl: {error}", file=sys.stderr)
        sys.exit(1)
