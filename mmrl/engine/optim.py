"""Learning-rate schedules, and which parameter learns how."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from mmrl.durations import Duration
from mmrl.model.towers import projection_axes
from mmrl.model.two_tower import Encoder, MatryoshkaCLIP
from mmrl.settings import Settings


class OptimConfig(Settings):
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate; the parts below take it unless they have their own."""
    lr_image: float | None = Field(default=None, ge=0)
    lr_text: float | None = Field(default=None, ge=0)
    lr_token_embedding: float | None = Field(default=None, ge=0)
    """Of the text tower's table of tokens, whose rows learn only when their token comes by."""
    lr_projection: float | None = Field(default=None, ge=0)
    lr_logit_scale: float | None = Field(default=None, ge=0)
    """Of the logit scale, and of the sigmoid loss's bias."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.98], min_length=2, max_length=2)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """On matrices; never on norms, gains, biases, the logit scale, nor what a tower asks to leave out (embeddings of
    position and class)."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each layer further from the output learns by this factor slower: for pretrained towers, such as 0.8."""
    schedule: Literal["cosine", "linear", "constant", "rsqrt"] = "cosine"
    warmup: Duration = "0 steps"
    cooldown: Duration = "0 steps"
    """Linear descent at the end, after 'constant' and 'rsqrt'."""
    final_lr: float = Field(default=0.0, ge=0, le=1)
    """Where the descent ends, as a share of the peak."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Gradients of a greater global norm are scaled down to it; null for no clipping."""


def lr_factor(config: OptimConfig, step: int, total: int, warmup: int, cooldown: int) -> float:
    """The learning rate of optimiser step `step` (0 … total-1), as a share of its peak."""
    if step < warmup:
        return (step + 1) / warmup
    left = max(total - warmup, 1)
    progress = (step - warmup) / left
    if config.schedule == "cosine":
        return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    if config.schedule == "linear":
        return 1 - (1 - config.final_lr) * progress
    level = math.sqrt(max(warmup, 1) / max(step + 1, 1)) if config.schedule == "rsqrt" else 1.0
    if cooldown and step >= total - cooldown:
        level *= 1 - (1 - config.final_lr) * (step - (total - cooldown) + 1) / cooldown
    return level


def set_lr(optimizer: Any, factor: float) -> float:
    """Sets every group's learning rate to its share of its own peak; returns the greatest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def build(model: MatryoshkaCLIP, model_cfg: dict[str, Any], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that learn, grouped by their part, decay and depth."""
    grouped: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for _, parameter, lr, decay in _settings_of_parameters(model, model_cfg, config):
        grouped[lr, decay].append(parameter)
    groups = [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in sorted(grouped.items(), key=lambda item: item[0], reverse=True)
    ]
    # A parameter that no group holds would silently stay as it is.
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    # Fused: one pass over memory. On two CPU cores it takes a third of the time of the default loop.
    return torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def _settings_of_parameters(
    model: MatryoshkaCLIP, model_cfg: dict[str, Any], config: OptimConfig
) -> Iterator[tuple[str, nn.Parameter, float, float]]:
    """(name, parameter, peak learning rate, weight decay) of each parameter that learns."""
    sides: list[tuple[Literal["image", "text"], Encoder, float | None]] = [
        ("image", model.image, config.lr_image),
        ("text", model.text, config.lr_text),
    ]
    for side, encoder, tower_lr in sides:
        projection = {f"tower.{name}" for name in projection_axes(model_cfg, side) or {}} | {"projection.weight"}
        without_decay = {f"tower.{name}" for name in _never_decayed(encoder.tower)}
        tables = {f"tower.{name}" for name in _token_tables(encoder.tower)}
        depth = _Depth([name for name, _ in encoder.named_parameters()])
        for name, parameter in encoder.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in projection:
                lr = _first(config.lr_projection, tower_lr, config.lr)
            elif name in tables and config.lr_token_embedding is not None:
                lr = config.lr_token_embedding
            else:
                lr = _first(tower_lr, config.lr) * config.layer_decay ** depth.from_output(name)
            # A matrix has two axes longer than 1; a gain of shape (C, 1, 1, 1) is none.
            decays = sum(size > 1 for size in parameter.shape) > 1 and name not in without_decay
            yield f"{side}.{name}", parameter, lr, config.weight_decay if decays else 0.0
    yield "log_logit_scale", model.log_logit_scale, _first(config.lr_logit_scale, config.lr), 0.0
    if model.logit_bias is not None:
        yield "logit_bias", model.logit_bias, _first(config.lr_logit_scale, config.lr), 0.0


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _token_tables(tower: nn.Module) -> set[str]:
    """Names of the embeddings with a row for each token of the vocabulary."""
    size = getattr(tower, "vocab_size", None)
    embeddings = {name: m for name, m in tower.named_modules() if isinstance(m, nn.Embedding)}
    return {f"{name}.weight" for name, embedding in embeddings.items() if embedding.num_embeddings == size}


def _never_decayed(tower: nn.Module) -> set[str]:
    """Names that the tower, or the timm trunk in it, asks to leave out (embeddings of position and class)."""
    names: set[str] = set()
    for prefix, module in (("", tower), ("trunk.", getattr(tower, "trunk", None))):
        ask = getattr(module, "no_weight_decay", None)
        if callable(ask):
            names |= {prefix + name for name in ask()}  # pyright: ignore[reportGeneralTypeIssues]
    return names | {"positional_embedding", "class_embedding"}


class _Depth:
    """How many layers lie between a parameter and the tower's output, by the numbers in the names of its blocks."""

    _BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers|layer|stages)\.(\d+)\.")
    _INPUT = re.compile(r"embed|conv1|stem|ln_pre|norm_pre")

    def __init__(self, names: list[str]) -> None:
        self._layers = 1 + max((int(m[1]) for name in names if (m := self._BLOCK.search(name))), default=-1)

    def from_output(self, name: str) -> int:
        block = self._BLOCK.search(name)
        if block:
            return self._layers - int(block[1])
        return self._layers + 1 if self._INPUT.search(name) else 0
