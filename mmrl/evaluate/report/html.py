"""The HTML that pages are made of: the frame around them, tables, pictures, numbers. Cells are HTML already."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from mmrl.evaluate.ranking.ranks import is_better_lower
from mmrl.evaluate.report.plots import COLOURS


def frame(title: str, under_title: str, body: str) -> str:
    """A page around a body."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{stylesheet()}</style>\n</head>\n<body>\n"
        f'<header><p class="eyebrow">mmrl evaluation</p><h1>{escape(title)}</h1>{under_title}</header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def stylesheet() -> str:
    """page.css with the colours of the pictures, of both themes."""
    css = files("mmrl.evaluate.report").joinpath("page.css").read_text(encoding="utf-8")
    for number, mark in enumerate(("/*LIGHT*/", "/*DARK*/")):
        css = css.replace(mark, " ".join(f"--{name}: {pair[number]};" for name, pair in COLOURS.items()))
    return css


def table(header: Sequence[str], rows: Iterable[Sequence[str]], chosen: str | None = None) -> str:
    """Cells are HTML already; the row whose first cell is `chosen` is marked. Scrolls on its own where it is wide."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = []
    for row in rows:
        mark = ' class="chosen"' if row[0] == chosen else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    inner = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide" tabindex="0">{inner}</div>'


def figure(svg: str, label: str, caption: str = "") -> str:
    """A picture with what it shows in words, for those who do not see it."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f"<figure>{svg}{below}</figure>"


def score(value: float, metric: str) -> str:
    """Shares in per cent, ranks as they are."""
    return f"{value:,.1f}".removesuffix(".0") if is_better_lower(metric) else f"{100 * value:.1f}"


def points(share: float) -> str:
    """A difference of shares in percentage points, with a true minus."""
    return f"{round(100 * share, 1) + 0.0:.1f}".replace("-", "−")


def with_range(value: str, low: str, high: str, tone: str = "") -> str:
    """A number, and its interval small behind or below it."""
    return f'<span class="{tone}">{value}</span><small>{low} to {high}</small>'


def anchor(name: str) -> str:
    """A name as part of an address within the page."""
    return "set-" + "".join(letter if letter.isalnum() else "-" for letter in name)
