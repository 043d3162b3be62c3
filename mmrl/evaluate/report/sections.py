"""The sections of a set on the report's page, in their order; each takes the set and gives HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mmrl.evaluate.analysis.advice import budget_of, other_words, short_count, size_words, words
from mmrl.evaluate.analysis.baselines import NAMES, label
from mmrl.evaluate.analysis.task import DIRECTIONS
from mmrl.evaluate.report import plots
from mmrl.evaluate.report.examples import Example
from mmrl.evaluate.report.html import anchor, figure, points, score, table, with_range
from mmrl.evaluate.report.plots import Curve
from mmrl.evaluate.report.tables import ARROWS

# Codes of the front that lose more than this are in the picture and in the list of all.
_LISTED_UP_TO = 0.25


@dataclass(frozen=True)
class SetPart:
    """What the page shows of one set."""

    name: str
    result: Mapping[str, Any]
    """Its part of retrieval.json, with "analysis"."""
    examples: Sequence[Example] = ()
    thumbnails: Mapping[int, str] = field(default_factory=dict)

    @property
    def analysis(self) -> Mapping[str, Any]:
        """What was drawn from the scores."""
        return self.result["analysis"]

    @property
    def metric(self) -> str:
        """The recall that the budget is of."""
        return self.analysis["advice"]["budget"]["metric"]


def of_set(part: SetPart) -> str:
    """All of them."""
    counts = f"{part.result['num_images']:,} images, {part.result['num_texts']:,} texts"
    if "folds" in part.result:
        counts += f"; all scores are the mean of {part.result['folds']} folds, the analysis is of the whole"
    if part.result.get("num_bad"):
        counts += f", {part.result['num_bad']:,} bad samples left out"
    shown = [
        f'<section class="set" id="{anchor(part.name)}"><h2>{escape(part.name)}</h2><p class="faint">{counts}</p>',
        headline(part),
        recall_by_dim(part),
        compression(part),
        blocks(part),
        found_from(part),
        examples(part),
        scores(part),
        degraded(part),
        "</section>",
    ]
    return "\n".join(section for section in shown if section)


def headline(part: SetPart) -> str:
    """The advice."""
    advice = part.analysis["advice"]
    said, chosen, full = words(advice), advice["smallest"], advice["full"]
    was = f"{100 * full['recall']['value']:.1f} %"
    tiles = [
        (f"{chosen['bytes']:,} bytes", f"a vector, instead of {full['bytes']:,}"),
        (
            size_words(chosen["memory"]),
            f"for {short_count(advice['vectors'])} vectors, instead of {size_words(full['memory'])}",
        ),
        (f"{100 * chosen['recall']['value']:.1f} %", f"{part.metric}, instead of {was}"),
        (f"{chosen['times_smaller']:.3g}×", "smaller than the full vector in fp32"),
    ]
    shown = "".join(f'<div class="tile"><b>{big}</b><span>{small}</span></div>' for big, small in tiles)
    others = "".join(f"<li>{_sentences(line)}</li>" for line in said.others)
    return (
        f'<div class="card headline"><p class="eyebrow">Within a budget of {budget_of(advice).words}</p>'
        f'<p class="big">{escape(said.headline)}</p><div class="tiles">{shown}</div>'
        f"<p>{_sentences(said.evidence, said.certainty)}</p><ul>{others}</ul>"
        f'<p class="faint">{_sentences(other_words(part.analysis))}</p></div>'
    )


def _sentences(*sentences: str) -> str:
    """As HTML; a number and its % stay in one line."""
    return escape(" ".join(sentences)).replace(" %", "\u00a0%")


def curves_of(analysis: Mapping[str, Any], direction: str, metric: str) -> list[Curve]:
    """The model's own prefixes first, then every baseline."""

    def of_metric(by_dim: Mapping[str, Any]) -> dict[str, Any]:
        return {dim: values[metric] for dim, values in by_dim.items()}

    curves = [Curve("this model, first dims", "model", of_metric(analysis["intervals"][direction]))]
    for name, by_dim in analysis["baselines"][direction].items():
        colour = name if name in NAMES else "other_pca" if name.endswith(", PCA") else "other"
        curves.append(Curve(label(name), colour, of_metric(by_dim), dashed=True))
    return curves


