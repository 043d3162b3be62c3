"""Formulas of the memory and the network traffic of a training step at every ZeRO stage.

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
                  Twice that with nesting.rotation, which computes the full dim and the smaller dims in two sweeps, and
                  as often as the loss has terms

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
"""

import math

from mmrl.config import Config
from mmrl.engine.engine import bucket_size
from mmrl.model.footprint import Footprint

MAX_LIVE_PARAMETERS = 1e9


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
    return config.sweeps * rows * (16.0 * model.embed_dim + 32.0 * len(config.nesting.dims))


def loss_memory_traffic(config: Config) -> float:
    """Bytes that the loss of the global batch moves in GPU memory; see the head of this file."""
    loss = config.loss
    if loss.name == "sigmoid":
        per_similarity = 158
    elif loss.kernels != "torch":
        per_similarity = 40 if loss.distillation else 36
    elif loss.distillation:
        per_similarity = 208
    else:
        per_similarity = 172 if loss.label_smoothing else 142
    terms = config.sweeps // config.nesting.sweeps
    return float(per_similarity) * terms * len(config.nesting.dims) * config.train.batch_size**2


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
    sweeps = config.sweeps
    once = sweeps * (B * (e * D + 16) + 2 * 4 * len(config.nesting.dims) * B + 4 * B * D)
    calls = config.nesting.sweeps * 5  # terms share them
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
