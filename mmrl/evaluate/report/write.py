"""Writes the files of a report.

FOLDER/
    index.html                  the self-contained page (mmrl.evaluate.report.page)
    report.md                   a summary in Markdown
    recall_by_dim.png, bytes_against_recall.png
    recall_by_step.png          of a training run only
    SET.items.jsonl             the rank of each query at every dim
    ranks.safetensors           the same as tensors, for mmrl compare (mmrl.evaluate.report.stored_ranks)
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.data.sequential import ImageReader
from mmrl.evaluate.analysis.advice import summarise, summarise_other_direction
from mmrl.evaluate.analysis.blocks import found_from
from mmrl.evaluate.analysis.run import Analysis
from mmrl.evaluate.directions import ARROWS, CROSS_MODAL
from mmrl.evaluate.report.examples import choose_examples, thumbnails
from mmrl.evaluate.report.page import render_page
from mmrl.evaluate.report.plots import bytes_against_recall, save_recall_png, save_steps_png
from mmrl.evaluate.report.sections import SetReport, curves_of
from mmrl.evaluate.report.tables import markdown_table, recall_markdown
from mmrl.evaluate.sets import Embedded
from mmrl.output.files import write_atomic


def write_report(folder: Path, title: str, evaluations: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the report of a training run: report.md with the scores of the last evaluation and its plots; returns the
    path of recall_by_dim.png.

    Args:
        evaluations: the objects of evaluations.jsonl; two or more are also plotted over the steps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot, scores_of_set = folder / "recall_by_dim.png", evaluations[-1]["sets"]
    save_recall_png(plot, scores_of_set)
    shown = [f"# {title}", f"![recall by dim]({plot.name})"]
    if len(evaluations) > 1:
        steps = folder / "recall_by_step.png"
        save_steps_png(steps, evaluations)
        shown += [f"![recall by step]({steps.name})"]
    tables = [recall_markdown(name, result) for name, result in scores_of_set.items()]
    write_atomic(folder / "report.md", "\n\n".join([*shown, "\n".join(tables)]))
    return plot


def write_page(
    folder: Path,
    title: str,
    reports: Sequence[SetReport],
    labelled: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, str],
) -> Path:
    """Writes the report of `mmrl eval`: index.html, report.md and its two plots; returns the page's path.

    Args:
        labelled: {set: entry in retrieval.json} of the zero-shot classification sets.
        about: {label: value} of the model and the software.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_recall_png(folder / "recall_by_dim.png", {report.name: report.result for report in reports})
    bytes_against_recall(reports[0].analysis["compression"], None, path=folder / "bytes_against_recall.png")
    text = [f"# {title}", "![recall by dim](recall_by_dim.png)", "![bytes against recall](bytes_against_recall.png)"]
    for report in reports:
        text += [recall_markdown(report.name, report.result).rstrip(), *_analysis_markdown(report.analysis)]
    text += ["\n".join(f"- {key}: {value}" for key, value in about.items())]
    write_atomic(folder / "report.md", "\n\n".join(text) + "\n")
    page = folder / "index.html"
    write_atomic(page, render_page(title, reports, labelled, about))
    return page


def _analysis_markdown(analysis: Mapping[str, Any]) -> list[str]:
    """The advice, the front of bytes against recall and the baselines, as Markdown paragraphs."""
    summary, metric = summarise(analysis["advice"]), analysis["compression"]["metric"]
    front = sorted((o for o in analysis["compression"]["options"] if o["front"]), key=lambda o: o["bytes"])
    codes = [["code", "bytes per vector", f"{metric}, %", "95 % interval"], ["---", "---:", "---:", "---:"]]
    for option in front:
        if not option["candidates"]:
            code = f"{option['dim']}-d {option['precision']}"
            codes.append([code, f"{option['bytes']:,}", *_with_interval(option["recall"])])
    shown = [f"**{summary.headline}** {summary.evidence} {summary.certainty}", summary.saving]
    shown += ["\n".join(f"- {line}" for line in summary.others)] if summary.others else []
    shown += [summarise_other_direction(analysis)]
    shown += [f"Pareto front of bytes and recall, one stage:\n\n{markdown_table(codes)}"]
    for direction in CROSS_MODAL:
        curves = curves_of(analysis, direction, metric)
        compared = [["dim", *(curve.name for curve in curves)], ["---:"] * (1 + len(curves))]
        for dim in curves[0].scores:
            values = (curve.scores.get(dim) for curve in curves)
            compared.append([dim, *(f"{100 * value['value']:.1f}" if value else "" for value in values)])
        shown.append(f"{ARROWS[direction]}, {metric} in %, compared with the baselines:\n\n{markdown_table(compared)}")
    return shown


def _with_interval(recall: Mapping[str, float]) -> list[str]:
    return [f"{100 * recall['value']:.1f}", f"{100 * recall['low']:.1f} to {100 * recall['high']:.1f}"]


def write_items(path: Path, embedded: Embedded, analysis: Analysis, k: int) -> None:
    """Writes one JSON object per query: its rank at every dim, and the dim from which on it is found within k."""
    with path.open("w", encoding="utf-8") as file:
        for direction, ranked in analysis.ranked.items():
            rank_of = {dim: one.rank_Q for dim, one in ranked.items()}
            first = next(iter(ranked.values()))
            from_Q = found_from(rank_of, k).tolist()
            for index, row in enumerate(first.query_Q.tolist()):
                query = embedded.captions[row] if direction == "text_to_image" else embedded.keys[row]
                ranks = {str(dim): int(rank_Q[index]) for dim, rank_Q in rank_of.items()}
                line = {"direction": direction, "query": query, "found_from": from_Q[index] or None, "rank": ranks}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def build_set_report(
    name: str, result: Mapping[str, Any], analysis: Analysis, embedded: Embedded, reader: ImageReader
) -> SetReport:
    """The page's data of one set. The examples' short dim is the advised one if it is at most a quarter of the full
    dim, otherwise the one nearest to an eighth of it."""
    ranked, task = analysis.ranked["text_to_image"], analysis.tasks["text_to_image"]
    full, advised = max(ranked), analysis.json["advice"]["smallest"]["dim"]
    smaller = [dim for dim in ranked if dim < full]
    if not smaller:
        return SetReport(name, result)
    short = advised if 4 * advised <= full else min(smaller, key=lambda dim: abs(math.log(8 * dim / full)))
    rank_of = {dim: one.rank_Q for dim, one in ranked.items()}
    chosen = choose_examples(task, embedded.captions, rank_of, ranked[full].query_Q, short)
    rows = {image.row for example in chosen for results in example.results for image in results.images}
    return SetReport(name, result, chosen, thumbnails(reader, embedded, rows))
