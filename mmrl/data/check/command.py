"""`mmrl check`: finds the problems of a set of shards before a run, and counts its steps.

Shards are checked in parallel, each by one process. The code that training reads with (`parsing.parse`, `SampleReader`,
`Stream`) decides which samples are bad and whether training would start.

    shard.py       checks one shard, in a worker process
    sortedness.py  tests whether neighbouring samples are more alike than random ones
    findings.py    combines the results of all shards, finds duplicates
    report.py      console output and contact sheet
"""

import os
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from mmrl.data.check import report
from mmrl.data.check.findings import CheckResult, Findings, RunEstimate, SetFacts, find_duplicates, find_overlap
from mmrl.data.check.report import counted
from mmrl.data.check.shard import CUT_SHORT, CheckOptions, ShardFacts, TokenCounter, check_shard
from mmrl.data.check.sortedness import order_note
from mmrl.data.counts import LIST, write_list
from mmrl.data.index import summarise_problems
from mmrl.data.index_file import SUFFIX
from mmrl.data.parsing import BOTH, IMAGE
from mmrl.data.samples import SampleReader
from mmrl.data.shards import ShardSpec, expand
from mmrl.data.sources import DataConfig, SourceConfig, data_config, named_sources, open_source
from mmrl.data.stores import ShardCache, is_remote
from mmrl.data.stream import Stream, window_and_lanes
from mmrl.data.workers import WorkerPool, usable_cores
from mmrl.errors import InputError
from mmrl.images import contact_sheet


def check_shards(
    data: ShardSpec | DataConfig,
    *,
    batch_size: int | None = None,
    world_size: int = 1,
    loader_workers: int | None = None,
    decode: bool = True,
    tokens: TokenCounter | None = None,
    least_side: int = 64,
    workers: int | None = None,
    index: bool = False,
    list_file: Path | None = None,
    sheet_file: Path | None = None,
    against: str | None = None,
    sides: Collection[str] = BOTH,
    second: frozenset[str] | None = None,
    quiet: bool = False,
) -> CheckResult:
    """Reads all samples of a set of shards, prints and returns the problems found.

    Args: as the options of `mmrl check` (cli/shards.py), and
        data: shards, or the `data:` section of a run, with its fields, sources and limits.
        tokens: counts the captions' lengths in tokens.
        least_side: images with a shorter side below this number of pixels are counted.
        sides: the towers of the run, which decide what a sample must have.
        second: what second members of pairs have in the run; None if there is no config.

    Raises:
        InputError: no such shards, a batch size that the ranks do not divide, a file that cannot be written, a sheet
            or comparison of images without images.
        RunStopped: a worker process was killed.
    """
    config = data_config(data)
    _check_run(batch_size, world_size, loader_workers)
    for name, value in (("sheet", sheet_file), ("against", against)):
        if value is not None and IMAGE not in sides:
            raise InputError(f"{name}: it shows or compares images, and texts alone have none; remove --{name}.")
    sources = named_sources(config)
    locations = [expand(one.shards, config.allow_pipe, keep_missing=True) for one in sources]
    _check_writable(locations, index, list_file, sheet_file)
    if against is not None and not decode:
        raise InputError("against: how images look is compared, which needs them decoded; remove --no-decode.")
    other_tasks = [] if against is None else [(x, config.fields) for x in expand(against, config.allow_pipe)]
    cache = ShardCache(config.remote)
    tasks = [(x, one.fields or config.fields) for one, some in zip(sources, locations, strict=True) for x in some]
    workers = max(1, min(usable_cores() if workers is None else workers, len(tasks)))
    findings = Findings([len(some) for some in locations], [one.repeat for one in sources], list_file)
    options = CheckOptions(cache, decode, tokens, index, against is not None, len(tasks), sides, second)
    work = partial(check_shard, options=options)
    with (
        WorkerPool(work, workers, preload=check_shard.__module__) as pool,
        report.check_progress(len(tasks) + len(other_tasks), quiet) as advance,
    ):
        for facts in pool.map(tasks):
            findings.add(facts)
            advance(facts.size)
        others = []
        for facts in pool.map(other_tasks):
            others.append(facts)
            advance(facts.size)
    checked = [facts for some in findings.of_set for facts in some]
    overlap = None
    if against is not None:
        with report.comparison_progress(sum(facts.samples for facts in others), quiet) as advance:
            overlap = find_overlap(against, others, checked, cache, advance)
    stops = [*_data_errors(findings, config.max_bad_fraction), *(_write_lists(checked) if index else ())]
    reader, stream, start_errors = _open_as_training(config, sources, findings, options, batch_size, world_size)
    loaders = config.workers or 0 if loader_workers is None else loader_workers
    notes = []
    if not decode and IMAGE in sides:
        notes.append("Images were not decoded: unreadable ones are not among the bad samples.")
    if index and any(is_remote(location) for location, _ in tasks):
        notes.append("Indexes of remote shards are in the cache folder; only local shards have theirs next to them.")
    result = CheckResult(
        ok=not stops and not start_errors,
        sets=[
            SetFacts.of(one.name or "", facts, tally, least_side, tokens)
            for one, facts, tally in zip(sources, findings.of_set, findings.tallies, strict=True)
        ],
        duplicates=find_duplicates(checked, cache),
        overlap=overlap,
        problems=dict(findings.kinds.most_common()),
        examples=findings.examples,
        bad_samples=findings.bad.total(),
        bad_share=findings.bad_share,
        max_bad_fraction=config.max_bad_fraction,
        plan=None if stream is None else RunEstimate.of(stream, world_size, loaders, len(tasks)),
        stops=[*stops, *start_errors],
        notes=[*notes, *_order_notes(config, sources, findings, batch_size or 1), *(reader.notes if reader else ())],
    )
    report.print_lines(Console(quiet=quiet), *report.result_lines(result))
    if sheet_file is not None:
        report.draw_sheet(sheet_file, reader, quiet)
    return result


