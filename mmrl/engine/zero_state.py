"""Where a parameter's master weights and optimiser state lie in this process, under any ZeRO stage.

With it, what a run needs to go on is saved as whole tensors by name and put back in parts. DeepSpeed's own files can be
read by the stage and the world size alone that wrote them, and are pickles.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mmrl.distributed import comm


@dataclass(frozen=True)
class Fragment:
    """The entries start … start+numel-1 of a flattened parameter, which this process's optimiser keeps."""

    holder: torch.Tensor
    """What the optimiser knows: the parameter itself, or a flat part of many."""
    offset: int
    """Of the entries in `holder`."""
    start: int
    numel: int

    def write(self, target: torch.Tensor, whole: torch.Tensor) -> None:
        """Puts our entries of a whole tensor, of the parameter's shape, into one of the holder's shape."""
        if self.is_whole(target, whole):
            target.copy_(whole)  # of any memory format
            return
        target.view(-1)[self.offset : self.offset + self.numel] = whole.reshape(-1)[
            self.start : self.start + self.numel
        ].to(target.device)

    def read(self, source: torch.Tensor, into: torch.Tensor) -> None:
        """The way back: our entries of a tensor of the holder's shape, into a whole one."""
        if self.is_whole(source, into):
            into.copy_(source)
            return
        into.view(-1)[self.start : self.start + self.numel] = source.view(-1)[self.offset : self.offset + self.numel]

    def is_whole(self, part: torch.Tensor, whole: torch.Tensor) -> bool:
        """Whether the holder is the parameter."""
        return part.shape == whole.shape and self.numel == whole.numel()


def fragment_of(parameter: torch.nn.Parameter, optimizer: Any, stage: int) -> Fragment | None:
    """This process's part of a parameter that learns; None where others keep all of it. `optimizer` is DeepSpeed's."""
    if stage == 0:
        return Fragment(parameter, 0, 0, parameter.numel())
    if stage == 3:
        # Each parameter is divided by itself, and its last part padded.
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = comm.world().rank * numel
        numel = min(numel, parameter.ds_numel - start)  # pyright: ignore[reportAttributeAccessIssue]
        return Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None
    mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
    if mapping is None:
        return None
    holder = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    ours, its = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(holder, its.start, ours.start, ours.numel)


def gather_moments(
    shapes: dict[str, torch.Size],
    fragments: dict[str, Fragment | None],
    optimizer: torch.optim.Optimizer,
    divided: bool,
) -> dict[str, torch.Tensor]:
    """The optimiser's state as whole float32 tensors "exp_avg/NAME", …, and "step"; on the CPU, on the main process
    alone, and apart from the state's own memory. Called on every process, since parts are added up."""
    world, moments = comm.world(), {}
    steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    keys = sorted({key for state in optimizer.state.values() for key in state if key != "step"})
    for name, shape in shapes.items():
        fragment = fragments[name]
        state = {} if fragment is None else optimizer.state.get(fragment.holder, {})
        if not state and not divided:
            continue  # it never had a gradient
        for key in keys:
            whole = torch.zeros(shape, device=world.device)
            if fragment is not None:
                fragment.read(state[key], whole)
            if divided:
                whole = comm.all_reduce_sum(whole)
            if world.is_rank_0:
                moments[f"{key}/{name}"] = whole.cpu()
    step = comm.all_reduce_max(torch.tensor([max(steps, default=0.0)], device=world.device))
    return {**moments, "step": step.cpu()} if world.is_rank_0 else {}


def scatter_moments(
    moments: dict[str, torch.Tensor], fragments: dict[str, Fragment | None], optimizer: torch.optim.Optimizer
) -> None:
    """Puts back what `gather_moments` gave, the part of this process."""
    keys = {label.partition("/")[0] for label in moments if "/" in label}
    for name, fragment in fragments.items():
        given = {key: moments[f"{key}/{name}"] for key in keys if f"{key}/{name}" in moments}
        if fragment is None or not given:
            continue
        state = optimizer.state[fragment.holder]
        for key, whole in given.items():
            if key not in state:
                state[key] = torch.zeros_like(fragment.holder, requires_grad=False)
            fragment.write(state[key], whole)
        state["step"] = torch.full((), moments["step"].item(), device=fragment.holder.device)
