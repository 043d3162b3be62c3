"""The base of every config section. A section stands beside the code that it configures."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


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
