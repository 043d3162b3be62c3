"""`mmrl compare`: tables of several evaluated runs, with paired differences, from retrieval.json and
ranks.safetensors."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from rich.console import Console

from mmrl.errors import InputError
from mmrl.evaluate.analysis.advice import format_points
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.directions import ARROWS, is_classification, main_directions
from mmrl.evaluate.ranking.ranks import is_better_lower
from mmrl.evaluate.report.page import format_score, labelled_svg, render, tone_of
from mmrl.evaluate.report.plots import Curve, recall_by_dim
from mmrl.evaluate.report.stored_ranks import StoredRanks, read_ranks
from mmrl.evaluate.report.tables import table
from mmrl.output.console import print_line
from mmrl.output.files import check_report_folder, parse_json, write_atomic

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

    def directions(self, set_name: str) -> tuple[str, ...]:
        """The main directions in which a set was scored; none of a classification set."""
        result = self.sets[set_name]
        return () if is_classification(result) else main_directions(result["chance"])

    @cached_property
    def ranks(self) -> dict[str, tuple[str, dict[str, StoredRanks]]]:
        """{set: (digest, {direction: ranks})}; empty if none are stored."""
        return read_ranks(self.folder / "report")


def compare_runs(
    runs: Sequence[Path],
    metrics: Sequence[str] = DEFAULT_METRICS,
    out: Path | None = None,
    quiet: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Prints the scores of the runs on their common sets, and each run's paired difference to the first run.

    Returns: {"runs": [name, …], "sets": {set: {direction: {dim: {metric: {run: cell}}}}}}. A cell has "value" and, if
        queries can be paired, "low", "high", "lead" (the difference to the first run) and "p". Runs without the dim are
        left out.

    Raises:
        InputError: fewer than two runs, a folder without scores, no set in common, an unknown metric; `out` holds other
            files, or a comparison with other settings and `force` is not given.
    """
    opened = _open(runs)
    settings = {"runs": [str(run.folder) for run in opened], "metrics": [*metrics]}
    if out is not None:
        check_report_folder(out, "compare.json", ["index.html"], settings, force=force)
    first = opened[0]
    common = [
        name
        for name in first.sets
        if all(name in run.sets and run.directions(name) == first.directions(name) != () for run in opened)
    ]
    if not common:
        have = "; ".join(f"{run.name}: {', '.join(run.sets)}" for run in opened)
        raise InputError(f"compare: the runs have no set in common ({have}); evaluate them on the same sets.")
    for run, name in itertools.product(opened, common):
        known = next(iter(run.sets[name]["dims"].values()))[run.directions(name)[0]]
        for metric in metrics:
            if metric not in known:
                raise InputError(f"metric: {metric!r} is not among the scores of {run.folder}: {', '.join(known)}.")
    unpaired = {name: why for name in common if (why := _why_unpaired(opened, name))}
    result = {
        "runs": [run.name for run in opened],
        "sets": {name: _compare_set(opened, name, metrics, name not in unpaired) for name in common},
        "settings": settings,
    }
    console = Console(quiet=quiet)
    for name, by_direction in result["sets"].items():
        print_line(console, f"{name}: {unpaired[name]}" if name in unpaired else None)
        for direction, by_dim in by_direction.items():
            for metric in metrics:
                title = f"{name}, {ARROWS[direction]} {metric}{'' if is_better_lower(metric) else ', %'}"
                cells = [[dim, *(_as_text(of[metric].get(run.name, {}), metric) for run in opened)]
                         for dim, of in by_dim.items()]  # fmt: skip
                console.print(table(title, [["dim", *result["runs"]], *cells]))
    if len(unpaired) < len(common):
        note = "in brackets: difference to the first run in points, with its 95 % interval; * where p < 0.05"
        print_line(console, note)
    if out is not None:
        print_line(console, f"Written: {_write(out, opened, result, metrics, unpaired)}")
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
            result = parse_json(file.read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"compare: {folder} has no retrieval.json; evaluate it with mmrl eval MODEL SHARDS --out {folder}."
            ) from None
        except ValueError as error:
            raise InputError(f"compare: {file} is not JSON ({error}); evaluate the run again.") from None
        sets = result.get("sets") if isinstance(result, dict) else None
        needed = {"dims", "chance", "num_images"}
        if not isinstance(sets, dict) or not all(isinstance(one, dict) and needed <= {*one} for one in sets.values()):
            raise InputError(
                f'compare: {file} has no "sets" of scores (old format, or damaged); evaluate the run again.'
            )
        runs.append(EvaluatedRun("/".join(path.parts[-depth:]), path, result))
    return runs


