"""Presets: the config of a run on a user's own data, without a config file.

`mmrl train --data` composes it of a recipe (a file of mmrl/presets, or the config of the run that --from names), of
what the options name, and of values that are scaled to the data and to this machine. KEY=VALUE arguments overrule them
all. The result is written to RUN/config.yaml, with comments, before training starts.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmrl import durations
from mmrl.config import Config, apply_override, dump_config, parse_config, read_config_values
from mmrl.data.samples import BadSample, SampleReader
from mmrl.data.sources import open_training_set
from mmrl.data.workers import host_memory
from mmrl.distributed import comm
from mmrl.errors import InputError, did_you_mean
from mmrl.hardware import has_native_bfloat16
from mmrl.model import bundle, footprint, registry
from mmrl.model.manifest import read_manifest
from mmrl.model.source import StoredModel, parse_model
from mmrl.nesting import check_dims
from mmrl.output.console import print_line
from mmrl.output.files import write_atomic
from mmrl.train import host_checks
from mmrl.train.own_data import DataOptions, find_shards, needs_packing
from mmrl.train.plan import plan_resources
from mmrl.train.run_folder import check_run_folder

_FOLDER = Path(__file__).parent.parent / "presets"
_WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")
# Of the steps; a preset's own warm-up is the maximum.
_WARMUP_SHARE = 0.06
_EVALUATIONS = 5
# A batch holds at most this share of the pairs: with fewer steps per epoch, each pair meets the same negatives.
_BATCH_SHARE = 8
# Of a host's memory: what a CPU may use for a model and its activations, and for decoded images.
_MODEL_SHARE, _CACHE_SHARE = 0.5, 0.25
_IMAGES_MEASURED = 64
# The learning rates of a run that continues from another one, relative to that one's.
_CONTINUED_RATE = 0.2


@dataclass(frozen=True)
class Preset:
    """A recipe, and how long it trains."""

    file: str
    samples: float
    """Pairs that a run sees …"""
    epochs: tuple[int, int]
    """… within these numbers of epochs."""


PRESETS = {
    "small": Preset("small.yaml", 185_600, (5, 90)),
    "vit-b-32": Preset("vit_b32_512_to_64.yaml", 2e9, (1, 32)),
    "finetune": Preset("finetune.yaml", 2e6, (1, 10)),
    "rotate-then-finetune": Preset("finetune_512_128.yaml", 2e6, (1, 10)),
}


@dataclass(frozen=True)
class TrainRequest:
    """The options of `mmrl train` that stand for a config file."""

    data: DataOptions | None
    """None: the data of the run `model`."""
    model: str | None = None
    """--from: MODEL, or a weights file for the preset's towers."""
    preset: str | None = None
    """None: small; with `model` the run's own recipe, finetune if its prefixes are trained, or rotate-then-finetune."""
    dims: Sequence[int] | None = None
    """None: the recipe's, as far as the embedding has them, and the full dim."""


def preset_path(name: str) -> Path:
    """The YAML file of a preset; raises InputError for an unknown name."""
    if name not in PRESETS:
        raise InputError(f"preset: there is no preset {name!r}.{did_you_mean(name, PRESETS)}")
    return _FOLDER / PRESETS[name].file


def compose_config(request: TrainRequest, overrides: Sequence[str], console: Console) -> Config:
    """The config that the options and overrides of `mmrl train` stand for. Packs the data if it is not shards, and
    writes RUN/config.yaml. Collective: rank 0 does it.

    Raises:
        InputError: an unknown preset, a model or data that cannot be used, a run folder that is in use, an invalid
            override; other ranks exit with code 2.
    """
    recipe = _Recipe(request, overrides)
    world = comm.start(recipe.config().engine.timeout_minutes * 60)
    memory = host_memory() / comm.all_hosts().count(comm.host())
    config = host_checks.agree(world, lambda: _compose(recipe, memory, console), rank_0_only=True)
    return comm.broadcast_object(config)


