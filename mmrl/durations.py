"""Durations in a config, e.g. '40 epochs', and their conversion to optimizer steps."""

import math
import re
from typing import Annotated

from pydantic import AfterValidator

_DURATION = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(steps?|samples?|epochs?)\s*$")


def _check_duration(text: int | str) -> int | str:
    if isinstance(text, str) and not _DURATION.match(text):
        raise ValueError(f"{text!r} is not a duration; write '2000 steps', '3_000_000 samples' or '40 epochs'")
    if isinstance(text, int) and text < 0:
        raise ValueError("a duration cannot be negative")
    return text


Duration = Annotated[int | str, AfterValidator(_check_duration)]
"""In a config: '2000 steps', '3_000_000 samples', '40 epochs', or an int (steps)."""


def to_steps(duration: int | str, batch_size: int, batches_per_epoch: int) -> int:
    """Convert a duration to optimizer steps, rounded up."""
    if isinstance(duration, int):
        return duration
    match = _DURATION.match(duration)
    assert match is not None, duration
    amount, unit = float(match[1].replace("_", "")), match[2]
    if unit.startswith("epoch"):
        return math.ceil(amount * batches_per_epoch)
    return math.ceil(amount / batch_size) if unit.startswith("sample") else math.ceil(amount)
