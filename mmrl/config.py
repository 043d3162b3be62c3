"""A run's config: composed of the sections of its parts, read from strict YAML with KEY=VALUE overrides."""

import itertools
import json
import re
import reprlib
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mmrl.data.sources import DataConfig
from mmrl.durations import Duration
from mmrl.engine.checkpoint import CheckpointConfig
from mmrl.engine.engine import EngineConfig
from mmrl.engine.optim import OptimConfig
from mmrl.engine.tracking import TrackingConfig
from mmrl.errors import InputError, did_you_mean
from mmrl.evaluate.sets import EvaluationConfig
from mmrl.images.image_spec import ImageConfig
from mmrl.inference.teacher import TeacherConfig
from mmrl.losses.config import LossConfig
from mmrl.model.two_tower import ModelConfig
from mmrl.nesting import NestingConfig
from mmrl.settings import Settings, hyperparameters, machine_field


class TrainConfig(Settings):
    """Batch size and length of the training."""

    batch_size: int = Field(ge=2)
    """Global batch size, over all processes. All pairs of a batch are negatives of each other."""
    micro_batch: int | None = machine_field(None, ge=1)
    """Pairs per process and forward pass (GradCache): less memory for one extra forward pass; gradients stay those of
    the global batch. Default: the whole share of the process."""
    duration: Duration
    """Length of the training."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of an exponential moving average of the weights, which is then evaluated and exported. Default: no
    average."""

    def split_batch(self, processes: int) -> tuple[int, int]:
        """(pairs of each process, pairs of a micro-batch). Raises InputError if one does not divide the other."""
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise InputError(
                f"train.batch_size: {self.batch_size} cannot be divided over {processes} processes; use a multiple of "
                f"{processes}, e.g. {max(1, round(self.batch_size / processes)) * processes}."
            )
        micro_batch = self.micro_batch or share
        if share % micro_batch:
            fitting = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
            raise InputError(
                f"train.micro_batch: a process's share of the batch, {share}, cannot be divided into micro-batches of "
                f"{micro_batch}; use {fitting}."
            )
        return share, micro_batch


class Config(Settings):
    """A training run."""

    run: str = machine_field(...)
    """Run folder."""
    resume: str | None = machine_field(None, pattern="^auto$")
    """auto resumes from the last checkpoint of the run folder, if there is one."""
    resume_allow: list[str] = machine_field([])
    """Keys of `optim` that may differ from those of the run that is resumed, e.g. [optim.lr]. RUN/changes.jsonl records
    each change."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of all random numbers."""
    model: ModelConfig
    image: ImageConfig = ImageConfig()
    nesting: NestingConfig
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig | None = None
    """A model to learn from besides the data (default: none)."""
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def rows_per_pair(self) -> tuple[int, int]:
        """The images and texts of a pair that the towers encode, with its second member and its hard negatives."""
        second, negatives = self.loss.second_members, self.data.negatives
        images = 1 + ("image" in second) + (negatives if self.data.negatives_images else 0)
        texts = 1 + ("text" in second) + negatives
        sides = self.model.sides
        return images * ("image" in sides), texts * ("text" in sides)

    @property
    def sweeps(self) -> int:
        """Sweeps of the loss over the similarities of a batch: one or two per term, see nesting.rotation."""
        return self.nesting.sweeps * sum(weight > 0 for weight in self.loss.term_weights.values())

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        """What the loss, the data, the towers and the teacher ask of each other."""
        if self.model.towers != "both":
            self._check_one_tower(self.model.towers)
        for side, other in (("image", "text"), ("text", "image")):
            if side in self.model.sides and not any(
                weight for name, weight in self.loss.term_weights.items() if side in name
            ):
                raise ValueError(f"loss: no term of the loss trains the {side} tower; set model.towers: {other}")
        teacher, loss, negatives = self.teacher, self.loss, self.data.negatives
        if negatives and (loss.name != "infonce" or loss.same_group != "mask"):
            raise ValueError("data.negatives: requires loss.name: infonce and loss.same_group: mask")
        if teacher is None:
            return self
        if loss.name != "infonce" or loss.distillation or not loss.image_text or negatives:
            raise ValueError(
                "teacher: requires loss.name: infonce, loss.image_text above 0, no loss.distillation, no data.negatives"
            )
        if teacher.embeddings is not None and not self.data.mask_equal_captions:
            raise ValueError("teacher.embeddings: requires data.mask_equal_captions: true, which identifies captions")
        return self

    def _check_one_tower(self, side: str) -> None:
        """Raises ValueError for what needs the other tower."""
        own, other, nesting = f"{side}_{side}", "text" if side == "image" else "image", self.nesting
        weights = self.loss.term_weights
        if not weights[own] or any(weight for name, weight in weights.items() if name != own):
            raise ValueError(f"model.towers: {side} trains by loss.{own} alone; set loss.image_text: 0, loss.{own}: 1")
        needs_other = {
            "teacher": self.teacher is not None,
            "nesting.rotate_at_start": nesting.rotate_at_start,
            "nesting.rotate_at_end": nesting.rotate_at_end,
            "data.negatives": side == "image" and self.data.negatives > 0,
            "data.negatives_images": side == "text" and self.data.negatives_images,
            f"optim.lr_{other}": getattr(self.optim, f"lr_{other}") is not None,
        }
        for key, is_set in needs_other.items():
            if is_set:
                raise ValueError(f"{key}: needs the {other} tower, and model.towers is {side}; remove the key")


