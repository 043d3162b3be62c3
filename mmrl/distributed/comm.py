"""The only door to torch.distributed: who we are, gathers (one with gradient), reductions.

One process is the same code as many: the functions below return their input's own values in a world of one,
whether or not a process group exists.

Shapes: b rows of this process, B = b * world_size rows of all, in the order of ranks.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from mmrl.distributed import launchers
from mmrl.errors import InputError, RunStopped

_is_single = False


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_rank_0(self) -> bool:
        """True on the one process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this process, or the CPU where there is none."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def start(timeout_s: float = 1800.0) -> World:
    """Joins the world that the launcher's variables describe (see launchers.py), or a world of one.

    A process without a launcher gets a group of its own, without a port: DeepSpeed wants one in any case.

    Raises:
        InputError: variables that do not fit, or more processes on this host than it has GPUs.
        RunStopped: not all processes came within the time.
    """
    if not dist.is_initialized():
        place, timeout = launchers.find(), timedelta(seconds=timeout_s)
        on_gpu = torch.cuda.is_available()
        if place is not None:
            place.export(os.environ)
        if on_gpu:
            gpu = _own_gpu(0 if place is None else place.local_rank)
            torch.cuda.set_device(gpu)
            os.environ["LOCAL_RANK"] = str(gpu)  # DeepSpeed takes the GPU of this number
        backend = "nccl" if on_gpu else "gloo"
        if place is None:
            dist.init_process_group(backend, timeout=timeout, store=HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts it
            return world()
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RunStopped(
                f"rank {place.rank} on host {host()} did not get together with all {place.size} processes "
                f"by way of {place.address}, port {place.port} ({reason}); see that all were started, with the same "
                "MASTER_ADDR and MASTER_PORT, and that hosts reach each other."
            ) from error
    return world()


def _own_gpu(local_rank: int) -> int:
    """This process's GPU among those that it sees: a launcher may show each process its own alone."""
    count = torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    if local_rank >= count:
        raise InputError(
            f"LOCAL_RANK: this is process {local_rank + 1} of host {host()}, which has {count} GPU(s); "
            "start one process a GPU."
        )
    return local_rank


def stop() -> None:
    """Leaves the world."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> World:
    """The present world; rank 0 of 1 before `start`."""
    if _is_single or not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def single_process() -> Iterator[None]:
    """For what one process does by itself while the others wait for it: within, its world is of one."""
    global _is_single
    assert not _is_single
    _is_single = True
    try:
        yield
    finally:
        _is_single = False


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums every process's gradient of the gathered rows and hands back our own.

    No further factor: data-parallel averaging divides by the world size, which is right when every process adds
    its share of the mean (tests/test_distributed.py holds it to the gradient of one process).
    """

    @staticmethod
    def forward(ctx: Any, rows_bD: torch.Tensor) -> torch.Tensor:
        rows_bD = rows_bD.contiguous()
        gathered_BD = rows_bD.new_empty(rows_bD.shape[0] * dist.get_world_size(), *rows_bD.shape[1:])
        dist.all_gather_into_tensor(gathered_BD, rows_bD)
        return gathered_BD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return reduce_scatter_sum(grads[0])


def gather(rows_bD: torch.Tensor) -> torch.Tensor:
    """Rows of all processes, in the order of ranks, with gradient: (b, …) -> (B, …). b is equal on all."""
    if world().size == 1:
        return rows_bD
    result: torch.Tensor = _Gather.apply(rows_bD)  # pyright: ignore[reportAssignmentType]
    return result


def reduce_scatter_sum(rows_BD: torch.Tensor) -> torch.Tensor:
    """Our own rows of the sum over processes, without gradient: (B, …) -> (b, …). B is divided by the world size."""
    if world().size == 1:
        return rows_BD
    rows_bD = rows_BD.new_empty(rows_BD.shape[0] // dist.get_world_size(), *rows_BD.shape[1:])
    dist.reduce_scatter_tensor(rows_bD, rows_BD.contiguous())
    return rows_bD


def local_rows(b: int) -> slice:
    """Where this process's b rows are among the gathered ones."""
    return slice(world().rank * b, (world().rank + 1) * b)


def host() -> str:
    """The name of this process's host."""
    return socket.gethostname()


def hosts() -> list[str]:
    """The name of each process's host, in the order of ranks; called on every process."""
    return all_gather_objects(host())


def all_gather_objects(value: Any) -> list[Any]:
    """One object a process, small and picklable, in the order of ranks, on every process."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over processes, without gradient."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over processes, without gradient."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if world().size == 1:
        return values.detach()
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, operation)
    return values


def ring_shift(values: torch.Tensor) -> torch.Tensor:
    """What the process before this one gives, as this one gives `values` to the next, in a ring."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(values)
    for work in dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, values, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
    ):
        work.wait()
    if received.is_cuda:
        torch.cuda.synchronize(received.device)
    return received


def broadcast_object(value: Any) -> Any:
    """The main process's object, on every process."""
    values = [value]
    if world().size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on any process, on every process."""
    raised = torch.tensor([float(flag)], device=world().device)
    if world().size > 1:
        dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())


def barrier() -> None:
    """Waits until every process is here."""
    if world().size > 1:
        dist.barrier()
