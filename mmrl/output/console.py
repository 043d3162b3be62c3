"""How commands print lines of text."""

import re

from rich.console import Console

# Control characters but tab and line feed, the characters that reorder text, halves of surrogate pairs.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text from data with its control characters escaped, so that it cannot control a terminal or a page."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


_URL = re.compile(r"\b([a-zA-Z][\w+.-]*://)(?:[^\s/]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")


def without_secrets(text: str) -> str:
    """A shard spec to publish, without what may hold a password: the user and query of URLs, the command of a pipe."""
    return re.sub(r"\bpipe:.*", "pipe:…", _URL.sub(r"\1\2", text))


def print_line(console: Console, line: str | None, style: str | None = None) -> None:
    """Prints text as it is: not parsed as markup, no numbers coloured, broken by the terminal only, control characters
    escaped. None: nothing."""
    if line is not None:
        console.print(visible(line), style=style, highlight=False, markup=False, soft_wrap=True)
