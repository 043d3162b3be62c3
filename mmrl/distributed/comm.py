"""Collectives over torch.distributed: process group, all-gather with gradient, reductions, broadcast, barrier.

With a world size of 1 each function except `ring_shift` returns its input, with or without a process group, so that
callers need no special case.

Shapes: b rows of this rank, B = b * world_size rows of all ranks, in rank order.
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
from torch.distributed.rendezvous import rendezvous

from mmrl.distributed import backend, launchers
from mmrl.errors import InputError, RunStopped

_is_single = False


@dataclass(frozen=True)
class World:
    """Rank of this process, and world size."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU if there is no GPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def start(timeout_s: float = 1800.0) -> World:
    """Initialises the process group from the launcher's variables (see launchers.py).

    Without a launcher it is a group of one process that opens no port; DeepSpeed requires a group in any case.

    Raises:
        InputError: invalid launcher variables, GPUs that cannot be used, or more processes than GPUs on a host.
        RunStopped: not all processes joined within the timeout.
    """
    if dist.is_initialized():
        return world()
    launch, timeout = launchers.detect_launch(), timedelta(seconds=timeout_s)
    if launch is None:
        if backend.uses_gpu():
            _set_gpu(_gpu_index(0))
        dist.init_process_group(_backend(), timeout=timeout, store=HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asserts that it is set
        return world()
    launch.export(os.environ)
    on_gpu, problem = False, None
    try:
        if on_gpu := backend.uses_gpu():
            _set_gpu(_gpu_index(launch.local_rank))
    except InputError as error:
        problem = str(error)
    try:
        store, rank, size = next(rendezvous("env://", launch.rank, launch.size, timeout=timeout))
        store.set_timeout(timeout)
        backend.agree(store, rank, size, on_gpu, problem, host())
        dist.init_process_group(_backend(), timeout=timeout, store=store, rank=rank, world_size=size)
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunStopped(
            f"rank {launch.rank} on host {host()} failed to join {launch.size} processes at "
            f"{launch.address}:{launch.port} ({reason}); check that all of them were started with the same "
            "MASTER_ADDR and MASTER_PORT, and that the hosts can reach each other."
        ) from error
    return world()


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _set_gpu(gpu: int) -> None:
    torch.cuda.set_device(gpu)
    os.environ["LOCAL_RANK"] = str(gpu)  # DeepSpeed uses it as the GPU index


def _gpu_index(local_rank: int) -> int:
    """The GPU of this process among the visible ones. Some launchers make only one GPU visible to each process."""
    count = torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0
    if local_rank >= count:
        raise InputError(
            f"LOCAL_RANK: {local_rank} on host {host()}, which has {count} GPU(s); start at most one process per GPU."
        )
    return local_rank


def stop() -> None:
    """Destroys the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> World:
    """The current world; rank 0 of 1 before `start`."""
    if _is_single or not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def single_process() -> Iterator[None]:
    """Inside this context `world` is a world of one, so that one rank can work alone while the others wait."""
    global _is_single
    assert not _is_single
    _is_single = True
    try:
        yield
    finally:
        _is_single = False


class _AllGatherRows(torch.autograd.Function):
    """All-gather whose backward is a reduce-scatter: the sum over ranks of the gradient of this rank's rows.

    It does not divide by the world size: data-parallel training averages over ranks afterwards.
    tests/distributed/test_comm.py compares the result with the gradient of one process.
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


def all_gather_rows(rows_bD: torch.Tensor) -> torch.Tensor:
    """All-gather with gradient: (b, …) -> (B, …), in rank order. b must be equal on all ranks."""
    if world().size == 1:
        return rows_bD
    result: torch.Tensor = _AllGatherRows.apply(rows_bD)  # pyright: ignore[reportAssignmentType]
    return result


def reduce_scatter_sum(rows_BD: torch.Tensor) -> torch.Tensor:
    """This rank's rows of the sum over ranks, without gradient: (B, …) -> (b, …). B is a multiple of the world size."""
    if world().size == 1:
        return rows_BD
    rows_bD = rows_BD.new_empty(rows_BD.shape[0] // dist.get_world_size(), *rows_BD.shape[1:])
    dist.reduce_scatter_tensor(rows_bD, rows_BD.contiguous())
    return rows_bD


def local_rows(b: int) -> slice:
    """The slice of this rank's b rows among the gathered B rows."""
    return slice(world().rank * b, (world().rank + 1) * b)


def host() -> str:
    """The host name."""
    return socket.gethostname()


def all_hosts() -> list[str]:
    """The host name of every rank, in rank order. Collective."""
    return all_gather_objects(host())


def all_gather_objects(value: Any) -> list[Any]:
    """One picklable object per rank, in rank order, on every rank."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over ranks, without gradient."""
    return _all_reduce(values, dist.ReduceOp.SUM)


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """The elementwise maximum over ranks, without gradient."""
    return _all_reduce(values, dist.ReduceOp.MAX)


def _all_reduce(values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if world().size == 1:
        return values.detach()
    values = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(values, operation)
    return values


def ring_shift(values: torch.Tensor) -> torch.Tensor:
    """Sends `values` to the next rank of a ring and returns what the previous rank sent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(values)
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, values, (rank + 1) % size), dist.P2POp(dist.irecv, received, (rank - 1) % size)]
    ):
        work.wait()
    if received.is_cuda:
        torch.cuda.synchronize(received.device)
    return received


def broadcast_object(value: Any) -> Any:
    """The object of rank 0, on every rank."""
    values = [value]
    if world().size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is True on any rank."""
    return bool(all_reduce_max(torch.tensor([float(flag)], device=world().device)).item())


def barrier() -> None:
    """Waits until every rank has called it."""
    if world().size > 1:
        dist.barrier()
