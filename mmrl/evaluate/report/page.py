"""`report/index.html`: one page that holds everything it shows. No script, nothing fetched, light and dark."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmrl.evaluate.report import sections
from mmrl.evaluate.report.html import anchor, frame
from mmrl.evaluate.report.sections import SetPart


def render(
    title: str, parts: Sequence[SetPart], labelled: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        labelled: the sets of zero-shot classification, by name, as retrieval.json has them.
        about: what is told of the model and the measurement, a line each.
    """
    names = [*(part.name for part in parts), *labelled]
    links = " ".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in names)
    links += ' <a href="#method">How this was measured</a>'
    body = "\n".join(
        [*map(sections.of_set, parts), *(sections.of_labelled(name, result) for name, result in labelled.items())]
    )
    return frame(title, f"<nav>{links}</nav>", body + _method(parts, about))


def _method(parts: Sequence[SetPart], about: Mapping[str, str]) -> str:
    seconds: dict[str, float] = {}
    for part in parts:
        for chapter, value in part.analysis["seconds"].items():
            seconds[chapter] = seconds.get(chapter, 0) + value
    spent = ", ".join(f"{chapter} {value:.1f} s" for chapter, value in seconds.items())
    entries = {**about, "Time beyond embedding": f"{sum(seconds.values()):.1f} s ({spent})"}
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in entries.items())
    resamples = parts[0].analysis["method"]["resamples"]
    return (
        f'<h2 id="method">How this was measured</h2><div class="card"><dl>{listed}</dl><ul>'
        "<li>A right answer's rank is 1 plus the number of wrong ones that score as high or higher: ties count against "
        "the query. R@K is the share of queries with a right answer within the first K.</li>"
        f"<li>Intervals are 95 % percentile bootstrap intervals over {resamples:,} resamples of items, all queries of "
        "an item together. They tell of other queries like these, not of another training.</li>"
        "<li>PCA, and the choice of best dims, are fitted on half of the items and scored on the other half's queries, "
        "both ways; random dims are the mean of three draws.</li>"
        "<li>int8: 256 even steps between each number's extremes in the gallery; binary: signs, by Hamming distance; "
        "pq2, pq4, pq8: product quantisation, a byte for 2, 4 or 8 numbers, each half of the gallery coded by the "
        "other half's codebook. But for binary, queries stay float32.</li>"
        "<li>The advice takes a dim only where every wider one in the same precision is within the budget, too; of "
        "many codes tried, the smallest within it looks a little better than it is.</li></ul></div>"
    )
