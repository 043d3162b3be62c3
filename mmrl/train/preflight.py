"""Checks of config and data before a run, in seconds, and the creation of the run folder."""

import math
import os
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmrl.config import Config
from mmrl.data.overlap import overlap_note
from mmrl.data.pack.hub import pack_missing
from mmrl.data.samples import SampleReader
from mmrl.data.second import has_table
from mmrl.data.shards import spec_list
from mmrl.data.sources import named_sources, open_training_set
from mmrl.data.stores import cache_folder
from mmrl.data.stream import window_and_lanes
from mmrl.data.workers import LoaderMemory
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.errors import InputError
from mmrl.evaluate.configured import ConfiguredSet, check_best, open_configured
from mmrl.evaluate.sets import DECODING_SHARE, decoding_memory
from mmrl.losses.triton_probe import require_triton, triton_problem
from mmrl.model import bundle, registry
from mmrl.nesting import Nesting, check_dims
from mmrl.train import host_checks
from mmrl.train.run_folder import open_run


@dataclass(frozen=True)
class PreparedRun:
    """A checked run: its dims, its data and where it resumes from."""

    nested: Nesting
    reader: SampleReader
    evaluation_sets: dict[str, ConfiguredSet]
    evaluation_dims: list[int]
    accumulation: int
    """Micro-batches per step, on each process."""
    workers: int
    """DataLoader worker processes of each process."""
    prefetch: int
    """Units that each data worker prepares in advance, see LoaderMemory."""
    resume_from: Path | None


def pack_data_sets(config: Config, world: World) -> None:
    """Packs the Hugging Face data sets of a config into the cache folder, unless they are there. Collective.

    Raises:
        InputError: one cannot be packed; all ranks stop.
    """
    sets = (*named_sources(config.data), *config.evaluation.sets.values())
    specs = [str(spec) for one in sets for spec in spec_list(one.shards)]
    host_checks.agree(world, lambda: pack_missing(specs))


def prepare(config: Config, world: World) -> PreparedRun:
    """Runs every check that needs no model on every rank, then creates the run folder on rank 0. Collective.

    Raises:
        InputError: a check failed on any rank; all ranks stop.
    """
    ranks_here = comm.all_hosts().count(comm.host())
    prepared = host_checks.agree(world, lambda: _check(config, world, ranks_here))
    assert prepared is not None
    readers = (prepared.reader, *(one.reader for one in prepared.evaluation_sets.values()))
    fingerprints = tuple(reader.fingerprint for reader in readers)
    seen = comm.all_gather_objects(fingerprints)
    if len(set(seen)) > 1:
        host_checks.agree(world, lambda: _check_same_shards(fingerprints, seen))
    steps_per_epoch = sum(share.per_epoch for share in prepared.reader.shares) // config.train.batch_size
    opened = host_checks.agree(world, lambda: open_run(config, steps_per_epoch), rank_0_only=True)
    resume_from, note = comm.broadcast_object(opened)
    kernels_note = _kernels_note(config, world.device)
    if world.is_rank_0:
        sets = prepared.evaluation_sets.items()
        if "image" in config.model.sides:
            shared = (overlap_note(name, prepared.reader, one.reader) for name, one in sets)
            prepared.reader.notes += filter(None, shared)
        prepared.reader.notes += filter(None, [note, kernels_note])
    host_checks.same_folder(config, world)
    return replace(prepared, resume_from=resume_from)


def _check(config: Config, world: World, ranks_here: int) -> PreparedRun:
    share, micro_batch = config.train.split_batch(world.size)
    if config.train.ema is not None and config.engine.zero_stage == 3:
        raise InputError("train.ema: needs whole weights, which ZeRO stage 3 partitions; use engine.zero_stage=2.")
    bundle.check_towers(config.model)
    model_cfg = registry.read_model_cfg(config.model.name)
    width = model_cfg["embed_dim"]
    on_gpu, others = world.device.type == "cuda", 0.0
    if on_gpu and config.evaluation.sets:
        rows = (1, 1) if config.model.towers == "both" else config.rows_per_pair  # as `sets.embed` reads them
        decoding = decoding_memory(bytes_per_sample(model_cfg, rows), ranks_here)
        count = decoding.default_workers(DECODING_SHARE)
        others = decoding.private(count) + decoding.shared(count, 1)
    memory = LoaderMemory(
        bytes_per_sample(model_cfg, config.rows_per_pair), share, micro_batch, ranks_here, on_gpu, others
    )
    workers = config.data.workers
    if workers is None:
        workers = 0 if config.data.cache else memory.default_workers()
    prefetch = memory.fitting_units_ahead(workers)
    nested = _check_nesting(config, width)
    if config.loss.kernels == "triton":
        require_triton(world.device)
    if config.engine.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise InputError(
            "engine.compile: torch.compile needs a C++ compiler, and none is in PATH; install g++ or remove this key."
        )
    if config.engine.compile and os.access(cache := cache_folder(config.data.remote), os.W_OK):
        # The default is a folder in /tmp that anybody could have made, with code in it.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    evaluation_dims = config.evaluation.dims or list(nested.dims)
    check_dims(evaluation_dims, width, "evaluation.dims")
    check_best(config.evaluation, evaluation_dims, config.model.sides)
    reader = open_training_set(config.data, config.model.sides)
    if config.loss.second_members and has_table(reader, config.loss.second_members):
        reader.all_groups()  # long where shards are remote; other ranks wait here, but not in the first step
    if workers and prefetch < (wanted := memory.units_ahead(workers)):
        reader.notes.append(
            f"The shared memory has room for {prefetch} of the {wanted} units of {memory.unit_bytes / 1e6:,.1f} MB "
            "that each data worker would prepare in advance; give the container more (docker run --shm-size)."
        )
    _check_cache_size(config, reader, ranks_here / world.size)
    return PreparedRun(
        nested=nested,
        reader=reader,
        evaluation_sets=open_configured(config.evaluation, config.data, config.model.sides),
        evaluation_dims=evaluation_dims,
        accumulation=share // micro_batch,
        workers=workers,
        prefetch=prefetch,
        resume_from=None,
    )


