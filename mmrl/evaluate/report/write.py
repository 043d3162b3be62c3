"""What an evaluation shows: the table on the screen, the same in Markdown, pictures, and the files of the report.

FOLDER/
    index.html                  the page, which needs nothing else (mmrl.evaluate.report.page)
    report.md                   the same in short
    recall_by_dim.png, bytes_against_recall.png
    SET.items.jsonl             each query's place at every dim
    ranks.safetensors           the same as numbers, for mmrl compare
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.table import Table

from mmrl.data.sequential import PictureReader
from mmrl.evaluate.analysis.advice import other_words, words
from mmrl.evaluate.analysis.blocks import found_from
from mmrl.evaluate.analysis.run import Analysis
from mmrl.evaluate.report import examples, plots
from mmrl.evaluate.report.page import render
from mmrl.evaluate.report.sections import SetPart, curves_of
from mmrl.evaluate.sets import Embedded

DIRECTIONS = {"image_to_text": "image→text", "text_to_image": "text→image"}
_RECALL_COLOURS = ("#1b6ca8", "#2a9d6f", "#c8553d", "#7b4fa6", "#94741b")


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Header, one row a dim from the widest to the narrowest, and chance: recalls in per cent, both ways."""
    recalls = list(result["chance"]["text_to_image"])
    header = ["dim", *(f"{direction} {name}" for direction in DIRECTIONS.values() for name in recalls)]
    body = [[dim, *_per_cent(scores, recalls)] for dim, scores in result["dims"].items()]
    return [header, *body, ["chance", *_per_cent(result["chance"], recalls)]]


def _per_cent(directions: Mapping[str, Mapping[str, float]], recalls: Sequence[str]) -> list[str]:
    return [f"{100 * directions[direction][name]:.1f}" for direction in DIRECTIONS for name in recalls]


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
    """The report of a training run: FOLDER/report.md and the picture beside it; returns the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "recall_by_dim.png"
    draw(picture, scores_of_set)
    parts = [markdown(name, result) for name, result in scores_of_set.items()]
    text = f"# {title}\n\n![recall by dim]({picture.name})\n\n" + "\n".join(parts)
    (folder / "report.md").write_text(text)
    return picture


def write_page(
    folder: Path,
    title: str,
    parts: Sequence[SetPart],
    labelled: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, str],
) -> Path:
    """The report of `mmrl eval`: index.html, and beside it report.md with its two pictures; returns the page's path.

    Args:
        labelled: the sets of zero-shot classification, by name, as retrieval.json has them.
    """
    write(folder, title, {part.name: part.result for part in parts})
    first = parts[0].result["analysis"]
    plots.bytes_against_recall(first["compression"], None, path=folder / "bytes_against_recall.png")
    text = [f"# {title}", "![recall by dim](recall_by_dim.png)", "![bytes against recall](bytes_against_recall.png)"]
    for part in parts:
        text += [markdown(part.name, part.result).rstrip(), *_analysis_markdown(part.result["analysis"])]
    text += ["\n".join(f"- {key}: {value}" for key, value in about.items())]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    page = folder / "index.html"
    page.write_text(render(title, parts, labelled, about), encoding="utf-8")
    return page


def _analysis_markdown(analysis: Mapping[str, Any]) -> list[str]:
    """The advice, the front of bytes against recall, and the baselines, as Markdown."""
    said, metric = words(analysis["advice"]), analysis["compression"]["metric"]
    front = sorted((o for o in analysis["compression"]["options"] if o["front"]), key=lambda o: o["bytes"])
    codes = [["code", "bytes", f"{metric}, %", "95 % interval"], ["---", "---:", "---:", "---:"]]
    for option in front:
        if not option["candidates"]:
            code = f"{option['dim']}-d {option['precision']}"
            codes.append([code, f"{option['bytes']:,}", *_with_interval(option["recall"])])
    shown = [f"**{said.headline}** {said.evidence} {said.certainty}", said.saving]
    shown += ["\n".join(f"- {line}" for line in said.others)] if said.others else []
    shown += [other_words(analysis), "Most recall in few bytes, one stage:\n\n" + _lines(codes)]
    for direction, name in DIRECTIONS.items():
        curves = curves_of(analysis, direction, metric)
        compared = [["dim", *(curve.name for curve in curves)], ["---:"] * (1 + len(curves))]
        for dim in curves[0].scores:
            values = (curve.scores.get(dim) for curve in curves)
            compared.append([dim, *(f"{100 * value['value']:.1f}" if value else "" for value in values)])
        shown.append(f"{name}, {metric} in %, beside the baselines:\n\n{_lines(compared)}")
    return shown


def _with_interval(recall: Mapping[str, float]) -> list[str]:
    return [f"{100 * recall['value']:.1f}", f"{100 * recall['low']:.1f} to {100 * recall['high']:.1f}"]


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_items(path: Path, embedded: Embedded, analysis: Analysis, k: int) -> None:
    """One JSON object a query: its place at every dim, and the dim from which on it is found within k."""
    with path.open("w", encoding="utf-8") as file:
        for direction, ranked in analysis.ranked.items():
            rank_of = {dim: one.rank_Q for dim, one in ranked.items()}
            first = next(iter(ranked.values()))
            from_Q = found_from(rank_of, k).tolist()
            for place, row in enumerate(first.query_Q.tolist()):
                query = embedded.captions[row] if direction == "text_to_image" else embedded.keys[row]
                ranks = {str(dim): int(rank_Q[place]) for dim, rank_Q in rank_of.items()}
                line = {"direction": direction, "query": query, "found_from": from_Q[place] or None, "rank": ranks}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def part_of(
    name: str, result: Mapping[str, Any], analysis: Analysis, embedded: Embedded, reader: PictureReader
) -> SetPart:
    """What the page shows of a set, with examples at the advised dim where that is short, else at about an eighth."""
    ranked, task = analysis.ranked["text_to_image"], analysis.tasks["text_to_image"]
    full, advised = max(ranked), analysis.json["advice"]["smallest"]["dim"]
    smaller = [dim for dim in ranked if dim < full]
    if not smaller:
        return SetPart(name, result)
    short = advised if 4 * advised <= full else min(smaller, key=lambda dim: abs(math.log(8 * dim / full)))
    rank_of = {dim: one.rank_Q for dim, one in ranked.items()}
    chosen = examples.choose(task, embedded.captions, rank_of, ranked[full].query_Q, short)
    rows = {found.row for example in chosen for answer in example.answers for found in answer.found}
    return SetPart(name, result, chosen, examples.thumbnails(reader, embedded, rows))


def draw(path: Path, scores_of_set: Mapping[str, Mapping[str, Any]]) -> None:
    """One panel a set: recall against dim, on a logarithmic axis, both directions, chance dotted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(scores_of_set), 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, (name, result) in enumerate(scores_of_set.items()):
        axes = figure.add_subplot(1, len(scores_of_set), number + 1)
        dims = [int(dim) for dim in result["dims"]]
        for k, colour in zip(result["chance"]["text_to_image"], cycle(_RECALL_COLOURS), strict=False):
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
