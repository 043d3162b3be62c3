"""Gathers and scatters sharded optimizer state, so that checkpoints do not depend on ZeRO stage and world size.

DeepSpeed's own checkpoints can only be read with the stage and world size that wrote them, and are pickles.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mmrl.distributed import comm


@dataclass(frozen=True)
class Fragment:
    """The elements start … start+numel-1 of a flattened parameter, which this rank's optimizer holds."""

    holder: torch.Tensor
    """The tensor that the optimizer updates: the parameter itself, or a flat buffer of fragments of many parameters."""
    offset: int
    """Position of the fragment in `holder`."""
    start: int
    numel: int

    def write(self, target: torch.Tensor, full: torch.Tensor) -> None:
        """Copies the fragment from a tensor of the parameter's shape into one of the holder's shape."""
        if self._is_full(target, full):
            target.copy_(full)  # works for any memory format
            return
        target.view(-1)[self.offset : self.offset + self.numel] = full.reshape(-1)[
            self.start : self.start + self.numel
        ].to(target.device)

    def read(self, source: torch.Tensor, full: torch.Tensor) -> None:
        """Copies the fragment from a tensor of the holder's shape into one of the parameter's shape."""
        if self._is_full(source, full):
            full.copy_(source)
            return
        full.view(-1)[self.start : self.start + self.numel] = source.view(-1)[self.offset : self.offset + self.numel]

    def _is_full(self, held: torch.Tensor, full: torch.Tensor) -> bool:
        return held.shape == full.shape and self.numel == full.numel()


def fragment_of(parameter: torch.nn.Parameter, optimizer: Any, stage: int) -> Fragment | None:
    """This rank's fragment of a trained parameter; None if other ranks hold all of it. `optimizer` is DeepSpeed's."""
    if stage == 0:
        return Fragment(parameter, 0, 0, parameter.numel())
    if stage == 3:
        # Each parameter is sharded by itself, and its last shard is padded.
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = comm.world().rank * numel
        numel = min(numel, parameter.ds_numel - start)  # pyright: ignore[reportAttributeAccessIssue]
        return Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None
    mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if mapping is None:
        return None
    holder = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    in_parameter, in_holder = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(holder, in_holder.start, in_parameter.start, in_parameter.numel)


def gather_moments(
    shapes: dict[str, torch.Size],
    fragments: dict[str, Fragment | None],
    optimizer: torch.optim.Optimizer,
    is_sharded: bool,
) -> dict[str, torch.Tensor]:
    """The optimizer state as unsharded float32 tensors "exp_avg/NAME", … and "step": CPU copies on rank 0, empty on
    other ranks. Collective."""
    world, moments = comm.world(), {}
    steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    keys = sorted({key for state in optimizer.state.values() for key in state if key != "step"})
    for name, shape in shapes.items():
        fragment = fragments[name]
        state = {} if fragment is None else optimizer.state.get(fragment.holder, {})
        if not state and not is_sharded:
            continue  # the parameter never had a gradient
        for key in keys:
            full = torch.zeros(shape, device=world.device)
            if fragment is not None:
                fragment.read(state[key], full)
            if is_sharded:
                full = comm.all_reduce_sum(full)
            if world.is_rank_0:
                moments[f"{key}/{name}"] = full.cpu()
    step = comm.all_reduce_max(torch.tensor([max(steps, default=0.0)], device=world.device))
    return {**moments, "step": step.cpu()} if world.is_rank_0 else {}


def scatter_moments(
    moments: dict[str, torch.Tensor], fragments: dict[str, Fragment | None], optimizer: torch.optim.Optimizer
) -> None:
    """Loads this rank's fragments of the result of `gather_moments` into the optimizer state."""
    keys = {label.partition("/")[0] for label in moments if "/" in label}
    for name, fragment in fragments.items():
        given = {key: moments[f"{key}/{name}"] for key in keys if f"{key}/{name}" in moments}
        if fragment is None or not given:
            continue
        state = optimizer.state[fragment.holder]
        for key, full in given.items():
            if key not in state:
                state[key] = torch.zeros_like(fragment.holder, requires_grad=False)
            fragment.write(state[key], full)
        state["step"] = torch.full((), moments["step"].item(), device=fragment.holder.device)