_MOST_NODES = 1_000_000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 300
_SHORT.maxlist = 30


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that 1e-3 is a float as in YAML 1.2, and that duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, times in Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)).items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, then applies overrides such as ``train.batch_size=128``.

    Raises:
        InputError: a missing file, invalid YAML, an unknown key, an invalid value.
    """
    values = read_config_values(path)
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path))


def read_config_values(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file, not validated.

    Raises:
        InputError: a missing file, invalid YAML, or YAML without keys.
    """
    try:
        values = _parse_yaml(Path(path).read_text(), str(path))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"config: the file {path} does not exist.") from None
    except UnicodeDecodeError:
        raise InputError(f"config: {path} is not UTF-8 text.") from None
    if not isinstance(values, dict):
        raise InputError(f"config: {path} holds no keys; `mmrl config init small` prints an example.")
    return values


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Validates the values of a config. `source` is named in error messages.

    Raises:
        InputError: an unknown key, or an invalid value.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_message(error.errors()[0])}") from None


def dump_config(config: Config, notes: Mapping[str, str] | None = None) -> str:
    """The config as YAML, with all defaults and a comment on each key. `load_config` reads it back.

    Args:
        notes: by dotted key, why it has its value; they follow the keys' own comments.
    """
    head = "# Edit a copy of this file and train with it: mmrl train COPY.yaml run=NEW_FOLDER\n"
    return head + "\n".join(_dump_section(config, "", notes or {})) + "\n"


