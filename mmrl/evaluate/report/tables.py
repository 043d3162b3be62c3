"""What an evaluation found, as tables for the terminal: retrieval in every direction, classes, degraded pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

ARROWS = {
    "image_to_text": "image→text",
    "text_to_image": "text→image",
    "image_to_image": "image→image",
    "text_to_text": "text→text",
}


def all_tables(name: str, result: Mapping[str, Any]) -> list[Table]:
    """All that one set's part of retrieval.json holds."""
    if "classification" in result["chance"]:
        return [_classes(name, result)]
    counts = f"{result['num_images']:,} images, {result['num_texts']:,} texts"
    if "folds" in result:
        counts += f", mean of {result['folds']} folds"
    shown = list(result["chance"])
    pairs = [shown[start : start + 2] for start in range(0, len(shown), 2)]
    tables = [_retrieval(f"{name}: {counts}; recall in %", result, pair) for pair in pairs]
    return [*tables, *([_degraded(name, result["degraded"])] if "degraded" in result else [])]


def _retrieval(title: str, result: Mapping[str, Any], ways: Sequence[str]) -> Table:
    """Two directions side by side: more columns would not fit into a terminal."""
    ks = list(result["chance"][ways[0]])
    rows = [
        [dim, *(f"{100 * scores[way][k]:.1f}" for way in ways for k in ks)] for dim, scores in result["dims"].items()
    ]
    by_chance = ["chance", *(f"{100 * result['chance'][way][k]:.1f}" for way in ways for k in ks)]
    # Three lines of heading, so that six columns fit.
    heads = [f"{ARROWS[way].replace('→', f'→{chr(10)}')}\n{k}" for way in ways for k in ks]
    return _table(title, ["dim", *heads], rows, by_chance)


def _classes(name: str, result: Mapping[str, Any]) -> Table:
    measures = list(result["chance"]["classification"])
    rows = [
        [dim, *(f"{100 * scores['classification'][one]:.1f}" for one in measures)]
        for dim, scores in result["dims"].items()
    ]
    by_chance = ["chance", *(f"{100 * result['chance']['classification'][one]:.1f}" for one in measures)]
    title = f"{name}: {result['num_images']:,} images, {result['num_classes']:,} classes; accuracy in %"
    return _table(title, ["dim", *(one.replace("_", " ") for one in measures)], rows, by_chance)


def _degraded(name: str, degraded: Mapping[str, Any]) -> Table:
    """R@1 by kind and severity: one row each, one column a dim."""
    kinds = {kind: one for kind, one in degraded.items() if kind != "num_queries"}
    dims = list(next(iter(next(iter(kinds.values()))["severities"].values())))
    rows = []
    for kind, one in kinds.items():
        for amount, scores in one["severities"].items():
            first = next(iter(scores[dims[0]]))
            rows.append([f"{kind} {amount}", *(f"{100 * scores[dim][first]:.1f}" for dim in dims)])
    title = f"{name}: {degraded['num_queries']:,} degraded pictures, each looking for its original; R@1 in %"
    return _table(title, ["damage", *(f"{dim}d" for dim in dims)], rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], last: Sequence[str] | None = None) -> Table:
    shown = Table(title=title, min_width=min(len(title), 78))  # else a narrow one breaks it
    for head in heads:
        shown.add_column(head, justify="right")
    for row in rows:
        shown.add_row(*row)
    if last is not None:
        shown.add_section()
        shown.add_row(*last, style="dim")
    return shown
