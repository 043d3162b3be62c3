"""`mmrl check`: finds the problems of a set of shards before a run, and counts its steps.

Shards are checked in parallel, each by one process. The code that training reads with (`samples.parse`, `SampleReader`,
`Stream`) decides which samples are bad and whether training would start.

    shard.py       checks one shard, in a worker process
    findings.py    combines the results of all shards, finds duplicates
    report.py      console output and contact sheet
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmrl.data.check import report
from mmrl.data.check.findings import CheckResult, Findings, RunEstimate, SetFacts, find_duplicates, find_overlap
from mmrl.data.check.report import counted
from mmrl.data.check.shard import CUT_SHORT, CheckOptions, ShardFacts, TokenCounter, check_shard
from mmrl.data.index import Problem, summarise_problems
from mmrl.data.opening import open_shards
from mmrl.data.samples import FieldsConfig, SampleReader, Source
from mmrl.data.shards import ShardSpec, expand
from mmrl.data.sources import DataConfig, SourceConfig, named_sources
from mmrl.data.stores import ShardCache, is_remote
from mmrl.data.stream import Stream
from mmrl.data.workers import WorkerPool, usable_cores
from mmrl.errors import InputError
from mmrl.images import contact_sheet

_SHEET_TILES, _SHEET_SEED = 24, 0


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
    quiet: bool = False,
) -> CheckResult:
    """Reads all samples of a set of shards, prints and returns the problems found.

    Args:
        data: shards, or the `data:` section of a run, with its fields, sources and limits.
        batch_size: global batch size of a run; given, the result has its steps per epoch.
        world_size: ranks of the run.
        loader_workers: loader processes per rank; default: `data.workers`.
        decode: decode every image as training does; several times slower than reading alone.
        tokens: counts the captions' lengths in tokens.
        least_side: images with a shorter side below this number of pixels are counted.
        workers: processes that check; default: all usable cores.
        index: write the index of each local shard next to it; else all indexes go into the cache folder.
        list_file: receives every problem, one JSON object per line, in the format of bad_samples.jsonl.
        sheet_file: receives an image of random samples with their captions.
        against: shards of another set, e.g. for validation. Its images that the checked set has too, or that look like
            one of them, are counted; nothing else of it is checked.

    Raises:
        InputError: no such shards, a batch size that the ranks do not divide, a file that cannot be written.
        RunStopped: a worker process was killed.
    """
    config = data if isinstance(data, DataConfig) else _as_config(data)
    _check_run(batch_size, world_size, loader_workers)
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
    work = partial(_check_task, options=CheckOptions(cache, decode, tokens, index, against is not None))
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
    stops = _data_errors(findings, config.max_bad_fraction)
    reader, stream, start_errors = _open_as_training(config, sources, findings, cache, batch_size, world_size)
    loaders = config.workers or 0 if loader_workers is None else loader_workers
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
        notes=[*_notes(tasks, index, decode), *(reader.notes if reader is not None else ())],
    )
    report.print_result(result, quiet)
    if sheet_file is not None:
        report.draw_sheet(sheet_file, reader, _SHEET_TILES, _SHEET_SEED, quiet)
    return result


def _as_config(shards: ShardSpec) -> DataConfig:
    return DataConfig(train=str(shards) if isinstance(shards, str | Path) else [str(one) for one in shards])


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


def _check_task(task: tuple[str, FieldsConfig], options: CheckOptions) -> ShardFacts:
    return check_shard(*task, options)


def _data_errors(findings: Findings, max_bad_fraction: float) -> list[str]:
    """Sentences on unusable shards, damaged shards, too many bad samples and indexes that could not be written."""
    errors = []
    unusable = [facts for some in findings.of_set for facts in some if not facts.usable]
    if unusable:
        total = sum(map(len, findings.of_set))
        errors.append(
            f"{len(unusable):,} of {counted(total, 'shard')} cannot be used, and training does not start with them: "
            f"{_first_problem(findings.examples, {facts.location for facts in unusable})}."
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


def _first_problem(examples: Sequence[Problem], locations: set[str]) -> str:
    problem = next(problem for problem in examples if problem.shard in locations and not problem.key)
    return f"{problem.shard}, {problem.reason}"


def _open_as_training(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    findings: Findings,
    cache: ShardCache,
    batch_size: int | None,
    world_size: int,
) -> tuple[SampleReader | None, Stream | None, list[str]]:
    """Opens the usable shards as training does; an InputError is returned as the third value."""
    usable = [[facts.location for facts in some if facts.usable] for some in findings.of_set]
    reader = stream = None
    try:
        opened = [
            Source(open_shards(some, cache), one.fields or config.fields, one.repeat, one.name or "")
            for one, some in zip(sources, usable, strict=True)
            if some
        ]
        if opened:
            reader = SampleReader(opened, cache)
            if batch_size is not None:
                stream = Stream(reader, batch_size // world_size, world_size=world_size)
    except InputError as error:
        return reader, None, [str(error)]
    return reader, stream, []


def _notes(tasks: Sequence[tuple[str, FieldsConfig]], index: bool, decode: bool) -> list[str]:
    notes = []
    if not decode:
        notes.append("Images were not decoded: unreadable ones are not among the bad samples.")
    if index and any(is_remote(location) for location, _ in tasks):
        notes.append("Indexes of remote shards are in the cache folder; only local shards have theirs next to them.")
    return notes
