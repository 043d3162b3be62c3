"""The sections of a set on the report page, in order; each function returns HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mmrl.evaluate.analysis.advice import budget_of, format_bytes, format_count, summarise, summarise_other_direction
from mmrl.evaluate.analysis.baselines import NAMES, label
from mmrl.evaluate.directions import ARROWS, CROSS_MODAL
from mmrl.evaluate.report import plots
from mmrl.evaluate.report.compression_section import compression_section
from mmrl.evaluate.report.examples import SHOWN, Example
from mmrl.evaluate.report.html import anchor, format_score, html_figure, html_table, points_with_interval, tone_of
from mmrl.evaluate.report.plots import Curve
from mmrl.evaluate.report.tables import accuracy_rows, degraded_rows


@dataclass(frozen=True)
class SetReport:
    """What the page shows of one set."""

    name: str
    result: Mapping[str, Any]
    """Its entry in retrieval.json, with "analysis"."""
    examples: Sequence[Example] = ()
    thumbnails: Mapping[int, str] = field(default_factory=dict)

    @property
    def analysis(self) -> Mapping[str, Any]:
        """The entry "analysis"."""
        return self.result["analysis"]

    @property
    def metric(self) -> str:
        """The metric of the budget."""
        return self.analysis["advice"]["budget"]["metric"]


def retrieval_section(report: SetReport) -> str:
    """All sections of a retrieval set."""
    counts = f"{report.result['num_images']:,} images, {report.result['num_texts']:,} texts"
    if "folds" in report.result:
        counts += f"; scores are the mean of {report.result['folds']} folds, the analysis is of the whole set"
    if report.result.get("num_bad"):
        counts += f", {report.result['num_bad']:,} bad samples left out"
    name = escape(report.name)
    shown = [
        f'<section class="set" id="{anchor(report.name)}"><h2>{name}</h2><p class="faint">{counts}</p>',
        headline(report),
        recall_by_dim(report),
        compression_section(report.name, report.metric, report.analysis),
        blocks(report),
        found_from(report),
        examples(report),
        scores(report),
        degraded(report),
        "</section>",
    ]
    return "\n".join(section for section in shown if section)


def headline(report: SetReport) -> str:
    """The advice."""
    advice = report.analysis["advice"]
    summary, chosen, full = summarise(advice), advice["smallest"], advice["full"]
    full_recall = f"{100 * full['recall']['value']:.1f} %"
    tiles = [
        (f"{chosen['bytes']:,} bytes", f"per vector, instead of {full['bytes']:,}"),
        (
            format_bytes(chosen["memory"]),
            f"for {format_count(advice['vectors'])} vectors, instead of {format_bytes(full['memory'])}",
        ),
        (f"{100 * chosen['recall']['value']:.1f} %", f"{report.metric}, instead of {full_recall}"),
        (f"{chosen['times_smaller']:.3g}×", "smaller than the full vector in fp32"),
    ]
    shown = "".join(f'<div class="tile"><b>{big}</b><span>{small}</span></div>' for big, small in tiles)
    others = "".join(f"<li>{_sentences(line)}</li>" for line in summary.others)
    return (
        f'<div class="card headline"><p class="eyebrow">Budget: lose at most {budget_of(advice).label}</p>'
        f'<p class="big">{escape(summary.headline)}</p><div class="tiles">{shown}</div>'
        f"<p>{_sentences(summary.evidence, summary.certainty)}</p><ul>{others}</ul>"
        f'<p class="faint">{_sentences(summarise_other_direction(report.analysis))}</p></div>'
    )


def _sentences(*sentences: str) -> str:
    """Escaped text; no line break between a number and its %."""
    return escape(" ".join(sentences)).replace(" %", "\u00a0%")


def curves_of(analysis: Mapping[str, Any], direction: str, metric: str) -> list[Curve]:
    """The curve of the evaluated model's prefixes, then those of the baselines."""

    def of_metric(by_dim: Mapping[str, Any]) -> dict[str, Any]:
        return {dim: values[metric] for dim, values in by_dim.items()}

    curves = [Curve("this model, prefix", "model", of_metric(analysis["intervals"][direction]))]
    for name, by_dim in analysis["baselines"][direction].items():
        colour = name if name in NAMES else "other_pca" if name.endswith(", PCA") else "other"
        curves.append(Curve(label(name), colour, of_metric(by_dim), dashed=True))
    return curves


