"""`mmrl compare`: tables of several evaluated runs, with paired differences, from retrieval.json and
ranks.safetensors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from mmrl.errors import InputError
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.directions import ARROWS, CROSS_MODAL
from mmrl.evaluate.ranking.ranks import is_better_lower
from mmrl.evaluate.report.page import format_points, format_score, labelled_svg, render, tone_of
from mmrl.evaluate.report.plots import Curve, recall_by_dim
from mmrl.evaluate.report.stored_ranks import StoredRanks, read_ranks
from mmrl.output.console import print_line
from mmrl.output.files import write_atomic

_COLOURS = ("model", "pca", "other", "best_dims", "other_pca", "random_dims")
DEFAULT_METRICS = ("R@1", "R@10")


@dataclass(frozen=True)
class EvaluatedRun:
    """The evaluation of one run."""

    name: str
    folder: Path
    result: Mapping[str, Any]

    @property
    def sets(self) -> Mapping[str, Any]:
        """{set: its entry in retrieval.json}"""
        return self.result["sets"]

    def retrieves(self, set_name: str) -> bool:
        """Whether a set was scored in both cross-modal directions."""
        return set(CROSS_MODAL) <= set(next(iter(self.sets[set_name]["dims"].values())))

    @cached_property
    def ranks(self) -> dict[str, tuple[str, dict[str, StoredRanks]]]:
        """{set: (digest, {direction: ranks})}; empty if none are stored."""
        return read_ranks(self.folder / "report")


def compare_runs(
    runs: Sequence[Path], metrics: Sequence[str] = DEFAULT_METRICS, out: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Prints the scores of the runs on their common sets, and each run's paired difference to the first run.

    Returns: {"runs": [name, …], "sets": {set: {direction: {dim: {metric: {run: cell}}}}}}. A cell has "value" and, if
        queries can be paired, "low", "high", "lead" (the difference to the first run) and "p". Runs without the dim are
        left out.

    Raises:
        InputError: fewer than two runs, a folder without scores, no set in common, an unknown metric.
    """
    opened = _open(runs)
    first = opened[0]
    common = [name for name in first.sets if all(name in run.sets and run.retrieves(name) for run in opened)]
    if not common:
        have = "; ".join(f"{run.name}: {', '.join(run.sets)}" for run in opened)
        raise InputError(f"compare: the runs have no set in common ({have}); evaluate them on the same sets.")
    _check_metrics(first, common[0], metrics)
    result = {
        "runs": [run.name for run in opened],
        "sets": {name: _compare_set(opened, name, metrics) for name in common},
    }
    console = Console(quiet=quiet)
    for set_name in common:
        for direction in CROSS_MODAL:
            by_dim = result["sets"][set_name][direction]
            for metric in metrics:
                console.print(_terminal_table(by_dim, opened, f"{set_name}, {ARROWS[direction]}", metric))
    for name in (name for name in common if not _all_paired(opened, name)):
        print_line(console, f"{name}: {_why_unpaired(opened, name)}")
    if out is not None:
        print_line(console, f"Written: {_write(out, opened, result, metrics)}")
    return result


def _open(folders: Sequence[Path]) -> list[EvaluatedRun]:
    if len(folders) < 2:
        raise InputError("compare: give at least two run folders, or folders written by mmrl eval --out.")
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise InputError(f"compare: {folder} is given twice.")
    # Names: the last component of each path, or as many as make them distinct.
    depth = next(n for n in range(1, 100) if len({path.parts[-n:] for path in resolved}) == len(resolved))
    runs = []
    for folder, path in zip(folders, resolved, strict=True):
        file = path / "retrieval.json"
        try:
            result = json.loads(file.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"compare: {folder} has no retrieval.json; evaluate it with mmrl eval MODEL SHARDS --out {folder}."
            ) from None
        except ValueError as error:
            raise InputError(f"compare: {file} is not JSON ({error}); evaluate the run again.") from None
        if "sets" not in result:
            raise InputError(f'compare: {file} has no "sets" (old format); evaluate the run again.')
        runs.append(EvaluatedRun("/".join(path.parts[-depth:]), path, result))
    return runs


def _check_metrics(run: EvaluatedRun, set_name: str, metrics: Sequence[str]) -> None:
    known = next(iter(run.sets[set_name]["dims"].values()))["text_to_image"]
    for metric in metrics:
        if metric not in known:
            raise InputError(f"metric: {metric!r} is not among the scores of {run.folder}: {', '.join(known)}.")


def _compare_set(runs: Sequence[EvaluatedRun], set_name: str, metrics: Sequence[str]) -> dict[str, Any]:
    """{direction: {dim: {metric: {run: {…}}}}}, the widest dim first."""
    dims = sorted({int(dim) for run in runs for dim in run.sets[set_name]["dims"]}, reverse=True)
    found: dict[str, Any] = {}
    for direction in CROSS_MODAL:
        pairs = _paired_ranks(runs, set_name, direction)
        found[direction] = {}
        for dim in dims:
            found[direction][str(dim)] = {
                metric: _cells(runs, set_name, direction, dim, metric, pairs) for metric in metrics
            }
    return found


