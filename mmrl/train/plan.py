"""`mmrl plan`: memory, network traffic and time of a run on N GPUs, estimated before any is booked.

Formulas of memory and traffic: costs.py.

Step time = (FLOPs of towers and loss) / (peak * utilisation) + (memory traffic of the loss) / (memory bandwidth) +
traffic / bandwidth + calls * latency * log2 N, without overlap: an upper bound if the assumed utilisation is reached.
The towers' FLOPs are counted on the fake tensors (torch's FlopCounterMode): 3 forwards for a trained tower, 1 for a
locked one, and one more forward of a trained tower with micro-batches; the loss takes 8B^2D/N (4 multiply-adds, see
mmrl/losses/README.md), with nesting.rotation twice that. Per similarity and dim, the loss moves 36 bytes of GPU memory
by the Triton kernels, with distillation 40; by passes of torch 142, with label smoothing 172, with distillation 208,
and the sigmoid loss, for which there are no kernels, 158: counted from the code.

What a GPU can do is in mmrl/hardware.py, from NVIDIA's data sheets; this project has not measured it, and --tflops and
--gigabytes replace it. Assumed: 40 % of the peak and 80 % of the bandwidths are reached; hosts of 8 GPUs; 50 GB/s of
network per GPU between hosts (400 Gb/s each); 20 us of latency per call and doubling; 1.5 GB plus 5 % of the GPU's
memory are lost to CUDA and fragmentation. A core decodes and augments 450 images of 500 x 400 pixels per second, and so
many data workers are planned unless data.workers is set (tests/benchmarks/data.py decode, on the machine of
tests/benchmarks/LOG.md). Their memory: see mmrl/data/workers.py.
"""

import math
from dataclasses import dataclass

from mmrl import durations
from mmrl.config import Config
from mmrl.data.sources import open_training_set
from mmrl.data.workers import LoaderMemory
from mmrl.errors import InputError
from mmrl.evaluate.sets import decoding_memory
from mmrl.hardware import GPUS
from mmrl.model import footprint, registry
from mmrl.model.footprint import Footprint
from mmrl.train import costs
from mmrl.train.preflight import bytes_per_sample

