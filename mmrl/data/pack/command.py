"""`mmrl pack`: a user's pictures and captions -> WebDataset shards that stream.py reads.

    OUT/
        shard-000000.tar …    samples KEY.jpg|jpeg|png|webp + KEY.txt (+ KEY.json), in the order of the source
        shard-000000.tar.index …  where each sample lies in it, see index.py
        bad_samples.jsonl     what was left out, one object a sample; only where something was

The shards appear together at the end, so a folder that has any has all. Their bytes are a function of the source
alone (and of what lies at its addresses), not of the machine, the hour, the number of workers or how often the work
was stopped; of Pillow's version too, where pictures are encoded again.

    pairs.py        the source → pairs, not yet opened
    prepare.py      a pair → the files of its sample, in workers.py's processes; fetch.py for addresses
    writer.py       samples → shards; where a stopped run goes on
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data.index import Problem
from mmrl.data.pack import prepare, writer
from mmrl.data.pack.pairs import FolderPairs, Pair, TablePairs
from mmrl.data.pack.tables import KINDS, Table
from mmrl.data.workers import Workers
from mmrl.errors import InputError, RunStopped


def pack(
    source: Path,
    out: Path,
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    group_column: str | None = None,
    samples_per_shard: int = 1000,
    max_side: int | None = None,
    dedup: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Packs image-text pairs into shards; returns what `--json` prints. Goes on where a stopped run left OUT.

    Args:
        source: a folder of pictures with KEY.txt and/or KEY.json beside them, or a table with a column of paths,
            which are relative to the table's folder, or of http(s) addresses.
        image_column: the table's column of paths; the first of IMAGE_COLUMNS that it has when left out. Addresses are
            fetched only where it is named.
        caption_columns: columns of captions (or of lists of them), the first caption foremost; all of CAPTION_COLUMNS
            that it has when left out. For a folder: keys of KEY.json, `captions` and `caption` when left out.
        group_column: names the item shown; for a folder a key of KEY.json, `group` when left out.
        max_side: pixels; larger pictures are made smaller and stored as JPEG. All others keep their bytes.
        dedup: of pairs whose pictures are the same byte for byte, only the first is kept.
        workers: processes that read, fetch and check the pictures. More than 1 want the usual guard of scripts,
            `if __name__ == "__main__":`.

    Raises:
        InputError: no such source or column, an unreadable table, OUT holds something else or was begun with other
            arguments, no usable pair at all.
        RunStopped: OUT cannot be written any more, or a worker was killed.
    """
    for name, number in (("samples-per-shard", samples_per_shard), ("max-side", max_side), ("workers", workers)):
        if number is not None and number < 1:
            raise InputError(f"{name}: {number} is too small; give at least 1.")
    pairs = _pairs_of(source, image_column, caption_columns, group_column)
    arguments = {
        "source": str(source.resolve()),
        "image-column": image_column,
        "caption-column": list(caption_columns),
        "group-column": group_column,
        "samples-per-shard": samples_per_shard,
        "max-side": max_side,
        "dedup": dedup,
        **pairs.fingerprint(),
    }
    console = Console(quiet=quiet)
    with writer.opened(out, arguments, samples_per_shard, dedup=dedup) as packer:
        try:
            _fill(packer, pairs, max_side, workers, console)
            shards = packer.finish(source)
        except OSError as error:
            raise RunStopped(
                f"{out} cannot be filled any further ({error.strerror or error}); mend that and start again with the "
                "same arguments: the finished shards are kept."
            ) from error
        except KeyboardInterrupt:
            console.print(f"Stopped. The same command goes on after the {packer.progress.shards:,} finished shards.")
            raise
    progress = packer.progress
    _show(console, source, packer, shards)
    return {
        "shards": [str(shard) for shard in shards],
        "samples": progress.samples,
        "bad": dict(progress.bad),
        "bad_samples": str(out / writer.BAD_SAMPLES) if progress.bad else None,
        "columns": pairs.columns,
    }


def _pairs_of(
    source: Path, image_column: str | None, caption_columns: Sequence[str], group_column: str | None
) -> FolderPairs | TablePairs:
    if source.is_dir():
        if image_column is not None:
            raise InputError(f"image-column: {source} is a folder; only a table has columns of paths.")
        return FolderPairs(source, caption_columns or ("captions", "caption"), group_column or "group")
    if source.is_file():
        return TablePairs(Table(source), image_column, caption_columns, group_column)
    raise InputError(f"source: {source} does not exist; give a folder of pictures or a table ({', '.join(KINDS)}).")


def _fill(
    packer: writer.PackWriter, pairs: FolderPairs | TablePairs, max_side: int | None, workers: int, console: Console
) -> None:
    """All pairs that the writer has not yet had, by way of the workers, under a progress bar."""
    start, total = packer.progress.position, len(pairs)
    if start:
        console.print(f"Going on after {packer.progress.samples:,} samples in {packer.progress.shards:,} shards.")
    work = partial(prepare.prepare, max_side=max_side)
    chunks = -(-(total - start) // prepare.AT_ONCE)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Workers(work, max(1, min(workers, chunks)), preload=prepare.__name__) as pool,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("packing", total=total, completed=start)
        for samples in pool.map(_chunked(pairs.after(start))):
            for sample in samples:
                packer.add(sample)
                progress.advance(task)


def _chunked(pairs: Iterable[Pair | Problem]) -> Iterator[list[Pair | Problem]]:
    left = iter(pairs)
    while chunk := list(islice(left, prepare.AT_ONCE)):
        yield chunk


def _show(console: Console, source: Path, packer: writer.PackWriter, shards: list[Path]) -> None:
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    last = f" … {shards[-1].name}" if len(shards) > 1 else ""
    lines = [f"{source}: {packer.progress.samples:,} samples, {size:,.1f} MB in {shards[0]}{last}"]
    if packer.progress.bad:
        lines.append(f"Left out: {packer.account_of_bad()}")
    if packer.progress.repeated:
        lines.append(
            f"Pictures that an earlier sample shows as well: {packer.progress.repeated:,}; without a common group such "
            "samples are each other's negatives: give them one by --group-column (the column of paths will do), or "
            "keep the first alone by --dedup."
        )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
