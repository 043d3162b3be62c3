"""The only door to deepspeed: one engine for one process or many, CPU or GPU, any ZeRO stage that a config names.

DeepSpeed's config is a dict made here from ours; no JSON file is written.
"""

import copy
import ctypes
import logging
import math
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from mmrl.distributed import comm
from mmrl.engine.loss_scale import LossScale
from mmrl.engine.timing import StepClock
from mmrl.engine.zero_state import Fragment, fragment_of, gather_moments, scatter_moments
from mmrl.hardware import multiplies_bfloat16
from mmrl.model.towers import Side
from mmrl.model.two_tower import MatryoshkaCLIP, Outputs
from mmrl.settings import Settings, machine


class EngineConfig(Settings):
    """How a step is carried out."""

    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """bf16 runs matrix products and convolutions in bfloat16; weights, optimiser and loss stay float32. fp16 does the
    same in float16, for GPUs without bfloat16: the loss is scaled, and a step whose gradients overflow is skipped and
    counted. auto is bf16 where all processes' devices have such products, else fp32: without, they are many times
    slower."""
    zero_stage: int = machine(0, ge=0, le=3)
    """What is divided among processes: 0 nothing, 1 optimiser state, 2 gradients as well, 3 weights as well."""
    reduce_each_micro_batch: bool = machine(False)
    """With train.micro_batch at stages 2 and 3: divide the gradients after each micro-batch instead of once a step.
    Sends them once for each micro-batch; saves 4 bytes a trained parameter, at stage 2 for each one beyond 5e8."""
    offload: bool = machine(False)
    """Keeps the optimiser's state in the host's memory and steps there, where a GPU is too small; wants ZeRO."""
    compile: bool = machine(False)
    """torch.compile for both towers: minutes at the start, faster steps. Wants a C++ compiler."""
    timeout_minutes: float = Field(default=30.0, gt=0, json_schema_extra={"machine": True})
    """How long a process waits for the others before it gives up."""
    lost_after_seconds: float = Field(default=30.0, ge=5, json_schema_extra={"machine": True})
    """A process that is not heard of for so long is taken for lost, and the others stop, naming it and its host. Four
    times as long outside of the steps: while it starts, evaluates or saves."""
    deepspeed: dict[str, Any] = machine({})
    """Merged over what DeepSpeed is given, for those who know it, such as {zero_optimization: {reduce_bucket_size:
    1_000_000}}; what contradicts other fields is refused."""

    @model_validator(mode="after")
    def _contradict_nothing(self) -> "EngineConfig":
        if self.offload and not self.zero_stage:
            raise ValueError("offload: ZeRO moves the optimiser's state; take zero_stage 1, 2 or 3 with it")
        _merged(_derived(self, None, 1, 1, "fp32"), self.deepspeed)
        return self


