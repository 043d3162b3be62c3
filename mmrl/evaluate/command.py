"""`mmrl eval`: a stored encoder on sets of pictures with captions, or with classes."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data.index import Problem
from mmrl.distributed import comm
from mmrl.errors import InputError, did_you_mean
from mmrl.evaluate import sets
from mmrl.evaluate.degrade import score_degraded
from mmrl.evaluate.ranking.ranks import KS
from mmrl.evaluate.ranking.retrieval import check_ks
from mmrl.evaluate.readers import OpenSet, open_set
from mmrl.evaluate.report import tables
from mmrl.evaluate.report.study import Study
from mmrl.evaluate.zeroshot import class_vectors, embed_labelled, read_classes, score_labelled
from mmrl.inference.evaluated import Evaluated, open_encoder
from mmrl.nesting import check_dims


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured."""

    dims: Sequence[int] | None = None
    """The trained dims when left out."""
    captions: int | None = None
    """Captions of each sample, the plain one first; all when left out."""
    ks: Sequence[int] = ()
    """Of recall@K, beside 1, 5 and 10."""
    folds: int = 1
    directions: Sequence[str] = sets.DIRECTIONS
    degrade: int = 0
    """So many pictures are degraded, and look for their originals."""
    classes: str | None = None
    """A file with a class a line, or `imagenet`: the sets are then for zero-shot classification."""
    templates: str | None = None
    budget: str | None = None
    """How much recall may be lost, as `mmrl.evaluate.analysis.advice` has it. With this, one of the next two, or a
    folder for the report, the sets are analysed."""
    vectors: str | None = None
    compare: Sequence[str] = ()
    """Other models."""


def evaluate_model(
    model: str, shards: Sequence[str], asked: Asked, out: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Scores MODEL on each set, shows the tables, writes the report to `out`; returns what retrieval.json holds.

    Under torchrun all processes embed and rank; the main one shows and writes.

    Raises:
        InputError: no such model or shards, dims that it does not have, a set named twice.
    """
    ks = sorted({*KS, *asked.ks})
    check_ks(ks)
    asked = replace(asked, ks=ks)
    for way in asked.directions:
        if way not in sets.DIRECTIONS:
            raise InputError(f"directions: there is no {way!r}.{did_you_mean(way, sets.DIRECTIONS)}")
    if asked.templates is not None and asked.classes is None:
        raise InputError("templates: given without classes; add --classes FILE, or --classes imagenet.")
    for option in ("budget", "vectors", "compare"):
        if getattr(asked, option) and not set(sets.CROSS) <= set(asked.directions):
            raise InputError(f"{option}: needs both directions between pictures and texts; add them to directions.")
    opened = _open(shards, asked)
    if "WORLD_SIZE" in os.environ:
        comm.start()
    world = comm.world()
    encoder = open_encoder(model)
    encoder.model.to(world.device)
    dims = list(asked.dims) if asked.dims else sorted({*encoder.nested_dims, encoder.dim})
    check_dims(dims, encoder.dim)
    analysed = out or asked.budget or asked.vectors or asked.compare
    study = Study(model, encoder, dims, asked.budget, asked.vectors, asked.compare) if analysed else None
    console = Console(quiet=quiet or not world.is_rank_0)
    results: dict[str, dict[str, Any]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bars = Bars(progress)
        for name, one in opened.items():
            if one.classes is None:
                results[name], bad = _retrieve(name, one, encoder, dims, asked, bars, study)
            else:
                results[name], bad = _classify(name, one, encoder, dims, bars)
            if bad:
                first = bad[0]
                console.print(f"{name}: {len(bad)} bad samples left out, such as {first.key}: {first.reason}")
    result = sets.as_retrieval_json(results)
    for name in results:
        console.print(*tables.all_tables(name, results[name]), sep="\n")
    if study:
        study.say(console)
    if out is not None and world.is_rank_0:
        sets.write_retrieval_json(out, result)
        page = study.write(out / "report", results) if study else None
        console.print(
            f"Written: {out}/retrieval.json" + (f" and {page}" if page else ""), highlight=False, soft_wrap=True
        )
    return result


def _open(shards: Sequence[str], asked: Asked) -> dict[str, OpenSet]:
    classes = None if asked.classes is None else read_classes(asked.classes, asked.templates)
    opened: dict[str, OpenSet] = {}
    for spec in shards:
        named = re.match(r"([\w-]+)=(.+)", spec)
        name, inner = named.groups() if named else (_name_of(spec), spec)
        if name in opened:
            raise InputError(f"shards: two sets are called {name!r}; name them as NAME=SHARDS.")
        opened[name] = open_set(inner, classes)
    return opened


def _name_of(spec: str) -> str:
    """A short name for a set given without one: the last part of its path."""
    return spec.removeprefix("starter:").rstrip("/").rpartition("/")[2].removesuffix(".tar")


class Bars:
    """Progress bars by what is being done."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """What is told numbers that add up to `total`, of this process's share of the work at least."""
        task = self._progress.add_task(what, total=total)
        try:
            yield lambda count: self._progress.advance(task, count)
        finally:
            self._progress.remove_task(task)


def _retrieve(
    name: str, one: OpenSet, encoder: Evaluated, dims: Sequence[int], asked: Asked, bars: Bars, study: Study | None
) -> tuple[dict[str, Any], list[Problem]]:
    with bars.bar(f"embedding {name}", len(one.reader)) as advance:
        embedded = sets.embed(
            one.reader,
            encoder.model,
            encoder.image_spec,
            encoder.tokenise,
            captions=asked.captions,
            on_batch=advance,
        )
    ways = [way for way in sets.DIRECTIONS if way in asked.directions]
    with bars.bar(f"ranking {name}", sets.num_rows(embedded, ways)) as advance:
        result = sets.score(embedded, dims, asked.ks, ways, asked.folds, on_rows=advance, over_ranks=True)
    if asked.degrade:
        with bars.bar(f"degrading {name}", min(asked.degrade, len(embedded.keys))) as advance:
            result["degraded"] = score_degraded(
                one.reader,
                encoder.model,
                encoder.image_spec,
                embedded.numbers,
                embedded.keys,
                embedded.image_ND,
                dims,
                asked.degrade,
                asked.ks,
                on_pictures=advance,
            )
    if study and set(sets.CROSS) <= set(result["chance"]):
        with bars.bar(f"analysing {name}", study.steps) as advance:
            study.take(name, one.reader, embedded, result, asked.captions, advance)
    return result, embedded.bad


def _classify(
    name: str, one: OpenSet, encoder: Evaluated, dims: Sequence[int], bars: Bars
) -> tuple[dict[str, Any], list[Problem]]:
    assert one.classes is not None
    with bars.bar(f"embedding {name}", len(one.reader)) as advance:
        labelled = embed_labelled(
            one.reader, encoder.model, encoder.image_spec, len(one.classes.names), on_batch=advance
        )
    vectors = class_vectors(one.classes, encoder.model, encoder.tokenise, dims)
    return score_labelled(labelled, vectors, over_ranks=True), labelled.bad
