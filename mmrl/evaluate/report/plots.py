"""The reports' plots: matplotlib figures, as themed SVG for the pages and as PNG for a training run's report.md.

Figures are drawn in the colours of the light theme. In the SVG, each colour is replaced by a CSS variable that the page
defines for both themes, and text stays text in the page's font.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl.evaluate.directions import ARROWS, CLASSIFICATION, is_classification, main_directions

# {name: (light theme, dark theme)}
COLOURS = {
    "ink": ("#1c2330", "#e4e8ef"),
    "faint": ("#667080", "#99a3b3"),
    "line": ("#dde1e8", "#363e4b"),
    "model": ("#1b6ca8", "#62b3ee"),
    "pca": ("#c2512f", "#f28c6b"),
    "best_dims": ("#94741b", "#d8b550"),
    "random_dims": ("#868d99", "#8f98a6"),
    "other": ("#22905f", "#52cf9c"),
    "other_pca": ("#7b4fa6", "#bb93e6"),
    "good": ("#1f7a4d", "#5bd49a"),
    "bad": ("#b3382c", "#f58a7e"),
}
PRECISION_COLOURS = {
    "fp32": "model",
    "fp16": "other",
    "int8": "pca",
    "sq8": "pca",
    "binary": "random_dims",
    "pq": "best_dims",
}
_MARKERS = {"fp32": "o", "fp16": "s", "int8": "D", "sq8": "d", "binary": "^", "pq": "P"}
_WIDTH, _HEIGHT = 5.0, 3.5  # inches; 360 pt is the width of a phone
_TEXT = 11


@dataclass(frozen=True)
class Curve:
    """Recall by dim of one model or baseline."""

    name: str
    colour: str
    """A key of COLOURS."""
    scores: Mapping[str, Mapping[str, float]]
    """{dim: {"value": …, "low": …, "high": …}}"""
    dashed: bool = False


@contextmanager
def _figure(height: float, titles: Sequence[str] = ("",)) -> Iterator[tuple[Any, list[Any]]]:
    """A figure with one pair of axes per title, in the light theme's colours."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, faint, line = (COLOURS[name][0] for name in ("ink", "faint", "line"))
    style: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # names of runs and sets are data
        "svg.hashsalt": "mmrl",
        "font.size": _TEXT,
        "text.color": ink,
        "axes.labelcolor": faint,
        "axes.edgecolor": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlesize": _TEXT,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": faint,
        "ytick.labelcolor": faint,
        "grid.color": line,
        "legend.frameon": False,
        "legend.labelcolor": ink,
        "legend.fontsize": _TEXT - 1,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH * len(titles), height), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        panels = [figure.add_subplot(1, len(titles), number) for number in range(1, len(titles) + 1)]
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title)
            axes.grid(linewidth=0.8)
        yield figure, panels


def recall_by_dim(
    curves: Sequence[Curve], chance: float | None, metric: str, name: str = "recall", legend: bool = False
) -> str:
    """SVG of recall by dim on a logarithmic axis, with intervals as bands and chance as a dotted line.

    `name` makes its element ids unique on the page.
    """
    with _figure(_HEIGHT) as (figure, (axes,)):
        _draw_by_dim(axes, curves, [] if chance is None else [chance], f"{metric}, %", legend)
        return _as_svg(figure, name)


def _draw_by_dim(
    axes: Any, curves: Sequence[Curve], chances: Sequence[float], y_label: str, legend: bool = True
) -> None:
    """Curves over the dim, the first on top, and a dotted line for each of `chances`."""
    drawn: dict[str, Any] = {}
    for curve in reversed(curves):
        x = sorted(int(dim) for dim in curve.scores)
        values, lows, highs = ([100 * curve.scores[str(dim)][key] for dim in x] for key in ("value", "low", "high"))
        colour, dash = COLOURS[curve.colour][0], "--" if curve.dashed else "-"
        width, size = (1.4, 3.5) if curve.dashed else (2.2, 5)
        axes.fill_between(x, lows, highs, color=colour, alpha=0.08 if curve.dashed else 0.16, linewidth=0)
        style: Any = {"color": colour, "linewidth": width, "marker": "o", "markersize": size}
        (drawn[curve.name],) = axes.plot(x, values, dash, label=curve.name, **style)
    for chance in chances:
        drawn["chance"] = axes.axhline(100 * chance, color=COLOURS["faint"][0], linestyle=":", linewidth=1.2)
    dims = sorted({int(dim) for curve in curves for dim in curve.scores})
    _label_axes(axes, dims, "dim: length of the prefix", y_label)
    if legend:
        # Not by labels of the lines: matplotlib hides those that begin with an underscore.
        axes.legend([*drawn.values()][::-1], [*drawn][::-1], loc="lower right")


