"""The base of every config section, and durations. A section stands beside the code that it configures."""

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A strict, immutable section: unknown keys and wrong types are errors, values never change once read.

    A field says either what is learnt (the default) or merely how the machine does it (`machine`). A run resumes
    only if all fields of the first kind are as they were; those of the second kind are free.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def machine(default: Any, **constraints: Any) -> Any:
    """A field that changes how a run is carried out, never what it learns."""
    return Field(default, json_schema_extra={"machine": True}, **constraints)


def learning_values(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """All fields of the learning kind, flat, by their dotted names."""
    values: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("machine"):
            continue
        value = getattr(settings, name)
        if isinstance(value, Settings):
            values |= learning_values(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


_DURATION = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(steps?|samples?|epochs?)\s*$")


def _check_duration(text: int | str) -> int | str:
    if isinstance(text, str) and not _DURATION.match(text):
        raise ValueError(f"{text!r} is no duration; write '2000 steps', '3_000_000 samples' or '40 epochs'")
    if isinstance(text, int) and text < 0:
        raise ValueError("a duration cannot be negative")
    return text


Duration = Annotated[int | str, AfterValidator(_check_duration)]
"""In a config: '2000 steps', '3_000_000 samples', '40 epochs', or a bare number of steps."""


def steps(duration: int | str, batch_size: int, batches_per_epoch: int) -> int:
    """The one converter of durations; inside, everything is counted in optimiser steps. Rounded up."""
    if isinstance(duration, int):
        return duration
    match = _DURATION.match(duration)
    assert match is not None, duration
    amount, unit = float(match[1].replace("_", "")), match[2]
    if unit.startswith("epoch"):
        return math.ceil(amount * batches_per_epoch)
    return math.ceil(amount / batch_size) if unit.startswith("sample") else math.ceil(amount)
