"""The base class of all config sections. Each section is defined next to the code that it configures."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A strict, immutable config section: unknown keys and wrong types are errors.

    A field is either a hyperparameter, which affects what is learned (the default), or a machine field
    (`machine_field`), which affects only how the run executes. Resuming a run requires equal hyperparameters; machine
    fields may change.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, use_attribute_docstrings=True
    )


def machine_field(default: Any, **constraints: Any) -> Any:
    """A pydantic Field that may change when a run is resumed, because it does not affect what is learned."""
    return Field(default, json_schema_extra={"machine": True}, **constraints)


def hyperparameters(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """All fields that are not machine fields, as a flat dict with dotted keys."""
    values: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("machine"):
            continue
        value = getattr(settings, name)
        if isinstance(value, Settings):
            values |= hyperparameters(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
