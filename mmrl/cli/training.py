"""`mmrl train`, `mmrl plan`, `mmrl config`."""

import json
from typing import Annotated

import typer

from mmrl.cli.options import Json

ConfigPath = Annotated[str, typer.Argument(help="YAML config, e.g. configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys to change, e.g. train.batch_size=128")
]


def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a model from a YAML config. Start it with torchrun for several processes.

    Resumable: run the same command again with resume=auto.
    """
    from mmrl.config import load_config
    from mmrl.train.trainer import train

    train(load_config(config, overrides or []))


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
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

    result = plan_resources(load_config(config, overrides or []), gpus, gpu, memory, tflops, gigabytes)
    print(json.dumps(result.as_json(), indent=2) if as_json else "\n".join(plan_lines(result)))


def schema() -> None:
    """Print the JSON schema of config files, for validation and completion in editors."""
    from mmrl.config import config_schema

    print(config_schema())


def reference() -> None:
    """Print a Markdown reference of all config keys (configs/REFERENCE.md)."""
    from mmrl.config import config_reference

    print(config_reference(), end="")
