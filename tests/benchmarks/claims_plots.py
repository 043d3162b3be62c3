"""The four plots on the page of claims.py."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from claims_runs import EQUAL, NESTED, NESTED_ROTATED, PCA, PLAIN, PLAIN_D, PLAIN_ROTATED, TRUNCATED
from claims_scores import Curves, Embeddings, Scores, cross, quick_recall

STYLES = {
    PLAIN_D: {"color": "#222222", "marker": "s"},
    TRUNCATED: {"color": "#c8553d", "marker": "v"},
    PCA: {"color": "#8fb8de", "marker": "^"},
    PLAIN_ROTATED: {"color": "#1b6ca8", "marker": "D"},
    EQUAL: {"color": "#e0a030", "marker": "P"},
    NESTED: {"color": "#2a9d6f", "marker": "o"},
    NESTED_ROTATED: {"color": "#7b4fa3", "marker": "X", "linestyle": "--"},
}
"""The arms that are drawn: those that have all dims."""
_CURVE_STYLES = {PLAIN: STYLES[TRUNCATED] | {"label": "plain, truncated"}, EQUAL: STYLES[EQUAL], NESTED: STYLES[NESTED]}
_WITH_INTERVAL = (PLAIN_D, NESTED)
_BLOCKS = 16
_COLUMNS = 3


def draw_by_dim(path: Path, tests: dict[str, Scores]) -> None:
    """R@1 by dim, a panel for each test set; intervals of two arms only, because seven would hide each other."""

    def draw(test: str, axes: Any) -> None:
        for arm, style in STYLES.items():
            measured = {dim: cross(one, "R@1") for dim, one in tests[test][arm].items()}
            _line(axes, list(measured), [one.value for one in measured.values()], label=arm, **style)
            if arm in _WITH_INTERVAL:
                low, high = 100 * np.array([one.interval for one in measured.values()]).T
                axes.fill_between(list(measured), low, high, color=style["color"], alpha=0.12, linewidth=0)
        _dims_on_x(axes, list(tests[test][NESTED]))

    _panels(path, list(tests), draw, xlabel="dim", ylabel="R@1, % (shaded: 95 % interval)")


def draw_over_steps(path: Path, curves: Curves, final: Scores) -> None:
    """R@1 over the steps, a panel for each dim, with the final R@1 of a model of that dim alone."""
    dims = list(next(iter(curves.values())))

    def draw(title: str, axes: Any) -> None:
        dim = int(title.removesuffix("-d"))
        for arm, style in _CURVE_STYLES.items():
            measured = {step: cross(one, "R@1") for step, one in curves[arm][dim].items()}
            _line(axes, [0, *measured], [0, *(one.value for one in measured.values())], **{"label": arm, **style})
        target = 100 * cross(final[PLAIN_D][dim], "R@1").value
        axes.axhline(target, color="#222222", linestyle=":", label="a model of that dim alone, at its end")

    _panels(path, [f"{dim}-d" for dim in dims], draw, xlabel="step", ylabel="R@1, %")


def draw_any_dim(path: Path, arms: Sequence[tuple[str, int, list[Embeddings]]], dims: Sequence[int]) -> None:
    """R@10 at prefix lengths that are trained and at others between them."""
    lengths = sorted({round(2 ** (half / 4)) for half in range(4 * (dims[0].bit_length() - 1) + 1)} | set(dims))
    seeds_of = _one_model_arms(arms, dims[0])

    def draw(_title: str, axes: Any) -> None:
        for arm, seeds in seeds_of.items():
            style = {name: value for name, value in STYLES[arm].items() if name != "marker"}
            _line(axes, lengths, [quick_recall(seeds, length, 10) for length in lengths], label=arm, **style)
        _dims_on_x(axes, dims)

    _panels(path, ["any prefix length"], draw, xlabel="prefix length (labelled: the nested dims)", ylabel="R@10, %")


def draw_blocks(path: Path, arms: Sequence[tuple[str, int, list[Embeddings]]], dims: Sequence[int]) -> None:
    """R@10 of each block of dims alone. It falls from left to right where the dims are ordered by importance."""
    width = max(1, dims[0] // _BLOCKS)
    starts = range(0, dims[0], width)
    seeds_of = _one_model_arms(arms, dims[0])

    def draw(_title: str, axes: Any) -> None:
        for arm, seeds in seeds_of.items():
            blocks = [[one.block(first, first + width) for one in seeds] for first in starts]
            recall = [quick_recall(of_seeds, width, 10) for of_seeds in blocks]
            _line(axes, [first + 1 for first in starts], recall, label=arm, **STYLES[arm])

    title = f"each block of {width} dims alone"
    _panels(path, [title], draw, xlabel="first dim of the block", ylabel="R@10, %")


def _one_model_arms(arms: Sequence[tuple[str, int, list[Embeddings]]], full: int) -> dict[str, list[Embeddings]]:
    """The drawn arms in which one model serves all dims."""
    return {arm: seeds for arm, dim, seeds in arms if dim == full and arm in STYLES and arm != PLAIN_D}


def _line(axes: Any, x: Sequence[float], shares: Sequence[float], **style: Any) -> None:
    axes.plot(x, 100 * np.array(shares), markersize=4, linewidth=1.4, **style)


def _dims_on_x(axes: Any, dims: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(dims), labels=[str(dim) for dim in dims])


def _panels(path: Path, titles: Sequence[str], draw: Callable[[str, Any], None], xlabel: str, ylabel: str) -> None:
    """Draw a panel per title, up to three in a row, with one legend below all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    width = 7.5 if columns == 1 else 4.6 * columns
    figure = Figure(figsize=(width, 3.6 * rows + 0.8), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes: Any = None
    for number, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, number + 1)
        draw(title, axes)
        axes.set_ylim(0, None)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        if number % columns == 0:
            axes.set_ylabel(ylabel)
        if number + columns >= len(titles):
            axes.set_xlabel(xlabel)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * columns), fontsize=8)
    figure.savefig(path)
