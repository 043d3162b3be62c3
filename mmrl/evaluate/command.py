"""`mmrl eval`: a stored encoder on sets of shards."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl import distributed
from mmrl.data.sources import open_reader
from mmrl.errors import InputError
from mmrl.evaluate import report, sets
from mmrl.evaluate.study import Study
from mmrl.model import bundle
from mmrl.nesting import check_dims


def evaluate_model(
    model: str,
    shards: Sequence[str],
    dims: Sequence[int] | None = None,
    captions: int | None = None,
    out: Path | None = None,
    quiet: bool = False,
    budget: str | None = None,
    vectors: str | None = None,
    compare: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores MODEL on each set, shows the tables, writes the report to `out`; returns what retrieval.json holds.

    With a budget, other models to compare with, or an `out`, the sets are analysed, too (mmrl.evaluate.study).

    Raises:
        InputError: no such model or shards, dims that it does not have, a set named twice.
    """
    readers = {}
    for spec in shards:
        named = re.match(r"([\w-]+)=(.+)", spec)
        name, inner = named.groups() if named else (_name_of(spec), spec)
        if name in readers:
            raise InputError(f"shards: two sets are called {name!r}; name them as NAME=SHARDS.")
        readers[name] = open_reader(inner)
    encoder = bundle.open_model(model)
    encoder.model.to(distributed.world().device)
    dims = list(dims) if dims else sorted({*encoder.nested_dims, encoder.dim})
    check_dims(dims, encoder.dim)
    study = Study(model, encoder, dims, budget, vectors, compare) if out or budget or vectors or compare else None
    console = Console(quiet=quiet)
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, reader in readers.items():
            task = progress.add_task(f"embedding {name}", total=len(reader))
            embedded = sets.embed(
                reader,
                encoder.model,
                encoder.image_spec,
                encoder.tokenise,
                captions=captions,
                on_batch=lambda count, task=task: progress.advance(task, count),
            )
            results[name] = sets.score(embedded, dims)
            if study and distributed.world().is_main:
                step = partial(progress.update, progress.add_task(f"analysing {name}", total=None))
                study.take(
                    name, reader, embedded, results[name], captions, lambda what, step=step: step(description=what)
                )
            if embedded.bad:
                first = embedded.bad[0]
                progress.console.print(
                    f"{name}: {len(embedded.bad)} bad samples left out, such as {first.key}: {first.reason}"
                )
    result = sets.as_retrieval_json(results)
    for name in results:
        console.print(report.table(name, results[name]))
    if study:
        study.say(console)
    if out is not None:
        sets.write_retrieval_json(out, result)
        page = study.write(out / "report") if study else None
        console.print(f"Written: {out}/retrieval.json and {page}", highlight=False, soft_wrap=True)
    return result


def _name_of(spec: str) -> str:
    """A short name for a set given without one: the last part of its path."""
    return spec.removeprefix("starter:").rstrip("/").rpartition("/")[2].removesuffix(".tar")
