"""What towers hold and compute, found by running them on fake tensors: shapes alone, without memory and without time.

torch's FakeTensorMode runs the real forward and backward, FlopCounterMode counts their operations, and a mode of ours
follows every allocation. `mmrl plan` and the utilisation that a run reports share the count.
"""

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmrl.images.image_spec import ImageSpec
from mmrl.model import towers, two_tower
from mmrl.model.towers import Side
from mmrl.model.two_tower import MatryoshkaCLIP, ModelConfig

# The two sizes at which activations are measured; they grow with the size in a straight line.
_SIZES = 2, 4


@dataclass(frozen=True)
class Footprint:
    """What the towers of a config ask for."""

    parameters: int
    trained: int
    embed_dim: int
    activations_fixed: float
    """Bytes held at the peak of forward and backward, whatever the micro-batch."""
    activations_per_pair: float
    forward_flops_per_pair: float
    locked_flops_per_pair: float
    """The part of the forward's that belongs to locked towers."""


def measure(config: ModelConfig, in_16_bits: bool, on_gpu: bool = True) -> Footprint:
    """Counts the towers' weights, activations and operations.

    Args:
        on_gpu: attention that keeps no matrix of scores, as on a GPU; else as MatryoshkaCLIP does on a CPU.

    Raises:
        InputError: an unknown model.
    """
    model_cfg = towers.read_model_cfg(config.name)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        model = _model(config, model_cfg, on_gpu)
        peaks = [_peak(model, model_cfg, size, in_16_bits) for size in _SIZES]
        forward, locked = _flops(model, model_cfg, config)
    a_pair = (peaks[1] - peaks[0]) / (_SIZES[1] - _SIZES[0])
    return Footprint(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embed_dim=model_cfg["embed_dim"],
        activations_fixed=max(peaks[0] - _SIZES[0] * a_pair, 0.0),
        activations_per_pair=a_pair,
        forward_flops_per_pair=forward,
        locked_flops_per_pair=locked,
    )


def model_flops(config: ModelConfig, batch_size: int) -> float:
    """Operations that a step on a global batch takes of all processes, without any that are repeated to save memory."""
    model_cfg = towers.read_model_cfg(config.name)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        forward, locked = _flops(_model(config, model_cfg, on_gpu=True), model_cfg, config)
    return step_flops(forward, locked, model_cfg["embed_dim"], batch_size)


def step_flops(forward: float, locked: float, embed_dim: int, batch_size: int, forwards: int = 1) -> float:
    """Operations of all processes in a step: of a trained tower so many forwards, and a backward that takes two; of a
    locked one a forward; of the loss 4 multiply-adds for each similarity and number of an embedding."""
    a_pair = (forwards + 2) * (forward - locked) + locked
    return batch_size * a_pair + 8.0 * batch_size**2 * embed_dim


def _model(config: ModelConfig, model_cfg: dict[str, Any], on_gpu: bool) -> MatryoshkaCLIP:
    built = towers.build_empty(config)
    side = towers.input_side(model_cfg)
    spec = ImageSpec(height=side, width=side, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return two_tower.MatryoshkaCLIP(
        two_tower.Encoder(built["image"], two_tower.added_projection(model_cfg, "image"), spec.normalise),
        two_tower.Encoder(built["text"], two_tower.added_projection(model_cfg, "text")),
        torch.ones(1),
        recomputes=on_gpu or config.grad_checkpointing,
    ).train()


def _inputs(model_cfg: dict[str, Any], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    side = towers.input_side(model_cfg)
    length = model_cfg["text_cfg"].get("context_length", 77)
    return torch.zeros(size, 3, side, side, dtype=torch.uint8), torch.zeros(size, length, dtype=torch.int64)


def _peak(model: nn.Module, model_cfg: dict[str, Any], size: int, in_16_bits: bool) -> int:
    """Bytes at the peak of forward and backward beyond weights and gradients, which are there before."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers()]
    known += [p.grad for p in model.parameters() if p.grad is not None]
    with Allocations(known) as allocations:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_16_bits):
            image_BD, text_BD, scale, _ = model(*_inputs(model_cfg, size))
        (image_BD.sum() + text_BD.sum() + scale.sum()).backward()
    return allocations.peak


def _flops(model: MatryoshkaCLIP, model_cfg: dict[str, Any], config: ModelConfig) -> tuple[float, float]:
    """Of a forward of one pair, and the part of it that belongs to locked towers."""
    image, text = _inputs(model_cfg, _SIZES[0])
    flops: dict[Side, float] = {}
    for side in ("image", "text"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _ = model.encode_image(image) if side == "image" else model.encode_text(text)
        flops[side] = counter.get_total_flops() / _SIZES[0]
    return sum(flops.values()), config.lock_image * flops["image"] + config.lock_text * flops["text"]


class Allocations(TorchDispatchMode):
    """Follows the memory of every tensor that is made within: how much is held, and the most that was."""

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return
        self._known.add(name)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.held -= size