def recall_by_dim(part: SetPart) -> str:
    """Curves of both directions beside the baselines, and by how much each is ahead."""
    analysis = part.analysis
    metrics = ["R@1", part.metric if part.metric != "R@1" else "R@10"]
    cards = []
    for direction, name in DIRECTIONS.items():
        for metric in metrics:
            curves = curves_of(analysis, direction, metric)
            chance = part.result["chance"][direction].get(metric)
            svg = plots.recall_by_dim(curves, chance, metric, name=f"{anchor(part.name)}-{direction}-{metric}")
            label = f"{metric}, {name}, by dim: " + "; ".join(_in_words(curve) for curve in curves)
            cards.append(f'<div class="card picture"><h4>{name}, {metric}</h4>{figure(svg, label)}</div>')
    curves = curves_of(analysis, "text_to_image", "R@1")
    drawn = ""
    if analysis["baseline_queries"] < max(part.result["num_texts"], part.result["num_images"]):
        drawn = f" Baselines are measured on up to {analysis['baseline_queries']:,} queries of each direction."
    return (
        "<h3>Recall by dim</h3><p>Nested prefixes beside other ways to as few numbers, on the same features. Bands are "
        f"95 % intervals. What a baseline is fitted on is never what it is scored on.{drawn}</p>"
        f'{_keys(curves)}<div class="grid">{"".join(cards)}</div>{_leads(part)}'
    )


def _keys(curves: Sequence[Curve]) -> str:
    items = [(curve.name, curve.colour, "dashed" if curve.dashed else "solid") for curve in curves]
    items.append(("chance", "faint", "dotted"))
    shown = "".join(
        f'<li><i class="{kind}" style="border-color: var(--{colour})"></i>{escape(name)}</li>'
        for name, colour, kind in items
    )
    return f'<ul class="keys">{shown}</ul>'


def _in_words(curve: Curve) -> str:
    values = ", ".join(f"{100 * one['value']:.0f} % at {dim}" for dim, one in curve.scores.items())
    return f"{curve.name} {values}"


def _leads(part: SetPart) -> str:
    """The paired differences, direction by direction."""
    shown = []
    for direction, name in DIRECTIONS.items():
        paired = part.analysis["paired"][direction]
        methods = ["full", *(method for method in paired if method != "full")]
        full = max(paired["full"], key=int)
        rows = []
        for dim in paired["full"]:
            cells = [_lead(paired[m][dim]) if dim in paired[m] and (m, dim) != ("full", full) else "" for m in methods]
            rows.append([dim, *cells])
        header = ["dim", *(f"than {escape(label(m))}" for m in methods)]
        shown.append(f"<h4>{name}</h4>{table(header, rows)}")
    return (
        f'<details class="card"><summary>How much better, in points of {part.metric}, over the same queries</summary>'
        '<p class="note">The prefix less the other at the same dim, with the 95 % interval of the pairs. Coloured '
        "where a paired sign-flip test gives p &lt; 0.05, not corrected for the number of comparisons.</p>"
        f"{''.join(shown)}</details>"
    )


def _lead(entry: Mapping[str, Any]) -> str:
    value = entry["lead"]["value"]
    tone = "" if entry["p"] >= 0.05 else "better" if value > 0 else "worse"
    return with_range(points(value), points(entry["lead"]["low"]), points(entry["lead"]["high"]), tone)


def compression(part: SetPart) -> str:
    """Bytes against recall in the budget's direction, and folded in, in the other."""
    found, other = part.analysis["compression"], part.analysis["other_direction"]["compression"]
    asked = f"{found['queries']:,} queries among {found['gallery']:,}"
    if found["queries"] < found["all_queries"]:
        asked += f" (drawn from {found['all_queries']:,} queries)"
    missing = found["product_quantisation"]
    missing = "" if missing == "measured" else f" Product quantisation {missing}."
    turned = f"{DIRECTIONS[other['direction']]}: {other['queries']:,} queries among {other['gallery']:,}"
    return (
        "<h3>Bytes against recall</h3>"
        f"<p>Every dim in every precision, {DIRECTIONS[found['direction']]}, {asked}.{missing} "
        "Among more vectors all recalls fall, those of short codes faster, and a list has to be longer: measure on a "
        f"gallery like your own.</p>{_bytes_against_recall(part, part.analysis)}"
        f'<details class="turned"><summary>The other way round, {turned}</summary>'
        f"{_bytes_against_recall(part, part.analysis['other_direction'])}</details>"
    )


