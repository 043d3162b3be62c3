"""Tables of an evaluation's scores, for the terminal and for Markdown: retrieval, classification, degraded images."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from mmrl.evaluate.directions import ARROWS, CLASSIFICATION, DIRECTIONS, SAME_MODAL, is_classification, main_directions
from mmrl.output.console import visible

_FEW_QUERIES = 500


def all_tables(results: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The terminal tables of {set: its entry in retrieval.json}."""
    tables = []
    for name, result in results.items():
        directions = list(result["chance"])
        # Two directions per table: more columns do not fit into a terminal.
        pairs = [directions[start : start + 2] for start in range(0, len(directions), 2)]
        tables += [table(f"{name}: {_counts(result)}", score_rows(result, pair)) for pair in pairs]
        if "degraded" in result:
            count = f"{result['degraded']['num_queries']:,}"
            title = f"{name}: {count} degraded images as queries for their originals; R@1 in %"
            tables.append(table(title, degraded_rows(result["degraded"])))
    return tables


def brief_tables(results: Mapping[str, Mapping[str, Any]]) -> list[Table | str]:
    """What fits on a screen: the main table of the first set at three dims, and a line for each other set."""
    (name, first), *others = results.items()
    dims = sorted(int(dim) for dim in first["dims"])
    advised = first["analysis"]["advice"]["smallest"]["dim"] if "analysis" in first else 0
    three = {dims[0], advised if advised in dims[1:-1] else dims[len(dims) // 2], dims[-1]}
    lines = [f"{name}: {one_line(result)}" for name, result in others]
    return [table(f"{name}: {_counts(first)}", score_rows(first, dims=three)), *lines]


def recall_markdown(name: str, result: Mapping[str, Any]) -> str:
    """A Markdown section with one set's table, for report.md and model cards: recall in the main directions, or
    zero-shot accuracy."""
    header, *body = score_rows(result)
    notes = "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in score_notes(result, _main_directions(result)))
    rows = "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---:"] * len(header), *body))
    return f"### {name}\n\n{_counts(result)}.\n\n{rows}\n{notes}"


def one_line(result: Mapping[str, Any]) -> str:
    """One set's R@10 in its main direction, or its accuracy, at every dim, in %, and the number of bad samples."""
    direction, metric, label = _headline(result)
    values = "  ".join(f"{dim}d {100 * scores[direction][metric]:.1f}" for dim, scores in result["dims"].items())
    bad = f"  ({result['num_bad']:,} bad samples left out)" if result["num_bad"] else ""
    return f"{label}: {values}{bad}"


