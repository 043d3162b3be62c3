"""The progress bar of every command."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, *extra_columns: ProgressColumn, transient: bool = True) -> Progress:
    """A bar with its task's description, a count, `extra_columns` and the time left. It is shown on terminals only and
    removed at the end, or stays with the elapsed time if it is not `transient`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *extra_columns,
        TimeRemainingColumn(elapsed_when_finished=not transient),
    )
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
