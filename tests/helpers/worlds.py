"""A world of several gloo processes on this machine."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

_INHERITED: list[object] = []


def run_in_world(size: int, work: Callable[[Path], None], folder: Path, start_method: str = "fork") -> None:
    """Runs work(folder) on `size` processes. Forked ones start at once; those that go backward are spawned,
    since a fork of a process that has may refuse to."""
    torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        _child, (size, work, folder), nprocs=size, start_method=start_method
    )


def drop_inherited_group() -> None:
    """In a forked process: forgets the process group that it has if another test of its parent has trained.

    The group's destructor would wait for threads that a fork does not have, so a reference is kept.
    """
    if dist.is_initialized():
        _INHERITED.append(dist.group.WORLD)
        dist.distributed_c10d._update_default_pg(None)


def _child(rank: int, size: int, work: Callable[[Path], None], folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    drop_inherited_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        work(folder)
    finally:
        dist.destroy_process_group()
