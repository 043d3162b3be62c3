"""Which captions are drawn, and when two are equal: after the cleaning that tokenizers do, as a model reads them."""

import html
import unicodedata
from collections.abc import Sequence

import numpy as np

from mmrl.data.groups import group_id


def caption_key(caption: str) -> str:
    """The caption without its differences in HTML entities, Unicode forms, case and spaces."""
    return " ".join(unicodedata.normalize("NFKC", html.unescape(html.unescape(caption))).casefold().split())


def caption_id(caption: str) -> int:
    """A stable 63-bit hash of `caption_key`: equal captions have equal ids."""
    return group_id(caption_key(caption))


def pick_caption(count: int, probabilities: list[float] | None, uniform: float) -> int:
    """Choose one of `count` captions with these probabilities; `uniform` is a random number in [0, 1)."""
    if probabilities is None:
        return int(uniform * count)
    shares = _shares(count, probabilities)
    return _draw(shares, uniform) if sum(shares) else 0  # else only captions that it lacks have a probability above 0


def pick_other_caption(
    captions: Sequence[str], drawn: str, probabilities: list[float] | None, uniform: float
) -> str | None:
    """A caption that is not equal to the drawn one, chosen as by `pick_caption`; None if there is none."""
    key = caption_key(drawn)
    shares = [
        share * (caption_key(caption) != key)
        for share, caption in zip(_shares(len(captions), probabilities or [1.0]), captions, strict=True)
    ]
    return captions[_draw(shares, uniform)] if sum(shares) else None


def _shares(count: int, probabilities: list[float]) -> list[float]:
    last = len(probabilities) - 1
    return [probabilities[min(i, last)] / (max(count - last, 1) if i >= last else 1) for i in range(count)]


def _draw(shares: list[float], uniform: float) -> int:
    return min(int(np.searchsorted(np.cumsum(shares) / sum(shares), uniform, side="right")), len(shares) - 1)
