"""`mmrl compare`: runs side by side, from what their evaluations left: retrieval.json and single queries' ranks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmrl.errors import InputError
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.analysis.task import DIRECTIONS
from mmrl.evaluate.ranking.ranks import is_better_lower
from mmrl.evaluate.report import plots, stored_ranks
from mmrl.evaluate.report.html import figure, frame, points, score, table
from mmrl.evaluate.report.plots import Curve

_COLOURS = ("model", "pca", "other", "best_dims", "other_pca", "random_dims")
METRICS = ("R@1", "R@10")


@dataclass(frozen=True)
class Run:
    """One run's evaluation."""

    name: str
    folder: Path
    result: Mapping[str, Any]

    @property
    def sets(self) -> Mapping[str, Any]:
        """{set: its part of retrieval.json}"""
        return self.result["sets"]

    def retrieves(self, set_name: str) -> bool:
        """Whether a set was scored in both directions between pictures and texts."""
        return set(DIRECTIONS) <= set(next(iter(self.sets[set_name]["dims"].values())))

    @cached_property
    def ranks(self) -> dict[str, tuple[str, dict[str, stored_ranks.StoredRanks]]]:
        """What is kept of single queries; empty where nothing is."""
        return stored_ranks.read(self.folder / "report")


def compare(
    runs: Sequence[Path], metrics: Sequence[str] = METRICS, out: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Shows the runs' scores on the sets that all of them have, and each run's lead over the first, query by query.

    Returns: {"runs": [name, …], "sets": {set: {direction: {dim: {metric: {run: cell}}}}}}, a cell with "value", "low",
        "high", "lead" and "p". A run that does not have the dim is left out, and all but "value" where queries cannot
        be paired.

    Raises:
        InputError: fewer than two runs, a folder without scores, no set or no dim in common, an unknown metric.
    """
    opened = _open(runs)
    first = opened[0]
    common = [name for name in first.sets if all(name in run.sets and run.retrieves(name) for run in opened)]
    if not common:
        have = "; ".join(f"{run.name}: {', '.join(run.sets)}" for run in opened)
        raise InputError(f"compare: the runs have no set in common ({have}); evaluate them on the same sets.")
    _check_metrics(first, common[0], metrics)
    result = {"runs": [run.name for run in opened], "sets": {name: _of_set(opened, name, metrics) for name in common}}
    console = Console(quiet=quiet)
    for set_name in common:
        for direction in DIRECTIONS:
            by_dim = result["sets"][set_name][direction]
            for metric in metrics:
                console.print(_screen(by_dim, opened, f"{set_name}, {DIRECTIONS[direction]}", metric))
    unpaired = [name for name in common if not _all_paired(opened, name)]
    for name in unpaired:
        console.print(f"{name}: {_why_unpaired(opened, name)}", highlight=False, soft_wrap=True)
    if out is not None:
        page = _write(out, opened, result, metrics)
        console.print(f"Written: {page}", highlight=False, soft_wrap=True)
    return result


def _open(folders: Sequence[Path]) -> list[Run]:
    if len(folders) < 2:
        raise InputError("compare: give at least two runs, or folders that mmrl eval --out wrote.")
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise InputError(f"compare: {folder} is given twice.")
    # The last part of a path, or as many more as tell the runs apart.
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
            raise InputError(f"compare: {file} names no sets; evaluate the run again with this mmrl.")
        runs.append(Run("/".join(path.parts[-depth:]), path, result))
    return runs


def _check_metrics(run: Run, set_name: str, metrics: Sequence[str]) -> None:
    known = next(iter(run.sets[set_name]["dims"].values()))["text_to_image"]
    for metric in metrics:
        if metric not in known:
            raise InputError(f"metric: {metric!r} is not among the scores of {run.folder}: {', '.join(known)}.")


def _of_set(runs: Sequence[Run], set_name: str, metrics: Sequence[str]) -> dict[str, Any]:
    """{direction: {dim: {metric: {run: {…}}}}}, the widest dim first."""
    dims = sorted({int(dim) for run in runs for dim in run.sets[set_name]["dims"]}, reverse=True)
    found: dict[str, Any] = {}
    for direction in DIRECTIONS:
        pairs = _pairs(runs, set_name, direction)
        found[direction] = {}
        for dim in dims:
            found[direction][str(dim)] = {
                metric: _cells(runs, set_name, direction, dim, metric, pairs) for metric in metrics
            }
    return found


def _cells(
    runs: Sequence[Run], set_name: str, direction: str, dim: int, metric: str, pairs: "_Pairs | None"
) -> dict[str, Any]:
    cells = {}
    for run in runs:
        scores = run.sets[set_name]["dims"].get(str(dim))
        if scores is None:
            continue
        cells[run.name] = {"value": scores[direction][metric]}
        if pairs and run is not runs[0]:
            cells[run.name] |= pairs.lead(run.name, dim, metric)
        if pairs:
            cells[run.name] |= pairs.interval(run.name, dim, metric)
    return cells


@dataclass(frozen=True)
class _Pairs:
    """The same queries of several runs."""

    first: str
    ranks: Mapping[str, stored_ranks.StoredRanks]
    bootstrap: Bootstrap

    def lead(self, name: str, dim: int, metric: str) -> dict[str, Any]:
        """By how much a run is ahead of the first, with its interval and p; empty where that cannot be said."""
        own, other = self.ranks[name].rank_of.get(dim), self.ranks[self.first].rank_of.get(dim)
        if own is None or other is None or not metric.startswith("R@"):
            return {}
        k = int(metric[2:])
        own_Q, other_Q = (own <= k).double(), (other <= k).double()
        lead = self.bootstrap.difference(own_Q, other_Q)
        return {"lead": lead.as_json(), "p": self.bootstrap.paired_p(own_Q, other_Q)}

    def interval(self, name: str, dim: int, metric: str) -> dict[str, Any]:
        """A run's own interval; empty where that cannot be said."""
        own = self.ranks[name].rank_of.get(dim)
        if own is None or not metric.startswith("R@"):
            return {}
        interval = self.bootstrap.intervals((own <= int(metric[2:])).double()[:, None])[0]
        return {"low": interval.low, "high": interval.high}


def _all_paired(runs: Sequence[Run], set_name: str) -> bool:
    return all(set_name in run.ranks for run in runs) and len({run.ranks[set_name][0] for run in runs}) == 1


def _why_unpaired(runs: Sequence[Run], set_name: str) -> str:
    without = [run.name for run in runs if set_name not in run.ranks]
    if without:
        return f"no intervals, since {', '.join(without)} kept no ranks of single queries; mmrl eval --out keeps them."
    return "no intervals, since the runs were not evaluated on the same samples and captions."


def _pairs(runs: Sequence[Run], set_name: str, direction: str) -> _Pairs | None:
    if not _all_paired(runs, set_name):
        return None
    ranks = {run.name: run.ranks[set_name][1][direction] for run in runs}
    first = ranks[runs[0].name]
    if any(not torch.equal(one.query_Q, first.query_Q) for one in ranks.values()):
        return None
    return _Pairs(runs[0].name, ranks, Bootstrap(first.item_Q))


@dataclass(frozen=True)
class _Cell:
    """One run at one dim, as it is shown."""

    value: str = ""
    lead: tuple[str, str, str] | None = None
    """Over the first run, in points: value, low, high."""
    tone: str = ""
    """better or worse where that is more than chance."""


def _rows(by_dim: Mapping[str, Any], runs: Sequence[Run], metric: str) -> list[tuple[str, list[_Cell]]]:
    """What the screen, the page and Markdown show alike: a dim and the runs' cells."""
    rows = []
    for dim, scores in by_dim.items():
        cells = []
        for run in runs:
            cell = scores[metric].get(run.name)
            if cell is None:
                cells.append(_Cell())
            elif "lead" not in cell:
                cells.append(_Cell(score(cell["value"], metric)))
            else:
                value, low, high = (cell["lead"][part] for part in ("value", "low", "high"))
                tone = "" if cell["p"] >= 0.05 else "better" if value > 0 else "worse"
                cells.append(_Cell(score(cell["value"], metric), (points(value), points(low), points(high)), tone))
        rows.append((dim, cells))
    return rows


def _screen(by_dim: Mapping[str, Any], runs: Sequence[Run], title: str, metric: str) -> Table:
    shown = Table(title=f"{title} {metric}{', %' if _is_share(metric) else ''}")
    shown.add_column("dim", justify="right")
    for run in runs:
        shown.add_column(run.name, justify="right", overflow="fold")
    rows = _rows(by_dim, runs, metric)
    for dim, cells in rows:
        shown.add_row(dim, *(_as_text(cell) + ("*" if cell.tone else "") for cell in cells))
    if any(cell.lead for _, cells in rows for cell in cells):
        shown.caption = "in brackets the lead over the first in points, with its 95 % interval; * where p < 0.05"
    return shown


def _markdown(by_dim: Mapping[str, Any], runs: Sequence[Run], metric: str) -> str:
    lines = [["dim", *(run.name for run in runs)], ["---:"] * (1 + len(runs))]
    lines += [[dim, *map(_as_text, cells)] for dim, cells in _rows(by_dim, runs, metric)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _as_text(cell: _Cell) -> str:
    return cell.value + (" ({}; {} to {})".format(*cell.lead) if cell.lead else "")


def _write(out: Path, runs: Sequence[Run], result: Mapping[str, Any], metrics: Sequence[str]) -> Path:
    """OUT/index.html, compare.md and compare.json; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(result, indent=2) + "\n")
    title = " · ".join(run.name for run in runs)
    sections, text = [], [f"# {title}"]
    for set_name in result["sets"]:
        cards = []
        text.append(f"## {set_name}")
        for direction, name in DIRECTIONS.items():
            by_dim = result["sets"][set_name][direction]
            for metric in metrics:
                cards.append(_card(by_dim, runs, f"{set_name}-{direction}", direction, metric))
                text.append(f"{name}, {metric}\n\n{_markdown(by_dim, runs, metric)}")
        why = "" if _all_paired(runs, set_name) else f'<p class="note">{escape(_why_unpaired(runs, set_name))}</p>'
        sections.append(
            f'<section class="set"><h2>{escape(set_name)}</h2>{why}<div class="grid">{"".join(cards)}</div></section>'
        )
    listed = "".join(f"<dt>{escape(run.name)}</dt><dd>{escape(str(run.folder))}</dd>" for run in runs)
    method = (
        f'<h2>The runs</h2><div class="card"><dl>{listed}</dl><p class="note">Small numbers: the lead over '
        f"{escape(runs[0].name)} in points and its 95 % interval, over the same queries, by 2,000 resamples of items. "
        "Coloured where a paired sign-flip test gives p &lt; 0.05, not corrected for the number of comparisons. They "
        "tell of other queries like these, not of another training with another seed.</p></div>"
    )
    (out / "compare.md").write_text("\n\n".join(text) + "\n")
    page = out / "index.html"
    page.write_text(frame(title, "", "".join(sections) + method), encoding="utf-8")
    return page


def _card(by_dim: Mapping[str, Any], runs: Sequence[Run], name: str, direction: str, metric: str) -> str:
    picture = ""
    if _is_share(metric):
        curves = []
        for place, run in enumerate(runs):
            cells = {dim: scores[metric][run.name] for dim, scores in by_dim.items() if run.name in scores[metric]}
            values = {dim: {"low": cell["value"], "high": cell["value"], **cell} for dim, cell in cells.items()}
            curves.append(Curve(run.name, _COLOURS[place % len(_COLOURS)], values, dashed=place >= len(_COLOURS)))
        svg = plots.recall_by_dim(curves, None, metric, name=f"compare-{name}-{metric}", legend=True)
        picture = figure(svg, f"{metric} of each run by dim; the table below has the numbers")
    rows = []
    for dim, cells in _rows(by_dim, runs, metric):
        row = [cell.value if cell.lead is None else _with_lead(cell.value, cell.lead, cell.tone) for cell in cells]
        rows.append([dim, *row])
    header = ["dim", *(escape(run.name) for run in runs)]
    return f'<div class="card picture"><h4>{DIRECTIONS[direction]}, {metric}</h4>{picture}{table(header, rows)}</div>'


def _with_lead(value: str, lead: tuple[str, str, str], tone: str) -> str:
    return f'{value}<small><span class="{tone}">{lead[0]}</span>; {lead[1]} to {lead[2]}</small>'


def _is_share(metric: str) -> bool:
    return not is_better_lower(metric)
