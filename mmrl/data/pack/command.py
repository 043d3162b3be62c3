"""`mmrl pack`: packs images and captions into WebDataset shards for training.

    OUT/
        shard-000000.tar …        samples KEY.jpg|jpeg|png|webp + KEY.txt (+ KEY.json, + KEY.second.jpg …), or KEY.json
                                  alone for two texts, in the order of the source, but those of a group together, and in
                                  one shard if they fit
        shard-000000.tar.index …  the offsets of its samples, see data/index.py
        shard-000000.tar.KEY.groups …  their groups, see data/groups.py; only where samples have a JSON file
        bad_samples.jsonl         the pairs that were skipped, one JSON object per line; absent if there are none

With a holdout, OUT/train and OUT/val have the shards of each part.

The shards are moved into OUT together at the end: either all of them are there or none. Their bytes depend only on the
source (and on what its URLs return), not on the machine, the time, the number of workers or on interruptions; where
images are re-encoded, also on Pillow's version.

    pairs.py        source → pairs: a table's rows, or the images of data/folder.py
    tables.py       reads CSV, TSV, JSON Lines and Parquet
    hub.py          reads Hugging Face data sets
    grouped.py      puts the pairs of a group next to each other
    holdout.py      divides the pairs into train and val
    prepare.py      pair → the members of its sample, in worker processes; downloads by data/fetch.py
    writer.py       samples → shards; resumes an interrupted pack
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from mmrl.data.folder import CAPTION_KEYS, ImageFolder
from mmrl.data.index import Problem
from mmrl.data.pack import prepare, writer
from mmrl.data.pack.grouped import GroupedPairs
from mmrl.data.pack.holdout import HeldOutPairs
from mmrl.data.pack.hub import HubTable
from mmrl.data.pack.pairs import Columns, FolderPairs, Pair, TablePairs
from mmrl.data.pack.tables import KINDS, Table, parquet_files
from mmrl.data.parsing import BOTH, IMAGE, TEXT
from mmrl.data.shards import HUB
from mmrl.data.workers import WorkerPool
from mmrl.errors import InputError, RunStopped
from mmrl.output.console import print_line
from mmrl.output.progress import progress_bar


def pack_shards(
    source: Path,
    out: Path,
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    group_column: str | None = None,
    second_text_column: str | None = None,
    second_image_column: str | None = None,
    sides: Collection[str] = BOTH,
    samples_per_shard: int = 1000,
    max_side: int | None = None,
    dedup: bool = False,
    holdout: str | None = None,
    holdout_seed: int = 0,
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Packs image-text pairs into shards; returns what `--json` prints. Resumes an interrupted pack in OUT.

    Args: as the options of `mmrl pack` (cli/shards.py), whose defaults are these:
        image_column: the first of IMAGE_COLUMNS that the table has; URLs are fetched only if the column is named.
        caption_columns: those of CAPTION_COLUMNS that the table has, in the order in which a sample gets them; for a
            folder CAPTION_KEYS, keys of NAME.json.
        group_column: for a folder the key `group` of NAME.json.
        sides: what a pair must have: IMAGE, TEXT or both; a pair of one of them needs the second column that is named.
        workers: a script that uses more than 1 needs the guard `if __name__ == "__main__":`.

    Raises:
        InputError: no such source or column, an unreadable table, OUT is not empty or was started with other
            arguments, no usable pair.
        RunStopped: OUT cannot be written any more, or a worker was killed.
    """
    for name, number in (("samples-per-shard", samples_per_shard), ("max-side", max_side), ("workers", workers)):
        if number is not None and number < 1:
            raise InputError(f"{name}: {number} is too small; give at least 1.")
    of_side = {"image-column": image_column, "second-image-column": second_image_column, "max-side": max_side}
    for option, value in of_side.items() if IMAGE not in sides else [("second-text-column", second_text_column)]:
        if value is not None and len(sides) == 1:
            raise InputError(f"{option}: no use with --towers {next(iter(sides))}; remove the option.")
    console = Console(quiet=quiet)
    named = Columns(image_column, caption_columns, group_column, second_text_column, second_image_column, sides)
    pairs = open_pairs(source, named)
    grouped = GroupedPairs(pairs, samples_per_shard, console)
    pairs = grouped if grouped.is_needed else pairs
    if holdout is not None:
        pairs = HeldOutPairs(pairs, holdout, holdout_seed, console)
        if pairs.held_out < 0.9 * pairs.wanted:
            print_line(
                console,
                f"Held out are {pairs.held_out:,} pairs instead of {pairs.wanted:,}: all others are linked by groups, "
                "captions or images.",
            )
    held_out = pairs.held_out if isinstance(pairs, HeldOutPairs) else None
    arguments = {
        "source": str(source if str(source).startswith(HUB) else source.resolve()),
        "image-column": image_column,
        "caption-column": list(caption_columns),
        "group-column": group_column,
        "second-text-column": second_text_column,
        "second-image-column": second_image_column,
        "towers": next(iter(sides)) if len(sides) == 1 else None,
        "samples-per-shard": samples_per_shard,
        "max-side": max_side,
        "dedup": dedup,
        "holdout": None,
        **pairs.fingerprint(),
    }
    with writer.open_writer(out, arguments, samples_per_shard, dedup=dedup, held_out=held_out, force=force) as packer:
        try:
            _pack_all(packer, pairs, max_side, workers, console)
            shards = packer.finish(source)
        except OSError as error:
            raise RunStopped(
                f"out: {out} cannot be written ({error.strerror or error}); fix that and run the same command again: "
                "finished shards are kept."
            ) from error
        except KeyboardInterrupt:
            console.print(
                f"Interrupted after {packer.progress.shards:,} finished shards. Run the same command again to resume."
            )
            raise
    progress = packer.progress
    _print_summary(console, source, packer, shards, pairs.columns)
    return {
        "shards": [str(shard) for shard in shards],
        "samples": progress.samples,
        **({} if held_out is None else {"held_out": asdict(progress.held_out)}),
        "bad": dict(progress.bad),
        "bad_samples": str(out / writer.BAD_SAMPLES) if progress.bad else None,
        "columns": pairs.columns,
    }


