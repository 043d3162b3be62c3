"""What a user's mistake raises, and the sentence it deserves."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what the user gave: a file, a key, a value, an argument.

    The message is one clear sentence that names the thing, what is allowed and the remedy; the command line
    prints it alone, without a traceback, and exits with 2.
    """


class RunStopped(RuntimeError):
    """A run that could not go on (a non-finite loss, a full disk); the message says what to do next. Exit 1."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Ends an error sentence: `` Did you mean 'batch_size'?``, or the allowed names where none is near."""
    names = list(allowed)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Allowed: {', '.join(sorted(names))}." if names else ""