def _why_unpaired(runs: Sequence[EvaluatedRun], set_name: str) -> str:
    """Why the runs' queries of a set cannot be paired; empty if they can. Different samples come first: their scores
    cannot be compared at all."""
    sizes = {run.name: (run.sets[set_name]["num_images"], run.sets[set_name]["num_texts"]) for run in runs}
    stored = [run.ranks[set_name] for run in runs if set_name in run.ranks]
    queries = [[ranks[direction].query_Q for direction in runs[0].directions(set_name)] for _, ranks in stored]
    same = len({digest for digest, _ in stored}) < 2 and all(
        torch.equal(a, b) for one in queries for a, b in zip(one, queries[0], strict=True)
    )
    if len(set(sizes.values())) > 1 or not same:
        listed = "; ".join(
            f"{name} on {images:,} images and {texts:,} texts" for name, (images, texts) in sizes.items()
        )
        return f"DIFFERENT SETS of this name, so the scores cannot be compared: {listed}."
    folds = {run.name: run.sets[set_name].get("folds", 1) for run in runs}
    if len({*folds.values()}) > 1:
        listed = ", ".join(f"{name} of {count}" for name, count in folds.items())
        return f"DIFFERENT FOLDS, so the scores cannot be compared: {listed}; evaluate the runs with the same --folds."
    if max(folds.values()) > 1:
        return "no intervals: the scores are means over folds, and the stored ranks are of the whole set."
    without = [run.name for run in runs if set_name not in run.ranks]
    return f"no intervals: {', '.join(without)} has no stored ranks; mmrl eval --out stores them." if without else ""


def _compare_set(runs: Sequence[EvaluatedRun], name: str, metrics: Sequence[str], paired: bool) -> dict[str, Any]:
    """{direction: {dim: {metric: {run: cell}}}}, the widest dim first."""
    dims = sorted({int(dim) for run in runs for dim in run.sets[name]["dims"]}, reverse=True)
    found: dict[str, Any] = {}
    for direction in runs[0].directions(name):
        bootstrap = Bootstrap(runs[0].ranks[name][1][direction].item_Q) if paired else None
        found[direction] = {}
        for dim in dims:
            scores = {run.name: run.sets[name]["dims"].get(str(dim)) for run in runs}
            ranks = {run.name: run.ranks[name][1][direction].rank_of.get(dim) for run in runs} if paired else {}
            found[direction][str(dim)] = {
                metric: {
                    run: {"value": of_run[direction][metric], **_statistics(ranks, run, metric, bootstrap)}
                    for run, of_run in scores.items()
                    if of_run is not None
                }
                for metric in metrics
            }
    return found


def _statistics(
    ranks: Mapping[str, torch.Tensor | None], run: str, metric: str, bootstrap: Bootstrap | None
) -> dict[str, Any]:
    """The interval of a run's score at one dim, and its paired difference to the first run with interval and p-value;
    empty if queries are not paired or the metric is not recall. `ranks` is {run: rank_Q}, None for a run without the
    dim."""
    rank_Q, (first, first_rank_Q) = ranks.get(run), next(iter(ranks.items()), ("", None))
    if bootstrap is None or rank_Q is None or not metric.startswith("R@"):
        return {}
    hit_Q = (rank_Q <= int(metric[2:])).double()
    interval = bootstrap.intervals(hit_Q[:, None])[0]
    found: dict[str, Any] = {"low": interval.low, "high": interval.high}
    if run != first and first_rank_Q is not None:
        first_hit_Q = (first_rank_Q <= int(metric[2:])).double()
        found["lead"] = bootstrap.difference(hit_Q, first_hit_Q).as_json()
        found["p"] = bootstrap.paired_p(hit_Q, first_hit_Q)
    return found


def _as_text(cell: Mapping[str, Any], metric: str) -> str:
    """The score, and its difference to the first run; empty for a run without the dim."""
    if "lead" not in cell:
        return format_score(cell["value"], metric) if cell else ""
    lead, low, high = (format_points(cell["lead"][key]) for key in ("value", "low", "high"))
    return f"{format_score(cell['value'], metric)} ({lead}; {low} to {high}){'*' if tone_of(cell) else ''}"


def _write(
    out: Path,
    runs: Sequence[EvaluatedRun],
    result: Mapping[str, Any],
    metrics: Sequence[str],
    unpaired: Mapping[str, str],
) -> Path:
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
        unpaired=unpaired,
        is_rank=is_better_lower,
        plot=plot,
    )
    write_atomic(out / "index.html", page)
    return out / "index.html"
