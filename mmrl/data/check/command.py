"""`mmrl check`: every problem of the shards before a run starts on them, and what the run would make of them.

Shards are read in parallel, each by one process and once. What is bad is decided by the code that training reads with;
whether training would start at all is asked of `SampleReader` and `Stream` themselves.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmrl.data.check import report
from mmrl.data.check.findings import CheckResult, Findings, Plan, SetFacts, find_duplicates
from mmrl.data.check.report import counted
from mmrl.data.check.shard import CUT_SHORT, ShardFacts, Tokens, Work, check_shard
from mmrl.data.index import Problem, account
from mmrl.data.opening import open_shards
from mmrl.data.samples import FieldsConfig, SampleReader, Source
from mmrl.data.shards import Spec, expand
from mmrl.data.sources import DataConfig, SourceConfig, named_sources
from mmrl.data.stores import Store, is_remote
from mmrl.data.stream import Stream
from mmrl.data.workers import Workers, usable_cores
from mmrl.errors import InputError
from mmrl.images import contact_sheet

_SHEET_TILES, _SHEET_SEED = 24, 0


def check(
    data: Spec | DataConfig,
    *,
    batch_size: int | None = None,
    world_size: int = 1,
    loader_workers: int | None = None,
    decode: bool = True,
    tokens: Tokens | None = None,
    least_side: int = 64,
    workers: int | None = None,
    index: bool = False,
    list_file: Path | None = None,
    sheet_file: Path | None = None,
    quiet: bool = False,
) -> CheckResult:
    """Reads all of a set of shards, shows and returns what is found.

    Args:
        data: shards, or the `data:` section of a run, whose fields, sources and limits then hold.
        batch_size: of the planned run, over all of its processes; with it the steps of an epoch are told.
        world_size: processes of the planned run.
        loader_workers: loader processes for each of them; `data.workers` when left out.
        decode: decode every picture, as training will; several times slower than reading.
        tokens: the tokenizer, for lengths of captions in tokens.
        least_side: pictures whose shorter side has fewer pixels are counted.
        workers: processes that check; all usable cores when left out.
        index: write the index of each local shard beside it; else all go into the cache folder.
        list_file: every problem goes there, one object a line, as in bad_samples.jsonl.
        sheet_file: random samples with their captions, as a picture.

    Raises:
        InputError: no such shards, a plan that does not divide, a file that cannot be written.
        RunStopped: a worker process was killed.
    """
    config = data if isinstance(data, DataConfig) else _as_config(data)
    planned = _planned(config, batch_size, world_size, loader_workers)
    sources = named_sources(config)
    locations = [expand(one.shards, config.allow_pipe, keep_missing=True) for one in sources]
    _refuse_unwritable(locations, index, list_file, sheet_file)
    store = Store(config.remote)
    tasks = [(x, one.fields or config.fields) for one, some in zip(sources, locations, strict=True) for x in some]
    workers = max(1, min(usable_cores() if workers is None else workers, len(tasks)))
    findings = Findings([len(some) for some in locations], list_file)
    look = partial(_check, work=Work(store, decode, tokens, index))
    with (
        Workers(look, workers, preload=check_shard.__module__) as pool,
        report.progress(len(tasks), quiet) as advance,
    ):
        for facts in pool.map(tasks):
            findings.add(facts)
            advance(facts.size)
    stops = _spoiled(findings, config.max_bad_fraction)
    reader, stream, refusal = _start(config, sources, locations, findings, store, planned)
    result = CheckResult(
        ok=not stops and not refusal,
        sets=[
            SetFacts.of(one.name or "", facts, tally, least_side, tokens)
            for one, facts, tally in zip(sources, findings.of_set, findings.tallies, strict=True)
        ],
        duplicates=find_duplicates([facts for some in findings.of_set for facts in some], store),
        problems=dict(findings.kinds.most_common()),
        examples=findings.examples,
        bad_samples=findings.bad.total(),
        bad_share=findings.bad_share,
        max_bad_fraction=config.max_bad_fraction,
        plan=None if stream is None or planned is None else _plan(stream, planned, len(tasks)),
        stops=[*stops, *refusal],
        notes=_notes(tasks, index, decode),
    )
    report.show(result, quiet)
    if sheet_file is not None:
        report.draw_sheet(sheet_file, reader, _SHEET_TILES, _SHEET_SEED, quiet)
    return result


def _as_config(shards: Spec) -> DataConfig:
    return DataConfig(train=str(shards) if isinstance(shards, str | Path) else [str(one) for one in shards])


@dataclass(frozen=True)
class _Planned:
    batch_size: int
    world_size: int
    loader_workers: int


def _planned(
    config: DataConfig, batch_size: int | None, world_size: int, loader_workers: int | None
) -> _Planned | None:
    if batch_size is None:
        if world_size != 1 or loader_workers is not None:
            raise InputError("batch-size: give the global batch as well, which a plan for so many processes needs.")
        return None
    if batch_size % world_size:
        raise InputError(
            f"batch-size: {batch_size} cannot be divided over {world_size} processes; take a multiple of {world_size}."
        )
    return _Planned(batch_size, world_size, config.workers if loader_workers is None else loader_workers)


def _refuse_unwritable(
    locations: Sequence[Sequence[str]], index: bool, list_file: Path | None, sheet_file: Path | None
) -> None:
    """Before hours of reading, not after them."""
    if sheet_file is not None:
        contact_sheet.check(sheet_file, "sheet")
    if list_file is not None:
        try:
            list_file.write_text("")
        except OSError as error:
            raise InputError(f"list: {list_file} cannot be written ({error.strerror}); name another file.") from None
    folders = {Path(x).parent for some in locations for x in some if not is_remote(x)} if index else set()
    for folder in sorted(folders):
        if folder.is_dir() and not os.access(folder, os.W_OK):
            raise InputError(f"index: {folder} may not be written to; leave --index out to use the cache folder.")


def _check(task: tuple[str, FieldsConfig], work: Work) -> ShardFacts:
    return check_shard(*task, work)


def _spoiled(findings: Findings, max_bad_fraction: float) -> list[str]:
    """What of the shards and samples would stop a training, or spoil it in silence."""
    stops = []
    lost = [facts for some in findings.of_set for facts in some if not facts.usable]
    if lost:
        total = sum(map(len, findings.of_set))
        stops.append(
            f"{len(lost):,} of {counted(total, 'shard')} cannot be used, and no training starts with them: "
            f"{_first(findings.examples, {facts.location for facts in lost})}."
        )
    cut = sum(count for kind, count in findings.kinds.items() if kind in CUT_SHORT)
    if cut:
        where = next(problem for problem in findings.examples if problem.kind in CUT_SHORT)
        stops.append(
            f"{counted(cut, 'shard')} cut short or damaged, so that samples are missing: {where.shard}, "
            f"{where.reason}; copy the whole files again."
        )
    bad = findings.bad.total()
    if findings.bad_share > max_bad_fraction:
        stops.append(
            f"{counted(bad, 'sample')}, {findings.bad_share:.2%}, {'is' if bad == 1 else 'are'} bad, more than "
            f"data.max_bad_fraction {max_bad_fraction:.2%} allows: {account(findings.bad)}."
        )
    unwritten = [facts for some in findings.of_set for facts in some if facts.index_error]
    if unwritten:
        stops.append(
            f"{len(unwritten):,} indexes could not be written beside their shards: {unwritten[0].index_error}."
        )
    return stops


def _first(examples: Sequence[Problem], locations: set[str]) -> str:
    problem = next(problem for problem in examples if problem.shard in locations and not problem.key)
    return f"{problem.shard}, {problem.reason}"


def _start(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    locations: Sequence[Sequence[str]],
    findings: Findings,
    store: Store,
    planned: _Planned | None,
) -> tuple[SampleReader | None, Stream | None, list[str]]:
    """What training does before its first batch, on the shards that can be used; its refusal is a finding."""
    usable = [[facts.location for facts in some if facts.usable] for some in findings.of_set]
    reader = stream = None
    try:
        opened = [
            Source(open_shards(some, store), one.fields or config.fields, one.repeat, one.name or "")
            for one, some in zip(sources, usable, strict=True)
            if some
        ]
        if opened:
            reader = SampleReader(opened, store)
            if planned is not None:
                stream = Stream(reader, planned.batch_size // planned.world_size, world_size=planned.world_size)
    except InputError as error:
        return reader, None, [str(error)]
    return reader, stream, []


def _plan(stream: Stream, planned: _Planned, shards: int) -> Plan:
    steps = stream.batches_per_epoch
    return Plan(
        batch_size=planned.batch_size,
        world_size=planned.world_size,
        loader_workers=planned.loader_workers,
        samples_per_epoch=stream.samples,
        steps_per_epoch=steps,
        left_out_per_epoch=stream.samples - steps * planned.batch_size,
        samples_per_rank=steps * planned.batch_size // planned.world_size,
        shards=shards,
        loaders=planned.world_size * max(planned.loader_workers, 1),
    )


def _notes(tasks: Sequence[tuple[str, FieldsConfig]], index: bool, decode: bool) -> list[str]:
    notes = []
    if not decode:
        notes.append("Pictures were not decoded: unreadable ones are not among the bad samples.")
    if index and any(is_remote(location) for location, _ in tasks):
        notes.append("Indexes of remote shards are in the cache folder: only those of local shards lie beside them.")
    return notes
