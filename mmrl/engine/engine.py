"""The DeepSpeed engine: forward, backward and optimizer step on CPU or GPU, for any world size and ZeRO stage.

DeepSpeed gets its config as a dict that is derived from EngineConfig; no JSON file is written.
"""

import copy
import ctypes
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from pydantic import model_validator

from mmrl.distributed import comm
from mmrl.distributed.gradients import GradientReducer
from mmrl.engine.loss_scale import LossScale
from mmrl.engine.timing import StepTimer
from mmrl.engine.zero_state import Fragment, fragment_of, gather_moments, scatter_moments
from mmrl.hardware import has_native_bfloat16
from mmrl.model.towers import Modality
from mmrl.model.two_tower import MatryoshkaCLIP, Outputs, Precision
from mmrl.settings import Settings, machine_field

Rows = torch.Tensor | tuple[torch.Tensor, ...]
"""The rows of a batch in one tensor, or in several."""


class EngineConfig(Settings):
    """Precision, ZeRO, offloading, compilation and timeouts."""

    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """bf16 and fp16 run matrix products and convolutions in 16 bits; weights, optimizer and loss stay fp32. fp16 scales
    the loss, and skips and counts steps whose gradients overflow. auto is bf16 if the devices of all processes have
    bfloat16 instructions, else fp32: without them, bf16 is many times slower."""
    zero_stage: int = machine_field(0, ge=0, le=3)
    """What is sharded over processes: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    reduce_each_micro_batch: bool = machine_field(False)
    """With train.micro_batch and ZeRO stage 2 or 3: reduce gradients after every micro-batch instead of once per step.
    More traffic, but saves 4 bytes per trained parameter (at stage 2 only per parameter beyond 500 million)."""
    offload: bool = machine_field(False)
    """Keep the optimizer state in host memory and update weights there. Requires ZeRO stage 1, 2 or 3."""
    compile: bool = machine_field(False)
    """Use torch.compile for both towers: minutes at the start, faster steps. Requires a C++ compiler."""
    timeout_minutes: float = machine_field(30.0, gt=0)
    """Timeout of a collective."""
    lost_after_seconds: float = machine_field(30.0, ge=5)
    """A process without a heartbeat for this long is considered lost, and the others stop with its rank and host. Four
    times as long while a run starts, evaluates or saves. A run also stops if it waits for a batch while no worker
    loads a sample for this long."""
    deepspeed: dict[str, Any] = machine_field({})
    """Extra DeepSpeed config, e.g. {zero_optimization: {reduce_bucket_size: 1_000_000}}. Values that contradict other
    fields are refused."""

    @model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        if self.offload and not self.zero_stage:
            raise ValueError("offload: requires ZeRO; set zero_stage to 1, 2 or 3")
        _merged(_derived(self, None, 1, 1, "fp32"), self.deepspeed)
        return self


class Engine:
    """A model in training: forward, backward, optimizer step, and full weights and moments for checkpoints."""

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
        self.precision: Precision
        if config.precision != "auto":
            self.precision = config.precision
        else:
            self.precision = "fp32" if comm.any_rank(not has_native_bfloat16(world.device)) else "bf16"
        if world.device.type == "cpu":
            _keep_freed_memory()
        if config.compile:
            model.image.tower.compile()
            model.text.tower.compile()
        self._full_copy = copy.deepcopy(model) if config.zero_stage == 3 else None
        # Under torch_autocast with ZeRO, DeepSpeed 0.19.8 never lowers its own loss scale: a non-finite norm ends the
        # step before the scaler is updated, so that all further steps are skipped. Hence our own loss scale.
        self.loss_scale = LossScale() if self.precision == "fp16" else None
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=(_Float16Model(model) if self.loss_scale else model).to(world.device),
            optimizer=optimizer,
            config=deepspeed_config(
                config, clip_norm, micro_batch, world.size, self.precision, sum(p.numel() for p in model.parameters())
            ),
            dist_init_required=False,
        )
        self._reducer: GradientReducer | None = None
        if config.zero_stage == 0:
            # DeepSpeed would reduce all gradients after the backward pass, with one process too.
            self._engine.enable_backward_allreduce = False
            if world.size > 1:
                trained = [p for p in model.parameters() if p.requires_grad]
                self._reducer = GradientReducer(trained, bucket_size(sum(p.numel() for p in trained)))
        self.model = model
        self.device = world.device
        self.timer = StepTimer(world.device)
        self._zero_stage = config.zero_stage
        # From stage 2 on, DeepSpeed reduces gradients after every micro-batch by default. We reduce once per step,
        # which keeps full gradients until the last micro-batch. At stage 2 that needs no more memory in all up to 5e8
        # parameters, because its bucket is then allocated after the activations are freed; at stage 3 it needs 4 bytes
        # per parameter more. CLIP towers are small next to their activations, and reducing 16 times per step is slow.
        self._reduces_once = config.zero_stage >= 2 and not config.reduce_each_micro_batch
        self._gathered = deepspeed.zero.GatheredParameters
        # Without ZeRO, DeepSpeed does not return the gradient norm, so `step` clips instead.
        self._clip_norm = (clip_norm or math.inf) if config.zero_stage == 0 else None

    def __call__(self, image_BCHW: Rows | None, text_BL: Rows | None) -> Any:
        """The model's forward pass, in the configured precision, on the engine's device."""
        with self.timer.phase("towers"):
            return self._engine(*(None if x is None else self.to_device(x) for x in (image_BCHW, text_BL)))

    def to_device(self, rows: Rows) -> torch.Tensor:
        """The rows in one tensor on the engine's device, without waiting for it if they are in page-locked memory."""
        if isinstance(rows, tuple):  # several units of a batch
            return torch.cat([self.to_device(one) for one in rows])
        return rows.to(self.device, non_blocking=True)

    @property
    def full_model(self) -> MatryoshkaCLIP:
        """The unsharded model, to evaluate and save. Under ZeRO stage 3 it is as of the last `gather_full_model`."""
        return self._full_copy or self.model

    def gather_full_model(self) -> None:
        """Updates `full_model` from the shards of all ranks. Collective."""
        if self._full_copy is None:
            return
        with torch.no_grad():
            for full, sharded in zip(self._full_copy.parameters(), self.model.parameters(), strict=True):
                with self._gathered([sharded]):
                    full.copy_(sharded)
            for full, buffer in zip(self._full_copy.buffers(), self.model.buffers(), strict=True):
                full.copy_(buffer)

    def trains(self, side: Modality) -> bool:
        """Whether a tower has trained parameters."""
        return any(parameter.requires_grad for parameter in getattr(self.model, side).parameters())

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Wraps the backward passes of all micro-batches of a step, so that gradients are reduced once, at the end."""
        if not self._reduces_once:
            yield
            return
        with ExitStack() as reduction:
            reduction.enter_context(self._engine.coalesce_grad_reduction())
            yield
            with self.timer.phase("backward"):
                reduction.close()

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulates the gradient of `loss`, averaged over ranks. `last`: this is the last call before `step`."""
        with self.timer.phase("backward"):
            self._engine.set_gradient_accumulation_boundary(last or self._reduces_once)
            if self.loss_scale is not None:
                if self._zero_stage:
                    self.optimizer.override_loss_scale(self.loss_scale.value)  # ZeRO scales the loss itself
                else:
                    loss = loss * self.loss_scale.value
            if self._reducer is None or not last:
                self._engine.backward(loss)
                return
            self._reducer.start()
            self._engine.backward(loss)
            self._reducer.finish()

    def step(self, values_N: torch.Tensor | None = None) -> list[float]:
        """Clips the gradients and updates the weights, unless the gradient norm is not finite (fp16 overflowed, or the
        run diverged).

        Args:
            values_N: float32 values to read from the device. They are read together with the norm, since the host waits
                for each read. Without ZeRO the update is also left out if one of them is not finite.

        Returns: the gradient norm before clipping, and the values.
        """
        values_N = torch.zeros(0, device=self.device) if values_N is None else values_N
        with self.timer.phase("optimizer"):
            read = self._step_with_zero(values_N) if self._clip_norm is None else self._step_without_zero(values_N)
            if self.loss_scale is not None:
                self.loss_scale.update(math.isfinite(read[0]))
            return read

    def _step_with_zero(self, values_N: torch.Tensor) -> list[float]:
        """DeepSpeed clips, and skips the update if the norm is not finite."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()  # a float if it is not finite
        norm_1 = norm.reshape(1) if isinstance(norm, torch.Tensor) else values_N.new_full((1,), norm)
        return torch.cat([norm_1.to(values_N), values_N]).tolist()

    def _step_without_zero(self, values_N: torch.Tensor) -> list[float]:
        assert self._clip_norm is not None
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        read: list[float] = torch.cat([norm.reshape(1) / scale, values_N]).tolist()
        if all(map(math.isfinite, read)):
            # What clip_grad_norm_ multiplies by, and the loss scale, in one pass.
            factor = min(1.0, self._clip_norm / (read[0] + 1e-6)) / scale
            if factor != 1:
                torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
            self._engine.step()
        else:
            self._engine.zero_grad()
        return read

    def moments(self) -> dict[str, torch.Tensor]:
        """The unsharded optimizer state by name, on rank 0. Collective."""
        shapes = {name: p.shape for name, p in self._trained_parameters()}
        is_sharded = self._zero_stage > 0 and comm.world().size > 1
        return gather_moments(shapes, self._fragments(), self._base_optimizer, is_sharded)

    def load(self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor]) -> None:
        """Loads an unsharded state dict and the result of `moments`, saved at any ZeRO stage and world size."""
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
        weights = {name: weights[name] for name in self.full_model.state_dict()}  # not those with merged adapters
        if self._full_copy is None:
            self.model.load_state_dict(weights)
            return
        self._full_copy.load_state_dict(weights)
        for full, sharded in zip(self._full_copy.parameters(), self.model.parameters(), strict=True):
            with self._gathered([sharded], modifier_rank=0):
                sharded.copy_(full)
        for full, buffer in zip(self._full_copy.buffers(), self.model.buffers(), strict=True):
            buffer.copy_(full)

    def _trained_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Trained parameters by name, unsharded."""
        return ((name, p) for name, p in self.full_model.named_parameters() if p.requires_grad)

    def _fragments(self) -> dict[str, Fragment | None]:
        return {
            name: fragment_of(parameter, self.optimizer, self._zero_stage)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer, which DeepSpeed wraps under ZeRO."""
        return self.optimizer.optimizer if self._zero_stage else self.optimizer


class _Float16Model(torch.nn.Module):
    """The model under fp16 autocast. It returns float32, because gradients of embeddings underflow in float16 before
    they are multiplied by the loss scale."""

    def __init__(self, model: MatryoshkaCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: torch.Tensor | None, text_ML: torch.Tensor | None) -> Outputs:
        with torch.autocast(comm.world().device.type, torch.float16):
            image_BD, text_MD, scale, bias = self.model(image_BCHW, text_ML)
        image_BD, text_MD = (None if x is None else x.float() for x in (image_BD, text_MD))
        return image_BD, text_MD, scale, bias


# Keys of engine.deepspeed that would override other fields of the config, or have no effect.
_NOT_ALLOWED = {"optimizer", "scheduler", "fp16", "bf16", "amp", "prescale_gradients", "checkpoint"}


def bucket_size(parameters: int) -> int:
    """Elements that are reduced at once. While one bucket is reduced, the next one fills, so DeepSpeed keeps two; its
    default of 500 million would take 4 GB, and would hold the gradients of a whole CLIP before the first is reduced."""
    return min(25_000_000, parameters)


def deepspeed_config(
    config: EngineConfig, clip_norm: float | None, micro_batch: int, world_size: int, precision: str, parameters: int
) -> dict[str, Any]:
    """The config dict for DeepSpeed."""
    merged = _merged(_derived(config, clip_norm, micro_batch, world_size, precision), config.deepspeed)
    merged["zero_optimization"].setdefault("reduce_bucket_size", bucket_size(parameters))
    return merged


def _merged(derived: dict[str, Any], extra: dict[str, Any], path: str = "deepspeed") -> dict[str, Any]:
    """Merges engine.deepspeed into the derived dict. Raises ValueError if the two contradict each other."""
    merged = dict(derived)
    for key, value in extra.items():
        name = f"{path}.{key}"
        if key in _NOT_ALLOWED:
            raise ValueError(f"{name} cannot be set here; use optim and engine.precision")
        if isinstance(value, dict) and isinstance(before := derived.get(key, {}), dict):
            merged[key] = _merged(before, value, name)
        elif key in derived and derived[key] != value:
            raise ValueError(f"{name}: {value!r} contradicts {derived[key]!r}, which other config fields set")
        else:
            merged[key] = value
    return merged


def _derived(
    config: EngineConfig, clip_norm: float | None, micro_batch: int, world_size: int, precision: str
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": config.zero_stage > 0}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": micro_batch * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        # DeepSpeed's default is to clip at 1.0. Without ZeRO, `Engine.step` clips.
        "gradient_clipping": clip_norm if clip_norm and config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's CPU optimizer requires a compiler; torch's fused AdamW does the same.
        "zero_force_ds_cpu_optimizer": False,
        # Without the empty list, gradients of linear layers and convolutions would be reduced in bfloat16.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the kernel, which takes a small model 10 % of its step
    time in page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # None with other C libraries
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: serve no allocation by mmap


def _import_deepspeed() -> Any:
    """Imports deepspeed without accelerator detection, warnings about skipped steps and compilation on a CPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the training log reports skipped steps
    # On a CPU, DeepSpeed compiles this kernel for a minute, and fails without a compiler. Only inference uses it.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