class Engine:
    """A model under training: forward, backward, step, and what a resume needs."""

    def __init__(
        self,
        model: MatryoshkaCLIP,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        clip_norm: float | None,
        micro_batch: int,
    ) -> None:
        deepspeed = _import_deepspeed()
        world = comm.world()
        self.precision = config.precision
        if config.precision == "auto":
            self.precision = "fp32" if comm.any_rank(not multiplies_bfloat16(world.device)) else "bf16"
        if world.device.type == "cpu":
            _keep_freed_memory()
        if config.compile:
            model.image.tower.compile()
            model.text.tower.compile()
        self._whole = copy.deepcopy(model) if config.zero_stage == 3 else None
        # DeepSpeed's own scale under torch_autocast never comes down with ZeRO (0.19.8): a norm that is not finite ends
        # the step before its scaler hears of it, and all further steps are skipped. So it is given our scale.
        self.loss_scale = LossScale() if self.precision == "fp16" else None
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=(_InHalf(model) if self.loss_scale else model).to(world.device),
            optimizer=optimizer,
            config=deepspeed_config(
                config, clip_norm, micro_batch, world.size, self.precision, sum(p.numel() for p in model.parameters())
            ),
            dist_init_required=False,
        )
        if world.size == 1 and config.zero_stage == 0:
            # It would flatten all gradients, reduce them with nobody and copy them back.
            self._engine.enable_backward_allreduce = False
        self.model = model
        self.device = world.device
        self.clock = StepClock(world.device)
        self._zero_stage = config.zero_stage
        # One reduction a step: DeepSpeed reduces at each micro-batch from stage 2 on, unless told to wait. The price is
        # whole gradients until the last of them. At stage 2 they take the room of its bucket, which then comes after
        # the activations: no more memory in all, up to 5e8 parameters. At stage 3, 4 bytes a parameter more. Towers are
        # small beside their activations, and gradients sent 16 times are not small beside a step.
        self._reduces_at_the_end = config.zero_stage >= 2 and not config.reduce_each_micro_batch
        self._gathered = deepspeed.zero.GatheredParameters
        # Without ZeRO, DeepSpeed clips but does not tell the norm.
        self._clip_here = (clip_norm or math.inf) if config.zero_stage == 0 else None

    def __call__(self, image_BCHW: torch.Tensor | None, text_BL: torch.Tensor | None) -> Any:
        """The model's forward, under the configured precision, on the engine's device."""
        with self.clock.part("towers"):
            return self._engine(
                *(None if x is None else x.to(self.device, non_blocking=True) for x in (image_BCHW, text_BL))
            )

    @property
    def whole_model(self) -> MatryoshkaCLIP:
        """The model with all its weights, to evaluate and to save: as of the last `refresh` where ZeRO divides them."""
        return self._whole or self.model

    def refresh(self) -> None:
        """Brings `whole_model` up to date; called on every process."""
        if self._whole is None:
            return
        with torch.no_grad():
            for whole, divided in zip(self._whole.parameters(), self.model.parameters(), strict=True):
                with self._gathered([divided]):
                    whole.copy_(divided)
            for whole, buffer in zip(self._whole.buffers(), self.model.buffers(), strict=True):
                whole.copy_(buffer)

    def trains(self, side: Side) -> bool:
        """Whether anything of a tower is learnt."""
        return any(parameter.requires_grad for parameter in getattr(self.model, side).parameters())

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Around the backward passes of a step that has several: their gradients are reduced once, at the end."""
        if not self._reduces_at_the_end:
            yield
            return
        with ExitStack() as reduction:
            reduction.enter_context(self._engine.coalesce_grad_reduction())
            yield
            with self.clock.part("backward"):
                reduction.close()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of `loss`, a mean over processes. `last`: the last one before a step."""
        with self.clock.part("backward"):
            self._engine.set_gradient_accumulation_boundary(last or self._reduces_at_the_end)
            if self.loss_scale is not None:
                if self._zero_stage:
                    self.optimizer.override_loss_scale(self.loss_scale.value)  # ZeRO multiplies, and divides again
                else:
                    loss = loss * self.loss_scale.value
            self._engine.backward(loss)

    def step(self) -> float:
        """Clips, and makes one optimiser step, but none where fp16's gradients overflowed. Returns the gradient's norm
        before clipping, infinite in that case."""
        with self.clock.part("optimizer"):
            norm = self._step_alone() if self._clip_here is not None else self._step_under_zero()
            if self.loss_scale is not None:
                self.loss_scale.update(math.isfinite(norm))
            return norm

    def _step_under_zero(self) -> float:
        """ZeRO clips, and makes no step where the norm is not finite."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def _step_alone(self) -> float:
        assert self._clip_here is not None
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_here * scale).item() / scale
        if self.loss_scale is not None:
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return math.inf
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / scale)
        self._engine.step()
        return norm

    def moments(self, of: Collection[str] | None = None) -> dict[str, torch.Tensor]:
        """The optimiser's state as whole tensors by name, `of` some parameters or of all, on the main process; called
        on every process."""
        shapes = {name: p.shape for name, p in self._whole_parameters() if of is None or name in of}
        divided = self._zero_stage > 0 and comm.world().size > 1
        return gather_moments(shapes, self._fragments(), self._base_optimizer, divided)

    def load(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        """Goes on from whole tensors: the model's state and what `moments` gave, of any ZeRO stage and world size."""
        self._load_weights(weights)
        fragments = self._fragments()
        if self._zero_stage:
            for name, fragment in fragments.items():
                if fragment is not None:
                    fragment.write(fragment.holder.data, weights[name])
        if moments:
            scatter_moments(moments, fragments, self._base_optimizer)

    @torch.no_grad()
    def _load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        if self._whole is None:
            self.model.load_state_dict(weights)
            return
        self._whole.load_state_dict(weights)
        for whole, divided in zip(self._whole.parameters(), self.model.parameters(), strict=True):
            with self._gathered([divided], modifier_rank=0):
                divided.copy_(whole)
        for whole, buffer in zip(self._whole.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(whole)

    def _whole_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those that learn, by name, in their whole shapes."""
        return ((name, p) for name, p in self.whole_model.named_parameters() if p.requires_grad)

    def _fragments(self) -> dict[str, Fragment | None]:
        return {
            name: fragment_of(parameter, self.optimizer, self._zero_stage)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """torch's own, which DeepSpeed wraps under ZeRO."""
        return self.optimizer.optimizer if self._zero_stage else self.optimizer


class _InHalf(torch.nn.Module):
    """The model's forward in float16. What it returns is float32: before the loss is scaled, the gradients of
    embeddings are too small for float16."""

    def __init__(self, model: MatryoshkaCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: torch.Tensor | None, text_ML: torch.Tensor | None) -> Outputs:
        with torch.autocast(comm.world().device.type, torch.float16):
            image_BD, text_MD, scale, bias = self.model(image_BCHW, text_ML)
        image_BD, text_MD = (None if x is None else x.float() for x in (image_BD, text_MD))
        return image_BD, text_MD, scale, bias


# What would change the learning behind the back of our own fields, or be read by nobody.
_NOT_ALLOWED = {"optimizer", "scheduler", "fp16", "bf16", "amp", "prescale_gradients", "checkpoint"}


def bucket_size(parameters: int) -> int:
    """Numbers that ZeRO reduces at once. DeepSpeed's own 500 million are 2 GB on each GPU however small the model."""
    return min(500_000_000, parameters)


def deepspeed_config(
    config: EngineConfig, clip_norm: float | None, micro_batch: int, world_size: int, precision: str, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's dict for ours."""
    merged = _merged(_derived(config, clip_norm, micro_batch, world_size, precision), config.deepspeed)
    merged["zero_optimization"].setdefault("reduce_bucket_size", bucket_size(parameters))
    return merged


def _merged(ours: dict[str, Any], theirs: dict[str, Any], path: str = "deepspeed") -> dict[str, Any]:
    """Ours with what the user adds. Raises ValueError where that contradicts ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        name = f"{path}.{key}"
        if key in _NOT_ALLOWED:
            raise ValueError(f"{name} cannot be set here; optim and engine.precision decide it")
        if isinstance(value, dict):
            merged[key] = _merged(ours.get(key, {}), value, name)
        elif key in ours and ours[key] != value:
            raise ValueError(f"{name}: {value!r} contradicts {ours[key]!r}, which other fields of the config decide")
        else:
            merged[key] = value
    return merged


def _derived(
    config: EngineConfig, clip_norm: float | None, micro_batch: int, world_size: int, precision: str
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": micro_batch * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        # Left out, DeepSpeed clips at 1.0; without ZeRO, `Engine.step` clips.
        "gradient_clipping": clip_norm if clip_norm and config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Its own optimiser for the host wants a compiler; torch's fused AdamW does the same.
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _keep_freed_memory() -> None:
    """Lets one step's freed tensors serve the next, where glibc would hand them back to the kernel and fault them in
    again: a tenth of a small model's step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own mapping


def _import_deepspeed() -> Any:
    """DeepSpeed without its guesses: it would look for an accelerator, talk on import and compile an extension."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of each skipped step; so do we
    # On a CPU, DeepSpeed builds this shared-memory kernel for a minute and fails without a compiler; it serves
    # inference only.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