def bytes_against_recall(compression: Mapping[str, Any], budget_line: float, name: str = "bytes") -> str:
    """SVG of recall against bytes: every one-stage option as a mark, the front of one-stage search as a line, that of
    two-stage search dashed with hollow marks."""
    options, metric = compression["options"], compression["metric"]
    colour_of = {precision: COLOURS[name][0] for precision, name in PRECISION_COLOURS.items()}

    def spots(chosen: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
        return [o["bytes"] for o in chosen], [100 * o["recall"]["value"] for o in chosen]

    with _figure(4.0) as (figure, (axes,)):
        for precision, marker in _MARKERS.items():
            single = [o for o in options if o["precision"] == precision and not o["candidates"]]
            if single:
                style = {"marker": marker, "s": 34, "color": colour_of[precision], "linewidths": 0, "zorder": 3}
                axes.scatter(*spots(single), label=precision, **style)
        front = sorted((o for o in options if o["front"]), key=lambda o: o["bytes"])
        single, staged = ([o for o in front if bool(o["candidates"]) == wanted] for wanted in (False, True))
        axes.plot(*spots(single), "-", color=COLOURS["ink"][0], linewidth=1.2, label="front, one stage", zorder=2)
        for option, *spot in zip(single, *spots(single), strict=True):
            placed = {"xytext": (3, -11), "textcoords": "offset points", "fontsize": 8, "color": COLOURS["ink"][0]}
            axes.annotate(str(option["dim"]), spot, **placed)
        if staged:
            axes.plot(*spots(staged), "--", color=COLOURS["faint"][0], linewidth=1.2, label="front, two stages")
            edges = [colour_of[o["precision"]] for o in staged]
            axes.scatter(*spots(staged), s=30, facecolors="none", edgecolors=edges, linewidths=1.2, zorder=2)
        axes.axhline(
            100 * budget_line, color=COLOURS["good"][0], linestyle=":", linewidth=1.3, label="limit of the budget"
        )
        sizes = sorted({o["bytes"] for o in options})
        ticks = [2**n for n in range(0, 20, 2) if sizes[0] <= 2**n <= sizes[-1]]
        _label_axes(axes, ticks, "bytes per vector read by every search", f"{metric}, %")
        axes.legend(fontsize=_TEXT - 1.5, loc="lower right", ncols=2, handletextpad=0.4, columnspacing=1)
        return _as_svg(figure, name)


def _label_axes(axes: Any, ticks: Sequence[int], x_label: str, y_label: str) -> None:
    """A logarithmic x axis with these ticks, and a y axis from 0."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, None)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def save_recall_png(path: Path, scores_of_set: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a PNG with one panel per set: recall by dim on a logarithmic axis, both directions, chance dotted; of a
    classification set, zero-shot accuracy."""
    titles = [f"{name} ({result['num_images']:,} images)" for name, result in scores_of_set.items()]
    with _figure(4.0, titles) as (figure, panels):
        for axes, result in zip(panels, scores_of_set.values(), strict=True):
            ways, metrics = _shown(result)
            curves = []
            for way in ways:
                for metric, colour in zip(metrics[::-1], ("model", "other", "pca", "best_dims"), strict=False):
                    values = {dim: float(of_dim[way][metric]) for dim, of_dim in result["dims"].items()}
                    scores = {dim: {"value": value, "low": value, "high": value} for dim, value in values.items()}
                    curves.append(
                        Curve(f"{ARROWS.get(way, '')} {metric}".strip(), colour, scores, dashed=way != ways[0])
                    )
            chances = [result["chance"][ways[-1]][metric] for metric in metrics]
            _draw_by_dim(axes, curves, chances, "zero-shot accuracy, %" if is_classification(result) else "recall, %")
        figure.savefig(path)


def _shown(result: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str]]:
    """What is plotted of a set: directions and metrics, the most telling metric last."""
    if is_classification(result):
        return (CLASSIFICATION,), ("top5", "top1")
    directions = main_directions(result["chance"])
    return directions, tuple(result["chance"][directions[0]])


def save_steps_png(path: Path, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG with one panel per set: a curve per dim of R@10 (the mean of the main directions), or of the
    zero-shot accuracy of a classification set, over the steps. `evaluations` are the objects of evaluations.jsonl."""
    import matplotlib as mpl

    last = evaluations[-1]["sets"]
    with _figure(4.0, list(last)) as (figure, panels):
        for axes, (name, result) in zip(panels, last.items(), strict=True):
            history = [(one["step"], one["sets"][name]["dims"]) for one in evaluations if name in one["sets"]]
            ways, (*_, metric) = _shown(result)
            for index, dim in enumerate(result["dims"]):
                curve = [(step, by_dim[dim]) for step, by_dim in history if dim in by_dim]
                values = [100 * sum(scores[way][metric] for way in ways) / len(ways) for _, scores in curve]
                colour = mpl.colormaps["viridis"](0.9 * index / max(1, len(result["dims"]) - 1))
                axes.plot([step for step, _ in curve], values, ".-", color=colour, linewidth=1.4, label=f"{dim}-d")
            axes.set_xlabel("step")
            axes.set_ylabel(f"{metric}{', mean of both directions' if len(ways) > 1 else ''}, %")
            axes.set_ylim(0, None)
            axes.legend(loc="lower right")
        figure.savefig(path)


def _as_svg(figure: Any, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(buffer.getvalue(), name)


def _themed(svg: str, name: str) -> str:
    """A matplotlib SVG made embeddable: colours as CSS variables, the page's font, unique ids."""
    svg = svg[svg.index("<svg") :]
    for variable, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    svg = re.sub(r"font: ([\d.]+px) inherit", r"font-size: \1", svg)
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", svg)
    # Without width and height, the SVG is scaled to the width of its container.
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1))