def changes(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line per set of two evaluations: the full dim's R@10 or accuracy before the training, and now. On a set that is
    not trained on, a loss is what fine-tuning has forgotten."""
    lines = []
    for name in (name for name in now if name in first):
        direction, metric, label = _headline(now[name])
        dim = max(now[name]["dims"], key=int)
        start, end = (100 * one[name]["dims"][dim][direction][metric] for one in (first, now))
        lines.append(f"{label} on {name}: {start:.1f} % at the start, {end:.1f} % now ({dim}-d)")
    return lines


def _headline(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """The direction, the metric and the label of the score that stands for a set."""
    if is_classification(result):
        return CLASSIFICATION, "top1", "zero-shot accuracy"
    direction = main_directions(result["chance"])[-1]
    return direction, "R@10", f"{ARROWS[direction]} R@10"


def score_notes(result: Mapping[str, Any], directions: Collection[str] = DIRECTIONS) -> list[str]:
    """Why scores of a set in these directions look odd, where they do: equal captions, few queries, a prefix above the
    full vector."""
    if is_classification(result):
        return []
    notes = []
    limits = {way: shares for way, shares in result.get("ceiling", {}).items() if min(shares.values()) < 1}
    if limits:
        values = "; ".join(
            f"{ARROWS[way]} {', '.join(f'{k} {100 * share:.1f} %' for k, share in shares.items() if share < 1)}"
            for way, shares in limits.items()
        )
        what = "texts" if "text_to_text" in limits else "captions"
        notes.append(f"items of different groups have equal {what}, so no model can exceed {values}")
    for way, count in result.get("num_queries", {}).items():
        if way in SAME_MODAL and way in directions and count < _FEW_QUERIES:
            notes.append(
                f"{ARROWS[way]} has {count:,} queries only, and each of them is {100 / count:.1f} % of the scores"
            )
    for way in _main_directions(result):
        recall_of = {dim: scores[way]["R@10"] for dim, scores in result["dims"].items()}
        full, best = max(recall_of, key=int), max(recall_of, key=lambda dim: recall_of[dim])
        if recall_of[best] > recall_of[full]:
            lead = 100 * (recall_of[best] - recall_of[full])
            notes.append(
                f"{ARROWS[way]} R@10 of {best}-d is {lead:.1f} points above {full}-d: {_why(result, way, best)}"
            )
    return notes


def _why(result: Mapping[str, Any], way: str, dim: str) -> str:
    """Why a prefix has a higher R@10 than the full vector: by chance, if its paired interval contains 0."""
    analysis = result.get("analysis")
    if "folds" in result:  # the analysis is of the whole set
        return "mmrl eval --out without --folds tests whether by chance"
    if analysis is None or analysis["advice"]["budget"]["metric"] != "R@10":
        return "mmrl eval --out tests whether by chance"
    lead = analysis["paired"][way]["full"][dim]["lead"]
    interval = f"{100 * lead['low']:.1f} to {100 * lead['high']:.1f} at 95 %".replace("-", "−")
    if lead["low"] <= 0:
        return f"that may be chance ({interval})"
    return f"the later dims hold more noise than signal for these queries ({interval})"


def score_rows(
    result: Mapping[str, Any], directions: Sequence[str] | None = None, dims: Collection[int] | None = None
) -> list[list[str]]:
    """Recall or accuracy in %: a header, one row per dim from the widest, chance, and the limit that equal captions
    set, where they do."""
    directions = directions or _main_directions(result)
    metrics = list(result["chance"][directions[0]])
    rows = {dim: scores for dim, scores in result["dims"].items() if dims is None or int(dim) in dims}
    rows["chance"] = result["chance"]
    ceiling = result.get("ceiling", {})
    if any(share < 1 for way in directions for share in ceiling.get(way, {}).values()):
        rows["limit"] = ceiling
    columns = [(way, metric) for way in directions for metric in metrics]

    def cells(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
        return [f"{100 * scores[way][k]:.1f}" if k in scores.get(way, {}) else "" for way, k in columns]

    header = ["dim", *(f"{ARROWS.get(way, '')} {metric.replace('_', ' ')}".strip() for way, metric in columns)]
    return [header, *([label, *cells(scores)] for label, scores in rows.items())]


def _main_directions(result: Mapping[str, Any]) -> Sequence[str]:
    return [CLASSIFICATION] if is_classification(result) else main_directions(result["chance"])


def _counts(result: Mapping[str, Any]) -> str:
    items, scores = ("classes", "zero-shot accuracy") if is_classification(result) else ("texts", "recall")
    if not is_classification(result) and (ways := main_directions(result["chance"])) and ways[0] in SAME_MODAL:
        kind = ways[0].partition("_")[0]
        return f"{result['num_queries'][ways[0]]:,} {kind}s as queries; {scores} in %"
    folds = f", mean of {result['folds']} folds" if "folds" in result else ""
    return f"{result['num_images']:,} images, {result[f'num_{items}']:,} {items}{folds}; {scores} in %"


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


def table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    """A terminal table of a header and rows of text; rows that are no scores, such as chance, are dim."""
    title = visible(title)
    # Escaped: rich would read a name such as "photos [new]" as markup.
    shown = Table(title=escape(title), min_width=min(len(title), 78))  # else the title of a narrow table is wrapped
    for head in rows[0]:
        # Headings of three lines, so that six columns fit into a terminal.
        lines = visible(head).replace("→", "→\n").replace(" ", "\n")
        shown.add_column(escape(lines), justify="right", overflow="fold")
    for row in rows[1:]:
        if row[0] == "chance":
            shown.add_section()
        shown.add_row(*row, style="dim" if row[0] in ("chance", "limit") else None)
    return shown
