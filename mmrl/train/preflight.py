"""Checks of config and data before a run, in seconds, and the creation of the run folder."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from mmrl.config import Config, config_differences, dump_config, load_config
from mmrl.data.samples import SampleReader
from mmrl.data.sources import open_reader, open_training_set
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.engine.checkpoint import Checkpoints
from mmrl.errors import InputError, did_you_mean
from mmrl.evaluate.ranking.ranks import metric_names
from mmrl.evaluate.readers import draw_shards
from mmrl.losses.nested_infonce import require_triton
from mmrl.model import towers
from mmrl.nesting import Nesting, check_dims
from mmrl.output.files import write_atomic
from mmrl.train import host_checks


@dataclass(frozen=True)
class PreparedRun:
    """A checked run: its dims, its data and where it resumes from."""

    nested: Nesting
    reader: SampleReader
    evaluation_readers: dict[str, SampleReader]
    evaluation_samples: dict[str, int]
    """Samples in each whole set; its reader may hold a random part of them (evaluation.most_samples)."""
    evaluation_dims: list[int]
    accumulation: int
    """Micro-batches per step, on each process."""
    resume_from: Path | None


def prepare(config: Config, world: World) -> PreparedRun:
    """Runs every check that needs no model on every rank, then creates the run folder on rank 0. Collective.

    Raises:
        InputError: a check failed on any rank; all ranks stop.
    """
    prepared = host_checks.agree(world, lambda: _check(config, world))
    assert prepared is not None
    fingerprints = tuple(reader.fingerprint for reader in (prepared.reader, *prepared.evaluation_readers.values()))
    seen = comm.all_gather_objects(fingerprints)
    if len(set(seen)) > 1:
        host_checks.agree(world, lambda: _check_same_shards(fingerprints, seen))
    resume_from = host_checks.agree(world, lambda: open_run(config), rank_0_only=True)
    host_checks.same_folder(config, world)
    return replace(prepared, resume_from=comm.broadcast_object(resume_from))


def _check(config: Config, world: World) -> PreparedRun:
    if config.train.batch_size % world.size:
        raise InputError(
            f"train.batch_size: {config.train.batch_size} cannot be divided over {world.size} processes; "
            f"use a multiple of {world.size}."
        )
    share = config.train.batch_size // world.size
    micro_batch = config.train.micro_batch or share
    if share % micro_batch:
        fitting = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
        raise InputError(
            f"train.micro_batch: a process's share of the batch, {share}, cannot be divided into micro-batches of "
            f"{micro_batch}; use {fitting}."
        )
    if config.train.ema is not None and config.engine.zero_stage == 3:
        raise InputError("train.ema: needs whole weights, which ZeRO stage 3 partitions; use engine.zero_stage=2.")
    width = towers.read_model_cfg(config.model.name)["embed_dim"]
    nested = Nesting.from_dims(config.nesting.dims, config.nesting.weights, width)
    if (config.nesting.dims_per_step or 0) > len(nested.dims):
        raise InputError(
            f"nesting.dims_per_step: {config.nesting.dims_per_step} of {len(nested.dims)} dims; at most all of them."
        )
    if config.nesting.dims_per_step and not all(nested.weights):
        raise InputError("nesting.dims_per_step: a dim with weight 0 cannot be sampled; remove it from nesting.dims.")
    if config.nesting.start is not None and nested.dims[-1] != width:
        raise InputError(
            f"nesting.start: rotates the whole embedding, so nesting.dims must include its width, {width}; the largest "
            f"is {nested.dims[-1]}."
        )
    if config.loss.kernels == "triton":
        require_triton(world.device)
    if config.engine.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise InputError(
            "engine.compile: torch.compile needs a C++ compiler, and none is in PATH; install g++ or remove this key."
        )
    evaluation_dims = config.evaluation.dims or list(nested.dims)
    check_dims(evaluation_dims, width, "evaluation.dims")
    _check_best(config, evaluation_dims)
    reader = open_training_set(config.data)
    whole_sets = {
        name: open_reader(one.shards, one.fields or config.data.fields, config.data.remote, config.data.allow_pipe)
        for name, one in config.evaluation.sets.items()
    }
    return PreparedRun(
        nested=nested,
        reader=reader,
        evaluation_readers={n: draw_shards(one, config.evaluation.most_samples) for n, one in whole_sets.items()},
        evaluation_samples={name: len(one) for name, one in whole_sets.items()},
        evaluation_dims=evaluation_dims,
        accumulation=share // micro_batch,
        resume_from=None,
    )


def _check_same_shards(fingerprints: tuple[str, ...], seen: list[tuple[str, ...]]) -> None:
    if fingerprints != Counter(seen).most_common(1)[0][0]:
        raise InputError("data: the shards of this host differ from those of the other hosts; copy them again.")


def _check_best(config: Config, dims: list[int]) -> None:
    best, names = config.evaluation.best, config.evaluation.sets
    if best is None:
        return
    if best.set not in names:
        raise InputError(
            f"evaluation.best.set: there is no evaluation set {best.set!r}.{did_you_mean(best.set, names)}"
        )
    if best.dim not in dims:
        raise InputError(f"evaluation.best.dim: {best.dim} is not evaluated; evaluated are {dims}.")
    if best.metric not in metric_names():
        allowed = ", ".join(metric_names())
        raise InputError(f"evaluation.best.metric: {best.metric!r} is not measured; allowed: {allowed}.")


def open_run(config: Config) -> Path | None:
    """Creates the run folder, or finds the checkpoint to resume from; writes config.yaml.

    Raises:
        InputError: the folder is not a run, holds a run without resume=auto, or a run of another config.
    """
    try:
        return _open_run(config, Path(config.run))
    except OSError as error:
        raise InputError(f"run: {config.run} cannot be written ({error}); choose another with run=FOLDER.") from error


def _open_run(config: Config, folder: Path) -> Path | None:
    stored = folder / "config.yaml"
    if folder.exists() and not stored.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"run: {folder} exists and is not a run folder; choose another with run=FOLDER.")
    last = Checkpoints(folder, config.checkpoint.keep).last()
    if stored.exists():
        differing = config_differences(load_config(stored), config)
        if differing:
            raise InputError(
                f"run: {folder} holds a run of another config ({'; '.join(differing[:3])}); "
                "choose another folder with run=FOLDER."
            )
    if last and config.resume is None:
        raise InputError(
            f"run: {folder} already holds a run (last checkpoint {last.name}); "
            "add resume=auto to continue it, or choose another folder with run=FOLDER."
        )
    write_atomic(stored, dump_config(config))
    return last
