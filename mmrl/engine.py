"""The only door to deepspeed: one engine for one process or many, CPU or GPU, any ZeRO stage that a config names.

DeepSpeed's config is a dict made here from ours; no JSON file is written.
"""

import logging
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from mmrl import distributed
from mmrl.errors import InputError
from mmrl.model.two_tower import MatryoshkaCLIP
from mmrl.settings import Settings, machine


class EngineConfig(Settings):
    """How a step is carried out."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs matrix products and convolutions in bfloat16; weights, optimiser and loss stay float32."""
    zero_stage: int = machine(0, ge=0, le=2)
    """What is divided among processes: 0 nothing, 1 optimiser state, 2 gradients as well."""
    compile: bool = machine(False)
    """torch.compile for both towers: minutes at the start, faster steps. Wants a C++ compiler."""
    timeout_minutes: float = Field(default=30.0, gt=0, json_schema_extra={"machine": True})
    """How long a process waits for the others before it gives up."""


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
        if config.compile:
            model.image.tower.compile()
            model.text.tower.compile()
        self._engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device),
            optimizer=optimizer,
            config=deepspeed_config(config, clip_norm, micro_batch, world.size),
            dist_init_required=False,
        )
        self.model = model
        self.device = world.device
        # Without ZeRO, DeepSpeed clips but does not tell the norm.
        self._clip_here = (clip_norm or math.inf) if config.zero_stage == 0 else None

    def __call__(
        self, image_BCHW: torch.Tensor, text_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The model's forward, under the configured precision, on the engine's device."""
        return self._engine(image_BCHW.to(self.device), text_BL.to(self.device))

    def step(self, loss: torch.Tensor) -> float:
        """Backward, averaged over processes; clip; one optimiser step. Returns the gradient's norm before clipping."""
        self._engine.backward(loss)
        if self._clip_here is None:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_here)
        self._engine.step()
        return norm.item()

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's float32 weights, whole, on the CPU. (ZeRO up to stage 2 keeps them whole on every process.)"""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Writes optimiser state and weights in DeepSpeed's own files; called on every process."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote. DeepSpeed unpickles: only ever called on the user's own run folder.

        Raises:
            InputError: the files are of another world size or ZeRO stage.
        """
        try:
            self._engine.load_checkpoint(str(folder), tag="engine")
        except Exception as error:
            if type(error).__name__ != "ZeRORuntimeException":
                raise
            raise InputError(
                f"resume: {folder} was written by another number of processes ({error}); "
                "with ZeRO 1 or 2, resume on as many processes as before."
            ) from error


def deepspeed_config(
    config: EngineConfig, clip_norm: float | None, micro_batch: int, world_size: int
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
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


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
