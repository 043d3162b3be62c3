"""What an evaluation shows: the table on the screen, the same in Markdown, the picture of recall by dim."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

DIRECTIONS = {"image_to_text": "image→text", "text_to_image": "text→image"}
_KS = ("R@1", "R@5", "R@10")


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Header, one row a dim from the widest to the narrowest, and chance: recalls in per cent, both ways."""
    header = ["dim", *(f"{direction} {k}" for direction in DIRECTIONS.values() for k in _KS)]
    body = [[dim, *_per_cent(scores)] for dim, scores in result["dims"].items()]
    return [header, *body, ["chance", *_per_cent(result["chance"])]]


def _per_cent(directions: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [f"{100 * directions[direction][k]:.1f}" for direction in DIRECTIONS for k in _KS]


def table(name: str, result: Mapping[str, Any]) -> Table:
    """For the terminal."""
    header, *body, by_chance = rows(result)
    shown = Table(title=f"{name}: {result['num_images']:,} images, {result['num_texts']:,} texts; recall in %")
    for column in header:
        # Three lines of heading, so that six columns fit into a terminal.
        shown.add_column(column.replace("→", "→\n").replace(" ", "\n"), justify="right")
    for row in body:
        shown.add_row(*row)
    shown.add_section()
    shown.add_row(*by_chance, style="dim")
    return shown


def markdown(name: str, result: Mapping[str, Any]) -> str:
    """For report.md and READMEs."""
    header, *body = rows(result)
    lines = [header, ["---:"] * len(header), *body]
    counts = f"{result['num_images']:,} images, {result['num_texts']:,} texts; recall in %."
    return f"### {name}\n\n{counts}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write(folder: Path, title: str, scores_of_set: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes FOLDER/report.md and the picture beside it; returns the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "recall_by_dim.png"
    draw(picture, scores_of_set)
    parts = [markdown(name, result) for name, result in scores_of_set.items()]
    text = f"# {title}\n\n![recall by dim]({picture.name})\n\n" + "\n".join(parts)
    (folder / "report.md").write_text(text)
    return picture


def draw(path: Path, scores_of_set: Mapping[str, Mapping[str, Any]]) -> None:
    """One panel a set: recall against dim, on a logarithmic axis, both directions, chance dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(scores_of_set), 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, (name, result) in enumerate(scores_of_set.items()):
        axes = figure.add_subplot(1, len(scores_of_set), number + 1)
        dims = [int(dim) for dim in result["dims"]]
        for k, colour in zip(_KS, ("#1b6ca8", "#2a9d6f", "#c8553d"), strict=True):
            for direction, dash in zip(DIRECTIONS, ("-", "--"), strict=True):
                values = [100 * result["dims"][str(dim)][direction][k] for dim in dims]
                axes.plot(dims, values, dash, color=colour, marker="o", markersize=4)
            axes.axhline(100 * result["chance"]["text_to_image"][k], color=colour, linestyle=":", linewidth=1)
            axes.annotate(
                k,
                (dims[0], 100 * result["dims"][str(dims[0])]["text_to_image"][k]),
                color=colour,
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(dims, [str(dim) for dim in dims])
        axes.minorticks_off()
        axes.set_xlim(min(dims) * 0.85, max(dims) * 1.6)
        axes.set_ylim(0, None)
        axes.set_xlabel("dim: length of the prefix used")
        axes.set_ylabel("recall, %")
        axes.set_title(f"{name} ({result['num_images']:,} images)", fontsize=10)
        axes.grid(alpha=0.25)
        axes.plot([], [], "k-", label="image→text")
        axes.plot([], [], "k--", label="text→image")
        axes.plot([], [], "k:", label="chance")
        axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.06))
    figure.savefig(path)