def _compose(recipe: "_Recipe", memory: float, console: Console) -> Config:
    config = recipe.config()
    resumed = Path(config.run) / "config.yaml"
    resumes = config.resume is not None and resumed.exists()
    check_run_folder(config, own=("shards",))
    if resumes:
        recipe.values = read_config_values(resumed)
    recipe.set_model()
    recipe.set_data(console)
    if resumes:
        return recipe.config()
    config = recipe.config()
    reader = open_training_set(config.data, config.model.sides)
    recipe.scale(reader, memory)
    config = recipe.config()
    write_atomic(resumed, dump_config(config, recipe.notes))
    pairs = sum(share.per_epoch for share in reader.shares)
    shown = "; ".join(f"{key} {attrgetter(key)(config)}" for key in recipe.notes)
    print_line(console, f"{recipe.name}, scaled to {pairs:,} pairs: {shown}.")
    print_line(
        console, f"All keys with comments: {resumed}. Change one by KEY=VALUE, or edit a copy and train with it."
    )
    return config


class _Recipe:
    """The values of a config in the making."""

    def __init__(self, request: TrainRequest, overrides: Sequence[str]) -> None:
        """Reads the recipe.

        Raises:
            InputError: an unknown preset, or a model that does not exist.
        """
        self._request, self._overrides = request, overrides
        self._given = {override.partition("=")[0] for override in overrides}
        self._source = (
            None if request.model is None or _is_weights(request.model) else parse_model(request.model, "from")
        )
        self.notes: dict[str, str] = {}
        """By dotted key, why a value is not the recipe's."""
        run = None if request.model is None else Path(request.model) / "config.yaml"
        self._preset = None
        if request.preset is None and run is not None and run.is_file():
            self.name, self.values = f"The recipe of {request.model}", _continued(read_config_values(run))
        else:
            preset = request.preset or self._default_preset()
            self.name, self.values = f"Preset {preset}", read_config_values(preset_path(preset))
            self._preset = PRESETS[preset]
        if request.data is None and self._preset is not None:
            raise InputError("data: missing; name your shards, folder or table with --data.")
        self.values["run"] = f"runs/{self._run_name()}"

    def config(self) -> Config:
        """The config so far, with the overrides."""
        values = json.loads(json.dumps(self.values))
        for override in self._overrides:
            apply_override(values, override)
        return parse_config(values, self.name)

    def set_model(self) -> None:
        """Sets the towers and the nested dims."""
        model, request = self.values["model"], self._request
        if request.model is not None and self._source is None:
            model["pretrained"] = request.model
        elif isinstance(self._source, StoredModel):
            model.update(name=request.model, pretrained=None)
        elif self._source is not None:
            model.update(name=self._source.name, pretrained=self._source.pretrained)
        config = self.config()
        bundle.check_towers(config.model)
        width = registry.read_model_cfg(config.model.name)["embed_dim"]
        dims = list(request.dims or [dim for dim in config.nesting.dims if dim <= width])
        is_new = not (request.model or config.model.pretrained)
        if request.dims and is_new:
            check_dims(dims, max(dims))
        if request.dims and is_new and max(dims) != width:
            width = max(dims)
            model["name"] = self._write_towers(config, width)
        rotates = config.nesting.rotation or config.nesting.rotate_at_start or config.nesting.rotate_at_end
        if width not in dims and not self._is_given("nesting.dims") and (rotates or request.dims is None):
            self.notes["nesting.dims"] = f"With the full dim, {width}, which a rotation preserves."
            dims = sorted([*dims, width], reverse=True)
        if dims != config.nesting.dims:
            self.values["nesting"]["dims"] = dims
            self.values["nesting"].pop("weights", None)

    def set_data(self, console: Console) -> None:
        """Sets the shards; packs what is not shards."""
        config, options = self.config(), self._request.data
        towers = config.model.towers
        if options is not None:
            for data in filter(None, (options.data, options.val)):
                if towers != "both" and needs_packing(data):
                    raise InputError(
                        f"data: {data} is packed for both towers, and model.towers is {towers}; run mmrl pack {data} "
                        f"shards --towers {towers} first, with the columns of the pairs, and give --data shards."
                    )
            side = registry.input_side(registry.read_model_cfg(config.model.name))
            train, val = find_shards(options, config.run, 2 * side, console)
            self.values["data"].pop("sources", None)
            self.values["data"]["train"] = train
            sets = self.values.setdefault("evaluation", {})
            sets["sets"] = {"val": {"shards": val}} if val else {}
            if val and sets.get("best"):
                own = {} if towers == "both" else {"direction": f"{towers}_to_{towers}"}
                sets["best"].update(set="val", **own)
            elif not val:
                sets.pop("best", None)
                sets.pop("patience", None)
                print_line(console, "Note: without --val nothing is evaluated during training.")
        best, dims = self.values.get("evaluation", {}).get("best"), self.config().nesting.dims
        if best and best["dim"] not in dims:
            best["dim"] = min(dims, key=lambda dim: abs(math.log(dim / best["dim"])))

    def scale(self, reader: SampleReader, memory: float) -> None:
        """Sets what depends on the number of pairs, the size of their images and `memory`, this process's bytes."""
        pairs = sum(share.per_epoch for share in reader.shares)
        if self._preset is not None:  # a run that is continued keeps its batch
            self._scale_batch(pairs)
        config = self.config()
        batch = config.train.batch_size
        if self._preset is not None:
            fewest, most = self._preset.epochs
            epochs = min(max(round(self._preset.samples / pairs), fewest), most)
            note = f"About {self._preset.samples:,.0f} pairs are seen, in {fewest} to {most} epochs of {pairs:,} pairs."
            self._set("train.duration", f"{epochs} epochs", note)

        def steps_of(duration: int | str) -> int:
            return durations.to_steps(duration, batch, max(1, pairs // batch))

        total = steps_of(self.config().train.duration)
        warmup = min(steps_of(config.optim.warmup), round(_WARMUP_SHARE * total))
        self._set("optim.warmup", f"{warmup} steps", f"At most {_WARMUP_SHARE:.0%} of the {total:,} steps.")
        every = math.ceil(total / _EVALUATIONS)
        for key, duration in (("evaluation", config.evaluation.every), ("checkpoint", config.checkpoint.every)):
            self._set(f"{key}.every", f"{min(steps_of(duration), every)} steps")
        self._set("tracking.log_every", max(1, min(config.tracking.log_every, total // 20)))
        if config.data.cache and "image" in config.model.sides:
            decoded = pairs * _decoded_bytes(reader, "image" in config.loss.second_members)
            self._set(
                "data.cache",
                decoded <= _CACHE_SHARE * memory,
                f"Decoded, the images take {decoded / 1e9:.2g} GB of memory.",
            )
        self._scale_micro_batch(memory)

    def _scale_batch(self, pairs: int) -> None:
        config, world = self.config(), comm.world()
        wanted = config.train.batch_size
        batch = min(wanted, 2 ** int(math.log2(max(pairs // _BATCH_SHARE, 2 * world.size))))
        batch = max(batch // world.size, 1) * world.size
        if batch == wanted or self._is_given("train.batch_size"):
            return
        self._set("train.batch_size", batch, f"At most one in {_BATCH_SHARE} of the {pairs:,} pairs.")
        factor = math.sqrt(batch / wanted)
        _scale_rates(self.values["optim"], factor)
        self.notes["optim.lr"] = f"Of a batch of {wanted}, times the square root of {batch}/{wanted}, as all rates."

    def _scale_micro_batch(self, memory: float) -> None:
        """Sets the largest micro-batch that fits into the memory of a GPU, or into a share of the host's."""
        config, world = self.config(), comm.world()
        if self._is_given("train.micro_batch"):
            return
        if config.train.batch_size // world.size % (config.train.micro_batch or 1):  # that of the run --from names
            del self.values["train"]["micro_batch"]
            config = self.config()
        on_gpu = world.device.type == "cuda"
        memory = torch.cuda.get_device_properties(world.device).total_memory if on_gpu else _MODEL_SHARE * memory
        precision = config.engine.precision
        in_16_bits = has_native_bfloat16(world.device) if precision == "auto" else precision != "fp32"
        measured = footprint.measure(config.model, in_16_bits, on_gpu, config.rows_per_pair)
        plan = plan_resources(config, world.size, memory_gb=memory / 1e9, measured=measured)
        share, fitting = plan.pairs_per_gpu, plan.stages[config.engine.zero_stage].micro_batch or 1
        if fitting < share:
            self._set("train.micro_batch", fitting, f"What fits into {memory / 1e9:.0f} GB; {share} at once do not.")

    def _is_given(self, key: str) -> bool:
        """Whether an override sets the key, its section or a key of it."""
        return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in self._given)

    def _set(self, key: str, value: Any, note: str = "") -> None:
        """Sets a key, unless an override does."""
        if self._is_given(key):
            return
        apply_override(self.values, f"{key}={json.dumps(value)}")
        if note:
            self.notes[key] = note

    def _write_towers(self, config: Config, width: int) -> str:
        """A copy of the towers' config with this width of the embedding, in the run folder; its path."""
        model_cfg = {**registry.read_model_cfg(config.model.name), "embed_dim": width}
        path = Path(config.run) / f"{Path(config.model.name).stem}-{width}.json"
        write_atomic(path, json.dumps(model_cfg, indent=2) + "\n")
        self.notes["model.name"] = f"{config.model.name} with {width} dims."
        return str(path)

    def _default_preset(self) -> str:
        if self._request.model is None:
            return "small"
        is_nested = isinstance(self._source, StoredModel) and len(read_manifest(self._source.folder)["nested_dims"]) > 1
        return "finetune" if is_nested else "rotate-then-finetune"

    def _run_name(self) -> str:
        """The name of the data; with "-continued" if the run that --from names has this name."""
        model = Path(self._request.model or "").name
        data = self._request.data.data if self._request.data else model
        parts = [Path(part).stem for part in Path(data.partition(":")[2] or data).parts]
        named = [part for part in parts if part.strip("./{}*") and part not in ("shards", "train")]
        name = re.sub(r"[^\w.-]", "-", named[-1]) if named else "own"
        return f"{name}-continued" if name == model else name


def _continued(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run's config for a new run that starts from its encoder: lower learning rates, no rotation before
    the first step, and the smaller dims' gradient at its last factor from the first step."""
    for key in ("resume", "run"):
        values.pop(key, None)
    nesting = values["nesting"]
    nesting["rotate_at_start"] = False
    if isinstance(gate := nesting.get("prefix_gradient"), dict):
        nesting["prefix_gradient"] = {"end": gate.get("end", 0.3), "power": 0.0}
    values["model"] = {**values["model"], "pretrained": None, "pretrained_image": False, "pretrained_text": False}
    _scale_rates(values["optim"], _CONTINUED_RATE)
    return values


def _scale_rates(optim: dict[str, Any], factor: float) -> None:
    """Multiplies the learning rates, except for that of the rotation, which has an optimizer of its own."""
    for key, rate in optim.items():
        if (key == "lr" or key.startswith("lr_")) and key != "lr_rotation" and rate is not None:
            optim[key] = float(f"{rate * factor:.3g}")


def _decoded_bytes(reader: SampleReader, second: bool) -> float:
    """The mean bytes of a sample's decoded image, and of its second one, of samples that are spread over the set."""
    sizes = []
    for index in range(0, len(reader), max(1, len(reader) // _IMAGES_MEASURED)):
        try:
            sample, image_CHW = reader.read_image(index)
            own = [reader.decode(index, sample.second_image)] if second and sample.second_image else []
            sizes.append(sum(one.numel() for one in (image_CHW, *own)))
        except BadSample:
            continue
    return sum(sizes) / max(len(sizes), 1)


def _is_weights(model: str) -> bool:
    return Path(model).suffix in _WEIGHTS and Path(model).is_file()
