"""`mmrl eval`: scores a stored encoder on sets of images with captions, or with class labels."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mmrl.data.index import Problem, printable
from mmrl.data.stores import is_remote
from mmrl.distributed import comm, launchers
from mmrl.errors import InputError, did_you_mean
from mmrl.evaluate import sets
from mmrl.evaluate.degrade import score_degraded
from mmrl.evaluate.directions import DIRECTIONS, main_directions, of_towers
from mmrl.evaluate.ranking.ranks import KS
from mmrl.evaluate.ranking.retrieval import check_ks
from mmrl.evaluate.readers import OpenSet, open_set
from mmrl.evaluate.report.study import Study
from mmrl.evaluate.report.tables import all_tables, brief_tables, score_notes
from mmrl.evaluate.zeroshot import read_classes, score_zero_shot
from mmrl.inference.evaluated import EvaluatedEncoder, open_encoder, sides_of
from mmrl.nesting import check_dims, untrained_note
from mmrl.output.console import print_line
from mmrl.output.files import check_report_folder, create_folder
from mmrl.output.next_steps import after_eval
from mmrl.output.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to measure."""

    dims: Sequence[int] | None = None
    """Default: the trained dims and the full dim."""
    captions: int | None = None
    """Captions used per sample, the plain one first. Default: all."""
    ks: Sequence[int] = ()
    """More K of recall@K; 1, 5 and 10 are always reported."""
    folds: int = 1
    directions: Sequence[str] = DIRECTIONS
    degrade: int = 0
    """Number of images to degrade and to use as queries for their originals."""
    classes: str | None = None
    """A file with one class name per line, or `imagenet`. The sets are then for zero-shot classification."""
    templates: str | None = None
    budget: str | None = None
    """How much recall may be lost (see `mmrl.evaluate.analysis.advice`). The sets are analysed if this, `vectors`,
    `compare` or an output folder is given."""
    vectors: str | None = None
    compare: Sequence[str] = ()
    """Baseline models."""


