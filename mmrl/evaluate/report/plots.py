"""The pictures of the report: matplotlib figures, as SVG in the colours of the reader's theme and as PNG for Markdown.

A figure is drawn in the light theme's colours. For the page, each of these becomes a CSS variable that the page defines
for both themes, and text stays text in the page's own font.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Name: light, dark.
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
    "binary": "random_dims",
    "pq2": "best_dims",
    "pq4": "best_dims",
    "pq8": "best_dims",
}
_MARKERS = {"fp32": "o", "fp16": "s", "int8": "D", "binary": "^", "pq2": "P", "pq4": "X", "pq8": "p"}
_WIDTH, _HEIGHT = 5.0, 3.5  # inches, so 360 pt: as wide as a phone, with text to match
_TEXT = 11


@dataclass(frozen=True)
class Curve:
    """Recall by dim of one way to d numbers."""

    name: str
    colour: str
    """A key of COLOURS."""
    scores: Mapping[str, Mapping[str, float]]
    """{dim: {"value": …, "low": …, "high": …}}"""
    dashed: bool = False


@contextmanager
def _figure(height: float = _HEIGHT) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes, in the light theme's colours on nothing."""
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
    """Recall against dim on a logarithmic axis, each with its interval as a band; chance as a dotted line: SVG.

    `name` sets its ids apart from those of other pictures of the page.
    """
    with _figure() as (figure, axes):
        dims = sorted({int(dim) for curve in curves for dim in curve.scores})
        for place, curve in reversed(list(enumerate(curves))):
            own = sorted(int(dim) for dim in curve.scores)
            values, lows, highs = (
                [100 * curve.scores[str(dim)][part] for dim in own] for part in ("value", "low", "high")
            )
            colour = COLOURS[curve.colour][0]
            dash = "--" if curve.dashed else "-"
            width, size = (2.2, 5) if place == 0 else (1.4, 3.5)
            axes.fill_between(own, lows, highs, color=colour, alpha=0.16 if place == 0 else 0.08, linewidth=0)
            axes.plot(own, values, dash, color=colour, linewidth=width, marker="o", markersize=size, label=curve.name)
        if chance is not None:
            axes.axhline(100 * chance, color=COLOURS["faint"][0], linestyle=":", linewidth=1.2, label="chance")
        axes.set_xscale("log", base=2)
        axes.set_xticks(dims, [str(dim) for dim in dims])
        axes.minorticks_off()
        axes.set_ylim(0, None)
        axes.set_xlabel("dim: numbers kept")
        axes.set_ylabel(f"{metric}, %")
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles[::-1], labels[::-1], fontsize=_TEXT - 1, loc="lower right")
        return _finished(figure, name)


def bytes_against_recall(
    compression: Mapping[str, Any], budget_line: float | None, name: str = "bytes", path: Path | None = None
) -> str:
    """Every option as a mark, the front of one-stage search as a line, that of two stages dashed, hollow marks: SVG.

    With a `path`, the same is written there as PNG.
    """
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
        if budget_line is not None:
            axes.axhline(
                100 * budget_line, color=COLOURS["good"][0], linestyle=":", linewidth=1.3, label="the budget's limit"
            )
        axes.set_xscale("log", base=2)
        sizes = sorted({o["bytes"] for o in options})
        ticks = [2**n for n in range(0, 20, 2) if sizes[0] <= 2**n <= sizes[-1]]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, None)
        axes.set_xlabel("bytes of a vector that every search reads")
        axes.set_ylabel(f"{metric}, %")
        axes.legend(fontsize=_TEXT - 1.5, loc="lower right", ncols=2, handletextpad=0.4, columnspacing=1)
        return _finished(figure, name, path)


def _finished(figure: Any, name: str, path: Path | None = None) -> str:
    if path is not None:
        figure.savefig(path, dpi=130, facecolor="white")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return themed(buffer.getvalue(), name)


def themed(svg: str, name: str) -> str:
    """A matplotlib SVG -> one that stands in a page: colours by variable, the page's font, names of its own."""
    svg = svg[svg.index("<svg") :]
    for variable, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{variable})")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    svg = re.sub(r"font: ([\d.]+px) inherit", r"font-size: \1", svg)
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", svg)
    # Without a width and a height of its own the picture takes those of its place.
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1))