def _bytes_against_recall(part: SetPart, of_direction: Mapping[str, Any]) -> str:
    """The picture, both fronts, and all that was measured, of one direction."""
    found, advice = of_direction["compression"], of_direction["advice"]
    budget, full = budget_of(advice), advice["full"]["recall"]["value"]
    limit = full * (1 - budget.drop) if budget.relative else full - budget.drop
    svg = plots.bytes_against_recall(found, limit, name=f"{anchor(part.name)}-{found['direction']}-bytes")
    front = sorted((o for o in found["options"] if o["front"]), key=lambda o: (bool(o["candidates"]), o["bytes"]))
    label = f"{part.metric} against bytes: " + "; ".join(
        f"{option_name(o)} {o['bytes']} bytes {100 * o['recall']['value']:.0f} %" for o in front
    )
    good = [o for o in front if o["lost"]["value"] <= max(_LISTED_UP_TO, budget.drop)]
    single, staged = ([o for o in good if bool(o["candidates"]) == wanted] for wanted in (False, True))
    everything = sorted(found["options"], key=lambda o: (-o["dim"], -o["bytes"], o["precision"], o["candidates"]))
    two_stages = (
        f"<h4>On the front, two stages</h4>{_options(staged, budget.unit)}<p class='note'>The short code gives a list; "
        "full vectors in fp16, in memory or on disk (the bytes after the plus), put it in order.</p>"
    )
    return (
        f'<div class="grid"><div class="card picture">{figure(svg, label, "Numbers beside the marks are dims.")}</div>'
        f'<div class="card"><h4>On the front, one stage</h4>{_options(single, budget.unit)}'
        f"{two_stages if staged else ''}</div></div>"
        f'<details class="card"><summary>All {len(everything)} that were measured</summary>'
        f"{_options(everything, budget.unit)}</details>"
    )


def option_name(option: Mapping[str, Any]) -> str:
    """64-d int8, or 64-d binary + 50 reranked."""
    staged = f" + {option['candidates']} reranked" if option["candidates"] else ""
    return f"{option['dim']}-d {option['precision']}{staged}"


def _options(options: Sequence[Mapping[str, Any]], unit: str) -> str:
    rows = []
    for option in options:
        lost = option["lost"]
        extra = f" + {option['rerank_bytes']:,}" if option["candidates"] else ""
        rows.append(
            [
                option_name(option),
                f"{option['bytes']:,}{extra}",
                f"{100 * option['recall']['value']:.1f}",
                with_range(points(lost["value"]), points(lost["low"]), points(lost["high"])),
            ]
        )
    return table(["code", "bytes", "recall, %", f"lost, {unit}"], rows)


def blocks(part: SetPart) -> str:
    """What each block of dims adds, and which single numbers could go."""
    found, dropping = part.analysis["blocks"], part.analysis["dropping"]
    most = max(block["energy_gallery"] for block in found)
    rows = []
    for block in found:
        adds, lost = (
            with_range(*(points(block[key][end]) for end in ("value", "low", "high")))
            for key in ("adds", "lost_without")
        )
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
    header = ["dims", f"adds to {part.metric}", "alone, %", "lost without it", "energy", "effective rank"]
    full = dropping["curve"][-1]["kept"]
    dead = f" {len(dropping['dead'])} numbers carry next to nothing." if dropping["dead"] else ""
    return (
        f'<h3>What each block of dims adds</h3><div class="card">{table(header, rows)}<p class="note">In points, with '
        "95 % intervals. Energy: the block's share of the squared length; effective rank: how many of its directions "
        f"are really used.</p><p>Of the {full} single numbers, {dropping['droppable']} can be dropped, those that tell "
        f"right from wrong answers least, before {part.metric} has lost {100 * dropping['within']:g} % of itself."
        f"{dead} That needs a list of the numbers kept; a prefix needs none.</p></div>"
    )


def found_from(part: SetPart) -> str:
    """The dim from which on each item is retrievable, counted."""
    found, budget = part.analysis["found_from"], budget_of(part.analysis["advice"])
    dims = sorted(int(dim) for dim in found if dim.isdigit())
    so_far, rows, stack = 0, [], []
    for place, dim in enumerate(dims):
        count = found[str(dim)]
        so_far += count
        rows.append([f"from {dim}-d", f"{count:,}", _share(count, found["items"]), _share(so_far, found["items"])])
        shade = 1 - 0.75 * place / max(1, len(dims) - 1)
        stack.append(f'<div style="flex: {count} 0 0; opacity: {shade:.2f}"></div>' if count else "")
    never = found["never"]
    rows.append(["never", f"{never:,}", _share(never, found["items"]), ""])
    stack.append(f'<div class="never" style="flex: {never} 0 0"></div>' if never else "")
    return (
        f'<h3>From which dim on is an item found?</h3><div class="card"><p>An item is found where at least half of its '
        f"queries have it within the first {budget.k}, {DIRECTIONS[budget.direction]}, at that dim and at every wider "
        f'one.</p><div class="stack" aria-hidden="true">{"".join(stack)}</div>'
        f"{table(['', 'items', 'share', 'so far'], rows)}"
        f'<p class="note">{escape(part.name)}.items.jsonl, beside this page, tells it for every query.</p></div>'
    )


