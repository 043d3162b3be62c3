"""The progress bar of every command."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, *extra_columns: ProgressColumn) -> Progress:
    """A bar with its task's description, a count, `extra_columns` and the time left. It is shown on terminals only and
    removed at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *extra_columns,
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
