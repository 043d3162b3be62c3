"""How `mmrl check` tells what it found: a progress bar, lines of text, a contact sheet."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data.check.findings import CheckResult, Duplicates, Plan, SetFacts, Spread
from mmrl.data.samples import BadSample, SampleReader
from mmrl.images import contact_sheet
from mmrl.images.contact_sheet import Tile

_SHEET_COLUMNS = 6


@contextmanager
def progress(shards: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar over the shards in a terminal, and at the end how fast they were read. What it yields is to be called
    after each shard with its bytes."""
    console, began, read = Console(quiet=quiet), time.monotonic(), 0
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as bar:  # fmt: skip
        task = bar.add_task("", total=shards, speed="")

        def advance(size: int) -> None:
            nonlocal read
            read += size
            bar.update(task, advance=1, speed=f"{read / 1e6 / (time.monotonic() - began):,.0f} MB/s")

        yield advance
    seconds = time.monotonic() - began
    _say(console, f"Read {read / 1e6:,.1f} MB in {seconds:,.1f} s, {read / 1e6 / seconds:,.0f} MB/s")


def show(result: CheckResult, quiet: bool) -> None:
    """Prints the result."""
    _say(Console(quiet=quiet), *lines(result))


def lines(result: CheckResult) -> list[str]:
    """The result as lines of text; each number of it is in the JSON too."""
    return [
        *(line for one in result.sets for line in _set_lines(one)),
        *_duplicate_lines(result.duplicates),
        *_problem_lines(result),
        *([] if result.plan is None else _plan_lines(result.plan)),
        *(f"note        {note}" for note in result.notes),
        *_verdict(result),
    ]


def _set_lines(facts: SetFacts) -> list[str]:
    head = f"{counted(facts.shards, 'shard')}, {counted(facts.samples, 'sample')}, {facts.bytes / 1e6:,.1f} MB"
    found = [f"{facts.name}: {head}" if facts.name else head]
    if facts.samples_of_shard is not None and facts.bytes_of_shard is not None:
        size = facts.bytes_of_shard
        found.append(
            f"  shards    {_spread(facts.samples_of_shard, 'samples')}; {size.smallest / 1e6:,.1f} to "
            f"{size.largest / 1e6:,.1f} MB; smallest {facts.smallest_shard}, largest {facts.largest_shard}"
        )
    found.append(f"  members   {_counts(facts.extensions)}")
    pictures = [_counts(facts.formats)]
    if facts.shorter_side is not None and facts.smallest_picture is not None and facts.largest_picture is not None:
        small, large = facts.smallest_picture, facts.largest_picture
        pictures += [
            f"shorter side {_spread(facts.shorter_side, 'pixels')}, {facts.small_pictures:,} below {facts.least_side}",
            f"smallest {small.width}x{small.height} ({small.key}), largest {large.width}x{large.height} ({large.key})",
        ]
    found.append(f"  pictures  {'; '.join(pictures)}")
    if facts.captions_of_sample is not None and facts.characters is not None:
        found.append(
            f"  captions  {facts.captions:,}: {_spread(facts.captions_of_sample, 'a sample')}; "
            f"{_spread(facts.characters, 'characters')}"
        )
    if facts.tokens is not None and facts.tokens.lengths is not None:
        found.append(
            f"  tokens    {_spread(facts.tokens.lengths, 'a caption')}; {facts.tokens.cut:,} captions are cut to the "
            f"{facts.tokens.context_length} that the model reads"
        )
    found.append(f"  groups    {facts.groups:,}, of {facts.grouped_samples:,} samples")
    return found


def _duplicate_lines(found: Duplicates) -> list[str]:
    said = []
    if found.pictures:
        said.append(
            f"duplicates  pictures that an earlier sample shows as well: {found.pictures:,}, without a common group, "
            f"so that both are each other's negatives: {found.pictures_apart:,}"
        )
        said += [f"            {one} = {other}" for one, other in found.picture_examples]
    if found.keys:
        said.append(f"duplicates  keys that come again in another shard: {found.keys:,}; its name tells them apart")
        said += [f"            {one} = {other}" for one, other in found.key_examples]
    return said


def _problem_lines(result: CheckResult) -> list[str]:
    said = []
    for kind, count in result.problems.items():
        said.append(f"problem     {count:,} {kind}")
        said += [f"            {one.shard} {one.key}: {one.reason}" for one in result.examples if one.kind == kind]
    return said


def _plan_lines(plan: Plan) -> list[str]:
    said = [
        f"plan        {plan.steps_per_epoch:,} steps an epoch of {plan.batch_size:,} samples (another "
        f"{plan.left_out_per_epoch:,} left out each epoch), {plan.samples_per_rank:,} samples for each of "
        f"{plan.world_size:,} ranks"
    ]
    if plan.shards < plan.loaders:
        said.append(
            f"            {plan.shards:,} shards are fewer than {plan.loaders:,} ranks x workers; no matter, since "
            "samples are divided, not shards"
        )
    return said


def _verdict(result: CheckResult) -> list[str]:
    count = counted(result.bad_samples, "bad sample")
    share = f"{count}, {result.bad_share:.2%}; {result.max_bad_fraction:.2%} are allowed"
    if result.ok:
        return [f"Fit to train on: {share}."]
    return [f"Not fit to train on ({share}):", *(f"  - {sentence}" for sentence in result.stops)]


def draw_sheet(path: Path, reader: SampleReader | None, tiles: int, seed: int, quiet: bool) -> None:
    """Random samples with their captions; those that cannot be used are passed over.

    Raises:
        InputError: the file cannot be written.
    """
    console, drawn = Console(quiet=quiet), list[Tile]()
    if reader is not None:
        rng = np.random.default_rng(seed)
        for number in rng.choice(len(reader), min(8 * tiles, len(reader)), replace=False):
            tile = _tile(reader, int(number))
            if tile is not None:
                drawn.append(tile)
            if len(drawn) == tiles:
                break
    if reader is None or not drawn:
        _say(console, f"No sheet was drawn in {path}: there is no sample to show.")
        return
    name = _printable(reader.sources[0].root.rstrip("/").rpartition("/")[2])
    note = f"{len(drawn)} of {len(reader):,} samples at random"
    contact_sheet.write(path, name, note, drawn, columns=_SHEET_COLUMNS)
    _say(console, f"Drawn: {path}")


def _tile(reader: SampleReader, number: int) -> Tile | None:
    try:
        sample, picture_CHW = reader.read_picture(number)
    except BadSample:
        return None
    height, width = picture_CHW.shape[1:]
    return Tile(
        sample.image, _printable(sample.name.rpartition("/")[2]), f"{width}x{height}", "  |  ".join(sample.captions)
    )


def counted(number: int, noun: str) -> str:
    """ "1 shard", "2 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _spread(numbers: Spread, unit: str) -> str:
    if numbers.smallest == numbers.largest:
        return f"{numbers.smallest:,} {unit}"
    return f"{numbers.smallest:,} to {numbers.largest:,} {unit}, median {numbers.median:,}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"


def _say(console: Console, *texts: str) -> None:
    for text in texts:
        console.print(_printable(text), highlight=False, markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Names come from the data: they must not steer the terminal, and need not be UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
