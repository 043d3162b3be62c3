"""Parameters, activation memory and FLOPs of the towers, measured on fake tensors: no memory is allocated.

torch's FakeTensorMode runs the real forward and backward, FlopCounterMode counts operations, and `AllocationTracker`
sums allocations. Used by `mmrl plan` and for the utilisation (MFU) that a run reports.
"""

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmrl.images.image_spec import ImageSpec, Normaliser
from mmrl.model import registry, towers, trainable, two_tower
from mmrl.model.two_tower import MatryoshkaCLIP, ModelConfig

# Activations are measured at two micro-batch sizes; their memory is linear in the size.
_SIZES = 2, 4


@dataclass(frozen=True)
class Footprint:
    """Size and cost of the towers of a config."""

    parameters: int
    trained: int
    """Parameters that are not locked."""
    embed_dim: int
    activations_fixed: float
    """Bytes of activations at the peak of forward and backward that do not depend on the micro-batch."""
    activations_per_pair: float
    """Further bytes at the peak, per pair of the micro-batch."""
    forward_flops_per_pair: float
    backward_flops_per_pair: float
    """Twice those of the forward pass, and less where weights are frozen."""


def measure(
    config: ModelConfig, in_16_bits: bool, on_gpu: bool = True, rows_per_pair: tuple[int, int] = (1, 1)
) -> Footprint:
    """Measures parameters, activation memory and FLOPs of the towers of a config.

    Args:
        on_gpu: attention does not store its score matrix, as on a GPU; else it does, as MatryoshkaCLIP on a CPU.
        rows_per_pair: images and texts of a pair, with its second members and hard negatives.

    Raises:
        InputError: an unknown model.
    """
    model_cfg = registry.read_model_cfg(config.name)
    with _fake_model(config, model_cfg, on_gpu) as model:
        inputs = [_inputs(model_cfg, size, rows_per_pair) for size in _SIZES]
        peaks = [_peak_bytes(model, one, in_16_bits) for one in inputs]
        forward, backward = _flops(model, inputs[0])
    per_pair = (peaks[1] - peaks[0]) / (_SIZES[1] - _SIZES[0])
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embed_dim=model_cfg["embed_dim"],
        activations_fixed=max(peaks[0] - _SIZES[0] * per_pair, 0.0),
        activations_per_pair=per_pair,
        forward_flops_per_pair=forward,
        backward_flops_per_pair=backward,
    )


def model_flops(
    config: ModelConfig, batch_size: int, sweeps: int = 1, rows_per_pair: tuple[int, int] = (1, 1)
) -> float:
    """FLOPs of one training step, summed over ranks, without recomputation (model FLOPs). See `step_flops`."""
    model_cfg = registry.read_model_cfg(config.name)
    with _fake_model(config, model_cfg, on_gpu=True) as model:
        forward, backward = _flops(model, _inputs(model_cfg, _SIZES[0], rows_per_pair))
    return step_flops(forward, backward, model_cfg["embed_dim"], batch_size, sweeps=sweeps)


def step_flops(
    forward: float, backward: float, embed_dim: int, batch_size: int, forwards: int = 1, sweeps: int = 1
) -> float:
    """FLOPs of one training step, summed over ranks: `forwards` forward passes and a backward pass of each pair, and 4
    multiply-adds per similarity and embedding dim for each of the loss's `sweeps`."""
    return batch_size * (forwards * forward + backward) + sweeps * 8.0 * batch_size**2 * embed_dim


@contextmanager
def _fake_model(config: ModelConfig, model_cfg: dict[str, Any], on_gpu: bool) -> Iterator[MatryoshkaCLIP]:
    """The model on fake tensors, in the context of their mode. It is built on the meta device: some constructors read
    values of tensors that they make on the CPU, which fake tensors do not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = _build_model(config, model_cfg, on_gpu)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes: dict[int, torch.Tensor] = {}  # shared parameters stay shared
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        fake = fakes.setdefault(id(parameter), nn.Parameter(_fake(parameter), parameter.requires_grad))
                        module._parameters[name] = fake  # pyright: ignore[reportArgumentType]
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else _fake(buffer)
            yield model


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _build_model(config: ModelConfig, model_cfg: dict[str, Any], on_gpu: bool) -> MatryoshkaCLIP:
    built = towers.build_empty(config.name)
    trainable.prepare({side: built[side] for side in config.sides}, model_cfg, config)
    size = registry.input_side(model_cfg)
    spec = ImageSpec(height=size, width=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    prepare = {"image": Normaliser(spec), "text": None}
    image, text = (
        two_tower.ProjectedTower(built[side], two_tower.added_projection(model_cfg, side), prepare[side])
        if side in config.sides
        else two_tower.ProjectedTower(towers.AbsentTower(side))
        for side in towers.SIDES
    )
    return two_tower.MatryoshkaCLIP(image, text, torch.ones(1), recomputes=on_gpu or config.grad_checkpointing).train()


_Inputs = tuple[torch.Tensor | None, torch.Tensor | None]


def _inputs(model_cfg: dict[str, Any], size: int, rows_per_pair: tuple[int, int]) -> _Inputs:
    """The images and texts of `size` pairs; None where a pair has none."""
    side = registry.input_side(model_cfg)
    length = model_cfg["text_cfg"].get("context_length", 77)
    images, texts = (size * rows for rows in rows_per_pair)
    image_BCHW = torch.zeros(images, 3, side, side, dtype=torch.uint8) if images else None
    return image_BCHW, torch.zeros(texts, length, dtype=torch.int64) if texts else None


def _peak_bytes(model: nn.Module, inputs: _Inputs, in_16_bits: bool) -> int:
    """Peak bytes of forward and backward, without weights and gradients, which exist before."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    existing = [*model.parameters(), *model.buffers()]
    existing += [p.grad for p in model.parameters() if p.grad is not None]
    with AllocationTracker(existing) as tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_16_bits):
            image_BD, text_BD, scale, _ = model(*inputs)
        (scale.sum() + sum(x.sum() for x in (image_BD, text_BD) if x is not None)).backward()
    return tracker.peak


def _flops(model: MatryoshkaCLIP, inputs: _Inputs) -> tuple[float, float]:
    """FLOPs of a forward and of a backward pass per pair."""
    with FlopCounterMode(display=False) as forward:  # it fails under no_grad at views of parameters
        image_BD, text_BD, _, _ = model(*inputs)
    with FlopCounterMode(display=False) as backward:
        torch.stack([x.sum() for x in (image_BD, text_BD) if x is not None]).sum().backward()
    return forward.get_total_flops() / _SIZES[0], backward.get_total_flops() / _SIZES[0]


class AllocationTracker(TorchDispatchMode):
    """Tracks the bytes of tensors that are created in this context: `allocated` now and at the `peak`."""

    def __init__(self, existing: Sequence[torch.Tensor] = ()) -> None:
        """Args: existing: tensors that are not counted."""
        super().__init__()
        self.allocated = self.peak = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage._cdata, storage.nbytes()
        if pointer in self._storages:
            return
        self._storages.add(pointer)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._remove, pointer, size)

    def _remove(self, pointer: int, size: int) -> None:
        self._storages.discard(pointer)
        self.allocated -= size