def _check_run(batch_size: int | None, world_size: int, loader_workers: int | None) -> None:
    if batch_size is None and (world_size != 1 or loader_workers is not None):
        raise InputError("batch-size: missing; world-size and loader-workers need the global batch size too.")
    if batch_size is not None and batch_size % world_size:
        raise InputError(
            f"batch-size: {batch_size} is not divisible by {world_size} processes; give a multiple of {world_size}."
        )


def _check_writable(
    locations: Sequence[Sequence[str]], index: bool, list_file: Path | None, sheet_file: Path | None
) -> None:
    """Raises InputError for an output that cannot be written: before hours of reading, not after them."""
    if sheet_file is not None:
        contact_sheet.check_path(sheet_file, "sheet")
    if list_file is not None:
        try:
            list_file.write_text("")
        except OSError as error:
            raise InputError(f"list: {list_file} cannot be written ({error.strerror}); choose another file.") from None
    folders = {Path(x).parent for some in locations for x in some if not is_remote(x)} if index else set()
    for folder in sorted(folders):
        if folder.is_dir() and not os.access(folder, os.W_OK):
            raise InputError(f"index: {folder} is not writable; without --index the cache folder is used.")


def _data_errors(findings: Findings, max_bad_fraction: float) -> list[str]:
    """Sentences on unusable shards, damaged shards, too many bad samples and indexes that could not be written."""
    errors = []
    unusable = [facts for some in findings.of_set for facts in some if not facts.usable]
    if unusable:
        total, locations = sum(map(len, findings.of_set)), {facts.location for facts in unusable}
        first = next(one for one in findings.examples if one.shard in locations and not one.key)
        errors.append(
            f"{len(unusable):,} of {counted(total, 'shard')} cannot be used, and training does not start with them: "
            f"{first.shard}, {first.reason}."
        )
    cut = sum(count for kind, count in findings.kinds.items() if kind in CUT_SHORT)
    if cut:
        first = next(problem for problem in findings.examples if problem.kind in CUT_SHORT)
        errors.append(
            f"{counted(cut, 'shard')} truncated or damaged, samples are missing: {first.shard}, {first.reason}; copy "
            "the whole files again."
        )
    bad = findings.bad.total()
    if findings.bad_share > max_bad_fraction:
        errors.append(
            f"{counted(bad, 'bad sample')}, {findings.bad_share:.2%}; data.max_bad_fraction allows "
            f"{max_bad_fraction:.2%}: {summarise_problems(findings.bad)}."
        )
    unwritten = [facts for some in findings.of_set for facts in some if facts.index_error]
    if unwritten:
        errors.append(
            f"{len(unwritten):,} indexes could not be written next to their shards: {unwritten[0].index_error}."
        )
    return errors


def _write_lists(checked: Sequence[ShardFacts]) -> Iterator[str]:
    """Writes the list of the shards of each folder whose indexes were written; yields a sentence if that fails."""
    local = [one for one in checked if one.usable and not is_remote(one.location)]
    shards = [Path(one.location) for one in local if not one.index_error]
    for folder in sorted({one.parent for one in shards}):
        try:
            indexes = {one.name: one.with_name(one.name + SUFFIX) for one in shards if one.parent == folder}
            write_list(folder / LIST, indexes)
        except (OSError, ValueError) as error:
            yield f"index: {folder / LIST} cannot be written ({error}); correct that, or leave out --index."


def _open_as_training(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    findings: Findings,
    options: CheckOptions,
    batch_size: int | None,
    world_size: int,
) -> tuple[SampleReader | None, Stream | None, list[str]]:
    """Opens the usable shards as training does; an InputError is returned as the third value."""
    usable = [[facts.location for facts in some if facts.usable] for some in findings.of_set]
    reader = stream = None
    try:
        opened = [
            open_source(one, some, config, options.cache) for one, some in zip(sources, usable, strict=True) if some
        ]
        samples = {facts.location: facts.samples for some in findings.of_set for facts in some}
        for shard in (shard for source in opened for shard in source.shards):
            shard.check_count(samples[shard.location])
        if opened:
            reader = SampleReader(opened, options.cache, options.sides)
            if batch_size is not None:
                rows, second = batch_size // world_size, options.second or frozenset()
                stream = Stream(reader, rows, world_size=world_size, second=second, sides=options.sides)
    except InputError as error:
        return reader, None, [str(error)]
    return reader, stream, []


def _order_notes(
    config: DataConfig, sources: Sequence[SourceConfig], findings: Findings, batch_size: int
) -> Iterator[str]:
    """A sentence for each set that is sorted."""
    for source, some in zip(sources, findings.of_set, strict=True):
        samples = sum(facts.samples for facts in some)
        window, _ = window_and_lanes(config, batch_size, samples)
        if note := order_note([one for facts in some for one in facts.neighbours], samples, window):
            yield f"{source.name}: {note}" if source.name else note
