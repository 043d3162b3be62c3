"""The page of claims.py and its four pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims_scores import (
    CROSS,
    METRICS,
    REFERENCE,
    SAME,
    Measured,
    Scores,
    cross,
    mean_of,
    quick,
    score_all,
)

COLOURS = {
    "plain, d only": "#222222",
    "truncated": "#c8553d",
    "rotated": "#1b6ca8",
    "PCA": "#7fb2d8",
    "nested, equal": "#9bd1b3",
    "nested": "#2a9d6f",
}
_CHANCE = 0.01
_BLOCKS = 16


def write(
    out: Path, results: Mapping[str, Mapping[str, Any]], dims: Sequence[int], seeds: Sequence[int], tiny: bool
) -> Path:
    """OUT/results.md, results.json and four pictures."""
    out.mkdir(parents=True, exist_ok=True)
    scored = {(world, test): score_all(arms) for world, one in results.items() for test, arms in one["tests"].items()}
    warning = "**A walk through a few pictures and steps, to test the program. These numbers mean nothing.**\n\n"
    parts = [
        "# Nesting and its rivals\n\n" + (warning if tiny else ""),
        f"`python tests/benchmarks/claims.py --worlds {' '.join(results)} --seeds {','.join(map(str, seeds))}` writes "
        "this page; that file tells what the arms are. In %, the mean of image→text and text→image; brackets hold 95 % "
        "of 1,000 draws of concepts and seeds.\n\n",
        "![recall by dim](recall_by_dim.png)\n\n![recall over steps](recall_over_steps.png)\n\n"
        "![recall at any cut](any_cut.png)\n\n![recall of each block of numbers alone](blocks.png)\n\n",
    ]
    for world, one in results.items():
        parts.append(f"## {world}\n\n{_about(one['ranks'])}\n\n{_verdicts(scored, results, world, dims)}\n")
        for test in one["tests"]:
            parts.append(f"### {world}, {test}\n\n")
            parts += [_table(scored[world, test], dims, metric) for metric in METRICS]
            parts.append(_differences(scored[world, test], dims))
            parts += [
                _table(scored[world, test], dims, "R@1", way)
                for way in SAME
                if _tells(scored[world, test], way, dims[0])
            ]
    (out / "results.md").write_text("".join(parts), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(_as_json(scored, results), indent=1) + "\n")
    _draw_by_dim(out / "recall_by_dim.png", scored)
    _draw_over_steps(out / "recall_over_steps.png", results, dims)
    _draw_any_cut(out / "any_cut.png", results, dims)
    _draw_blocks(out / "blocks.png", results, dims)
    return out / "results.md"


def _percent(one: Measured) -> str:
    low, high = map(_shown, one.interval)
    return f"{_shown(one.value)} [{low}, {high}]"


def _shown(value: float) -> float:
    """In %, to a decimal, and never as -0.0."""
    return round(100 * value, 1) + 0.0


def _table(found: Scores, dims: Sequence[int], metric: str, direction: str | None = None) -> str:
    """Of one direction, or the mean of the two between pictures and texts."""
    title = metric if direction is None else f"{metric}, {_arrow(direction)}"
    lines = [[title, *map(str, dims)], ["---", *["---:"] * len(dims)]]
    for arm, by_dim in found.items():
        shown = (by_dim[dim][direction][metric] if direction else cross(by_dim[dim], metric) for dim in dims)
        lines.append([arm, *map(_percent, shown)])
    return _markdown(lines)


def _tells(found: Scores, direction: str, full: int) -> bool:
    """Whether a set can tell models apart in a direction: where plain finds one query in a hundred."""
    plain = found[REFERENCE][full]
    return direction in plain and plain[direction]["R@1"].value >= _CHANCE


def _arrow(direction: str) -> str:
    return direction.replace("_to_", "→")


def _differences(found: Scores, dims: Sequence[int]) -> str:
    lines = [[f"R@1 less that of “{REFERENCE}”", *map(str, dims)], ["---", *["---:"] * len(dims)]]
    for arm, by_dim in found.items():
        if arm != REFERENCE:
            reference = found[REFERENCE]
            lines.append([arm, *(_percent(cross(by_dim[d], "R@1") - cross(reference[d], "R@1")) for d in dims)])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def _about(ranks: Mapping[str, Any]) -> str:
    rank = float(np.mean(ranks["effective_rank"]))
    shares = ranks["share_of_second_moment"]
    kept = ", ".join(f"{dim}: {100 * np.mean([one[dim] for one in shares]):.1f}" for dim in reversed(shares[0]))
    return f"The plain model's effective rank on the training set is {rank:.1f}; its rotation keeps, in %, at {kept}."


def _verdicts(
    scored: Mapping[tuple[str, str], Scores], results: Mapping[str, Any], world: str, dims: Sequence[int]
) -> str:
    """Each claim of nested training, on the first test set that can tell: what was aimed at, and what came out."""
    tests, full = list(results[world]["tests"]), dims[0]
    test, found = tests[0], scored[world, tests[0]]

    def r1(arm: str, dim: int) -> Measured:
        return cross(found[arm][dim], "R@1")

    def r10(arm: str, dim: int) -> Measured:
        return cross(found[arm][dim], "R@10")

    claims = [(f"R@1 at {full}, less plain's", 0.0, r1("nested", full) - r1(REFERENCE, full))]
    for dim in dims[1:]:
        own = r1("nested", dim) - r1(REFERENCE, dim)
        claims.append((f"R@1 at {dim}, less that of a model of that dim", -0.005, own))
    claims += [(f"R@1 at {dim}, less PCA's of plain", 0.0, r1("nested", dim) - r1("PCA", dim)) for dim in dims]
    shares = [one for one in (("a quarter", full // 4, 0.98), ("an eighth", full // 8, 0.95)) if one[1] in dims]
    for name, dim, least in shares:
        claims.append((f"R@10 that {name} of the dims keeps", least, r10("nested", dim) / r10("nested", full)))
    means = [{arm: mean_of([r10(arm, dim) for dim in dims]) for arm in ("nested", "truncated")}] * len(CROSS)
    for way in SAME:
        that = next((one for one in tests if _tells(scored[world, one], way, full)), None)
        if that is None:
            continue
        by_arm, of = scored[world, that], f"{_arrow(way)} on {that}: "
        tax = by_arm["nested"][full][way]["R@1"] - by_arm[REFERENCE][full][way]["R@1"]
        claims.append((f"{of}R@1 at {full}, less plain's", 0.0, tax))
        kept = {dim: by_arm["nested"][dim][way]["R@10"] for dim in dims}
        claims += [(f"{of}R@10 that {name} keeps", least, kept[dim] / kept[full]) for name, dim, least in shares]
        means.append({arm: mean_of([by_arm[arm][dim][way]["R@10"] for dim in dims]) for arm in ("nested", "truncated")})
    nested, truncated = (mean_of([one[arm] for one in means]) for arm in ("nested", "truncated"))
    claims.append(
        (f"mean R@10 over the dims and {len(means)} directions, as a share of plain's, cut", 1.03, nested / truncated)
    )
    lines = [[f"{world}, {test}: the nested model's", "aim", "measured", "reached"], ["---", "---:", "---:", "---"]]
    for what, aim, one in claims:
        lines.append([what, f"≥ {100 * aim:g}", _percent(one), _reached(one, aim)])
    return (
        _markdown(lines)
        + "Until its turn the nested model is the plain one: the full dim learns as fast, not faster.\n"
    )


def _reached(one: Measured, aim: float) -> str:
    if _shown(one.value) >= 100 * aim:
        return "yes"
    return "no, but within the interval" if one.interval[1] >= aim else "no"


def _as_json(scored: Mapping[tuple[str, str], Scores], results: Mapping[str, Any]) -> dict[str, Any]:
    """Every number and interval, every direction."""
    found: dict[str, Any] = {world: {"ranks": one["ranks"], "tests": {}} for world, one in results.items()}
    for (world, test), arms in scored.items():
        found[world]["tests"][test] = {
            arm: {
                str(dim): {
                    direction: {metric: [one.value, *one.interval] for metric, one in metrics.items()}
                    for direction, metrics in by_direction.items()
                }
                for dim, by_direction in by_dim.items()
            }
            for arm, by_dim in arms.items()
        }
    return found


# ------------------------------------------------------------------------------------------------ the pictures


def _panels(path: Path, titles: Sequence[str], draw: Any, ylabel: str, xlabel: str, log: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, title in enumerate(titles):
        axes = figure.add_subplot(1, len(titles), number + 1)
        draw(title, axes)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(0, None)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path)


def _draw_by_dim(path: Path, scored: Mapping[tuple[str, str], Scores]) -> None:
    panel_of = {f"{world}, {test}": found for (world, test), found in scored.items()}

    def draw(title: str, axes: Any) -> None:
        for arm, by_dim in panel_of[title].items():
            measured = {dim: cross(one, "R@1") for dim, one in by_dim.items()}
            values = np.array([100 * one.value for one in measured.values()])
            low, high = 100 * np.array([one.interval for one in measured.values()]).T
            axes.plot(list(measured), values, marker="o", markersize=3, color=COLOURS[arm], label=arm)
            axes.fill_between(list(measured), low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)

    _panels(path, list(panel_of), draw, "R@1, %", "dim", log=True)


def _draw_over_steps(path: Path, results: Mapping[str, Any], dims: Sequence[int]) -> None:
    small = min(dims, key=lambda dim: abs(dim - 16))

    def draw(title: str, axes: Any) -> None:
        for arm, steps in results[title]["curves"].items():
            for dim, dash in ((dims[0], "-"), (small, "--")):
                values = [100 * quick(seeds, dim, 1) for seeds in steps.values()]
                colour = COLOURS.get(arm, COLOURS["truncated"])
                axes.plot(list(steps), values, dash, color=colour, marker="o", markersize=3, label=f"{arm}, {dim}")

    _panels(path, list(results), draw, "R@1, %", "steps", log=False)


def _draw_any_cut(path: Path, results: Mapping[str, Any], dims: Sequence[int]) -> None:
    cuts = sorted({round(2 ** (half / 4)) for half in range(4 * (dims[0].bit_length() - 1) + 1)} | set(dims))

    def draw(title: str, axes: Any) -> None:
        tests = results[title]["tests"]
        for arm, dim, seeds in tests[next(iter(tests))]:
            if dim == dims[0] and arm != REFERENCE:
                values = [100 * quick(seeds, one, 10) for one in cuts]
                axes.plot(cuts, values, color=COLOURS[arm], label=arm)

    _panels(path, list(results), draw, "R@10, %", "any dim", log=True)


def _draw_blocks(path: Path, results: Mapping[str, Any], dims: Sequence[int]) -> None:
    """What each block of the numbers finds by itself: where they are ranked, the line falls."""
    width = max(1, dims[0] // _BLOCKS)
    starts = range(0, dims[0], width)

    def draw(title: str, axes: Any) -> None:
        tests = results[title]["tests"]
        for arm, dim, seeds in tests[next(iter(tests))]:
            if dim == dims[0] and arm != REFERENCE:
                blocks = [[one.block(first, first + width) for one in seeds] for first in starts]
                values = [100 * quick(of_seeds, width, 10) for of_seeds in blocks]
                axes.plot(
                    [first + 1 for first in starts], values, color=COLOURS[arm], marker="o", markersize=3, label=arm
                )

    _panels(path, list(results), draw, f"R@10 of {width} numbers alone, %", "first of them", log=False)
