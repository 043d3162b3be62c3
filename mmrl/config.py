"""One run's config: the owners' sections composed; strict YAML in, KEY=VALUE overrides, YAML out."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from mmrl.data.sources import DataConfig
from mmrl.durations import Duration
from mmrl.engine.checkpoint import CheckpointConfig
from mmrl.engine.engine import EngineConfig
from mmrl.engine.optim import OptimConfig
from mmrl.engine.tracking import TrackingConfig
from mmrl.errors import InputError, did_you_mean
from mmrl.evaluate.sets import EvaluationConfig
from mmrl.losses.config import LossConfig
from mmrl.model.two_tower import ModelConfig
from mmrl.nesting import NestingConfig
from mmrl.settings import Settings, learning_values, machine


class TrainConfig(Settings):
    """How long, and on how much at a time."""

    batch_size: int = Field(ge=2)
    """The global batch: all of it, over all processes, are each other's negatives."""
    micro_batch: int | None = machine(None, ge=1)
    """So many pairs of a process are in memory with their activations at once, for a second forward; all of its share
    of the batch when left out. What is learnt is the same."""
    duration: Duration
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Keep a moving average of the weights with this decay a step, and evaluate and export it; off when left out."""


class Config(Settings):
    """A run."""

    run: str = machine(...)
    """Folder of the run: made, or continued with resume: auto."""
    resume: str | None = machine(None, pattern="^auto$")
    """'auto' goes on from the run's last checkpoint, if there is one."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    model: ModelConfig
    nesting: NestingConfig
    loss: LossConfig = LossConfig()
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML takes 1e-3 for a string. And a key given twice is a mistake, not an override."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, then applies overrides such as ``train.batch_size=128``.

    Raises:
        InputError: no such file, no YAML, an unknown key (with the nearest right one), a value that does not fit.
    """
    try:
        values = _parse_yaml(Path(path).read_text(), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"config: the file {path} does not exist.") from None
    except UnicodeDecodeError:
        raise InputError(f"config: {path} is not UTF-8 text.") from None
    if not isinstance(values, dict):
        raise InputError(f"config: {path} holds no keys; see configs/quickstart.yaml for a complete one.")
    for override in overrides:
        _apply(values, override)
    return parse(values, str(path))


def parse(values: dict[str, Any], source: str) -> Config:
    """Validated values of a config; `source` is named in messages."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_sentence(error.errors()[0])}") from None


def dump(config: Config) -> str:
    """The resolved config as YAML, every default spelt out; `load` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def schema() -> str:
    """The JSON schema of a config file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def differences(old: Config, new: Config) -> list[str]:
    """The fields of the learning kind in which two configs differ, as ``key: old -> new``."""
    before, after = learning_values(old), learning_values(new)
    keys = before.keys() | after.keys()
    return sorted(f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: write KEY=VALUE, such as train.batch_size=128.")
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        inner = section.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"override {override!r}: {parent!r} is a value, not a section.")
        section = inner
    section[last] = _parse_yaml(text, f"override {override!r}")


def _sentence(error: ErrorDetails) -> str:
    """One pydantic error -> one sentence that names the key, what is wrong and what is allowed."""
    location = [str(part) for part in error["loc"] if part not in ("int", "str", "list[str]")]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{did_you_mean(location[-1], _keys_of(location[:-1]))}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing."
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}; got {error['input']!r}."


def _keys_of(location: Sequence[str]) -> list[str]:
    """The keys that the section at `location` has."""
    section: type[Settings] = Config
    parts = iter(location)
    for part in parts:
        annotation = section.model_fields[part].annotation
        if get_origin(annotation) is dict:
            next(parts, None)  # a name of the user's, such as an evaluation set's
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, Settings)]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)
