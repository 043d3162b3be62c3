"""The reports' plots: matplotlib figures, as themed SVG for the pages and as PNG for a training run's report.md.

Figures are drawn in the colours of the light theme. In the SVG, each colour is replaced by a CSS variable that the page
defines for both themes, and text stays text in the page's font.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from mmrl.evaluate.directions import ARROWS, CLASSIFICATION, CROSS_MODAL, is_classification

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
_RECALL_COLOURS = ("#1b6ca8", "#2a9d6f", "#c8553d", "#7b4fa6", "#94741b")


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
def _figure(height: float = _HEIGHT) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes, in the light theme's colours."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, faint, line = (COLOURS[name][0] for name in ("ink", "faint", "line"))
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mmrl",
        "font.size": _TEXT,
        "text.color": ink,
        "axes.labelcolor": faint,
        "axes.edgecolor": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": faint,
        "ytick.labelcolor": faint,
        "grid.color": line,
        "legend.frameon": False,
        "legend.labelcolor": ink,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.grid(linewidth=0.8)
        yield figure, axes


def recall_by_dim(
    curves: Sequence[Curve], chance: float | None, metric: str, name: str = "recall", legend: bool = False
) -> str:
    """SVG of recall by dim on a logarithmic axis, with intervals as bands and chance as a dotted line.

    `name` makes its element ids unique on the page.
    """
    with _figure() as (figure, axes):
        dims = sorted({int(dim) for curve in curves for dim in curve.scores})
        for index, curve in reversed(list(enumerate(curves))):
            x = sorted(int(dim) for dim in curve.scores)
            values, lows, highs = ([100 * curve.scores[str(dim)][key] for dim in x] for key in ("value", "low", "high"))
            colour = COLOURS[curve.colour][0]
            dash = "--" if curve.dashed else "-"
            width, size = (2.2, 5) if index == 0 else (1.4, 3.5)
            axes.fill_between(x, lows, highs, color=colour, alpha=0.16 if index == 0 else 0.08, linewidth=0)
            axes.plot(x, values, dash, color=colour, linewidth=width, marker="o", markersize=size, label=curve.name)
        if chance is not None:
            axes.axhline(100 * chance, color=COLOURS["faint"][0], linestyle=":", linewidth=1.2, label="chance")
        _label_axes(axes, dims, "dim: length of the prefix", f"{metric}, %")
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1], fontsize=_TEXT - 1, loc="lower right")
        return _as_svg(figure, name)


def bytes_against_recall(compression: Mapping[str, Any], budget_line: float, name: str = "bytes") -> str:
    """SVG of recall against bytes: every one-stage option as a mark, the front of one-stage search as a line, that of
    two-stage search dashed with hollow marks."""
    options, metric = compression["options"], compression["metric"]
    with _figure(4.0) as (figure, axes):
        for precision, marker in _MARKERS.items():
            colour = COLOURS[PRECISION_COLOURS[precision]][0]
            single = [o for o in options if o["precision"] == precision and not o["candidates"]]
            if single:
                spots = [o["bytes"] for o in single], [100 * o["recall"]["value"] for o in single]
                axes.scatter(*spots, marker=marker, s=34, color=colour, linewidths=0, label=precision, zorder=3)
        for staged, dash, label in ((False, "-", "front, one stage"), (True, "--", "front, two stages")):
            front = sorted(
                (o["bytes"], 100 * o["recall"]["value"], str(o["dim"]), o["precision"])
                for o in options
                if o["front"] and bool(o["candidates"]) == staged
            )
            if not front:
                continue
            x, y, dims, precisions = zip(*front, strict=True)
            shade = COLOURS["ink" if not staged else "faint"][0]
            axes.plot(x, y, dash, color=shade, linewidth=1.2, label=label, zorder=2)
            if staged:
                edges = [COLOURS[PRECISION_COLOURS[p]][0] for p in precisions]
                axes.scatter(x, y, s=30, facecolors="none", edgecolors=edges, linewidths=1.2, zorder=2)
                continue
            for spot in zip(x, y, dims, strict=True):
                axes.annotate(
                    spot[2], spot[:2], xytext=(3, -11), textcoords="offset points", fontsize=8, color=COLOURS["ink"][0]
                )
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
    with _panels(path, list(scores_of_set)) as panels:
        for axes, result in zip(panels, scores_of_set.values(), strict=True):
            _recall_panel(axes, result)


def _recall_panel(axes: Any, result: Mapping[str, Any]) -> None:
    dims = [int(dim) for dim in result["dims"]]
    labelled = is_classification(result)
    dash_of = {CLASSIFICATION: "-"} if labelled else dict(zip(CROSS_MODAL, ("-", "--"), strict=True))
    for direction, dash in dash_of.items():
        by_chance = result["chance"][direction]
        metrics = ("top1", "top5") if labelled else tuple(by_chance)  # mean_per_class would cover top1
        for metric, colour in zip(metrics, cycle(_RECALL_COLOURS), strict=False):
            values = [100 * result["dims"][str(dim)][direction][metric] for dim in dims]
            axes.plot(dims, values, dash, color=colour, marker="o", markersize=4)
            if direction != list(dash_of)[-1]:
                continue
            axes.axhline(100 * by_chance[metric], color=colour, linestyle=":", linewidth=1)
            offset = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(metric, (dims[0], values[0]), color=colour, **offset)
    _label_axes(axes, dims, "dim: length of the prefix", "zero-shot accuracy, %" if labelled else "recall, %")
    axes.set_xlim(min(dims) * 0.85, max(dims) * 1.6)
    axes.set_title(f"{axes.get_title()} ({result['num_images']:,} images)", fontsize=10)
    for direction, dash in dash_of.items():
        axes.plot([], [], f"k{dash}", label=ARROWS.get(direction, "accuracy"))
    axes.plot([], [], "k:", label="chance")
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.06))


def save_steps_png(path: Path, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG with one panel per set: a curve per dim of R@10 (the mean of both directions), or of the zero-shot
    accuracy of a classification set, over the steps.

    Args:
        evaluations: the objects of evaluations.jsonl.
    """
    import matplotlib as mpl

    last = evaluations[-1]["sets"]
    with _panels(path, list(last)) as panels:
        for axes, (name, result) in zip(panels, last.items(), strict=True):
            history = [(one["step"], one["sets"][name]["dims"]) for one in evaluations if name in one["sets"]]
            labelled = is_classification(result)
            ways, metric = ((CLASSIFICATION,), "top1") if labelled else (CROSS_MODAL, "R@10")
            dims = list(result["dims"])
            for index, dim in enumerate(dims):
                curve = [(step, by_dim[dim]) for step, by_dim in history if dim in by_dim]
                values = [100 * sum(scores[way][metric] for way in ways) / len(ways) for _, scores in curve]
                colour = mpl.colormaps["viridis"](0.9 * index / max(1, len(dims) - 1))
                steps = [step for step, _ in curve]
                axes.plot(steps, values, color=colour, linewidth=1.4, marker="o", markersize=3, label=f"{dim}-d")
            axes.set_xlabel("step")
            axes.set_ylabel("zero-shot accuracy, %" if labelled else "R@10, mean of both directions, %")
            axes.legend(fontsize=8, loc="lower right")


@contextmanager
def _panels(path: Path, titles: Sequence[str]) -> Iterator[list[Any]]:
    """A row of axes with these titles, written to a PNG at the end. Their y axis starts at 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(titles), 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(1, len(titles), number) for number in range(1, len(titles) + 1)]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    yield panels
    for axes in panels:
        axes.set_ylim(0, None)
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
