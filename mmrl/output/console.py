"""How commands print lines of text."""

from rich.console import Console


def print_line(console: Console, line: str | None, style: str | None = None) -> None:
    """Prints text as it is: not parsed as markup, no numbers coloured, broken by the terminal only. None: nothing."""
    if line is not None:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
