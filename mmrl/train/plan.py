"""`mmrl plan`: memory, network traffic and time of a run on N GPUs, estimated before any is booked.

Memory per process in bytes. P parameters, of which T are trained; N processes; m pairs per micro-batch; b = B / N pairs
per process; D the embedding's width; e bytes per embedding value (2 under bf16, else 4); K dims.

    weights       4P at stages 0-2. 4P/N at stage 3, plus up to 4*min(P, 1e9) gathered while computing (DeepSpeed's
                  stage3_max_live_parameters)
    gradients     4T at stages 0 and 1, 4T/N at 2 and 3; at 1-3 also two buckets of 4*min(P, 25e6) (reduce_bucket_size).
                  With micro-batches they stay whole until they are reduced once per step, unless
                  engine.reduce_each_micro_batch is set: at stage 2, 4T during forward and backward, then buckets and
                  partition; at stage 3, another 4T. reduce_each_micro_batch is advised only if nothing fits without it
    optimizer     8T (Adam) at stage 0; 12T/N at 1-3, including DeepSpeed's fp32 copy of the partition
    EMA           4P with train.ema
    activations   fixed + m * per pair: measured by forward and backward of the real towers on fake tensors (torch's
                  FakeTensorMode: shapes without memory), following every allocation
    loss          16(b + B)D + 32K(b + B), and tiles of 1/128 of the GPU's memory: for both modalities the embedding,
                  its blocks, their gradients and the concatenation, at most 4 bytes per value (losses/sweep.py).
                  Twice that with nesting.rotation, which computes the full dim and the smaller dims in two sweeps

Stages: Rajbhandari et al. 2020 (arXiv 1910.02054, section 3 and figure 1), with DeepSpeed 0.19's buffers, which
tests/train/test_plan.py and tests/benchmarks/scale.py measure. With micro-batches the loss is computed while no
activations are held, so the larger of the two counts; without them, their sum.

Traffic per process and step, in a ring: an all-gather or reduce-scatter of S bytes sends S(N-1)/N, an all-reduce twice
that (Thakur, Rabenseifner and Gropp 2005, section 4). A is the number of micro-batches.

    loss          all-gather of the text embeddings eBD and of the groups 16B; all-reduce of the column sums 4KB;
                  reduce-scatter of the text gradient 4BD (losses/nested_infonce.py). Twice with nesting.rotation,
                  and an all-reduce of the rotation's gradient 4D^2
    stage 0       all-reduce of the gradients 4T, once
    stage 1       the same, and all-gather of the new weights 4T
    stage 2       the same; with reduce_each_micro_batch the all-reduce A times
    stage 3       reduce-scatter of the gradients 4T, once or A times; all-gather of the weights 4P for each forward and
                  each backward, some of which DeepSpeed may save for a small model

Step time = (FLOPs of towers and loss) / (peak * utilisation) + (memory traffic of the loss) / (memory bandwidth) +
traffic / bandwidth + calls * latency * log2 N, without overlap: an upper bound if the assumed utilisation is reached.
The towers' FLOPs are counted on the fake tensors (torch's FlopCounterMode): 3 forwards for a trained tower, 1 for a
locked one, and one more forward of a trained tower with micro-batches; the loss takes 8B^2D/N (4 multiply-adds, see
mmrl/losses/README.md), with nesting.rotation twice that. Per similarity and dim, the loss moves 36 bytes of GPU memory
by the Triton kernels, which compute the plain InfoNCE; by passes of torch 142, with label smoothing 172, with
distillation 208, and the sigmoid loss 158: counted from the code.

What a GPU can do is in mmrl/hardware.py, from NVIDIA's data sheets; this project has not measured it, and --tflops and
--gigabytes replace it. Assumed: 40 % of the peak and 80 % of the bandwidths are reached; hosts of 8 GPUs; 50 GB/s of
network per GPU between hosts (400 Gb/s each); 20 us of latency per call and doubling; 1.5 GB plus 5 % of the GPU's
memory are lost to CUDA and fragmentation. A core decodes and augments 450 images of 500 x 400 pixels per second
(tests/benchmarks/data.py decode, on the machine of tests/benchmarks/LOG.md).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mmrl import durations
from mmrl.config import Config
from mmrl.data.sources import open_training_set
from mmrl.engine.engine import bucket_size
from mmrl.errors import InputError
from mmrl.hardware import GPUS
from mmrl.model import footprint
from mmrl.model.footprint import Footprint

GB = 1e9
MAX_LIVE_PARAMETERS = 1e9
SHARE_OF_PEAK, SHARE_OF_BANDWIDTH = 0.4, 0.8
GPUS_PER_HOST, BETWEEN_GB_S = 8, 50.0
IMAGES_PER_CORE_S = 450
LATENCY_S = 20e-6
RESERVED_GB, FRAGMENTATION = 1.5, 0.05


@dataclass(frozen=True)
class StageEstimate:
    """One ZeRO stage: memory per GPU with the largest micro-batch that fits, traffic and step time."""

    zero_stage: int
    micro_batch: int | None
    """None if not even one pair fits."""
    reduce_each_micro_batch: bool
    """Whether it fits only with this option."""
    weights_gb: float
    gradients_gb: float
    optimizer_gb: float
    activations_gb: float
    loss_gb: float
    total_gb: float
    traffic_gb: float
    """Sent per process and step."""
    collective_calls: int
    step_seconds: float


@dataclass(frozen=True)
class ResourcePlan:
    """Memory, traffic and time of a run at every ZeRO stage."""

    gpu: str
    gpus: int
    memory_gb: float
    precision: str
    parameters: int
    trained_parameters: int
    global_batch: int
    pairs_per_gpu: int
    steps_per_epoch: int | None
    steps: int | None
    hours: float | None
    """Of the whole run at the stage `best`; None if that or the number of steps is unknown."""
    images_per_host_s: float | None
    """Images per second that the data workers of a host must deliver."""
    notes: list[str]
    stages: list[StageEstimate]
    best: int | None
    """The lowest stage that fits."""

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return dataclasses.asdict(self)


def plan_resources(
    config: Config,
    gpus: int,
    gpu: str = "h100",
    memory_gb: float | None = None,
    tflops: float | None = None,
    gigabytes: float | None = None,
    measured: Footprint | None = None,
) -> ResourcePlan:
    """Estimates memory, traffic and time of `config` on `gpus` GPUs.

    Args:
        gpu: one of mmrl.hardware.GPUS.
        memory_gb: GB of each GPU, instead of its data sheet's.
        tflops: TFLOP/s that a GPU reaches, instead of the constants above.
        gigabytes: GB/s that a GPU sends, instead of the constants above.
        measured: the towers' footprint, if it is known already.

    Raises:
        InputError: a batch that the GPUs do not divide; an unknown model or GPU; a precision that the GPU lacks.
    """
    if gpu not in GPUS:
        raise InputError(f"gpu: {gpu!r} is not known; choose from {', '.join(GPUS)}.")
    sheet = GPUS[gpu]
    memory_gb = memory_gb or sheet.memory_gb
    batch = config.train.batch_size
    if batch % gpus:
        raise InputError(
            f"train.batch_size: {batch} cannot be divided over {gpus} GPUs; use a multiple of {gpus}, e.g. "
            f"{max(gpus, round(batch / gpus) * gpus)}."
        )
    precision = config.engine.precision
    if precision == "auto":
        precision = "bf16" if sheet.has_bfloat16 else "fp32"
    if precision == "bf16" and not sheet.has_bfloat16:
        raise InputError(f"engine.precision: a {gpu} has no bf16 instructions; set it to fp16 or fp32.")
    model = measured or footprint.measure(config.model, precision != "fp32")
    peak = sheet.tflops_32 if precision == "fp32" else sheet.tflops_16
    link_gb_s = sheet.link_gb_s if gpus <= GPUS_PER_HOST else min(sheet.link_gb_s, BETWEEN_GB_S)
    machine = _Machine(
        gpus,
        memory_gb,
        flops_s=(tflops or peak * SHARE_OF_PEAK) * 1e12,
        bytes_s=(gigabytes or link_gb_s * SHARE_OF_BANDWIDTH) * GB,
        memory_bytes_s=sheet.memory_gb_s * SHARE_OF_BANDWIDTH * GB,
    )
    fits = [_fit(config, model, machine, stage, precision) for stage in range(4)]
    best = next((fit.zero_stage for fit in fits if fit.micro_batch is not None and _allowed(config, fit)), None)
    samples, note = _samples(config)
    notes = [note] if note else []
    if config.train.ema is not None:
        notes.append("train.ema keeps a second copy of the weights, which is counted; it cannot be used with stage 3.")
    per_epoch = None if samples is None else samples // batch
    steps = _steps(config, per_epoch)
    seconds = None if best is None else fits[best].step_seconds
    return ResourcePlan(
        gpu=gpu,
        gpus=gpus,
        memory_gb=memory_gb,
        precision=precision,
        parameters=model.parameters,
        trained_parameters=model.trained,
        global_batch=batch,
        pairs_per_gpu=batch // gpus,
        steps_per_epoch=per_epoch,
        steps=steps,
        hours=None if seconds is None or steps is None else steps * seconds / 3600,
        images_per_host_s=None if seconds is None else batch / seconds * min(1, GPUS_PER_HOST / gpus),
        notes=notes,
        stages=fits,
        best=best,
    )


def plan_lines(result: ResourcePlan) -> list[str]:
    """The plan as lines of text."""
    epoch = "unknown" if result.steps_per_epoch is None else f"{result.steps_per_epoch:,}"
    steps = "unknown" if result.steps is None else f"{result.steps:,}"
    shown = [
        f"{result.parameters / 1e6:,.1f} M parameters, {result.trained_parameters / 1e6:,.1f} M trained, "
        f"{result.precision}; {result.gpus} GPUs ({result.gpu}) of {result.memory_gb:g} GB",
        f"global batch {result.global_batch:,}: {result.pairs_per_gpu:,} pairs per GPU; steps per epoch: {epoch}, "
        f"total: {steps}",
        "",
        "GB per GPU    weights  gradients  optimizer  activations     loss    total   micro-batch"
        "   sent/step     calls   step",
    ]
    for fit in result.stages:
        parts = (fit.weights_gb, fit.gradients_gb, fit.optimizer_gb, fit.activations_gb, fit.loss_gb, fit.total_gb)
        widths = (9, 11, 11, 13, 9, 9)
        numbers = "".join(f"{part:{width}.2f}" for part, width in zip(parts, widths, strict=True))
        micro = "does not fit" if fit.micro_batch is None else f"{fit.micro_batch:,}"
        shown.append(
            f"ZeRO stage {fit.zero_stage}{numbers}{micro:>14}{fit.traffic_gb:11.2f} GB{fit.collective_calls:8,}"
            f"{fit.step_seconds:6.2f} s"
        )
    shown.append("")
    if result.best is None:
        shown.append("Nothing fits: use more memory, model.grad_checkpointing=true, or a smaller global batch.")
    else:
        fit = result.stages[result.best]
        micro = "" if fit.micro_batch == result.pairs_per_gpu else f" train.micro_batch={fit.micro_batch}"
        each = " engine.reduce_each_micro_batch=true" if fit.reduce_each_micro_batch else ""
        shown.append(f"Lowest stage that fits: engine.zero_stage={result.best}{micro}{each}")
    if result.hours is not None:
        shown.append(f"Time of the run: about {result.hours:,.1f} hours, if data arrives in time (an estimate)")
    if result.images_per_host_s is not None:
        cores = math.ceil(result.images_per_host_s / IMAGES_PER_CORE_S)
        shown.append(
            f"Data: {result.images_per_host_s:,.0f} images/s per host; of JPEGs of 500 x 400 pixels, about {cores:,} "
            "CPU core(s) decode as many"
        )
    return [*shown, *(f"Note: {note}" for note in result.notes)]


@dataclass(frozen=True)
class _Machine:
    gpus: int
    memory_gb: float
    flops_s: float
    bytes_s: float
    memory_bytes_s: float


def _allowed(config: Config, fit: StageEstimate) -> bool:
    return config.train.ema is None or fit.zero_stage < 3


def _fit(config: Config, model: Footprint, machine: _Machine, stage: int, precision: str) -> StageEstimate:
    """The estimate of one stage with the largest micro-batch that fits; with one pair if none does."""
    share = config.train.batch_size // machine.gpus
    loss = loss_bytes(config, model, machine.gpus) + machine.memory_gb * GB / 128
    room = machine.memory_gb * GB * (1 - FRAGMENTATION) - RESERVED_GB * GB

    def bytes_of(m: int, each: bool) -> tuple[tuple[float, float, float], float]:
        """(weights, gradients, optimizer state), and the peak of activations and loss."""
        keeps_whole = m < share and not each
        states = state_bytes(model, stage, machine.gpus, config.train.ema is not None, keeps_whole)
        after = reduction_bytes(model, machine.gpus) if keeps_whole and stage == 2 else 0.0
        return states, _working(model, m, share, max(loss, after))

    wanted = [config.train.micro_batch] if config.train.micro_batch else _divisors(share)
    fitting: list[int] = []
    each = False
    for each in (True,) if config.engine.reduce_each_micro_batch else (False, stage >= 2):
        needed = {m: bytes_of(m, each) for m in wanted if share % m == 0}
        fitting = [m for m, (states, working) in needed.items() if sum(states) + working <= room]
        if fitting:
            break
    m = max(fitting, default=min(wanted))
    accumulation = share // m
    states, working = bytes_of(m, each)
    traffic, calls = traffic_of(config, model, machine.gpus, stage, accumulation, precision, each)
    activations = model.activations_fixed + m * model.activations_per_pair
    flops = footprint.step_flops(
        model.forward_flops_per_pair,
        model.locked_flops_per_pair,
        model.embed_dim,
        config.train.batch_size,
        forwards=1 if accumulation == 1 else 2,
        sweeps=config.nesting.sweeps,
    )
    return StageEstimate(
        zero_stage=stage,
        micro_batch=m if fitting else None,
        reduce_each_micro_batch=each and stage >= 2 and accumulation > 1,
        weights_gb=states[0] / GB,
        gradients_gb=states[1] / GB,
        optimizer_gb=states[2] / GB,
        activations_gb=activations / GB,
        loss_gb=loss / GB,
        total_gb=(sum(states) + working) / GB + RESERVED_GB,
        traffic_gb=traffic / GB,
        collective_calls=calls,
        step_seconds=flops / machine.gpus / machine.flops_s
        + loss_memory_traffic(config) / machine.gpus / machine.memory_bytes_s
        + traffic / machine.bytes_s
        + calls * LATENCY_S * math.log2(max(machine.gpus, 2)),
    )


def _working(model: Footprint, m: int, share: int, loss: float) -> float:
    activations = model.activations_fixed + m * model.activations_per_pair
    return activations + loss if m == share else max(activations, loss)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def state_bytes(
    model: Footprint, stage: int, gpus: int, averaged: bool = False, keeps_whole: bool = False
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state per process; see the head of this file.

    Args:
        averaged: with an EMA copy of the weights.
        keeps_whole: stages 2 and 3 keep whole gradients until the last micro-batch.
    """
    share = 1 / gpus if stage else 1
    weights = 4.0 * model.parameters * (share if stage == 3 else 1)
    if stage == 3:
        weights += 4 * min(model.parameters, MAX_LIVE_PARAMETERS)
    if averaged:
        weights += 4 * model.parameters
    buckets = 2 * 4.0 * bucket_size(model.parameters) if stage else 0.0
    gradients = 4.0 * model.trained * (share if stage >= 2 else 1) + buckets
    if stage >= 2 and keeps_whole:
        gradients = 4.0 * model.trained + (gradients if stage == 3 else 0)
    return weights, gradients, (12 if stage else 8) * model.trained * share


