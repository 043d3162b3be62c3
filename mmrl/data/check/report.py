"""The console output of `mmrl check`: a progress bar, the result as text, a contact sheet."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import TextColumn

from mmrl.data.check.findings import CheckResult, Duplicates, Overlap, RunEstimate, SetFacts, Spread
from mmrl.data.samples import BadSample, SampleReader
from mmrl.images import contact_sheet
from mmrl.images.contact_sheet import Tile
from mmrl.output.console import print_line, visible
from mmrl.output.progress import progress_bar

_SHEET_TILES, _SHEET_COLUMNS = 24, 6


@contextmanager
def check_progress(shards: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar over the shards, and the read speed at the end. Yields a function to call with the bytes of
    each finished shard."""
    console, began, read = Console(quiet=quiet), time.monotonic(), 0
    with progress_bar(console, TextColumn("{task.fields[speed]}")) as bar:
        task = bar.add_task("checking", total=shards, speed="")

        def advance(size: int) -> None:
            nonlocal read
            read += size
            bar.update(task, advance=1, speed=f"{read / 1e6 / (time.monotonic() - began):,.0f} MB/s")

        yield advance
    seconds = time.monotonic() - began
    print_lines(console, f"Read {read / 1e6:,.1f} MB in {seconds:,.1f} s, {read / 1e6 / seconds:,.0f} MB/s")


