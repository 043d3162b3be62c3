"""`report/index.html`: a self-contained page without scripts or external resources, in a light and a dark theme."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmrl.evaluate.report.html import anchor, html_page
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
    seconds: dict[str, float] = {}
    for report in reports:
        for step, value in report.analysis["seconds"].items():
            seconds[step] = seconds.get(step, 0) + value
    times = ", ".join(f"{step} {value:.1f} s" for step, value in seconds.items())
    entries = {**about, "Analysis time": f"{sum(seconds.values()):.1f} s ({times})"}
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items())
    resamples = reports[0].analysis["method"]["resamples"]
    return (
        f'<h2 id="method">Method</h2><div class="card"><dl>{listed}</dl><ul>'
        "<li>The rank of a positive is 1 plus the number of non-positives that score at least as high: ties count "
        "against the query. R@K is the share of queries with a positive at rank K or better.</li>"
        f"<li>Intervals are 95 % percentile bootstrap intervals from {resamples:,} resamples of items; all queries of "
        "an item are resampled together. They cover the choice of queries, not the variation between training "
        "runs.</li>"
        "<li>PCA and best single dims are fitted on half of the items and scored on the queries of the other half, "
        "both ways. Best single dims are those that separate positives from all pairs best. Random dims are the mean "
        "of three draws.</li>"
        "<li>One stage is measured on what mmrl embed --precision stores, two stages on the shortlists of mmrl index "
        "--code, which holds images only. int8: each vector scaled to ±127. sq8: 256 steps between the extremes of "
        "each dim. binary: signs, compared by Hamming distance. pq: product quantisation, 4 bits per two dims. Queries "
        "stay float32, except for binary.</li>"
        "<li>The advice considers a dim only if all larger dims in the same precision are within the budget, too. It "
        "is the smallest of many options, so its measured loss is slightly optimistic.</li></ul></div>"
    )
