"""The section "Bytes against recall" of the report page: plot, Pareto fronts and all options, in both directions."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.evaluate.analysis.advice import budget_of
from mmrl.evaluate.directions import ARROWS
from mmrl.evaluate.report.html import anchor, html_figure, html_table, points_with_interval
from mmrl.evaluate.report.plots import bytes_against_recall

# Options on the front that lose more than this are only in the plot and in the list of all options.
_MAX_LISTED_LOSS = 0.25


def compression_section(set_name: str, metric: str, analysis: Mapping[str, Any]) -> str:
    """Bytes against recall in the budget's direction; the other direction is collapsed."""
    found, other = analysis["compression"], analysis["other_direction"]["compression"]
    counts = f"{found['queries']:,} queries, gallery of {found['gallery']:,}"
    if found["queries"] < found["all_queries"]:
        counts += f" (sampled from {found['all_queries']:,} queries)"
    missing = "; ".join(f"{code} {reason}" for code, reason in found["not_measured"].items())
    missing = f" Not measured in two stages: {missing}." if missing else ""
    reverse = f"{ARROWS[other['direction']]}: {other['queries']:,} queries, gallery of {other['gallery']:,}"
    return (
        "<h3>Bytes against recall</h3>"
        f"<p>Every dim in every precision, {ARROWS[found['direction']]}, {counts}.{missing} "
        "In a larger gallery all recalls are lower, those of short codes most, and two-stage search needs more "
        "candidates: measure on a gallery of the size you will search.</p>"
        f"{_bytes_against_recall(set_name, metric, analysis)}"
        f'<details class="other-direction"><summary>Other direction, {reverse}</summary>'
        f"{_bytes_against_recall(set_name, metric, analysis['other_direction'])}</details>"
    )


def _bytes_against_recall(set_name: str, metric: str, of_direction: Mapping[str, Any]) -> str:
    """The plot, both fronts and all options of one direction."""
    found, advice = of_direction["compression"], of_direction["advice"]
    budget, full = budget_of(advice), advice["full"]["recall"]["value"]
    limit = full * (1 - budget.drop) if budget.relative else full - budget.drop
    svg = bytes_against_recall(found, limit, name=f"{anchor(set_name)}-{found['direction']}-bytes")
    front = sorted((o for o in found["options"] if o["front"]), key=lambda o: (bool(o["candidates"]), o["bytes"]))
    alt = f"{metric} against bytes: " + "; ".join(
        f"{_option_name(o)} {o['bytes']} bytes {100 * o['recall']['value']:.0f} %" for o in front
    )
    good = [o for o in front if o["lost"]["value"] <= max(_MAX_LISTED_LOSS, budget.drop)]
    single, staged = ([o for o in good if bool(o["candidates"]) == wanted] for wanted in (False, True))
    everything = sorted(found["options"], key=lambda o: (-o["dim"], -o["bytes"], o["precision"], o["candidates"]))
    two_stages = (
        f"<h4>Pareto front, two stages</h4>{_options(staged, budget.unit)}<p class='note'>A search over short codes in "
        "memory selects candidates; full vectors in fp32, on disk, rerank them (bytes after the plus).</p>"
    )
    return (
        f'<div class="grid"><div class="card plot">{html_figure(svg, alt, "Labels are dims.")}</div>'
        f'<div class="card"><h4>Pareto front, one stage</h4>{_options(single, budget.unit)}'
        f"{two_stages if staged else ''}</div></div>"
        f'<details class="card"><summary>All {len(everything)} options</summary>'
        f"{_options(everything, budget.unit)}</details>"
    )


def _option_name(option: Mapping[str, Any]) -> str:
    """64-d int8, or 64-d binary + 50 reranked."""
    staged = f" + {option['candidates']} reranked" if option["candidates"] else ""
    return f"{option['dim']}-d {option['precision']}{staged}"


def _options(options: Sequence[Mapping[str, Any]], unit: str) -> str:
    rows = []
    for option in options:
        extra = f" + {option['rerank_bytes']:,}" if option["candidates"] else ""
        rows.append(
            [
                _option_name(option),
                f"{option['bytes']:,}{extra}",
                f"{100 * option['recall']['value']:.1f}",
                points_with_interval(option["lost"]),
            ]
        )
    return html_table(["code", "bytes per vector", "recall, %", f"lost, {unit}"], rows)
