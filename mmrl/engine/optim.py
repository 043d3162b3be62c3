"""AdamW with per-parameter learning rates and weight decay, and learning-rate schedules."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmrl.durations import Duration
from mmrl.errors import InputError
from mmrl.model.depth import Depth
from mmrl.model.towers import projection_axes
from mmrl.model.two_tower import MatryoshkaCLIP, ProjectedTower
from mmrl.settings import Settings


class OptimConfig(Settings):
    """AdamW, learning rates and their schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate. The parameter groups below use it unless they have their own."""
    lr_image: float | None = Field(default=None, ge=0)
    """Peak learning rate of the image tower."""
    lr_text: float | None = Field(default=None, ge=0)
    """Peak learning rate of the text tower."""
    lr_token_embedding: float | None = Field(default=None, ge=0)
    """Peak learning rate of the token embeddings, whose rows only get gradients from texts with their token."""
    lr_projection: float | None = Field(default=None, ge=0)
    """Peak learning rate of the projections into the embedding space."""
    lr_logit_scale: float | None = Field(default=None, ge=0)
    """Peak learning rate of the logit scale, and of the logit bias of the sigmoid loss."""
    lr_rotation: float = Field(default=1e-2, ge=0)
    """Peak learning rate of the learnable rotation (nesting.rotation). It has its own Adam without weight decay and is
    not part of clip_norm."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.98], min_length=2, max_length=2)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(default=1e-6, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of matrices. Norms, gains, biases, the logit scale, and position and class embeddings have none."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate per layer of distance from the output, e.g. 0.8 for pretrained towers."""
    schedule: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    """Learning-rate schedule after the warmup."""
    warmup: Duration = "0 steps"
    """Length of the linear warmup."""
    cooldown: Duration = "0 steps"
    """Length of the linear decay at the end of a constant or rsqrt schedule."""
    final_lr: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of the decay, as a fraction of the peak."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Maximum global gradient norm; null disables clipping."""


class MovingAverage(AveragedModel):
    """An exponential moving average of a model's parameters; the buffers are the model's."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Called after each step. AveragedModel would copy its counter to the device, and wait for that."""
        averages: list[torch.Tensor] = [*self.module.parameters()]
        current: list[torch.Tensor] = [*model.parameters()]
        if int(self.n_averaged) == 0:  # pyright: ignore[reportArgumentType]
            torch._foreach_copy_(averages, current)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(averages, current, 1 - self._decay)  # pyright: ignore[reportPrivateImportUsage]
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.n_averaged += 1


def lr_factor(config: OptimConfig, step: int, total: int, warmup: int, cooldown: int) -> float:
    """Learning rate of optimizer step `step` (0 … total-1), as a fraction of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    if config.schedule == "cosine":
        return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "linear":
        return 1 - (1 - config.final_lr) * progress
    level = math.sqrt(max(warmup, 1) / max(step + 1, 1)) if config.schedule == "rsqrt" else 1.0
    if cooldown and step >= total - cooldown:
        level *= 1 - (1 - config.final_lr) * (step - (total - cooldown) + 1) / cooldown
    return level


def set_lr(optimizer: Any, factor: float) -> float:
    """Sets the learning rate of every group to `factor` times its peak; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def build(model: MatryoshkaCLIP, model_cfg: dict[str, Any], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all trained parameters, grouped by learning rate and weight decay.

    Raises:
        InputError: optim.layer_decay for a tower whose layers are not known by their names.
    """
    grouped: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter, lr, decay in _parameter_settings(model, model_cfg, config):
        grouped[lr, decay].append(parameter)
    groups = [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in sorted(grouped.items(), key=lambda item: item[0], reverse=True)
    ]
    # A parameter that is in no group would silently never be trained.
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    # Fused: one pass over memory, a third of the time of the default implementation on two CPU cores.
    return torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def _parameter_settings(
    model: MatryoshkaCLIP, model_cfg: dict[str, Any], config: OptimConfig
) -> Iterator[tuple[nn.Parameter, float, float]]:
    """(parameter, peak learning rate, weight decay) of each trained parameter."""
    for side in model.sides:
        encoder: ProjectedTower = getattr(model, side)
        tower_lr: float | None = getattr(config, f"lr_{side}")
        projection = {f"tower.{name}" for name in projection_axes(model_cfg, side) or {}} | {"projection.weight"}
        without_decay = {f"tower.{name}" for name in _no_weight_decay(encoder.tower)}
        token_embeddings = {f"tower.{name}" for name in _token_embeddings(encoder.tower)}
        depth = Depth(name for name, _ in encoder.named_parameters())
        if config.layer_decay != 1 and not depth.blocks:
            raise InputError(
                f"optim.layer_decay: the layers of this {side} tower are not known by their names; set it to 1, or use "
                f"optim.lr_{side}."
            )
        for name, parameter in encoder.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in projection:
                lr = _first(config.lr_projection, tower_lr, config.lr)
            elif name in token_embeddings and config.lr_token_embedding is not None:
                lr = config.lr_token_embedding
            else:
                lr = _first(tower_lr, config.lr) * config.layer_decay ** depth.from_output(name)
            # A matrix has at least two axes longer than 1, unlike a gain of shape (C, 1, 1, 1).
            decays = sum(size > 1 for size in parameter.shape) > 1 and name not in without_decay
            yield parameter, lr, config.weight_decay if decays else 0.0
    for parameter in (model.log_logit_scale, model.logit_bias):
        if parameter is not None:
            yield parameter, _first(config.lr_logit_scale, config.lr), 0.0


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _token_embeddings(tower: nn.Module) -> set[str]:
    """Names of the embedding weights with one row per token of the vocabulary."""
    size = getattr(tower, "vocab_size", None)
    embeddings = {name: m for name, m in tower.named_modules() if isinstance(m, nn.Embedding)}
    return {f"{name}.weight" for name, embedding in embeddings.items() if embedding.num_embeddings == size}


def _no_weight_decay(tower: nn.Module) -> set[str]:
    """Names of position and class embeddings, and of what the tower or its timm trunk excludes from weight decay."""
    names: set[str] = set()
    for prefix, module in (("", tower), ("trunk.", getattr(tower, "trunk", None))):
        excluded = getattr(module, "no_weight_decay", None)
        if callable(excluded):
            names |= {prefix + name for name in excluded()}  # pyright: ignore[reportGeneralTypeIssues]
    return names | {"positional_embedding", "class_embedding"}
