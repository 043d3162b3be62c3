"""Writes the files of a report.

FOLDER/
    report.md, recall_by_dim.png, recall_by_step.png    of a training run
    index.html                  of `mmrl eval`: the self-contained page (mmrl.evaluate.report.page)
    SET.items.jsonl             the rank of each query at every dim
    ranks.safetensors           the same as tensors, for mmrl compare (mmrl.evaluate.report.stored_ranks)
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.data.sequential import ImageReader
from mmrl.evaluate.analysis.blocks import found_from
from mmrl.evaluate.analysis.run import Analysis
from mmrl.evaluate.report.examples import choose_examples, thumbnails
from mmrl.evaluate.report.page import SetReport
from mmrl.evaluate.report.plots import save_recall_png, save_steps_png
from mmrl.evaluate.report.tables import changes, recall_markdown
from mmrl.evaluate.sets import Embedded
from mmrl.output.files import write_atomic


def write_report(folder: Path, title: str, evaluations: Sequence[Mapping[str, Any]]) -> Path:
    """Writes the report of a training run: report.md with the scores of the last evaluation and its plots; returns the
    path of recall_by_dim.png. `evaluations` are the objects of evaluations.jsonl; two or more are also plotted over the
    steps."""
    folder.mkdir(parents=True, exist_ok=True)
    plot, scores_of_set = folder / "recall_by_dim.png", evaluations[-1]["sets"]
    save_recall_png(plot, scores_of_set)
    shown = [f"# {title}", f"![recall by dim]({plot.name})"]
    if len(evaluations) > 1:
        steps = folder / "recall_by_step.png"
        save_steps_png(steps, evaluations)
        shown += [f"![recall by step]({steps.name})"]
    if evaluations[0]["step"] == 0:
        shown.append("\n".join(f"- {line}" for line in changes(evaluations[0]["sets"], scores_of_set)))
    tables = [recall_markdown(name, result) for name, result in scores_of_set.items()]
    write_atomic(folder / "report.md", "\n\n".join([*shown, "\n".join(tables)]))
    return plot


def write_items(path: Path, embedded: Embedded, analysis: Analysis, k: int) -> None:
    """Writes one JSON object per query: its rank at every dim, and the dim from which on it is found within k."""
    with path.open("w", encoding="utf-8") as file:
        for direction, ranked in analysis.ranked.items():
            rank_of = {dim: one.rank_Q for dim, one in ranked.items()}
            first = next(iter(ranked.values()))
            from_Q = found_from(rank_of, k).tolist()
            for index, row in enumerate(first.query_Q.tolist()):
                query = embedded.captions[row] if direction.startswith("text") else embedded.keys[row]
                ranks = {str(dim): int(rank_Q[index]) for dim, rank_Q in rank_of.items()}
                line = {"direction": direction, "query": query, "found_from": from_Q[index] or None, "rank": ranks}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def build_set_report(
    name: str, result: Mapping[str, Any], analysis: Analysis, embedded: Embedded, reader: ImageReader
) -> SetReport:
    """The page's data of one set, with examples of texts that find images. Their short dim is the advised one if it is
    at most a quarter of the full dim, otherwise the one nearest to an eighth of it."""
    if "text_to_image" not in analysis.tasks:
        return SetReport(name, result)
    ranked, task = analysis.ranked["text_to_image"], analysis.tasks["text_to_image"]
    full, advised = max(ranked), analysis.json["advice"]["smallest"]["dim"]
    smaller = [dim for dim in ranked if dim < full]
    if not smaller:
        return SetReport(name, result)
    short = advised if 4 * advised <= full else min(smaller, key=lambda dim: abs(math.log(8 * dim / full)))
    rank_of = {dim: one.rank_Q for dim, one in ranked.items()}
    chosen = choose_examples(task, embedded.captions, rank_of, ranked[full].query_Q, short)
    rows = {row for example in chosen for results in example.results for row, _ in results.images}
    return SetReport(name, result, chosen, thumbnails(reader, embedded, rows))
