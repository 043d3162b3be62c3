"""One optimizer step on one global batch: forward, nested loss, backward, update.

Shapes: b pairs of this process, D the embedding's width, K dims, G keys of a group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim.swa_utils import AveragedModel

from mmrl.config import Config
from mmrl.data import draws
from mmrl.data.batches import Batch
from mmrl.distributed import comm
from mmrl.distributed.stragglers import describe_non_finite
from mmrl.engine import grad_cache, optim
from mmrl.engine.engine import Engine
from mmrl.losses.config import nested_loss
from mmrl.losses.inputs import NestedLoss
from mmrl.losses.rotated import rotated_nested_info_nce
from mmrl.nesting import Nesting
from mmrl.train.prefixes import Prefixes

_DROPOUT_DRAW = 1 << 21


@dataclass(frozen=True)
class Schedule:
    """Lengths in optimizer steps."""

    total: int
    warmup: int
    cooldown: int


@dataclass(frozen=True)
class StepResult:
    """What one step computed."""

    loss: NestedLoss
    """`total` is L_D + P with a rotation, else the weighted mean of all dims."""
    grad_norm: float
    lr: float
    logit_scale: torch.Tensor
    """(1,) or (K,), in ascending order of the dims."""
    logit_bias: torch.Tensor | None
    """(1,) or (K,), of the sigmoid loss."""
    prefix_gradient: float | None
    """The factor on the gradient that the smaller dims send into the towers; None without a rotation."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient norm that is NaN or infinite. It is the same on every rank, so all of them raise it."""


class TrainStep:
    """Forward, loss, backward and update. The model's weights change here and nowhere else during a run."""

    def __init__(
        self,
        config: Config,
        nested: Nesting,
        engine: Engine,
        schedule: Schedule,
        ema: AveragedModel | None,
        prefixes: Prefixes | None,
    ) -> None:
        self._config, self._nested, self._engine, self._schedule = config, nested, engine, schedule
        self._ema, self._prefixes = ema, prefixes

    def __call__(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Trains step `step` (from 0) on this process's share of the global batch.

        Raises:
            NonFiniteError: the loss, before the update; or the gradient norm, which is known only after the update, so
                the weights may be damaged and must not be saved.
        """
        engine, schedule = self._engine, self._schedule
        factor = optim.lr_factor(self._config.optim, step, schedule.total, schedule.warmup, schedule.cooldown)
        lr = optim.set_lr(engine.optimizer, factor)
        group_bG = torch.cat([batch.groups for batch in micro_batches]).to(engine.device)
        keys = [key for batch in micro_batches for key in batch.keys]
        prefix_gradient = None
        if self._prefixes is not None:
            prefix_gradient = self._config.nesting.prefix_gradient.at(step + 1, schedule.total)
        scales: list[tuple[torch.Tensor, torch.Tensor | None]] = []

        def loss_of(
            image_bD: torch.Tensor, text_bD: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
        ) -> NestedLoss:
            if self._prefixes is not None:
                scale = torch.cat([self._prefixes.logit_scale_k, scale])
            # Copies, since the bias is the parameter itself, which the step changes.
            scales.append((scale.detach().clone(), None if bias is None else bias.detach().clone()))
            loss = self._loss(group_bG, image_bD, text_bD, scale, bias, prefix_gradient)
            if not math.isfinite(value := loss.total.item()):
                origin = describe_non_finite(image_bD, text_bD, keys)
                raise NonFiniteError(f"the loss is {value}" + (f" ({origin})" if origin else ""))
            return loss

        inputs = [(batch.image, batch.text) for batch in micro_batches]
        loss = grad_cache.backward(engine, inputs, loss_of, partial(self._seed_dropout, step))
        norm = engine.step()
        if self._prefixes is not None and not math.isfinite(
            prefix_norm := self._prefixes.step(factor, skip=not math.isfinite(norm))
        ):
            raise NonFiniteError(
                f"the gradient norm of the rotation and the smaller dims' logit scales is {prefix_norm}"
            )
        if not math.isfinite(norm) and (engine.loss_scale is None or engine.loss_scale.is_exhausted):
            raise NonFiniteError(f"the gradient norm is {norm}")
        if self._ema is not None:
            self._ema.update_parameters(engine.model)
        logit_scale, logit_bias = scales[-1]
        return StepResult(loss, norm, lr, logit_scale, logit_bias, prefix_gradient)

    def _loss(
        self,
        group_bG: torch.Tensor,
        image_bD: torch.Tensor,
        text_bD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        prefix_gradient: float | None,
    ) -> NestedLoss:
        """The loss of the global batch."""
        nested, options = self._nested, self._config.loss
        with self._engine.timer.phase("loss"):
            if self._prefixes is None or prefix_gradient is None:
                return nested_loss(options, image_bD, text_bD, scale, bias, nested, group_bG)
            return rotated_nested_info_nce(
                image_bD,
                text_bD,
                scale,
                nested.dims,
                self._prefixes.rotation,
                prefix_gradient,
                nested.weights,
                group_bG,
                options,
            )

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """Seeds dropout by (seed, step, rank, micro-batch), so that both forward passes of GradCache, and a step that
        is repeated after a resume, draw the same masks."""
        names = (self._config.seed, step, comm.world().rank, micro_batch, _DROPOUT_DRAW)
        torch.manual_seed(int(draws.bits(*names) >> 1))
