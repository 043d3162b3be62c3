"""A process that dies, hangs or fails is named by the others within a bounded time; none of them waits for ever."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.distributed.heartbeat import BEAT_S, GRACE_S, Heartbeat
from mmrl.errors import RunStopped

LOST_AFTER_S = 5.0
HOST = re.escape(socket.gethostname())


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _fail() -> None:
    raise OverflowError("the shelf is full")


def _run(rank: int, size: int, folder: Path, culprit: int, fault: Callable[[], None] | None) -> None:
    """One process: meets the others twice, and between the two meets its fate."""
    sys.stderr = (folder / f"said{rank}").open("w")
    if dist.is_initialized():  # inherited
        dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        with Heartbeat(comm.world(), LOST_AFTER_S) as heartbeat:
            heartbeat.at(13, "training")
            comm.barrier()
            time.sleep(2 * BEAT_S)
            if rank == culprit and fault is not None:
                fault()
            comm.barrier()
    except RunStopped as error:
        print(f"mmrl: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except OverflowError:
        os._exit(3)
    os._exit(0)


def _world(folder: Path, culprit: int, fault: Callable[[], None] | None) -> tuple[list[int | None], list[str], float]:
    """Exit codes, what was said, and the seconds until the last but the culprit had ended."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_run, args=(rank, 3, folder, culprit, fault)) for rank in range(3)]
    for process in processes:
        process.start()
    began = time.monotonic()
    for rank, process in enumerate(processes):
        if rank != culprit or fault is None:
            process.join(60)
    took = time.monotonic() - began
    processes[culprit].kill()
    processes[culprit].join()
    return [one.exitcode for one in processes], [(folder / f"said{rank}").read_text() for rank in range(3)], took


@pytest.mark.parametrize(
    ("culprit", "fault", "says"),
    [
        (1, _die, rf"rank 1 on host {HOST} is gone: .* \(step 14, training\)"),
        (0, _die, rf"rank 0 on host {HOST} is gone"),
        (2, _hang, rf"rank 2 on host {HOST} has not been heard of for [56] s"),
        pytest.param(0, _hang, rf"rank 0 on host {HOST} has not answered for \d s", marks=pytest.mark.slow),
        (1, _fail, rf"rank 1 on host {HOST} stopped: OverflowError: the shelf is full \(step 14, training\)"),
    ],
    ids=["dies", "main dies", "hangs", "main hangs", "fails"],
)
def test_the_others_stop_and_name_it(tmp_path: Path, culprit: int, fault: Callable[[], None], says: str) -> None:
    codes, said, took = _world(tmp_path, culprit, fault)
    for rank in {0, 1, 2} - {culprit}:
        assert codes[rank] == 1, said
        assert re.search(says, said[rank]), said
        assert "resume=auto" in said[rank]
    assert took < LOST_AFTER_S + GRACE_S + 30  # far less where nothing else runs


def test_a_run_that_ends_well_says_nothing(tmp_path: Path) -> None:
    codes, said, _ = _world(tmp_path, 1, None)
    assert codes == [0, 0, 0]
    assert said == ["", "", ""]


def test_one_process_has_no_watch() -> None:
    with Heartbeat(World(), LOST_AFTER_S) as heartbeat:
        heartbeat.at(1, "training")
