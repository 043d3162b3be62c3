"""Building blocks of the HTML pages: page frame, tables, figures, formatted values. Cells are HTML already."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

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


def stylesheet() -> str:
    """page.css with the plots' colours of the light and the dark theme."""
    css = files("mmrl.evaluate.report").joinpath("page.css").read_text(encoding="utf-8")
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


def with_interval(value: str, low: str, high: str, tone: str = "") -> str:
    """A value with its interval in small print; `tone` is a CSS class."""
    return f'<span class="{tone}">{value}</span><small>{low} to {high}</small>'


def anchor(name: str) -> str:
    """The HTML id of a set's section."""
    return "set-" + "".join(letter if letter.isalnum() else "-" for letter in name)
