"""One optimizer step on one global batch: forward, nested loss, backward, update.

Shapes: b pairs of this process, D the embedding's width, K dims, G keys of a group.
"""

import math
from collections.abc import Callable, Sequence
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
from mmrl.train import sides
from mmrl.train.prefixes import Prefixes

_DROPOUT_DRAW = 1 << 21


@dataclass(frozen=True)
class Schedule:
    """Lengths in optimizer steps."""

    total: int
    warmup: int
    cooldown: int
    rise: int
    """Of nesting.prefix_gradient."""


@dataclass(frozen=True)
class StepResult:
    """What one step computed."""

    loss: float
    """L_D + P with a rotation, else the weighted mean of all dims."""
    loss_by_dim: dict[int, float]
    distillation_by_dim: dict[int, float]
    other_terms: dict[str, dict[int, float]]
    """As in `NestedLoss`."""
    grad_norm: float
    lr: float
    logit_scale: list[float]
    """1 or K values, in ascending order of the dims."""
    logit_bias: list[float]
    """1 or K values of the sigmoid loss; empty with another loss."""
    prefix_gradient: float | None
    """The factor on the gradient that the smaller dims send into the towers; None without a rotation."""
    stopping: int
    """The maximum over ranks of `StopRequest.code`; 0 if none was asked to stop."""


class NonFiniteError(ArithmeticError):
    """A loss or a gradient norm that is NaN or infinite. It is the same on every rank, so all of them raise it."""