def recall_by_dim(report: SetReport) -> str:
    """Recall by dim compared with the baselines, both directions, and the paired differences."""
    analysis = report.analysis
    metrics = ["R@1", report.metric if report.metric != "R@1" else "R@10"]
    cards = []
    for direction in CROSS_MODAL:
        for metric in metrics:
            curves = curves_of(analysis, direction, metric)
            chance = report.result["chance"][direction].get(metric)
            svg = plots.recall_by_dim(curves, chance, metric, name=f"{anchor(report.name)}-{direction}-{metric}")
            heading = f"{ARROWS[direction]}, {metric}"
            alt = f"{heading}, by dim: " + "; ".join(_alt_text(curve) for curve in curves)
            cards.append(f'<div class="card plot"><h4>{heading}</h4>{html_figure(svg, alt)}</div>')
    curves = curves_of(analysis, "text_to_image", "R@1")
    sampled = ""
    if analysis["baseline_queries"] < max(report.result["num_texts"], report.result["num_images"]):
        sampled = f" Baselines are measured on up to {analysis['baseline_queries']:,} queries per direction."
    return (
        "<h3>Recall by dim</h3><p>Prefixes of this model compared with other embeddings of the same number of dims. "
        f"Bands are 95 % intervals. No baseline is fitted on the items it is scored on.{sampled}</p>"
        f'{_legend(curves)}<div class="grid">{"".join(cards)}</div>{_paired_differences(report)}'
    )


def _legend(curves: Sequence[Curve]) -> str:
    items = [(curve.name, curve.colour, "dashed" if curve.dashed else "solid") for curve in curves]
    items.append(("chance", "faint", "dotted"))
    shown = "".join(
        f'<li><i class="{style}" style="border-color: var(--{colour})"></i>{escape(name)}</li>'
        for name, colour, style in items
    )
    return f'<ul class="keys">{shown}</ul>'


def _alt_text(curve: Curve) -> str:
    values = ", ".join(f"{100 * one['value']:.0f} % at {dim}" for dim, one in curve.scores.items())
    return f"{curve.name} {values}"


def _paired_differences(report: SetReport) -> str:
    shown = []
    for direction in CROSS_MODAL:
        paired = report.analysis["paired"][direction]
        methods = ["full", *(method for method in paired if method != "full")]
        full = max(paired["full"], key=int)
        rows = []
        for dim in paired["full"]:
            cells = [
                _difference(paired[m][dim]) if dim in paired[m] and (m, dim) != ("full", full) else "" for m in methods
            ]
            rows.append([dim, *cells])
        header = ["dim", *(f"vs {escape(label(m))}" for m in methods)]
        shown.append(f"<h4>{ARROWS[direction]}</h4>{html_table(header, rows)}")
    return (
        f'<details class="card"><summary>Difference to each baseline in points of {report.metric}, paired by query'
        '</summary><p class="note">Prefix of this model minus the baseline at the same dim, with the 95 % interval of '
        "the paired difference. Coloured where a paired sign-flip test gives p &lt; 0.05, not corrected for the number "
        f"of comparisons.</p>{''.join(shown)}</details>"
    )


def _difference(entry: Mapping[str, Any]) -> str:
    return points_with_interval(entry["lead"], tone_of(entry))


def blocks(report: SetReport) -> str:
    """What each block of dims adds, and which single dims can be dropped."""
    found, dropping = report.analysis["blocks"], report.analysis["dropping"]
    most = max(block["energy_gallery"] for block in found)
    rows = []
    for block in found:
        adds, lost = points_with_interval(block["adds"]), points_with_interval(block["lost_without"])
        bar = f'<span class="bar" style="width: {50 * block["energy_gallery"] / most:.0f}px"></span>'
        rows.append(
            [
                f"{block['from'] + 1}–{block['to']}",
                adds,
                f"{100 * block['alone']:.1f}",
                lost,
                f"{bar}{100 * block['energy_gallery']:.0f} %",
                f"{block['effective_rank_gallery']:.0f} of {block['to'] - block['from']}",
            ]
        )
    header = [
        "dims",
        f"adds to {report.metric}",
        "alone, %",
        "lost without it",
        "energy",
        "effective rank (covariance)",
    ]
    full, count = dropping["curve"][-1]["kept"], len(dropping["dead"])
    dead = f" {count} {'dim has' if count == 1 else 'dims have'} almost no energy." if count else ""
    return (
        f'<h3>What each block of dims adds</h3><div class="card">{html_table(header, rows)}<p class="note">In points, '
        "with 95 % intervals. Energy: the block's share of the squared length of the gallery's vectors. Effective "
        "rank: of the block's covariance over the gallery, i.e. how many directions of the block are used.</p>"
        f"<p>{dropping['droppable']} of the {full} dims can be dropped one by one, least informative first, before "
        f"{report.metric} falls by more than {100 * dropping['within']:g} % of its value.{dead} Unlike a prefix, this "
        "needs a stored list of the dims kept.</p></div>"
    )