def evaluate_model(
    model: str,
    shards: Sequence[str],
    options: EvalOptions,
    out: Path | None = None,
    quiet: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Scores a model on each set, prints the tables, writes the report to `out`; returns the content of retrieval.json.

    Under a launcher (torchrun, srun, mpirun) the processes divide the embedding and the ranking; rank 0 prints and
    writes.

    Raises:
        InputError: no such model or shards, dims that the model does not have, two sets of one name; `out` holds other
            files, or a report with other settings and `force` is not given.
    """
    ks = sorted({*KS, *options.ks})
    check_ks(ks)
    options = replace(options, ks=ks)
    sides = sides_of(model)
    _check(options, sides)
    specs = _named(shards)
    # Not the sets themselves: a URL can hold a password.
    hashes = {name: hashlib.sha256(os.fsencode(spec)).hexdigest()[:12] for name, spec in specs.items()}
    settings = json.loads(json.dumps({"model": model, "sets": hashes, **asdict(options)}))  # with lists, no tuples
    if out is not None:
        check_report_folder(out, "retrieval.json", ["report"], settings, force=force)
    classes = None if options.classes is None else read_classes(options.classes, options.templates)
    opened = {name: open_set(spec, classes, sides) for name, spec in specs.items()}
    if launchers.detect_launch() is not None:
        comm.start()
    world = comm.world()
    if out is not None and world.is_rank_0:
        create_folder(out)
    encoder = open_encoder(model)
    encoder.model.to(world.device)
    dims = list(options.dims) if options.dims else sorted({*encoder.nested_dims, encoder.dim})
    check_dims(dims, encoder.dim)
    analyse = out or options.budget or options.vectors or options.compare
    study = Study(model, encoder, dims, options.budget, options.vectors, options.compare) if analyse else None
    console = Console(quiet=quiet or not world.is_rank_0)
    print_line(console, untrained_note(dims, encoder.nested_dims))
    results: dict[str, dict[str, Any]] = {}
    with progress_bar(console) as progress:
        for name, one in opened.items():
            if one.classes is None:
                results[name], bad = _score_retrieval(name, specs[name], one, encoder, dims, options, progress, study)
            else:
                with _task(progress, f"embedding {name}", len(one.reader)) as advance:
                    results[name], bad = score_zero_shot(one.reader, one.classes, encoder, dims, advance)
            if bad:
                first = bad[0]
                print_line(console, f"{name}: {len(bad)} bad samples left out, such as {first.key}: {first.reason}")
    result = {**sets.as_retrieval_json(results), "nested_dims": list(encoder.nested_dims), "settings": settings}
    for shown in brief_tables(results) if out else all_tables(results):
        print_line(console, shown) if isinstance(shown, str) else console.print(shown)
    for name, scores in results.items():
        for note in score_notes(scores, main_directions(of_towers(sides)) if out else DIRECTIONS):
            print_line(console, f"{name}: {note}.")
        if study and len(sides) == 1 and world.is_rank_0 and "analysis" not in scores:
            print_line(
                console, f"{name}: not analysed, since no sample has a second {sides[0]} (fields.second_{sides[0]})."
            )
    if study:
        study.print_advice(console, brief=bool(out))  # with a report, which has that of all sets
    if out is not None and world.is_rank_0:
        sets.write_retrieval_json(out, result)
        page = study.write_report(out / "report", results) if study else None
        print_line(console, f"All dims and directions: {page or out / 'retrieval.json'}")
    advised = [one["analysis"]["advice"]["smallest"]["dim"] for one in results.values() if "analysis" in one]
    smaller = [*advised, *sorted(encoder.nested_dims), encoder.dim][0]
    searches_second = bool(advised) and len(sides) == 1
    print_line(console, after_eval(model, encoder.dim, smaller, next(iter(specs.values())), searches_second))
    return result


def _check(options: EvalOptions, sides: Sequence[str]) -> None:
    for direction in options.directions:
        if direction not in DIRECTIONS:
            raise InputError(f"directions: unknown direction {direction!r}.{did_you_mean(direction, DIRECTIONS)}")
    if options.templates is not None and options.classes is None:
        raise InputError("templates: given without classes; add --classes FILE, or --classes imagenet.")
    allowed = of_towers(sides)
    if not set(allowed) & set(options.directions):
        raise InputError(f"directions: the model has {sides[0]}s alone; allowed: {', '.join(allowed)}.")
    needed = main_directions(allowed)
    for option in ("budget", "vectors", "compare"):
        if getattr(options, option) and not set(needed) <= set(options.directions):
            raise InputError(f"{option}: needs the directions {' and '.join(needed)}; add them to directions.")
    if options.degrade and "image" not in sides:
        raise InputError("degrade: the model has no image tower; leave the option out.")
    if options.classes is not None and len(sides) < 2:
        raise InputError("classes: zero-shot classification compares images with texts, and the model has one tower.")


def _named(shards: Sequence[str]) -> dict[str, str]:
    """{name: shards}, from SHARDS or NAME=SHARDS."""
    specs: dict[str, str] = {}
    for spec in shards:
        named = re.match(r"([\w-]+)=(.+)", spec)
        name, inner = named.groups() if named else (_default_name(spec), spec)
        if name in specs:
            raise InputError(f"shards: two sets are called {name!r}; name them as NAME=SHARDS.")
        specs[name] = inner
    return specs


def _default_name(spec: str) -> str:
    """The last component of the path, without .tar. The query of a URL is left out: it can be long, and a password."""
    path = spec.partition("?")[0] if is_remote(spec) else spec
    return printable(path.removeprefix("starter:").rstrip("/").rpartition("/")[2].removesuffix(".tar"))


@contextmanager
def _task(progress: Progress, description: str, total: int) -> Iterator[Callable[[float], None]]:
    """A progress bar that is removed at the end; yields a function that advances it. This process may advance it by
    less than `total`, which counts the work of all processes."""
    task = progress.add_task(description, total=total)
    try:
        yield lambda count: progress.advance(task, count)
    finally:
        progress.remove_task(task)


def _score_retrieval(
    name: str,
    spec: str,
    one: OpenSet,
    encoder: EvaluatedEncoder,
    dims: Sequence[int],
    options: EvalOptions,
    progress: Progress,
    study: Study | None,
) -> tuple[dict[str, Any], list[Problem]]:
    directions = [direction for direction in DIRECTIONS if direction in options.directions]
    with _task(progress, f"embedding {name}", len(one.reader)) as advance:
        embedded = sets.embed(one.reader, encoder, captions=options.captions, directions=directions, on_batch=advance)
    with _task(progress, f"ranking {name}", sets.num_rows(embedded, directions)) as advance:
        result = sets.score(embedded, dims, options.ks, directions, options.folds, on_rows=advance, over_ranks=True)
    if options.degrade:
        with _task(progress, f"degrading {name}", min(options.degrade, len(embedded.keys))) as advance:
            result["degraded"] = score_degraded(
                one.reader, encoder, embedded, dims, options.degrade, options.ks, on_images=advance
            )
    if study and study.can_analyse(embedded, result):
        with _task(progress, f"analysing {name}", study.steps) as advance:
            study.analyse_set(name, spec, one.reader, embedded, result, options.captions, advance)
    return result, embedded.bad
