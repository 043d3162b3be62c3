"""`mmrl train`, `mmrl plan`, `mmrl config schema`."""

import json
from typing import Annotated

import typer

from mmrl.cli.options import Json


def train(
    config: Annotated[str, typer.Argument(help="YAML file, such as configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="train.batch_size=128")] = None,
) -> None:
    """Carry out the run that CONFIG describes. Start it under torchrun for several processes."""
    from mmrl import config as configs
    from mmrl.train.trainer import train

    train(configs.load(config, overrides or []))


def plan(
    config: Annotated[str, typer.Argument(help="YAML file, such as configs/vit_b32_512_to_64.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="train.batch_size=32768")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the planned run, one process each")] = 8,
    memory: Annotated[float, typer.Option(min=1, help="GB of memory of each")] = 80.0,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s that a GPU reaches; 40 % of an H100's")
    ] = None,
    gigabytes: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s sent; 80 % of NVLink's, or of 400 Gb/s")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what CONFIG needs of memory, network and time, before anything is booked."""
    from mmrl import config as configs
    from mmrl.train import plan as planning

    result = planning.plan(configs.load(config, overrides or []), gpus, memory, tflops, gigabytes)
    print(json.dumps(result.as_json(), indent=2) if as_json else "\n".join(planning.lines(result)))


def schema() -> None:
    """Print the JSON schema of config files, for editors."""
    from mmrl import config as configs

    print(configs.schema())
