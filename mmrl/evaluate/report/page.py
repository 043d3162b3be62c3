"""The HTML pages of `mmrl eval` and `mmrl compare`: self-contained, without scripts, in a light and a dark theme.

The templates are frame.html (both pages), page.html (one section per set) and compare.html. Jinja escapes every value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmrl.evaluate.analysis.advice import budget_of, format_bytes, format_count, summarise, summarise_other_direction
from mmrl.evaluate.analysis.baselines import NAMES, label
from mmrl.evaluate.analysis.bootstrap import RESAMPLES
from mmrl.evaluate.directions import ARROWS, CROSS_MODAL
from mmrl.evaluate.ranking.ranks import is_better_lower
from mmrl.evaluate.report import plots
from mmrl.evaluate.report.examples import Example
from mmrl.evaluate.report.plots import Curve
from mmrl.evaluate.report.tables import accuracy_rows, degraded_rows

# Options on the front that lose more than this are only in the plot and in the list of all options.
_MAX_LISTED_LOSS = 0.25


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


def render(template: str, title: str, **values: Any) -> str:
    """A whole page, by a template of this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "anchor": _anchor,
        "bytes": format_bytes,
        "commas": lambda number: f"{number:,}",
        "count": format_count,
        "percent": lambda share: f"{100 * share:.1f}",
        "points": format_points,
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
    }
    shared = {"arrows": ARROWS, "colours": plots.COLOURS, "resamples": RESAMPLES, "score": format_score}
    return environment.get_template(template).render(title=title, tone_of=tone_of, **shared, **values)


def render_page(
    title: str, reports: Sequence[SetReport], labelled: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]
) -> str:
    """The page of `mmrl eval`.

    Args:
        labelled: {set: entry in retrieval.json} of the zero-shot classification sets.
        about: {label: value} of the model and the software.
    """
    return render(
        "page.html",
        title,
        reports=reports,
        labelled=labelled,
        about=about,
        names=[*(report.name for report in reports), *labelled],
        cross_modal=CROSS_MODAL,
        budget_of=budget_of,
        label=label,
        summarise=summarise,
        summarise_other_direction=summarise_other_direction,
        curves_of=curves_of,
        recall_plot=_recall_plot,
        bytes_plot=_bytes_plot,
        shown_options=_shown_options,
        option_name=_option_name,
        found_dims=lambda found: sorted((dim for dim in found if dim.isdigit()), key=int),
        accuracy_rows=accuracy_rows,
        degraded_rows=degraded_rows,
    )


def curves_of(analysis: Mapping[str, Any], direction: str, metric: str) -> list[Curve]:
    """The curve of the evaluated model's prefixes, then those of the baselines."""

    def of_metric(by_dim: Mapping[str, Any]) -> dict[str, Any]:
        return {dim: values[metric] for dim, values in by_dim.items()}

    curves = [Curve("this model, prefix", "model", of_metric(analysis["intervals"][direction]))]
    for name, by_dim in analysis["baselines"][direction].items():
        colour = name if name in NAMES else "other_pca" if name.endswith(", PCA") else "other"
        curves.append(Curve(label(name), colour, of_metric(by_dim), dashed=True))
    return curves


def _recall_plot(report: SetReport, direction: str, metric: str) -> Markup:
    curves = curves_of(report.analysis, direction, metric)
    chance = report.result["chance"][direction].get(metric)
    svg = plots.recall_by_dim(curves, chance, metric, name=f"{_anchor(report.name)}-{direction}-{metric}")
    values = [
        f"{curve.name} " + ", ".join(f"{100 * one['value']:.0f} % at {dim}" for dim, one in curve.scores.items())
        for curve in curves
    ]
    return labelled_svg(svg, f"{ARROWS[direction]}, {metric}, by dim: {'; '.join(values)}")


def _bytes_plot(set_name: str, of_direction: Mapping[str, Any]) -> Markup:
    found, advice = of_direction["compression"], of_direction["advice"]
    budget, full = budget_of(advice), advice["full"]["recall"]["value"]
    limit = full * (1 - budget.drop) if budget.relative else full - budget.drop
    svg = plots.bytes_against_recall(found, limit, name=f"{_anchor(set_name)}-{found['direction']}-bytes")
    values = (
        f"{_option_name(o)} {o['bytes']} bytes {100 * o['recall']['value']:.0f} %" for o in _front(found["options"])
    )
    return labelled_svg(svg, f"{found['metric']} against bytes: {'; '.join(values)}")


def _shown_options(of_direction: Mapping[str, Any]) -> tuple[str, list[Any], list[Any], list[Any]]:
    """The unit of the loss; the Pareto fronts of one stage and of two, without large losses; all options."""
    options, budget = of_direction["compression"]["options"], budget_of(of_direction["advice"])
    good = [o for o in _front(options) if o["lost"]["value"] <= max(_MAX_LISTED_LOSS, budget.drop)]
    single, staged = ([o for o in good if bool(o["candidates"]) == wanted] for wanted in (False, True))
    everything = sorted(options, key=lambda o: (-o["dim"], -o["bytes"], o["precision"], o["candidates"]))
    return budget.unit, single, staged, everything


def _front(options: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted((o for o in options if o["front"]), key=lambda o: (bool(o["candidates"]), o["bytes"]))


def _option_name(option: Mapping[str, Any]) -> str:
    """64-d int8, or 64-d binary + 50 reranked."""
    staged = f" + {option['candidates']} reranked" if option["candidates"] else ""
    return f"{option['dim']}-d {option['precision']}{staged}"


def labelled_svg(svg: str, text: str) -> Markup:
    """An SVG with a description for screen readers."""
    return Markup(svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(text), 1))  # noqa: S704 (ours)


def format_score(value: float, metric: str) -> str:
    """Ranks as numbers, all other metrics in %."""
    return f"{value:,.1f}".removesuffix(".0") if is_better_lower(metric) else f"{100 * value:.1f}"


def format_points(share: float) -> str:
    """A difference of shares in percentage points, with a typographic minus."""
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "−")


def tone_of(paired: Mapping[str, Any]) -> str:
    """The CSS class of a paired difference: "better" or "worse" if p < 0.05. Empty without a difference."""
    return "" if paired.get("p", 1) >= 0.05 else "better" if paired["lead"]["value"] > 0 else "worse"


def _anchor(name: str) -> str:
    """The HTML id of a set's section."""
    return "set-" + "".join(letter if letter.isalnum() else "-" for letter in name)
