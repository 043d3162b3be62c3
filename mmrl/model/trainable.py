"""What of the towers trains: frozen blocks, LoRA adapters; and gradient checkpointing."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mmrl.errors import InputError
from mmrl.model import lora
from mmrl.model.depth import Depth
from mmrl.model.towers import Modality, Towers, TowersConfig, projection_axes


def prepare_training(built: Towers, config: TowersConfig) -> Towers:
    """The towers with what the config names frozen, with adapters and with gradient checkpointing. Raises InputError: a
    tower does not support one of them."""
    spec = built.image_spec
    inputs = {"image": torch.zeros(1, 3, spec.height, spec.width), "text": built.tokenise(["a"])}
    prepare({side: getattr(built, side) for side in config.sides}, built.model_cfg, config, inputs)
    return replace(built, grad_checkpointing=config.grad_checkpointing)


def prepare(
    towers: dict[Modality, nn.Module],
    model_cfg: dict[str, Any],
    config: TowersConfig,
    inputs: dict[str, torch.Tensor] | None = None,
) -> None:
    """As `prepare_training`, in place. `inputs` is one row for each tower, to find which layers it calls; None for
    towers without weights."""
    for side, tower in towers.items():
        if config.lora is not None and config.adapts(side):
            run = None if inputs is None else partial(_forward, tower, inputs[side])
            lora.inject(tower, config.lora, side, run)
        if trains := _trained_by_name(tower, model_cfg, config, side):
            _freeze(tower, trains)
        if config.grad_checkpointing:
            _enable_grad_checkpointing(tower, side)


@torch.no_grad()
def _forward(tower: nn.Module, x: torch.Tensor) -> None:
    was_training = tower.training
    tower.eval()(x)
    tower.train(was_training)


def _trained_by_name(
    tower: nn.Module, model_cfg: dict[str, Any], config: TowersConfig, side: Modality
) -> Callable[[str], bool] | None:
    """Whether a parameter trains, by its name; None if all of the tower do. Projections always do: they have to learn
    nested dims.

    Raises:
        InputError: model.train_last_blocks for a tower with fewer blocks, or whose blocks are not known by their names.
    """
    last: int | None = getattr(config.train_last_blocks, side)
    if last is not None:
        depth = Depth(name for name, _ in tower.named_parameters())
        if last > depth.blocks:
            kind = type(getattr(tower, "trunk", tower)).__name__
            found = f"has {depth.blocks}" if depth.blocks else "has none that are known by their names"
            remedy = f"set it to at most {depth.blocks}" if depth.blocks else f"use model.lock_{side}"
            raise InputError(
                f"model.train_last_blocks.{side}: {last} blocks, but the {side} tower, a {kind}, {found}; {remedy}."
            )
        return lambda name: depth.from_output(name) <= last
    projection = projection_axes(model_cfg, side) or {}
    if config.adapts(side):
        return lambda name: name in projection or lora.is_adapter(name)
    return projection.__contains__ if getattr(config, f"lock_{side}") else None


def _freeze(tower: nn.Module, trains: Callable[[str], bool]) -> None:
    """Freezes the parameters that do not train, and keeps the statistics of their batch norms."""
    from timm.layers.norm_act import freeze_batch_norm_2d  # open_clip's drops the activation of timm's batch norms

    for name, module in [*tower.named_modules()]:
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and not trains(f"{name}.weight"):
            parent, _, child = name.rpartition(".")
            tower.get_submodule(parent).add_module(child, freeze_batch_norm_2d(module))
    for name, parameter in tower.named_parameters():
        parameter.requires_grad = trains(name)


def _enable_grad_checkpointing(tower: nn.Module, side: Modality) -> None:
    # timm's own module: open_clip's wrapper ignores models that do not support it.
    trunk: Any = getattr(tower, "trunk", tower)
    transformer: Any = getattr(trunk, "transformer", None)
    is_hugging_face = hasattr(transformer, "disable_input_require_grads")
    try:
        if type(tower).__name__ == "ModifiedResNet":
            raise ValueError("it accepts the call and ignores it")
        if is_hugging_face:
            with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # transformers renamed the method
                transformer.gradient_checkpointing_enable({"use_reentrant": False})
            transformer.disable_input_require_grads()  # the backward pass would go through frozen blocks
        else:
            trunk.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, TypeError, ValueError):
        kind = type(transformer if is_hugging_face else trunk).__name__
        raise InputError(
            f"model.grad_checkpointing: the {side} tower, a {kind}, cannot recompute its activations; set it to false, "
            "and set a smaller train.micro_batch to save memory."
        ) from None
