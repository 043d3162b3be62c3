"""`mmrl pack` and `mmrl check`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmrl.cli.options import Force, Json, is_override
from mmrl.errors import InputError

if TYPE_CHECKING:
    from mmrl.data.check.shard import TokenCounter
    from mmrl.data.sources import DataConfig


def pack(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of images with captions in NAME.txt or NAME.json, a .csv, .tsv, .jsonl or .parquet table, a "
            "folder or pattern of .parquet files, or a Hugging Face data set, hf:NAME:SPLIT"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the shards")],
    image_column: Annotated[
        str | None,
        typer.Option(
            help="Column of images, their paths or URLs (default: image, image_path, path, filename, file, file_name "
            "or img; URLs are then not fetched)"
        ),
    ] = None,
    caption_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with captions, or key in NAME.json; repeatable (default: caption, captions, text and title)"
        ),
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column or JSON key; rows with the same value are not each other's negatives")
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per shard")] = 1000,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink larger images to this many pixels, as JPEG")
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Of images with identical bytes, keep the first pair only")
    ] = False,
    holdout: Annotated[
        str | None,
        typer.Option(
            help="Share, e.g. 5%, or number of the pairs to put into OUT/val, all others into OUT/train. The two share "
            "no group, caption or image file"
        ),
    ] = None,
    holdout_seed: Annotated[int, typer.Option(help="Seed that chooses the pairs of --holdout")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one per core)")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Pack a folder or a table of image-text pairs into shards. Resumable: run the same command again."""
    from mmrl.data.pack.command import pack_shards
    from mmrl.data.workers import usable_cores
    from mmrl.output.next_steps import after_pack

    result = pack_shards(
        source,
        out,
        image_column=image_column,
        caption_columns=caption_column or (),
        group_column=group_column,
        samples_per_shard=samples_per_shard,
        max_side=max_side,
        dedup=dedup,
        holdout=holdout,
        holdout_seed=holdout_seed,
        workers=workers or usable_cores(),
        force=force,
        quiet=as_json,
    )
    print(json.dumps(result, indent=2) if as_json else after_pack(out, held_out=holdout is not None))


def check(
    shards: Annotated[
        list[str] | None,
        typer.Argument(help="Shards (default: those of --config); with --config also KEY=VALUE, as for mmrl train"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML config: shards, fields, limits, batch size and tokenizer of a run")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Global batch size, to print the run's steps")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Processes (GPUs) of the run")] = 1,
    loader_workers: Annotated[
        int | None, typer.Option(min=0, help="Loader processes per GPU (default: data.workers)")
    ] = None,
    decode: Annotated[bool, typer.Option(help="Decode every image as training does; slow")] = True,
    tokenizer: Annotated[
        str | None, typer.Option(help="Model whose tokenizer counts the captions' tokens, e.g. ViT-B-32")
    ] = None,
    index: Annotated[bool, typer.Option("--index", help="Write each shard's index next to it")] = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet of random samples to this file, e.g. sheet.png")
    ] = None,
    list_file: Annotated[
        Path | None, typer.Option("--list", help="Write every problem to this file, as JSON lines")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Shards of a validation or test set: count its images that SHARDS have too, or nearly"),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes (default: all cores)")] = None,
    as_json: Json = False,
) -> None:
    """Check SHARDS for bad samples, damaged files and duplicates. Exit code 1 if they are not OK to train on."""
    from mmrl.data.check.command import check_shards

    data, tokens, least_side, run_batch_size = _data_to_check(shards or [], config, tokenizer)
    result = check_shards(
        data,
        batch_size=batch_size or run_batch_size,
        world_size=world_size,
        loader_workers=loader_workers,
        decode=decode,
        tokens=tokens,
        least_side=least_side,
        workers=workers,
        index=index,
        list_file=list_file,
        sheet_file=sheet,
        against=against,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    if not result.ok:
        raise typer.Exit(1)


def _data_to_check(
    shards: list[str], config: Path | None, tokenizer: str | None
) -> "tuple[DataConfig, TokenCounter | None, int, int | None]":
    """The data section, the token counter, the model's image side in pixels (64 without a model), the batch size."""
    from mmrl.config import load_config
    from mmrl.data.check.shard import TokenCounter
    from mmrl.data.sources import DataConfig

    if config is None and not shards:
        raise InputError("shards: missing; give a tar, a folder, a pattern or @list.txt, or a config with --config.")
    overrides = [] if config is None else [one for one in shards if is_override(one) and not Path(one).exists()]
    shards = [one for one in shards if one not in overrides]
    run = None if config is None else load_config(config, overrides)
    data = DataConfig() if run is None else run.data
    if shards:
        data = data.model_copy(update={"train": shards, "sources": []})
    model = tokenizer or (run.model.name if run else None)
    if model is None:
        return data, None, 64, None
    from mmrl.model import registry

    tokenise = registry.build_tokenizer(model)
    side = registry.input_side(registry.read_model_cfg(model))
    tokens = TokenCounter(tokenise.lengths, tokenise.context_length, tokenise.max_characters)
    return data, tokens, side, run.train.batch_size if run else None