def _check_cache_size(config: Config, reader: SampleReader, share_of_host: float) -> None:
    """Refuses a cache of remote shards that is smaller than the shards which a host reads at one time."""
    remote, sizes = config.data.remote, reader.shard_bytes()
    samples = sum(share.per_epoch for share in reader.shares)
    lanes = math.ceil(window_and_lanes(config.data, config.train.batch_size, samples)[1] * share_of_host)
    shards = 1 + remote.shards_ahead(lanes)
    needed = min(sum(sizes), lanes * shards * max(sizes)) / 1e9
    if reader.is_remote and needed > remote.gigabytes:
        raise InputError(
            f"data.remote.gigabytes: {remote.gigabytes:g} GB are too few for the shards that this host reads at one "
            f"time ({lanes} lanes, each with {shards} shards of up to {max(sizes) / 1e9:.2g} GB), so all would be "
            f"downloaded several times; set it to at least {needed:.3g}, or data.lanes or data.remote.read_ahead lower."
        )


def bytes_per_sample(model_cfg: dict[str, Any], rows_per_pair: tuple[int, int] = (1, 1)) -> int:
    """Bytes of one row of a batch: the uint8 images, the int64 tokens of the texts, and some int64 ids."""
    size = model_cfg["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    images, texts = rows_per_pair
    return images * 3 * height * width + texts * 8 * model_cfg["text_cfg"].get("context_length", 77) + 32


def _check_nesting(config: Config, width: int) -> Nesting:
    """The nested dims of an embedding with `width` dims."""
    nesting = config.nesting
    nested = Nesting.from_dims(nesting.dims, nesting.weights, width)
    if not all(nested.weights):
        dims = [dim for dim, weight in zip(nested.dims, nested.weights, strict=True) if not weight]
        raise InputError(
            f"nesting.weights: {dims} have weight 0 and would not be trained; remove them from nesting.dims, and name "
            "them in evaluation.dims to score them."
        )
    rotates = nesting.rotation or nesting.rotate_at_start or nesting.rotate_at_end
    if rotates and nested.dims[-1] != width:
        raise InputError(
            f"nesting.dims: {nesting.dims} must include the full dim, {width}, which a rotation preserves; add it, or "
            "set nesting.rotation: false."
        )
    if nesting.learns_rotation and config.loss.name == "sigmoid":
        raise InputError(
            "loss.name: sigmoid trains without a learnable rotation; set nesting.rotation: false (and "
            "nesting.rotate_at_start: true for pretrained towers)."
        )
    for key in ("rotate_at_start", "rotate_at_end"):
        if getattr(nesting, key) and len(nested.dims) == 1:
            raise InputError(f"nesting.{key}: serves dims below {width}, and nesting.dims has none; add some.")
    return nested


def _kernels_note(config: Config, device: torch.device) -> str | None:
    """A line for the console if the loss's Triton kernels cannot run on the GPU of a rank. Collective."""
    uses = device.type == "cuda" and config.loss.name == "infonce" and config.loss.kernels == "auto"
    problems = comm.all_gather_objects(triton_problem(device) if uses else None)
    for rank, problem in enumerate(problems):
        if problem:
            return f"Note: rank {rank} computes the loss by PyTorch operations, as its Triton kernels fail: {problem}"
    return None


def _check_same_shards(fingerprints: tuple[str, ...], seen: list[tuple[str, ...]]) -> None:
    if fingerprints != Counter(seen).most_common(1)[0][0]:
        raise InputError("data: the shards of this host differ from those of the other hosts; copy them again.")