def found_from(report: SetReport) -> str:
    """How many items are found from which dim on."""
    found, budget = report.analysis["found_from"], budget_of(report.analysis["advice"])
    dims = sorted(int(dim) for dim in found if dim.isdigit())
    total, rows, stack = 0, [], []
    for index, dim in enumerate(dims):
        count = found[str(dim)]
        total += count
        rows.append([f"from {dim}-d", f"{count:,}", _share(count, found["items"]), _share(total, found["items"])])
        opacity = 1 - 0.75 * index / max(1, len(dims) - 1)
        stack.append(f'<div style="flex: {count} 0 0; opacity: {opacity:.2f}"></div>' if count else "")
    never = found["never"]
    rows.append(["never", f"{never:,}", _share(never, found["items"]), ""])
    stack.append(f'<div class="never" style="flex: {never} 0 0"></div>' if never else "")
    return (
        f'<h3>From which dim on is an item found?</h3><div class="card"><p>An item counts as found if at least half '
        f"of its queries have it in the top {budget.k} ({ARROWS[budget.direction]}) at this dim and at all larger "
        "dims.</p>"
        f'<div class="stack" aria-hidden="true">{"".join(stack)}</div>'
        f"{html_table(['', 'items', 'share', 'cumulative'], rows)}"
        f'<p class="note">{escape(report.name)}.items.jsonl, in the folder of this page, lists every query.</p></div>'
    )


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def examples(report: SetReport) -> str:
    """Example queries with the first images at the full dim and at a short dim."""
    if not report.examples:
        return ""
    shown = "".join(_example(example, report) for example in report.examples)
    return (
        f"<h3>Example queries</h3><p>The top {SHOWN} images at the full dim and at a short dim; positives are framed. "
        "Queries are random within each kind; the number of examples per kind is fixed and does not reflect how often "
        f'it occurs.</p><div class="card">{shown}</div>'
    )


def _example(example: Example, report: SetReport) -> str:
    columns = []
    for results in example.results:
        strip = []
        for image in results.images:
            kind, url = "right" if image.is_positive else "wrong", report.thumbnails.get(image.row)
            inner = f'<img src="{url}" alt="{"positive" if image.is_positive else "negative"}">' if url else ""
            strip.append(f'<li class="{kind}">{inner}</li>')
        columns.append(
            f"<div><p>{results.dim}-d: best positive at rank {results.rank:,}</p>"
            f'<ol class="strip">{"".join(strip)}</ol></div>'
        )
    return (
        f'<div class="example"><h4>“{escape(example.query)}”<span class="kind">{example.kind}</span></h4>'
        f'<div class="sides">{"".join(columns)}</div></div>'
    )


def scores(report: SetReport) -> str:
    """All metrics in every measured direction, with intervals where available."""
    by_dim = report.result["dims"]
    # With folds, the scores are of smaller galleries than the analysis.
    intervals = {} if "folds" in report.result else report.analysis["intervals"]
    measured = next(iter(by_dim.values()))
    chosen = str(report.analysis["advice"]["smallest"]["dim"])
    shown = []
    for direction, name in ARROWS.items():
        if direction not in measured:
            continue
        metrics = list(measured[direction])
        rows = []
        for dim, directions in by_dim.items():
            known = intervals.get(direction, {}).get(dim, {})
            rows.append(
                [dim, *(_score(directions[direction][metric], metric, known.get(metric)) for metric in metrics)]
            )
        by_chance = report.result["chance"].get(direction, {})
        rows.append(["chance", *(format_score(by_chance[m], m) if m in by_chance else "" for m in metrics)])
        header = ["dim", *(metric.replace("_", " ") for metric in metrics)]
        shown.append(f"<h4>{name}</h4>{html_table(header, rows, chosen)}")
    return (
        '<h3>All scores</h3><div class="card"><p class="note">In %; median and mean rank count from 1. ± is half of '
        f"the 95 % interval. The row of the advised dim is highlighted.</p>{''.join(shown)}</div>"
    )


def _score(value: float, metric: str, interval: Mapping[str, float] | None) -> str:
    half = f"<small>±{50 * (interval['high'] - interval['low']):.1f}</small>" if interval else ""
    return format_score(value, metric) + half


def degraded(report: SetReport) -> str:
    """Recall of degraded images as queries for their originals, if measured."""
    found = report.result.get("degraded")
    if not found:
        return ""
    header, *rows = degraded_rows(found)
    return (
        f'<h3>Degraded images</h3><div class="card"><p class="note">{found["num_queries"]:,} images per degradation '
        f"as queries for their originals; R@1 in %.</p>{html_table(header, rows)}</div>"
    )


def classification_section(name: str, result: Mapping[str, Any]) -> str:
    """The section of a zero-shot classification set: its accuracy at every dim."""
    header, *rows = accuracy_rows(result)
    return (
        f'<section class="set" id="{anchor(name)}"><h2>{escape(name)}</h2><p class="faint">{result["num_images"]:,} '
        f'images, {result["num_classes"]:,} classes</p><h3>Zero-shot classification</h3><div class="card">'
        f'<p class="note">Accuracy in %.</p>{html_table(header, rows)}</div></section>'
    )