GB = 1e9
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
class HostEstimate:
    """The data workers of a host at the stage `best`."""

    images_s: float
    """Images per second that they must deliver; 0 without an image tower."""
    workers_per_gpu: int
    """data.workers, or as many as deliver these images."""
    workers_gb: float
    """Memory of all of them, and of as many that decode for evaluation, without shared memory."""
    shared_gb: float
    """Shared memory (/dev/shm)."""


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
    host: HostEstimate | None
    """None if nothing fits."""
    notes: list[str]
    stages: list[StageEstimate]
    best: int | None
    """The lowest stage that fits."""


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
        memory_gb, tflops, gigabytes: of a GPU: GB, TFLOP/s and GB/s sent, instead of those that are assumed.
        measured: the towers' footprint, if it is known already.

    Raises:
        InputError: a batch or micro-batch that cannot be divided; an unknown model or GPU; a precision that the GPU
            lacks.
    """
    if gpu not in GPUS:
        raise InputError(f"gpu: {gpu!r} is not known; choose from {', '.join(GPUS)}.")
    sheet = GPUS[gpu]
    memory_gb = memory_gb or sheet.memory_gb
    batch = config.train.batch_size
    config.train.split_batch(gpus)
    precision = config.engine.precision
    if precision == "auto":
        precision = "bf16" if sheet.has_bfloat16 else "fp32"
    if precision == "bf16" and not sheet.has_bfloat16:
        raise InputError(f"engine.precision: a {gpu} has no bf16 instructions; set it to fp16 or fp32.")
    model = measured or footprint.measure(config.model, precision != "fp32", rows_per_pair=config.rows_per_pair)
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
    stages = fits if config.train.ema is None else fits[:3]
    best = next((fit for fit in stages if fit.micro_batch is not None), None)
    samples, note = _samples(config)
    notes = [note] if note else []
    if config.train.ema is not None:
        notes.append("train.ema keeps a second copy of the weights, which is counted; it cannot be used with stage 3.")
    per_epoch = None if samples is None else samples // batch
    steps = _steps(config, per_epoch)
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
        hours=None if best is None or steps is None else steps * best.step_seconds / 3600,
        host=None if best is None else _host(config, gpus, best.micro_batch or 1, batch / best.step_seconds),
        notes=notes,
        stages=fits,
        best=None if best is None else best.zero_stage,
    )


def _host(config: Config, gpus: int, micro_batch: int, pairs_s: float) -> HostEstimate:
    """The data workers of a host, for a run of `pairs_s` pairs per second."""
    processes = min(gpus, GPUS_PER_HOST)
    images_s = pairs_s * config.rows_per_pair[0] * processes / gpus
    sample_bytes = bytes_per_sample(registry.read_model_cfg(config.model.name), config.rows_per_pair)
    memory = LoaderMemory(sample_bytes, config.train.batch_size // gpus, micro_batch, processes, pins=True)
    workers = config.data.workers
    if workers is None:
        workers = max(1, math.ceil(images_s / processes / IMAGES_PER_CORE_S))  # one reads texts alone
    private, shared = memory.private(workers), memory.shared(workers, memory.units_ahead(workers))
    if config.evaluation.sets:
        decoding = decoding_memory(sample_bytes, processes)
        private, shared = private + decoding.private(workers), shared + decoding.shared(workers, 1)
    return HostEstimate(images_s, workers, private / GB, shared / GB)


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
    if (host := result.host) is not None:
        if host.images_s:
            shown.append(
                f"Data: {host.images_s:,.0f} images/s per host; of JPEGs of 500 x 400 pixels, about "
                f"{math.ceil(host.images_s / IMAGES_PER_CORE_S):,} CPU core(s) decode as many"
            )
        shown.append(
            f"Host: with {host.workers_per_gpu} data worker(s) per GPU, about {host.workers_gb:,.1f} GB of memory for "
            f"them and those of evaluation, and {host.shared_gb:,.1f} GB of shared memory (/dev/shm)"
        )
    return [*shown, *(f"Note: {note}" for note in result.notes)]


@dataclass(frozen=True)
class _Machine:
    gpus: int
    memory_gb: float
    flops_s: float
    bytes_s: float
    memory_bytes_s: float


def _fit(config: Config, model: Footprint, machine: _Machine, stage: int, precision: str) -> StageEstimate:
    """The estimate of one stage with the largest micro-batch that fits; with one pair if none does."""
    share = config.train.batch_size // machine.gpus
    loss = costs.loss_bytes(config, model, machine.gpus) + machine.memory_gb * GB / 128
    room = machine.memory_gb * GB * (1 - FRAGMENTATION) - RESERVED_GB * GB

    def bytes_of(m: int, each: bool) -> tuple[tuple[float, float, float], float]:
        """(weights, gradients, optimizer state), and the peak of activations and loss."""
        keeps_whole = m < share and not each
        states = costs.state_bytes(model, stage, machine.gpus, config.train.ema is not None, keeps_whole)
        after = max(loss, costs.reduction_bytes(model, machine.gpus) if keeps_whole and stage == 2 else 0.0)
        activations = model.activations_fixed + m * model.activations_per_pair
        return states, activations + after if m == share else max(activations, after)

    wanted = [config.train.micro_batch] if config.train.micro_batch else range(1, share + 1)
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
    traffic, calls = costs.traffic_of(config, model, machine.gpus, stage, accumulation, precision, each)
    activations = model.activations_fixed + m * model.activations_per_pair
    flops = footprint.step_flops(
        model.forward_flops_per_pair,
        model.backward_flops_per_pair,
        model.embed_dim,
        config.train.batch_size,
        forwards=1 if accumulation == 1 else 2,
        sweeps=config.sweeps,
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
        + costs.loss_memory_traffic(config) / machine.gpus / machine.memory_bytes_s
        + traffic / machine.bytes_s
        + calls * LATENCY_S * math.log2(max(machine.gpus, 2)),
    )


def _samples(config: Config) -> tuple[int | None, str | None]:
    """Samples per epoch if the shards can be read here, else the reason why not."""
    try:
        return sum(share.per_epoch for share in open_training_set(config.data, config.model.sides).shares), None
    except InputError as error:
        return None, f"Steps per epoch are unknown, because the shards cannot be read here: {error}"


def _steps(config: Config, per_epoch: int | None) -> int | None:
    duration = config.train.duration
    if per_epoch is None and isinstance(duration, str) and "epoch" in duration:
        return None
    return max(1, durations.to_steps(duration, config.train.batch_size, per_epoch or 0))