def open_pairs(source: Path, named: Columns) -> FolderPairs | TablePairs:
    """The pairs of a source, listed but not read; the arguments and errors are those of `pack_shards`."""
    if str(source).startswith(HUB):
        return TablePairs(HubTable(str(source)), named)
    if files := parquet_files(source):
        return TablePairs(Table(source, files), named)
    if source.is_dir():
        for option in ("image", "second_image", "second_text"):
            if getattr(named, option) is not None:
                raise InputError(f"{option.replace('_', '-')}-column: {source} is a folder; only a table has columns.")
        if IMAGE not in named.sides:
            raise InputError(f"source: {source} is a folder; texts without images are packed from a table.")
        keys, group, needs_captions = named.captions or CAPTION_KEYS, named.group or "group", TEXT in named.sides
        return FolderPairs(ImageFolder(source, caption_keys=keys, group_key=group, require_captions=needs_captions))
    if source.is_file():
        return TablePairs(Table(source), named)
    raise InputError(f"source: {source} does not exist; give a folder of images or a table ({', '.join(KINDS)}).")


def _pack_all(
    packer: writer.PackWriter,
    pairs: FolderPairs | TablePairs | GroupedPairs | HeldOutPairs,
    max_side: int | None,
    workers: int,
    console: Console,
) -> None:
    """Packs all pairs that the writer does not have yet."""
    start, total = packer.progress.position, len(pairs)
    if start:
        console.print(f"Resuming after {packer.progress.samples:,} samples in {packer.progress.shards:,} shards.")
    work = partial(prepare.prepare, max_side=max_side)
    chunks = -(-(total - start) // prepare.CHUNK)
    with WorkerPool(work, max(1, min(workers, chunks)), preload=prepare.__name__) as pool, progress_bar(console) as bar:
        task = bar.add_task("packing", total=total, completed=start)
        for samples in pool.map(_chunked(pairs.after(start))):
            for sample in samples:
                packer.add(sample)
                bar.advance(task)


def _chunked(pairs: Iterable[Pair | Problem]) -> Iterator[list[Pair | Problem]]:
    remaining = iter(pairs)
    while chunk := list(islice(remaining, prepare.CHUNK)):
        yield chunk


def _print_summary(
    console: Console, source: Path, packer: writer.PackWriter, shards: list[Path], columns: Mapping[str, Any] | None
) -> None:
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    held_out = packer.progress.held_out
    last = f" … {shards[-1].name}" if len(shards) > 1 else ""
    where = shards[0].parent.parent if held_out.shards else f"{shards[0]}{last}"
    lines = [f"{source}: {packer.progress.samples:,} samples, {size:,.1f} MB in {where}"]
    if columns:
        seconds = [columns.get("second_text"), columns.get("second_image")]
        used = [columns["image"], *columns["captions"], columns["group"], *seconds]
        lines.append(f"Columns that were read: {', '.join(filter(None, used))}")
        if any(seconds) and (without := packer.progress.samples - packer.progress.seconds):
            lines.append(f"Samples without a second text or image: {without:,}")
    if held_out.shards:
        others = f"the other {packer.progress.samples - held_out.samples:,} are in {shards[-1].parent}"
        lines.append(f"Held out: {held_out.samples:,} samples in {shards[0].parent}; {others}")
        if held_out.images_in_train:
            lines.append(
                f"Samples of {shards[-1].parent} with the same image as one held out: {held_out.images_in_train:,}. "
                "Leave them out with --dedup."
            )
    if packer.progress.bad:
        lines.append(f"Skipped: {packer.bad_summary()}")
    if packer.progress.repeated:
        what = "texts" if columns and columns["image"] is None else "image"
        lines.append(
            f"Samples with the same {what} as an earlier one and no group: {packer.progress.repeated:,}. They are each "
            "other's negatives; give them a common group with --group-column (the column of paths will do), or keep "
            "only the first with --dedup."
        )
    print_line(console, "\n".join(lines))
