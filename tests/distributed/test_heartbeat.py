"""A rank that dies, hangs or fails is named by the other ranks within a bounded time."""

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
from helpers.worlds import drop_inherited_group

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
    raise OverflowError("out of range")


def _run(rank: int, size: int, folder: Path, faulty_rank: int, fault: Callable[[], None] | None) -> None:
    """One rank: two barriers, and between them the fault of the faulty rank."""
    sys.stderr = (folder / f"stderr{rank}").open("w")
    drop_inherited_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        with Heartbeat(comm.world(), LOST_AFTER_S) as heartbeat:
            heartbeat.report_progress(13, "training")
            comm.barrier()
            time.sleep(2 * BEAT_S)
            if rank == faulty_rank and fault is not None:
                fault()
            comm.barrier()
    except RunStopped as error:
        print(f"mmrl: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    except OverflowError:
        os._exit(3)
    os._exit(0)


def _world(
    folder: Path, faulty_rank: int, fault: Callable[[], None] | None
) -> tuple[list[int | None], list[str], float]:
    """Exit codes, stderr, and the seconds until all but the faulty rank had ended."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_run, args=(rank, 3, folder, faulty_rank, fault)) for rank in range(3)]
    for process in processes:
        process.start()
    began = time.monotonic()
    for rank, process in enumerate(processes):
        if rank != faulty_rank or fault is None:
            process.join(60)
    took = time.monotonic() - began
    processes[faulty_rank].kill()
    processes[faulty_rank].join()
    return [one.exitcode for one in processes], [(folder / f"stderr{rank}").read_text() for rank in range(3)], took


@pytest.mark.parametrize(
    ("faulty_rank", "fault", "message"),
    [
        (1, _die, rf"rank 1 on host {HOST} disconnected: .* \(step 14, training\)"),
        (0, _die, rf"rank 0 on host {HOST} disconnected"),
        (2, _hang, rf"rank 2 on host {HOST} has sent no heartbeat for [56] s"),
        pytest.param(0, _hang, rf"rank 0 on host {HOST} has not answered for \d s", marks=pytest.mark.slow),
        (1, _fail, rf"rank 1 on host {HOST} stopped: OverflowError: out of range \(step 14, training\)"),
    ],
    ids=["killed", "rank 0 killed", "hangs", "rank 0 hangs", "raises"],
)
def test_all_ranks_stop_and_name_the_lost_one(
    tmp_path: Path, faulty_rank: int, fault: Callable[[], None], message: str
) -> None:
    codes, stderr, took = _world(tmp_path, faulty_rank, fault)
    for rank in {0, 1, 2} - {faulty_rank}:
        assert codes[rank] == 1, stderr
        assert re.search(message, stderr[rank]), stderr
        assert "resume=auto" in stderr[rank]
    assert took < LOST_AFTER_S + GRACE_S + 30  # generous: other tests may be running


def test_a_successful_run_prints_nothing(tmp_path: Path) -> None:
    codes, stderr, _ = _world(tmp_path, 1, None)
    assert codes == [0, 0, 0]
    assert stderr == ["", "", ""]


def test_one_process_needs_no_heartbeat() -> None:
    with Heartbeat(World(), LOST_AFTER_S) as heartbeat:
        heartbeat.report_progress(1, "training")
