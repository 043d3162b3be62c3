"""`report/index.html`: a self-contained page without scripts or external resources, in a light and a dark theme."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmrl.evaluate.report.html import anchor, html_page, read_asset
from mmrl.evaluate.report.sections import SetReport, classification_section, retrieval_section


def render_page(
    title: str, reports: Sequence[SetReport], labelled: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        labelled: {set: entry in retrieval.json} of the zero-shot classification sets.
        about: {label: value} of the model and the software.
    """
    names = [*(report.name for report in reports), *labelled]
    links = " ".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in names)
    links += ' <a href="#method">Method</a>'
    sections = [
        *map(retrieval_section, reports),
        *(classification_section(name, result) for name, result in labelled.items()),
        _method(reports, about),
    ]
    return html_page(title, f"<nav>{links}</nav>", "\n".join(sections))


def _method(reports: Sequence[SetReport], about: Mapping[str, str]) -> str:
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds.update(report.analysis["seconds"])
    times = ", ".join(f"{step} {value:.1f} s" for step, value in seconds.items())
    entries = {**about, "Analysis time": f"{sum(seconds.values()):.1f} s ({times})"}
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items())
    resamples = reports[0].analysis["method"]["resamples"]
    notes = read_asset("method.html").replace("RESAMPLES", f"{resamples:,}")
    return f'<h2 id="method">Method</h2><div class="card"><dl>{listed}</dl>{notes}</div>'