def reduction_bytes(model: Footprint, gpus: int) -> float:
    """Bytes that stage 2 needs on top of whole gradients to reduce them once, after backward: buckets and partition."""
    return 2 * 4.0 * bucket_size(model.parameters) + 4.0 * model.trained / gpus


def loss_bytes(config: Config, model: Footprint, gpus: int) -> float:
    """Bytes of the loss per process, without its tiles."""
    rows = config.train.batch_size // gpus + config.train.batch_size
    return config.nesting.sweeps * rows * (16.0 * model.embed_dim + 32.0 * _num_dims(config))


def loss_memory_traffic(config: Config) -> float:
    """Bytes that the loss of the global batch moves in GPU memory; see the head of this file."""
    loss = config.loss
    if loss.name == "sigmoid":
        per_similarity = 158
    elif loss.distillation:
        per_similarity = 208
    elif loss.label_smoothing:
        per_similarity = 172
    else:
        per_similarity = 142 if loss.kernels == "torch" or loss.same_group == "positive" else 36
    return float(per_similarity) * _num_dims(config) * config.train.batch_size**2


def traffic_of(
    config: Config, model: Footprint, gpus: int, stage: int, accumulation: int, precision: str, each: bool = False
) -> tuple[float, int]:
    """Bytes sent per process and step, and collective calls per step; see the head of this file.

    Args:
        each: gradients are reduced for each micro-batch instead of once per step.
    """
    if gpus == 1:
        return 0.0, 0
    B, D, e = config.train.batch_size, model.embed_dim, 2 if precision == "bf16" else 4
    # Text embeddings and groups gathered; column sums and the loss reduced; the text gradient scattered.
    sweeps = config.nesting.sweeps
    once = sweeps * (B * (e * D + 16) + 2 * 4 * _num_dims(config) * B + 4 * B * D)
    calls = sweeps * 5
    if config.nesting.learns_rotation:
        once += 2 * 4 * D**2
        calls += 1
    gradients, weights = 4.0 * model.trained, 4.0 * model.parameters
    buckets = math.ceil(model.trained / bucket_size(model.parameters))
    times = accumulation if each and stage >= 2 else 1
    if stage == 0:
        once += 2 * gradients
        calls += buckets
    elif stage < 3:
        once += times * 2 * gradients + gradients
        calls += times * buckets + 2 + 2 * buckets
    else:
        forwards = 2 * accumulation if accumulation > 1 else 1
        once += times * gradients + (forwards + accumulation) * weights
        calls += times * buckets + 2 + (forwards + accumulation) * math.ceil(model.parameters / 5e7)
    return once * (gpus - 1) / gpus, calls


def _num_dims(config: Config) -> int:
    return len(config.nesting.dims)


def _samples(config: Config) -> tuple[int | None, str | None]:
    """Samples per epoch if the shards can be read here, else the reason why not."""
    try:
        return sum(share.per_epoch for share in open_training_set(config.data).shares), None
    except InputError as error:
        return None, f"Steps per epoch are unknown, because the shards cannot be read here: {error}"


def _steps(config: Config, per_epoch: int | None) -> int | None:
    duration = config.train.duration
    if per_epoch is None and isinstance(duration, str) and "epoch" in duration:
        return None
    return max(1, durations.to_steps(duration, config.train.batch_size, per_epoch or 0))