def _cells(
    runs: Sequence[EvaluatedRun], set_name: str, direction: str, dim: int, metric: str, pairs: "_PairedRanks | None"
) -> dict[str, Any]:
    cells = {}
    for run in runs:
        scores = run.sets[set_name]["dims"].get(str(dim))
        if scores is None:
            continue
        cells[run.name] = {"value": scores[direction][metric]}
        if pairs:
            cells[run.name] |= pairs.statistics(run.name, dim, metric)
    return cells


@dataclass(frozen=True)
class _PairedRanks:
    """The ranks of the same queries in several runs."""

    first: str
    ranks: Mapping[str, StoredRanks]
    bootstrap: Bootstrap

    def statistics(self, name: str, dim: int, metric: str) -> dict[str, Any]:
        """The interval of a run's score, and its paired difference to the first run with interval and p-value; empty if
        the metric is not recall or the run lacks the dim."""
        rank_Q, first_rank_Q = self.ranks[name].rank_of.get(dim), self.ranks[self.first].rank_of.get(dim)
        if rank_Q is None or not metric.startswith("R@"):
            return {}
        k = int(metric[2:])
        hit_Q = (rank_Q <= k).double()
        interval = self.bootstrap.intervals(hit_Q[:, None])[0]
        found: dict[str, Any] = {"low": interval.low, "high": interval.high}
        if name != self.first and first_rank_Q is not None:
            first_hit_Q = (first_rank_Q <= k).double()
            found["lead"] = self.bootstrap.difference(hit_Q, first_hit_Q).as_json()
            found["p"] = self.bootstrap.paired_p(hit_Q, first_hit_Q)
        return found


def _all_paired(runs: Sequence[EvaluatedRun], set_name: str) -> bool:
    return all(set_name in run.ranks for run in runs) and len({run.ranks[set_name][0] for run in runs}) == 1


def _why_unpaired(runs: Sequence[EvaluatedRun], set_name: str) -> str:
    without = [run.name for run in runs if set_name not in run.ranks]
    if without:
        return f"no intervals: {', '.join(without)} has no stored ranks; mmrl eval --out stores them."
    return "no intervals: the runs were not evaluated on the same samples and captions."


def _paired_ranks(runs: Sequence[EvaluatedRun], set_name: str, direction: str) -> _PairedRanks | None:
    if not _all_paired(runs, set_name):
        return None
    ranks = {run.name: run.ranks[set_name][1][direction] for run in runs}
    first = ranks[runs[0].name]
    if any(not torch.equal(one.query_Q, first.query_Q) for one in ranks.values()):
        return None
    return _PairedRanks(runs[0].name, ranks, Bootstrap(first.item_Q))


def _terminal_table(by_dim: Mapping[str, Any], runs: Sequence[EvaluatedRun], title: str, metric: str) -> Table:
    shown = Table(title=f"{title} {metric}{'' if is_better_lower(metric) else ', %'}")
    shown.add_column("dim", justify="right")
    for run in runs:
        shown.add_column(run.name, justify="right", overflow="fold")
    is_paired = False
    for dim, of_metric in by_dim.items():
        cells = [of_metric[metric].get(run.name, {}) for run in runs]
        shown.add_row(dim, *(_as_text(cell, metric) for cell in cells))
        is_paired |= any("lead" in cell for cell in cells)
    if is_paired:
        shown.caption = "in brackets: difference to the first run in points, with its 95 % interval; * where p < 0.05"
    return shown


def _as_text(cell: Mapping[str, Any], metric: str) -> str:
    """The score, and its difference to the first run; empty for a run without the dim."""
    if "lead" not in cell:
        return format_score(cell["value"], metric) if cell else ""
    lead, low, high = (format_points(cell["lead"][key]) for key in ("value", "low", "high"))
    return f"{format_score(cell['value'], metric)} ({lead}; {low} to {high}){'*' if tone_of(cell) else ''}"


def _write(out: Path, runs: Sequence[EvaluatedRun], result: Mapping[str, Any], metrics: Sequence[str]) -> Path:
    """Writes OUT/index.html and compare.json; returns the page's path."""
    write_atomic(out / "compare.json", json.dumps(result, indent=2) + "\n")

    def plot(set_name: str, direction: str, metric: str) -> Markup:
        curves, by_dim = [], result["sets"][set_name][direction]
        for index, name in enumerate(result["runs"]):
            cells = {dim: scores[metric][name] for dim, scores in by_dim.items() if name in scores[metric]}
            values = {dim: {"low": cell["value"], "high": cell["value"], **cell} for dim, cell in cells.items()}
            curves.append(Curve(name, _COLOURS[index % len(_COLOURS)], values, dashed=index >= len(_COLOURS)))
        svg = recall_by_dim(curves, None, metric, name=f"compare-{set_name}-{direction}-{metric}", legend=True)
        return labelled_svg(svg, f"{metric} of each run by dim; the values are in the table below")

    page = render(
        "compare.html",
        " · ".join(result["runs"]),
        sets=result["sets"],
        names=result["runs"],
        metrics=metrics,
        folders={run.name: run.folder for run in runs},
        unpaired={name: _why_unpaired(runs, name) for name in result["sets"] if not _all_paired(runs, name)},
        is_rank=is_better_lower,
        plot=plot,
    )
    write_atomic(out / "index.html", page)
    return out / "index.html"
