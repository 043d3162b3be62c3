"""Building blocks of the HTML pages: page frame, tables, figures, formatted values. Cells are HTML already."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmrl.evaluate.ranking.ranks import is_better_lower
from mmrl.evaluate.report.plots import COLOURS


def html_page(title: str, below_title: str, body: str) -> str:
    """A complete HTML document around `body`."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{stylesheet()}</style>\n</head>\n<body>\n"
        f'<header><p class="eyebrow">mmrl evaluation</p><h1>{escape(title)}</h1>{below_title}</header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def read_asset(name: str) -> str:
    """A text file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def stylesheet() -> str:
    """page.css with the plots' colours of the light and the dark theme."""
    css = read_asset("page.css")
    for theme, mark in enumerate(("/*LIGHT*/", "/*DARK*/")):
        css = css.replace(mark, " ".join(f"--{name}: {pair[theme]};" for name, pair in COLOURS.items()))
    return css


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], chosen: str | None = None) -> str:
    """A table that scrolls sideways if it is too wide; the row whose first cell is `chosen` is highlighted."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = []
    for row in rows:
        mark = ' class="chosen"' if row[0] == chosen else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide" tabindex="0">{inner}</div>'


def html_figure(svg: str, label: str, caption: str = "") -> str:
    """A figure with an aria-label for screen readers."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f"<figure>{svg}{below}</figure>"


def format_score(value: float, metric: str) -> str:
    """Ranks as numbers, all other metrics in %."""
    return f"{value:,.1f}".removesuffix(".0") if is_better_lower(metric) else f"{100 * value:.1f}"


def format_points(share: float) -> str:
    """A difference of shares in percentage points, with a typographic minus."""
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "−")


def points_with_interval(interval: Mapping[str, float], tone: str = "") -> str:
    """A share in percentage points, with its interval in small print; `tone` is a CSS class."""
    value, low, high = (format_points(interval[key]) for key in ("value", "low", "high"))
    return f'<span class="{tone}">{value}</span><small>{low} to {high}</small>'


def tone_of(paired: Mapping[str, Any]) -> str:
    """The CSS class of a paired difference: "better" or "worse" if p < 0.05. Empty without a difference."""
    return "" if paired.get("p", 1) >= 0.05 else "better" if paired["lead"]["value"] > 0 else "worse"


def anchor(name: str) -> str:
    """The HTML id of a set's section."""
    return "set-" + "".join(letter if letter.isalnum() else "-" for letter in name)
