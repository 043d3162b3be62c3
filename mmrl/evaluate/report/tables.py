"""Tables of an evaluation's scores, for the terminal and for Markdown: retrieval, classification, degraded images."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from mmrl.evaluate.directions import ARROWS, CLASSIFICATION, CROSS_MODAL, is_classification


def result_tables(name: str, result: Mapping[str, Any]) -> list[Table]:
    """The terminal tables of one set's entry in retrieval.json."""
    counts = _counts(result)
    if is_classification(result):
        header, *body, by_chance = accuracy_rows(result)
        return [_table(f"{name}: {counts}; accuracy in %", header, body, by_chance)]
    if "folds" in result:
        counts += f", mean of {result['folds']} folds"
    directions = list(result["chance"])
    # Two directions per table: more columns do not fit into a terminal.
    pairs = [directions[start : start + 2] for start in range(0, len(directions), 2)]
    tables = [_recall_table(f"{name}: {counts}; recall in %", result, pair) for pair in pairs]
    if "degraded" in result:
        header, *body = degraded_rows(result["degraded"])
        count = f"{result['degraded']['num_queries']:,}"
        tables.append(_table(f"{name}: {count} degraded images as queries for their originals; R@1 in %", header, body))
    return tables


def recall_markdown(name: str, result: Mapping[str, Any]) -> str:
    """A Markdown section with one set's table, for report.md and model cards: recall of both cross-modal directions, or
    zero-shot accuracy."""
    labelled = is_classification(result)
    header, *body = accuracy_rows(result) if labelled else _recall_rows(result, CROSS_MODAL)
    counts = f"{_counts(result)}; {'zero-shot accuracy' if labelled else 'recall'} in %."
    return f"### {name}\n\n{counts}\n\n{markdown_table([header, ['---:'] * len(header), *body])}\n"


def one_line(result: Mapping[str, Any]) -> str:
    """One set's R@10 of text→image, or zero-shot accuracy, at every dim, in %, and the number of bad samples."""
    direction, metric = (CLASSIFICATION, "top1") if is_classification(result) else ("text_to_image", "R@10")
    label = "zero-shot accuracy" if is_classification(result) else f"{ARROWS[direction]} {metric}"
    values = "  ".join(f"{dim}d {100 * scores[direction][metric]:.1f}" for dim, scores in result["dims"].items())
    return f"{label}: {values}" + (f"  ({result['num_bad']:,} bad samples left out)" if result["num_bad"] else "")


def ceiling_note(result: Mapping[str, Any]) -> str:
    """A sentence on the R@1 that equal captions leave to any model; empty if they leave all."""
    shares = {ARROWS[one]: scores["R@1"] for one, scores in result.get("ceiling", {}).items() if scores["R@1"] < 1}
    if not shares:
        return ""
    values = ", ".join(f"{arrow} {100 * share:.1f} %" for arrow, share in shares.items())
    return f"no model can exceed an R@1 of {values}, because items without a common group have equal captions."


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as Markdown; the second row is the alignment."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _recall_rows(result: Mapping[str, Any], directions: Sequence[str]) -> list[list[str]]:
    """Header, one row per dim from the widest, and chance; recall in %."""
    ks = list(result["chance"][directions[0]])

    def cells(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
        return [f"{100 * scores[direction][k]:.1f}" for direction in directions for k in ks]

    header = ["dim", *(f"{ARROWS[direction]} {k}" for direction in directions for k in ks)]
    body = [[dim, *cells(scores)] for dim, scores in result["dims"].items()]
    return [header, *body, ["chance", *cells(result["chance"])]]


def _recall_table(title: str, result: Mapping[str, Any], directions: Sequence[str]) -> Table:
    header, *body, by_chance = _recall_rows(result, directions)
    # Headings of three lines, so that six columns fit into a terminal.
    header = [column.replace("→", "→\n").replace(" ", "\n") for column in header]
    return _table(title, header, body, by_chance)


def accuracy_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Header, one row per dim from the widest, and chance; accuracy in %."""
    metrics = list(result["chance"][CLASSIFICATION])
    rows = [
        [label, *(f"{100 * scores[CLASSIFICATION][metric]:.1f}" for metric in metrics)]
        for label, scores in (*result["dims"].items(), ("chance", result["chance"]))
    ]
    return [["dim", *(metric.replace("_", " ") for metric in metrics)], *rows]


def _counts(result: Mapping[str, Any]) -> str:
    others = "classes" if is_classification(result) else "texts"
    return f"{result['num_images']:,} images, {result[f'num_{others}']:,} {others}"


def degraded_rows(degraded: Mapping[str, Any]) -> list[list[str]]:
    """Header, and one row per kind and severity: the lowest K's recall at each dim, in %."""
    kinds = {kind: one for kind, one in degraded.items() if kind != "num_queries"}
    dims = list(next(iter(next(iter(kinds.values()))["severities"].values())))
    rows = [["degradation", *(f"{dim}-d" for dim in dims)]]
    for kind, one in kinds.items():
        for severity, scores in one["severities"].items():
            first = next(iter(scores[dims[0]]))
            rows.append([f"{kind} {severity}", *(f"{100 * scores[dim][first]:.1f}" for dim in dims)])
    return rows


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] | None = None) -> Table:
    shown = Table(title=title, min_width=min(len(title), 78))  # otherwise the title of a narrow table is wrapped
    for head in heads:
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(*row)
    if last is not None:
        shown.add_section()
        shown.add_row(*last, style="dim")
    return shown
