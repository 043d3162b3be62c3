"""`mmrl pack` and `mmrl check`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrl.cli.options import Json
from mmrl.errors import InputError

if TYPE_CHECKING:
    from mmrl.data.check.shard import Tokens
    from mmrl.data.sources import DataConfig


def pack(
    source: Annotated[
        Path, typer.Argument(help="Folder of pictures with KEY.txt or KEY.json, or CSV|TSV|JSONL|Parquet")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the shards")],
    image_column: Annotated[
        str | None,
        typer.Option(help="Column of paths (image, image_path, path, … by default) or, if named, of URLs to fetch"),
    ] = None,
    caption_column: Annotated[
        list[str] | None, typer.Option(help="May be repeated; caption, captions, text and title by default")
    ] = None,
    group_column: Annotated[str | None, typer.Option(help="Names the item: one item is no negative of itself")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    max_side: Annotated[int | None, typer.Option(min=1, help="Make larger pictures this small, as JPEG")] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Of pictures equal byte for byte keep the first, lose the others' captions")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at work; one a core by default")] = None,
    as_json: Json = False,
) -> None:
    """Pack image-text pairs of your own into shards. Stopped, the same command goes on where it stood."""
    from mmrl.data.pack import command as packing
    from mmrl.data.workers import usable_cores

    result = packing.pack(
        source,
        out,
        image_column=image_column,
        caption_columns=caption_column or (),
        group_column=group_column,
        samples_per_shard=samples_per_shard,
        max_side=max_side,
        dedup=dedup,
        workers=workers or usable_cores(),
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result, indent=2))


def check(
    shards: Annotated[list[str] | None, typer.Argument(help="Shards; those of the config when left out")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run's YAML: its shards, fields, limits, batch size and tokenizer")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Global batch of the planned run")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Processes (GPUs) of the planned run")] = 1,
    loader_workers: Annotated[int | None, typer.Option(min=0, help="data.workers of the planned run")] = None,
    decode: Annotated[
        bool, typer.Option(help="Decode every picture as training does; without it many times faster")
    ] = True,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model config, such as ViT-B-32, whose tokenizer tells captions' lengths")
    ] = None,
    index: Annotated[bool, typer.Option("--index", help="Write each shard's index beside it")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Draw random samples into this file, such as sheet.png")] = None,
    list_file: Annotated[Path | None, typer.Option("--list", help="Write every problem there, as JSON lines")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that check; all cores by default")] = None,
    as_json: Json = False,
) -> None:
    """Find every problem of SHARDS before a run: exit 0 if they are fit to train on, 1 if not."""
    from mmrl.data.check import command as checking

    data, tokens, side, planned = _to_check(shards or [], config, tokenizer)
    result = checking.check(
        data,
        batch_size=batch_size or planned,
        world_size=world_size,
        loader_workers=loader_workers,
        decode=decode,
        tokens=tokens,
        least_side=side,
        workers=workers,
        index=index,
        list_file=list_file,
        sheet_file=sheet,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    if not result.ok:
        raise typer.Exit(1)


def _to_check(
    shards: list[str], config: Path | None, tokenizer: str | None
) -> "tuple[DataConfig, Tokens | None, int, int | None]":
    """The data section, the tokenizer, the least side of a picture and the batch size that the options mean."""
    from mmrl import config as configs
    from mmrl.data.check.shard import Tokens
    from mmrl.data.sources import DataConfig

    if config is None and not shards:
        raise InputError("shards: none are given; name a tar, a folder, a pattern, @list.txt, or a run with --config.")
    run = None if config is None else configs.load(config)
    data = DataConfig() if run is None else run.data
    if shards:
        data = data.model_copy(update={"train": shards, "sources": []})
    model = tokenizer or (run.model.name if run else None)
    if model is None:
        return data, None, 64, None
    from mmrl.model import towers

    tokenise = towers.tokenise_of(model)
    side = towers.input_side(towers.read_model_cfg(model))
    return data, Tokens(tokenise.lengths, tokenise.context_length), side, run.train.batch_size if run else None
