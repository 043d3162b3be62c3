"""One optimizer step on one global batch: forward, nested loss, backward, update.

Shapes: b pairs of this process, D the embedding's width, K dims.
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
from mmrl.nesting import Nesting

_DROPOUT_DRAW, _DIMS_DRAW = 1 << 21, 1 << 23


@dataclass(frozen=True)
class Schedule:
    """Lengths in optimizer steps."""

    total: int
    warmup: int
    cooldown: int
    nests_from: int | None = None
    """The step before which the full dim alone is trained, and after which all dims are."""


@dataclass(frozen=True)
class StepResult:
    """What one step computed."""

    loss: NestedLoss
    grad_norm: float
    lr: float
    logit_scale: torch.Tensor
    """(1,) or (K,)."""
    logit_bias: torch.Tensor | None
    """(1,) or (K,), of the sigmoid loss."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient norm that is NaN or infinite. It is the same on every rank, so all of them raise it."""


class TrainStep:
    """Forward, loss, backward and update. The model's weights change here and nowhere else during a run."""

    def __init__(
        self, config: Config, nested: Nesting, engine: Engine, schedule: Schedule, ema: AveragedModel | None
    ) -> None:
        self._config, self._nested, self._engine, self._schedule, self._ema = config, nested, engine, schedule, ema

    def __call__(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """Trains step `step` (from 0) on this process's share of the global batch.

        Raises:
            NonFiniteError: the loss, before the update; or the gradient norm, which is known only after the update, so
                the weights may be damaged and must not be saved.
        """
        engine, schedule = self._engine, self._schedule
        factor = optim.lr_factor(self._config.optim, step, schedule.total, schedule.warmup, schedule.cooldown)
        lr = optim.set_lr(engine.optimizer, factor)
        group_b = torch.cat([batch.group for batch in micro_batches]).to(engine.device)
        keys = [key for batch in micro_batches for key in batch.keys]
        scales: list[tuple[torch.Tensor, torch.Tensor | None]] = []

        def loss_of(
            image_bD: torch.Tensor, text_bD: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
        ) -> NestedLoss:
            scales.append((scale.detach(), None if bias is None else bias.detach()))
            loss = self._loss(step, group_b, image_bD, text_bD, scale, bias)
            if not math.isfinite(value := loss.total.item()):
                origin = describe_non_finite(image_bD, text_bD, keys)
                raise NonFiniteError(f"the loss is {value}" + (f" ({origin})" if origin else ""))
            return loss

        inputs = [(batch.image, batch.text) for batch in micro_batches]
        loss = grad_cache.backward(engine, inputs, loss_of, partial(self._seed_dropout, step))
        norm = engine.step()
        if not math.isfinite(norm) and (engine.loss_scale is None or engine.loss_scale.is_exhausted):
            raise NonFiniteError(f"the gradient norm is {norm}")
        if self._ema is not None:
            self._ema.update_parameters(engine.model)
        logit_scale, logit_bias = scales[-1]
        return StepResult(loss, norm, lr, logit_scale, logit_bias)

    def _loss(
        self,
        step: int,
        group_b: torch.Tensor,
        image_bD: torch.Tensor,
        text_bD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> NestedLoss:
        """The loss of the global batch, at the dims that this step trains."""
        nested, indices = self._nested, self._trained_indices(step)
        if len(indices) < len(nested.dims):
            nested = nested.subset(indices)
            scale = scale if len(scale) == 1 else scale[indices]
            bias = bias if bias is None or len(bias) == 1 else bias[indices]
        with self._engine.timer.phase("loss"):
            return nested_loss(self._config.loss, image_bD, text_bD, scale, bias, nested, group_b)

    def _trained_indices(self, step: int) -> list[int]:
        """Indices of the dims that this step trains."""
        count, sampled = len(self._nested.dims), self._config.nesting.dims_per_step
        if self._schedule.nests_from is not None and step < self._schedule.nests_from:
            return [count - 1]
        if sampled is None:
            return list(range(count))
        return sorted(draws.permutation(count, self._config.seed, step, _DIMS_DRAW)[:sampled].tolist())

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """Seeds dropout by (seed, step, rank, micro-batch), so that both forward passes of GradCache, and a step that
        is repeated after a resume, draw the same masks."""
        names = (self._config.seed, step, comm.world().rank, micro_batch, _DROPOUT_DRAW)
        torch.manual_seed(int(draws.bits(*names) >> 1))
