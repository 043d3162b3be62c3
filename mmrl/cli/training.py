"""`mmrl train`, `mmrl plan`, `mmrl config`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mmrl.cli.options import Json, check_overrides, is_path, parse_ints
from mmrl.errors import InputError


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]", help="YAML config; config keys to change, e.g. train.batch_size=128"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Instead of CONFIG: shards, a folder of images with captions, or a table, to train on"),
    ] = None,
    val: Annotated[
        str | None, typer.Option(help="The same, for validation (default: a part of --data is held out)")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Encoder to start from: a run, open_clip:NAME:TAG …")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="small (default), vit-b-32, finetune or rotate-then-finetune (default with --from)"),
    ] = None,
    dims: Annotated[
        str | None, typer.Option("--dims", "--dim", help="Nested dims, e.g. 512,128 (default: those of the preset)")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Folder for the shards that --data is packed into (default: RUN/shards)")
    ] = None,
    holdout: Annotated[str | None, typer.Option(help="Share or number of pairs to hold out, e.g. 5%")] = None,
    image_column: Annotated[str | None, typer.Option(help="The table's column of images, as for mmrl pack")] = None,
    caption_column: Annotated[list[str] | None, typer.Option(help="A column with captions (repeatable)")] = None,
    group_column: Annotated[str | None, typer.Option(help="The column that names the item shown")] = None,
) -> None:
    """Train a model: from a YAML config, or with --data by a preset that is scaled to your data.

    Start it with torchrun for several processes. Resumable: run the same command again with resume=auto.
    """
    of_data = {
        "val": val,
        "shards": shards,
        "holdout": holdout,
        "image-column": image_column,
        "caption-column": caption_column,
        "group-column": group_column,
    }
    others = of_data if data is None else {}
    if data is None and from_ is None:
        others = {**of_data, "preset": preset, "dims": dims}
    for name, value in others.items():
        if value:
            raise InputError(f"{name}: goes with --data, which is missing; of a config, change keys by KEY=VALUE.")
    if data is None and from_ is None:
        _train_config(arguments or [])
        return

    from rich.console import Console

    from mmrl.train.own_data import DataOptions
    from mmrl.train.presets import TrainRequest, compose_config
    from mmrl.train.trainer import train

    own = None
    if data is not None:
        own = DataOptions(data, val, shards, holdout, image_column, tuple(caption_column or ()), group_column)
    request, overrides = TrainRequest(own, from_, preset, parse_ints("dims", dims)), check_overrides(arguments or [])
    console = Console()
    train(compose_config(request, overrides, console), console)


def _train_config(arguments: list[str]) -> None:
    from mmrl.config import load_config
    from mmrl.train.trainer import train

    if not arguments or ("=" in arguments[0] and not is_path(arguments[0])):
        raise InputError("config: missing; give a YAML file, or your images or shards: mmrl train --data photos.")
    train(load_config(arguments[0], check_overrides(arguments[1:])))


def plan(
    config: Annotated[str, typer.Argument(help="YAML config, e.g. configs/quickstart.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys to change, e.g. train.batch_size=128")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, one process each")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: h100, h200, a100, l40s, a10, l4, v100, t4 …")] = "h100",
    memory: Annotated[
        float | None, typer.Option(min=1, help="Memory per GPU in GB (default: its data sheet's)")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s achieved per GPU (default: 40 % of its peak)")
    ] = None,
    gigabytes: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s sent per GPU (default: 80 % of NVLink; of 400 Gb/s for more than 8 GPUs)"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, traffic and step time of a run on N GPUs, and recommend ZeRO stage and micro-batch."""
    from mmrl.config import load_config
    from mmrl.train.plan import plan_lines, plan_resources

    loaded = load_config(config, check_overrides(overrides or []))
    result = plan_resources(loaded, gpus, gpu, memory, tflops, gigabytes)
    print(json.dumps(asdict(result), indent=2) if as_json else "\n".join(plan_lines(result)))


def init(
    preset: Annotated[str, typer.Argument(help="small, vit-b-32, finetune or rotate-then-finetune")] = "small",
) -> None:
    """Print a preset's config, to edit and train: mmrl config init small > my.yaml."""
    from mmrl.train.presets import preset_path

    print(preset_path(preset).read_text(), end="")


def schema() -> None:
    """Print the JSON schema of config files, for validation and completion in editors."""
    from mmrl.config import config_schema

    print(config_schema())


def reference() -> None:
    """Print a Markdown reference of all config keys (configs/REFERENCE.md)."""
    from mmrl.config import config_reference

    print(config_reference(), end="")