def _dump_section(section: Settings, path: str, notes: Mapping[str, str]) -> list[str]:
    pad, lines = "  " * path.count("."), []
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), path + name
        comment = " ".join((field.description or "").split())
        # The first sentence, and what the default means; configs/REFERENCE.md has the rest.
        comment = re.split(r"(?<=\.)(?<!e\.g\.)\s+(?=[A-Z])(?!Default)", comment)[0]
        if isinstance(value, Settings):
            comment = comment or " ".join((type(value).__doc__ or "").split())
        text = f"{comment} {notes[key]}" if key in notes else comment
        lines += ["", *textwrap.wrap(text, 120, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")][path != "" :]
        if isinstance(value, Settings):
            lines += [f"{pad}{name}:", *_dump_section(value, f"{key}.", notes)]
        else:
            dumped = section.model_dump(mode="json", include={name})
            flow = None if isinstance(dumped[name], list | dict) else False  # None: the innermost lists in one line
            shown = yaml.safe_dump(dumped, sort_keys=False, width=110, default_flow_style=flow)
            lines += [pad + line for line in shown.splitlines()]
    return lines


def config_schema() -> str:
    """The JSON schema of config files, e.g. for validation and completion in an editor."""
    return json.dumps(Config.model_json_schema(), indent=2)


def config_reference() -> str:
    """Markdown tables of all config keys, one table per section."""
    schema = Config.model_json_schema()
    head = (
        "# Config reference\n\n"
        "Written by `mmrl config reference`. *learning* keys must not change when a run resumes;\n"
        "*machine* keys do not affect what is learned and may change. A *duration* is `2000 steps`, `40 epochs`,\n"
        "`3_000_000 samples`, or an int (steps)."
    )
    return "\n".join([head, *_section_reference("", schema, schema["$defs"], {})]) + "\n"


def _section_reference(
    path: str, section: dict[str, Any], definitions: dict[str, Any], path_of: dict[str, str]
) -> list[str]:
    """The heading and table of a section, then of its subsections. `path_of`: where a definition was described."""
    rows, subsections = [], []
    for name, field in section["properties"].items():
        key = f"{path}.{name}" if path else name
        types = field.get("anyOf", [field])
        for one in types:
            nested = {"": one, ".N": one.get("items"), ".NAME": one.get("additionalProperties")}
            for suffix, value in nested.items():
                if not isinstance(value, dict) or "$ref" not in value:
                    continue
                definition = value["$ref"].rpartition("/")[2]
                if (same := path_of.setdefault(definition, key + suffix)) == key + suffix:
                    subsections += _section_reference(same, definitions[definition], definitions, path_of)
                else:
                    subsections += [f"\n## {key}{suffix}\n\nThe same keys as `{same}`."]
        if "$ref" in field:
            continue
        is_duration = [one.get("type") for one in types[:2]] == ["integer", "string"]
        shown_types = ["duration", *map(_type_name, types[2:])] if is_duration else map(_type_name, types)
        is_required = name in section.get("required", [])
        cells = (
            f"`{key}`",
            " or ".join(shown_types),
            "required" if is_required else f"`{json.dumps(field['default'])}`",
            ", ".join(limit for one in types if (limit := _limits(one))),
            "machine" if field.get("machine") else "learning",
            " ".join(field.get("description", "").replace("|", "\\|").split()),
        )
        rows.append(f"| {' | '.join(cells)} |")
    heading = f"\n## {path or 'Top level'}\n\n{' '.join(section['description'].split())}\n"
    return [heading, "| key | type | default | allowed | kind | |", "|---|---|---|---|---|---|", *rows, *subsections]


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "items" in schema:
        return f"list of {_type_name(schema['items'])}"
    names = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null", "object": "dict"}
    return names.get(schema.get("type", ""), "section")


def _limits(schema: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:.12g}" for key, sign in signs.items() if key in schema]
    if "pattern" in schema:
        limits.append(f"`{schema['pattern'].strip('^$')}`")
    fewest, most = schema.get("minItems"), schema.get("maxItems")
    if fewest == most is not None:
        limits.append(f"{fewest} items")
    elif fewest or most:
        limits.append(f"at least {fewest} item(s)" if fewest else f"at most {most} items")
    if "items" in schema and (of_items := _limits(schema["items"])):
        limits.append(f"each {of_items}")
    return ", ".join(limits)


def config_differences(old: Config, new: Config) -> list[str]:
    """The hyperparameters in which two configs differ, as ``key: old -> new``."""
    before, after = hyperparameters(old), hyperparameters(new)
    keys = before.keys() | after.keys()
    return sorted(f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if _size(node, {}) > _MOST_NODES:
            raise ValueError("its aliases stand for too many values")
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also of a date or a number; nested too deeply
        raise InputError(f"{source} is not valid YAML: {' '.join(str(error).split())}.") from None


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """The values in a node if each alias were written out; too many if an alias is inside of what it stands for."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1  # until it is counted
        inner = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(one, known) for one in inner)
    return known[id(node)]


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one key of a config's values, as ``train.batch_size=128`` says; raises InputError if it says nothing."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: write KEY=VALUE, e.g. train.batch_size=128.")
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        inner = section.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"override {override!r}: {parent!r} is a value, not a section.")
        section = inner
    section[last] = _parse_yaml(text, f"override {override!r}")


def _message(error: ErrorDetails) -> str:
    """A pydantic error as one sentence that names the key, what is wrong and what is allowed."""
    location = [str(part) for part in error["loc"] if part not in ("int", "str", "list[str]")]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{did_you_mean(location[-1], _keys_of(location[:-1]))}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing."
    message = error["msg"].removeprefix("Value error, ")
    # Of a whole section it says too much.
    got = "" if isinstance(error["input"], dict) else f"; got {_SHORT.repr(error['input'])}"
    return f"{key}: {message}{got}." if key else f"{message}."


def _keys_of(location: Sequence[str]) -> list[str]:
    """The keys of the section at `location`."""
    section: type[Settings] = Config
    parts = iter(location)
    for part in parts:
        annotation = section.model_fields[part].annotation
        if get_origin(annotation) in (dict, list):
            next(parts, None)  # the name of an evaluation set, or the index of a source
        kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, Settings)]
        if not inner:
            return []
        section = inner[0]
    return list(section.model_fields)
