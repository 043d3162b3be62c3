"""The only door to deepspeed: one engine for one process or many, CPU or GPU, any ZeRO stage that a config names.

DeepSpeed's config is a dict made here from ours; no JSON file is written.
"""

import copy
import ctypes
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from mmrl import distributed
from mmrl.errors import InputError
from mmrl.hardware import multiplies_bfloat16
from mmrl.model.towers import Side
from mmrl.model.two_tower import MatryoshkaCLIP
from mmrl.settings import Settings, machine


class EngineConfig(Settings):
    """How a step is carried out."""

    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16 runs matrix products and convolutions in bfloat16; weights, optimiser and loss stay float32. auto is bf16
    where all processes' devices have such products, else fp32: without, they are many times slower."""
    zero_stage: int = machine(0, ge=0, le=3)
    """What is divided among processes: 0 nothing, 1 optimiser state, 2 gradients as well, 3 weights as well."""
    compile: bool = machine(False)
    """torch.compile for both towers: minutes at the start, faster steps. Wants a C++ compiler."""
    timeout_minutes: float = Field(default=30.0, gt=0, json_schema_extra={"machine": True})
    """How long a process waits for the others before it gives up."""
    lost_after_seconds: float = Field(default=30.0, ge=5, json_schema_extra={"machine": True})
    """A process that is not heard of for so long is taken for lost, and the others stop, naming it and its host. Four
    times as long outside of the steps: while it starts, evaluates or saves."""


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
        world = distributed.world()
        self.precision = config.precision
        if config.precision == "auto":
            self.precision = "fp32" if distributed.anywhere(not multiplies_bfloat16(world.device)) else "bf16"
        if world.device.type == "cpu":
            _keep_freed_memory()
        if config.compile:
            model.image.tower.compile()
            model.text.tower.compile()
        self._whole = copy.deepcopy(model) if config.zero_stage == 3 else None
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=optimizer,
            config=deepspeed_config(config, clip_norm, micro_batch, world.size, self.precision),
            dist_init_required=False,
        )
        if world.size == 1 and config.zero_stage == 0:
            # It would flatten all gradients, reduce them with nobody and copy them back.
            self._engine.enable_backward_allreduce = False
        self.model = model
        self.device = world.device
        self._zero_stage = config.zero_stage
        self._gathered = deepspeed.zero.GatheredParameters
        # Without ZeRO, DeepSpeed clips but does not tell the norm.
        self._clip_here = (clip_norm or math.inf) if config.zero_stage == 0 else None

    def __call__(self, image_BCHW: torch.Tensor | None, text_BL: torch.Tensor | None) -> Any:
        """The model's forward, under the configured precision, on the engine's device."""
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

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds to the gradients; averages them over processes at the `last` one before a step."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self) -> float:
        """Clips, and makes one optimiser step. Returns the gradient's norm before clipping."""
        if self._clip_here is None:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_here)
        self._engine.step()
        return norm.item()

    def save(self, folder: Path) -> None:
        """Writes optimiser state and weights in DeepSpeed's own files; called on every process.

        Raises:
            OSError: this process could not write; only after it has met the others wherever DeepSpeed waits for all.
        """
        writer, problems = self._engine.checkpoint_engine, []
        write = writer.save

        def guarded(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except Exception as error:  # torch reports a full disk as a RuntimeError
                problems.append(error)

        writer.save = guarded
        try:
            self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)
        finally:
            writer.save = write
        if problems:
            raise OSError(str(problems[0]).splitlines()[0]) from problems[0]

    @property
    def layout(self) -> dict[str, int]:
        """How the optimiser's state lies in the files, for `load`."""
        return {"zero_stage": self._zero_stage, "world_size": distributed.world().size}

    def load(self, folder: Path, layout: dict[str, int]) -> None:
        """Reads what `save` wrote. DeepSpeed unpickles: only ever called on the user's own run folder.

        Raises:
            InputError: the files are of another ZeRO stage, or, above stage 0, of another world size.
        """
        then, now = layout, self.layout
        if (then["zero_stage"] > 0) != (now["zero_stage"] > 0):
            raise InputError(
                f"engine.zero_stage: this run was saved at stage {then['zero_stage']} and cannot go on at stage "
                f"{now['zero_stage']}; resume at the stage that it was saved at."
            )
        if now["zero_stage"] and then["world_size"] != now["world_size"]:
            raise InputError(
                f"resume: at ZeRO stage {now['zero_stage']} this run goes on on {then['world_size']} processes, as it "
                f"was saved; there are {now['world_size']}."
            )
        self._engine.load_checkpoint(str(folder), tag="engine")


def deepspeed_config(
    config: EngineConfig, clip_norm: float | None, micro_batch: int, world_size: int, precision: str
) -> dict[str, Any]:
    """DeepSpeed's dict for ours."""
    return {
        "train_batch_size": micro_batch * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        # Left out, DeepSpeed clips at 1.0; without ZeRO, `Engine.step` clips.
        "gradient_clipping": clip_norm if clip_norm and config.zero_stage else 0.0,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
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

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU, DeepSpeed builds this shared-memory kernel for a minute and fails without a compiler; it serves
    # inference only.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
