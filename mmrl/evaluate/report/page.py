"""The HTML pages of `mmrl eval` and `mmrl compare`: self-contained, without scripts, in a light and a dark theme.

The templates are frame.html (both pages), page.html (one section per set) and compare.html. Jinja escapes every value.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmrl.evaluate.analysis import advice, baselines
from mmrl.evaluate.analysis.bootstrap import RESAMPLES
from mmrl.evaluate.directions import ARROWS
from mmrl.evaluate.ranking.ranks import is_better_lower
from mmrl.evaluate.report import plots, tables
from mmrl.evaluate.report.examples import Example
from mmrl.evaluate.report.plots import Curve
from mmrl.output.console import visible


@dataclass(frozen=True)
class SetReport:
    """What the page shows of one set."""

    name: str
    result: Mapping[str, Any]
    """Its entry in retrieval.json, with "analysis"."""
    examples: Sequence[Example] = ()
    thumbnails: Mapping[int, str] = field(default_factory=dict)
    shards: str = "SHARDS"

    @property
    def analysis(self) -> Mapping[str, Any]:
        return self.result["analysis"]

    @property
    def metric(self) -> str:
        return self.analysis["advice"]["budget"]["metric"]

    def build(self, answer: Mapping[str, Any], model: str) -> str:
        """The commands that build an answer of the advice from this set."""
        paths = {"MODEL": shlex.quote(model), "SHARDS": shlex.quote(self.shards)}
        words = (paths.get(word, word) for word in " && ".join(answer["commands"]).split(" "))
        return " ".join(words)


def render(template: str, title: str, **values: Any) -> str:
    """A whole page, by a template of this folder."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # captions and keys are data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "anchor": _anchor,
        "bytes": advice.format_bytes,
        "commas": lambda number: f"{number:,}",
        "count": advice.format_count,
        "percent": lambda share: f"{100 * share:.1f}",
        "points": advice.format_points,
        "unbroken": lambda text: text.replace(" %", "\u00a0%"),
    }
    environment.globals |= {"advising": advice, "baselines": baselines, "tables": tables}
    shared = {"arrows": ARROWS, "colours": plots.COLOURS, "resamples": RESAMPLES, "score": format_score}
    return environment.get_template(template).render(title=title, tone_of=tone_of, **shared, **values)


def render_page(
    model: str, reports: Sequence[SetReport], labelled: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]
) -> str:
    """The page of `mmrl eval`.

    Args:
        labelled: {set: entry in retrieval.json} of the zero-shot classification sets.
        about: {label: value} of the model and the software.
    """
    return render(
        "page.html",
        f"{model} at every dim",
        model=model,
        reports=reports,
        labelled=labelled,
        about=about,
        curves_of=curves_of,
        recall_plot=_recall_plot,
        bytes_plot=_bytes_plot,
    )


def curves_of(analysis: Mapping[str, Any], direction: str, metric: str) -> list[Curve]:
    """The curve of the evaluated model's prefixes, then those of the baselines."""

    def of_metric(by_dim: Mapping[str, Any]) -> dict[str, Any]:
        return {dim: values[metric] for dim, values in by_dim.items()}

    curves = [Curve("this model, prefix", "model", of_metric(analysis["intervals"][direction]))]
    for name, by_dim in analysis["baselines"][direction].items():
        colour = name if name in baselines.NAMES else "other_pca" if name.endswith(", PCA") else "other"
        curves.append(Curve(baselines.label(name), colour, of_metric(by_dim), dashed=True))
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
    found, given = of_direction["compression"], of_direction["advice"]
    budget, full = advice.budget_of(given), given["full"]["recall"]["value"]
    limit = full * (1 - budget.drop) if budget.relative else full - budget.drop
    svg = plots.bytes_against_recall(found, limit, name=f"{_anchor(set_name)}-{found['direction']}-bytes")
    front = sorted((o for o in found["options"] if o["front"]), key=lambda o: (bool(o["candidates"]), o["bytes"]))
    values = (f"{advice.option_name(o)} {o['bytes']} bytes {100 * o['recall']['value']:.0f} %" for o in front)
    return labelled_svg(svg, f"{found['metric']} against bytes: {'; '.join(values)}")


def labelled_svg(svg: str, text: str) -> Markup:
    """An SVG with a description for screen readers."""
    return Markup(svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(text), 1))  # noqa: S704 (ours)


def format_score(value: float, metric: str) -> str:
    """Ranks as numbers, all other metrics in %."""
    return f"{value:,.1f}".removesuffix(".0") if is_better_lower(metric) else f"{100 * value:.1f}"


def tone_of(paired: Mapping[str, Any]) -> str:
    """The CSS class of a paired difference: "better" or "worse" if p < 0.05. Empty without a difference."""
    return "" if paired.get("p", 1) >= 0.05 else "better" if paired["lead"]["value"] > 0 else "worse"


def _anchor(name: str) -> str:
    """The HTML id of a set's section."""
    return "set-" + "".join(letter if letter.isalnum() else "-" for letter in name)
