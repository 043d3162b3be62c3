"""Exceptions whose message is for the user."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid user input: a file, a config key, a value, an argument.

    The message is one clear sentence: what is wrong, what is allowed and the remedy. The command line prints it
    without a traceback and exits with 2.
    """


class RunStopped(RuntimeError):
    """A run that cannot continue (a non-finite loss, a full disk). The message says what to do next. Exit code 1.

    `shown`: the message is already on stderr.
    """

    def __init__(self, message: str, *, shown: bool = False) -> None:
        super().__init__(message)
        self.shown = shown


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """The end of an error message: `` Did you mean 'batch_size'?``, or the allowed names if none is close."""
    names = list(allowed)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Allowed: {', '.join(sorted(names))}." if names else ""
