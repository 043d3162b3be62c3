"""When two captions are equal: after the cleaning that tokenizers do, so that what a model reads is equal."""

import html
import unicodedata

from mmrl.data.samples import group_id


def caption_key(caption: str) -> str:
    """The caption without its differences in HTML entities, Unicode forms, case and spaces."""
    return " ".join(unicodedata.normalize("NFKC", html.unescape(html.unescape(caption))).casefold().split())


def caption_id(caption: str) -> int:
    """A stable 63-bit hash of `caption_key`: equal captions have equal ids."""
    return group_id(caption_key(caption))