def _share(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %"


def examples(part: SetPart) -> str:
    """Queries with their first five pictures, by the full vector and by a short one."""
    if not part.examples:
        return ""
    shown = "".join(_example(example, part) for example in part.examples)
    return (
        "<h3>Queries to look at</h3><p>The first five pictures by the full vector and by a short one; right answers "
        f'are framed. Drawn at random of each kind, so their numbers say nothing.</p><div class="card">{shown}</div>'
    )


def _example(example: Example, part: SetPart) -> str:
    sides = []
    for answer in example.answers:
        where = "first" if answer.rank == 1 else f"at place {answer.rank:,}"
        strip = []
        for found in answer.found:
            kind, address = "right" if found.is_right else "wrong", part.thumbnails.get(found.row)
            inner = f'<img src="{address}" alt="{kind} answer">' if address else ""
            strip.append(f'<li class="{kind}">{inner}</li>')
        sides.append(f'<div><p>{answer.dim}-d: right answer {where}</p><ol class="strip">{"".join(strip)}</ol></div>')
    return (
        f'<div class="example"><h4>“{escape(example.query)}”<span class="kind">{example.kind}</span></h4>'
        f'<div class="sides">{"".join(sides)}</div></div>'
    )


def scores(part: SetPart) -> str:
    """Every direction that was measured; with intervals where there are some."""
    by_dim = part.result["dims"]
    # Means over folds are of smaller galleries than the analysis.
    intervals = {} if "folds" in part.result else part.analysis["intervals"]
    present = next(iter(by_dim.values()))
    chosen = str(part.analysis["advice"]["smallest"]["dim"])
    shown = []
    for direction, name in ARROWS.items():
        if direction not in present:
            continue
        metrics = list(present[direction])
        rows = []
        for dim, directions in by_dim.items():
            known = intervals.get(direction, {}).get(dim, {})
            rows.append(
                [dim, *(_score(directions[direction][metric], metric, known.get(metric)) for metric in metrics)]
            )
        by_chance = part.result["chance"].get(direction, {})
        rows.append(["chance", *(score(by_chance[m], m) if m in by_chance else "" for m in metrics)])
        header = ["dim", *(metric.replace("_", " ") for metric in metrics)]
        shown.append(f"<h4>{name}</h4>{table(header, rows, chosen)}")
    return (
        '<h3>All scores</h3><div class="card"><p class="note">In %, ranks from 1; ± is half the 95 % interval.</p>'
        f"{''.join(shown)}</div>"
    )


def _score(value: float, metric: str, interval: Mapping[str, float] | None) -> str:
    half = f"<small>±{50 * (interval['high'] - interval['low']):.1f}</small>" if interval else ""
    return score(value, metric) + half


def degraded(part: SetPart) -> str:
    """Degraded pictures that look for their originals, where that was measured."""
    found = part.result.get("degraded")
    if not found:
        return ""
    kinds = {kind: one["severities"] for kind, one in found.items() if kind != "num_queries"}
    dims = list(next(iter(next(iter(kinds.values())).values())))
    rows = []
    for kind, severities in kinds.items():
        for amount, by_dim in severities.items():
            first = next(iter(by_dim[dims[0]]))
            rows.append([f"{escape(kind)} {escape(amount)}", *(f"{100 * by_dim[dim][first]:.1f}" for dim in dims)])
    return (
        f'<h3>Degraded pictures</h3><div class="card"><p class="note">{found["num_queries"]:,} pictures of each damage '
        f"look for their originals; R@1 in %.</p>{table(['damage', *(f'{dim}-d' for dim in dims)], rows)}</div>"
    )


def of_labelled(name: str, result: Mapping[str, Any]) -> str:
    """A set of zero-shot classification: its accuracy at every dim."""
    chance = result["chance"]["classification"]
    rows = [
        [dim, *(f"{100 * by_way['classification'][one]:.1f}" for one in chance)]
        for dim, by_way in result["dims"].items()
    ]
    rows.append(["chance", *(f"{100 * value:.1f}" for value in chance.values())])
    return (
        f'<section class="set" id="{anchor(name)}"><h2>{escape(name)}</h2><p class="faint">{result["num_images"]:,} '
        f'images, {result["num_classes"]:,} classes</p><h3>Zero-shot classification</h3><div class="card">'
        f"{table(['dim', *(one.replace('_', ' ') for one in chance)], rows)}</div></section>"
    )
