"""`mmrl pack` and `mmrl check`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmrl.cli.options import Force, Json, is_override, is_path
from mmrl.errors import InputError

if TYPE_CHECKING:
    from mmrl.data.sources import DataConfig

Side = Literal["both", "image", "text"]


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
    second_text_column: Annotated[
        str | None, typer.Option(help="A table's column of the text that belongs to the caption, e.g. a passage")
    ] = None,
    second_image_column: Annotated[
        str | None, typer.Option(help="A table's column of another image of the item, paths or URLs")
    ] = None,
    towers: Annotated[
        Side, typer.Option(help="The towers to train: text packs texts without images, image needs no captions")
    ] = "both",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per shard")] = 1000,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink larger images to this many pixels, as JPEG")
    ] = None,
    dedup: Annotated[
        bool,
        typer.Option(
            "--dedup", help="Of (first) images with identical bytes, or of equal texts, keep the first pair only"
        ),
    ] = False,
    holdout: Annotated[
        str | None,
        typer.Option(
            help="Share, e.g. 5%, or number of the pairs to put into OUT/val, all others into OUT/train. The two share "
            "no group, text or image file"
        ),
    ] = None,
    holdout_seed: Annotated[int, typer.Option(help="Seed that chooses the pairs of --holdout")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one per core)")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Pack a folder or a table of pairs into shards. Resumable: run the same command again."""
    from mmrl.data.pack.command import pack_shards
    from mmrl.data.workers import usable_cores
    from mmrl.output.next_steps import after_pack

    result = pack_shards(
        source,
        out,
        image_column=image_column,
        caption_columns=caption_column or (),
        group_column=group_column,
        second_text_column=second_text_column,
        second_image_column=second_image_column,
        sides=_sides(towers),
        samples_per_shard=samples_per_shard,
        max_side=max_side,
        dedup=dedup,
        holdout=holdout,
        holdout_seed=holdout_seed,
        workers=workers or usable_cores(),
        force=force,
        quiet=as_json,
    )
    print(json.dumps(result, indent=2) if as_json else after_pack(out, held_out=holdout is not None, towers=towers))


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
    towers: Annotated[
        Side | None, typer.Option(help="The towers to train: what a sample must have (default: both, or --config's)")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes (default: all cores)")] = None,
    as_json: Json = False,
) -> None:
    """Check SHARDS for bad samples, damaged files and duplicates. Exit code 1 if they are not OK to train on."""
    from mmrl.data.check.command import check_shards

    data, of_run = _data_to_check(shards or [], config, tokenizer, towers)
    run_batch_size = of_run.pop("batch_size", None)
    result = check_shards(
        data,
        batch_size=batch_size or run_batch_size,
        world_size=world_size,
        loader_workers=loader_workers,
        decode=decode,
        workers=workers,
        index=index,
        list_file=list_file,
        sheet_file=sheet,
        against=against,
        quiet=as_json,
        **of_run,
    )
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    if not result.ok:
        raise typer.Exit(1)


def _sides(towers: Side | None) -> tuple[str, ...]:
    """What a sample must have for these towers."""
    return ("image", "text") if towers in (None, "both") else (towers,)


def _data_to_check(
    shards: list[str], config: Path | None, tokenizer: str | None, towers: Side | None
) -> "tuple[DataConfig, dict[str, Any]]":
    """The data section, and what is known of the run: further arguments of `check_shards`."""
    from mmrl.config import load_config
    from mmrl.data.check.shard import TokenCounter
    from mmrl.data.sources import DataConfig

    if config is None and not shards:
        raise InputError("shards: missing; give a tar, a folder, a pattern or @list.txt, or a config with --config.")
    if config is not None and towers is not None:
        raise InputError("towers: --config says which towers there are; give model.towers=… to change them.")
    overrides = [] if config is None else [one for one in shards if is_override(one) and not is_path(one)]
    shards = [one for one in shards if one not in overrides]
    run = None if config is None else load_config(config, overrides)
    data, of_run = DataConfig(), dict[str, Any](sides=_sides(towers))
    if run is not None:
        data, of_run = run.data, {"sides": run.model.sides, "second": run.loss.second_members}
    if shards:
        data = data.model_copy(update={"train": shards, "sources": []})
    model = tokenizer or (run.model.name if run else None)
    if model is None:
        return data, of_run
    from mmrl.model import registry

    if "text" in of_run["sides"]:
        tokenise = registry.build_tokenizer(model)
        of_run["tokens"] = TokenCounter(tokenise.lengths, tokenise.context_length, tokenise.max_characters)
    if "image" in of_run["sides"]:
        of_run["least_side"] = registry.input_side(registry.read_model_cfg(model))
    return data, of_run | ({"batch_size": run.train.batch_size} if run else {})