class TrainStep:
    """Forward, loss, backward and update. The model's weights change here and nowhere else during a run.

    The host waits for a GPU twice in a step: the loss reads what decides on its exponents, and before the update all
    values of the step are read together.
    """

    def __init__(
        self,
        config: Config,
        nested: Nesting,
        engine: Engine,
        schedule: Schedule,
        ema: AveragedModel | None,
        prefixes: Prefixes | None,
        teacher: sides.TeacherOfRun | None = None,
    ) -> None:
        self._teacher = teacher
        self._config, self._nested, self._engine, self._schedule = config, nested, engine, schedule
        self._ema, self._prefixes = ema, prefixes

    def __call__(
        self, step: int, micro_batches: Sequence[Batch], stop_code: Callable[[], int], meanwhile: Callable[[], None]
    ) -> StepResult:
        """Trains step `step` (from 0) on this process's share of the global batch. Collective.

        Args:
            stop_code: `StopRequest.code` of this process.
            meanwhile: called once, while a GPU computes the step.

        Raises:
            NonFiniteError: the loss or a gradient norm. Nothing was updated, or under ZeRO the towers alone.
        """
        engine, schedule = self._engine, self._schedule
        factor = optim.lr_factor(self._config.optim, step, schedule.total, schedule.warmup, schedule.cooldown)
        lr = optim.set_lr(engine.optimizer, factor)
        keys = [key for batch in micro_batches for key in batch.keys]
        prefix_gradient = None
        if self._prefixes is not None:
            prefix_gradient = self._config.nesting.prefix_gradient.at(step + 1, schedule.rise)
        embeddings: list[torch.Tensor] = []
        to_read: dict[str, torch.Tensor] = {}

        def loss_of(
            image_D: torch.Tensor | None, text_D: torch.Tensor | None, scale: torch.Tensor, bias: torch.Tensor | None
        ) -> NestedLoss:
            if self._prefixes is not None:
                scale = torch.cat([self._prefixes.logit_scale_k, scale])
            to_read["scale"] = scale
            if bias is not None:
                to_read["bias"] = bias
            return self._loss(micro_batches, image_D, text_D, scale, bias, prefix_gradient, embeddings)

        context_length = None if self._teacher is None else self._teacher.context_length
        inputs = [sides.tower_inputs(batch, context_length) for batch in micro_batches]
        loss = grad_cache.backward(engine, inputs, loss_of, partial(self._seed_dropout, step))
        to_read |= {"loss": loss.total, "by_dim": torch.stack([*loss.by_dim.values()])}
        if loss.distillation_by_dim:
            to_read["distillation"] = torch.stack([*loss.distillation_by_dim.values()])
        to_read |= {name: torch.stack([*by_dim.values()]) for name, by_dim in loss.other_terms.items()}
        if self._prefixes is not None:
            to_read["prefix_norm"] = self._prefixes.reduce()
        to_read["stop"] = comm.all_reduce_max(torch.full((1,), float(stop_code()), device=engine.device))
        packed = torch.cat([x.detach().float().flatten() for x in to_read.values()])
        meanwhile()
        norm, *values = engine.step(packed)
        of = {name: [values.pop(0) for _ in range(x.numel())] for name, x in to_read.items()}
        if not math.isfinite(of["loss"][0]):
            origin = describe_non_finite(embeddings, keys)
            raise NonFiniteError(f"the loss is {of['loss'][0]}" + (f" ({origin})" if origin else ""))
        self._update_others(factor, norm, of.get("prefix_norm", [0.0])[0])
        return StepResult(
            loss=of["loss"][0],
            loss_by_dim=dict(zip(loss.by_dim, of["by_dim"], strict=True)),
            distillation_by_dim=dict(zip(loss.distillation_by_dim, of.get("distillation", []), strict=True)),
            other_terms={name: dict(zip(by_dim, of[name], strict=True)) for name, by_dim in loss.other_terms.items()},
            grad_norm=norm,
            lr=lr,
            logit_scale=of["scale"],
            logit_bias=of.get("bias", []),
            prefix_gradient=prefix_gradient,
            stopping=int(of["stop"][0]),
        )

    def _update_others(self, lr_factor: float, norm: float, prefix_norm: float) -> None:
        """Updates the rotation and the moving averages after the towers, whose gradient norm is `norm`.

        Raises:
            NonFiniteError: a norm is not finite, and fp16 is not the cause.
        """
        engine = self._engine
        if not math.isfinite(prefix_norm):
            raise NonFiniteError(
                f"the gradient norm of the rotation and the smaller dims' logit scales is {prefix_norm}"
            )
        if not math.isfinite(norm) and (engine.loss_scale is None or engine.loss_scale.is_exhausted):
            raise NonFiniteError(f"the gradient norm is {norm}")
        if self._prefixes is not None:
            self._prefixes.step(lr_factor, skip=not math.isfinite(norm))
        if self._ema is not None:
            self._ema.update_parameters(engine.model)

    def _loss(
        self,
        micro_batches: Sequence[Batch],
        image_D: torch.Tensor | None,
        text_D: torch.Tensor | None,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        prefix_gradient: float | None,
        embeddings: list[torch.Tensor],
    ) -> NestedLoss:
        """The loss of the global batch. The embeddings that it is of are added to `embeddings`."""
        nested, options = self._nested, self._config.loss
        image_bD, text_bD, second, negatives = sides.split(image_D, text_D, micro_batches)
        seconds = () if second is None else (second.image_bD, second.text_bD)
        wrong = () if negatives is None else (negatives.image_nD, negatives.text_nD)
        embeddings += [x for x in (image_bD, text_bD, *seconds, *wrong) if x is not None]
        group_bG = sides.groups(micro_batches)
        teacher = None if self._teacher is None else self._teacher(micro_batches, self._engine)
        with self._engine.timer.phase("loss"):
            if self._prefixes is None or prefix_gradient is None:
                return nested_loss(
                    options, image_bD, text_bD, scale, bias, nested, group_bG, second, negatives, teacher
                )
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
                second,
                negatives,
                teacher,
            )

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """Seeds dropout by (seed, step, rank, micro-batch), so that both forward passes of GradCache, and a step that
        is repeated after a resume, draw the same masks."""
        names = (self._config.seed, step, comm.world().rank, micro_batch, _DROPOUT_DRAW)
        torch.manual_seed(int(draws.bits(*names) >> 1))