@contextmanager
def comparison_progress(samples: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar over the samples of another set. Yields a function to call with numbers of finished ones."""
    with progress_bar(Console(quiet=quiet)) as bar:
        task = bar.add_task("comparing", total=samples)
        yield lambda count: bar.advance(task, count)


def result_lines(result: CheckResult) -> list[str]:
    """The result as lines of text; every number in them is in the JSON too."""
    return [
        *(line for one in result.sets for line in _set_lines(one)),
        *_duplicate_lines(result.duplicates),
        *([] if result.overlap is None else _overlap_lines(result.overlap)),
        *_problem_lines(result),
        *([] if result.plan is None else _estimate_lines(result.plan)),
        *(f"note        {note}" for note in result.notes),
        *_verdict(result),
    ]


def _set_lines(facts: SetFacts) -> list[str]:
    head = f"{counted(facts.shards, 'shard')}, {counted(facts.samples, 'sample')}, {facts.bytes / 1e6:,.1f} MB"
    lines = [f"{facts.name}: {head}" if facts.name else head]
    if facts.samples_of_shard is not None and facts.bytes_of_shard is not None:
        size = facts.bytes_of_shard
        lines.append(
            f"  shards    {_spread(facts.samples_of_shard, 'samples')}; {size.smallest / 1e6:,.1f} to "
            f"{size.largest / 1e6:,.1f} MB; smallest {facts.smallest_shard}, largest {facts.largest_shard}"
        )
    lines.append(f"  members   {_counts(facts.extensions)}")
    images = [_counts(facts.formats)]
    if facts.shorter_side is not None and facts.smallest_picture is not None and facts.largest_picture is not None:
        small, large = facts.smallest_picture, facts.largest_picture
        images += [
            f"shorter side {_spread(facts.shorter_side, 'pixels')}, {facts.small_pictures:,} below {facts.least_side}",
            f"smallest {small.width}x{small.height} ({small.key}), largest {large.width}x{large.height} ({large.key})",
        ]
    if facts.formats:
        lines.append(f"  images    {'; '.join(images)}")
    if facts.captions_of_sample is not None and facts.characters is not None:
        lines.append(
            f"  captions  {facts.captions:,}: {_spread(facts.captions_of_sample, 'per sample')}; "
            f"{_spread(facts.characters, 'characters')}"
        )
    seconds = {"text": facts.second_texts, "image": facts.second_images}
    if any(seconds.values()):
        shown = (f"{counted(count, 'sample')} with a second {kind}" for kind, count in seconds.items() if count)
        lines.append(f"  pairs     {', '.join(shown)} of their own, of {facts.samples:,}")
    if facts.tokens is not None and facts.tokens.lengths is not None:
        lines.append(
            f"  tokens    {_spread(facts.tokens.lengths, 'per text')}; {facts.tokens.cut:,} texts are truncated to "
            f"the model's context length of {facts.tokens.context_length}"
        )
        if facts.tokens.beyond:
            lines[-1] += (
                f"; {counted(facts.tokens.beyond, 'text')} of more than {facts.tokens.max_characters:,} characters, "
                "of which the rest is not read"
            )
    lines.append(f"  groups    {facts.groups:,}; {counted(facts.grouped_samples, 'sample')} with a group")
    if facts.split_groups:
        lines[-1] += (
            f"; {facts.split_groups:,} of them split over shards, where loss.image_image and loss.text_text find fewer "
            "second members; mmrl pack puts groups together"
        )
    return lines


def _duplicate_lines(found: Duplicates) -> list[str]:
    lines = []
    if found.pictures:
        lines.append(
            f"duplicates  {counted(found.pictures, 'sample')} with the same image as an earlier one; "
            f"{found.pictures_apart:,} without a common group, and so each other's negatives"
        )
        lines += [f"            {one} = {other}" for one, other in found.picture_examples]
    if found.captions_apart:
        lines.append(
            f"duplicates  {counted(found.captions_apart, 'sample')} with a text of another one and no common group; "
            "no negatives of each other with data.mask_equal_captions, but wrong answers in an evaluation"
        )
        lines += [f"            {one} = {other}" for one, other in found.caption_examples]
    return lines


def _overlap_lines(found: Overlap) -> list[str]:
    bad = f"; {counted(found.bad, 'bad sample')} not compared" if found.bad else ""
    return [
        f"overlap     of {counted(found.samples, 'sample')} in {found.against}, {found.identical:,} have an image of "
        f"this set, and {found.alike:,} one that looks like it{bad}",
        *(f"            {one} = {other}" for one, other in found.identical_examples),
        *(f"            {one} ~ {other}" for one, other in found.alike_examples),
    ]


def _problem_lines(result: CheckResult) -> list[str]:
    lines = []
    for kind, count in result.problems.items():
        lines.append(f"problem     {count:,} {kind}")
        lines += [f"            {one.shard} {one.key}: {one.reason}" for one in result.examples if one.kind == kind]
    return lines


def _estimate_lines(run: RunEstimate) -> list[str]:
    lines = [
        f"run         {run.steps_per_epoch:,} steps per epoch with a batch size of {run.batch_size:,}, "
        f"{run.left_out_per_epoch:,} samples dropped per epoch; {run.samples_per_rank:,} samples for each of "
        f"{counted(run.world_size, 'rank')}"
    ]
    if run.shards < run.loaders:
        lines.append(
            f"            {counted(run.shards, 'shard')} for {run.loaders:,} loaders (ranks × workers); no problem, "
            "since samples are distributed, not shards"
        )
    return lines


def _verdict(result: CheckResult) -> list[str]:
    count = counted(result.bad_samples, "bad sample")
    share = f"{count}, {result.bad_share:.2%} (limit {result.max_bad_fraction:.2%})"
    if result.ok:
        return [f"OK to train on: {share}."]
    return [f"Not OK to train on: {share}.", *(f"  - {sentence}" for sentence in result.stops)]


def draw_sheet(path: Path, reader: SampleReader | None, quiet: bool) -> None:
    """Writes a contact sheet of random samples with their captions; bad samples are skipped.

    Raises:
        InputError: the file cannot be written.
    """
    console, drawn = Console(quiet=quiet), list[Tile]()
    if reader is not None:
        rng = np.random.default_rng(0)
        for number in rng.choice(len(reader), min(8 * _SHEET_TILES, len(reader)), replace=False):
            tile = _tile(reader, int(number))
            if tile is not None:
                drawn.append(tile)
            if len(drawn) == _SHEET_TILES:
                break
    if reader is None or not drawn:
        print_lines(console, f"No contact sheet written to {path}: there is no usable sample.")
        return
    name = visible(reader.sources[0].root.rstrip("/").rpartition("/")[2])
    note = f"{len(drawn)} of {len(reader):,} samples at random"
    contact_sheet.write(path, name, note, drawn, columns=_SHEET_COLUMNS)
    print_lines(console, f"Contact sheet: {path}")


def _tile(reader: SampleReader, number: int) -> Tile | None:
    try:
        sample, image_CHW = reader.read_image(number)
    except BadSample:
        return None
    height, width = image_CHW.shape[1:]
    return Tile(
        sample.image, visible(sample.name.rpartition("/")[2]), f"{width}x{height}", "  |  ".join(sample.captions)
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


def print_lines(console: Console, *lines: str) -> None:
    """Prints lines of text."""
    for line in lines:
        print_line(console, line.replace("\n", "\\n"))  # of a name
