"""A rank that dies, hangs or fails is named by the other ranks within a bounded time."""

import contextlib
import ipaddress
import multiprocessing
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.worlds import drop_inherited_group

from mmrl.distributed import comm
from mmrl.distributed import coordinator as coordinator_module
from mmrl.distributed.comm import World
from mmrl.distributed.coordinator import BEAT_S, GRACE_S, NONCE_BYTES, RECEIVED_BYTES, Coordinator, frame, hello
from mmrl.distributed.heartbeat import Heartbeat
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
            heartbeat.report_progress(20, "training")
            comm.barrier()
            if rank == faulty_rank and fault is not None:
                fault()  # before the next heartbeat: the others know the step
            comm.barrier()
    except RunStopped as error:
        os._exit(1 if error.shown else 4)
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
        (1, _die, rf"rank 1 on host {HOST} disconnected: .* \(step 21, training\)"),
        (0, _die, rf"rank 0 on host {HOST} disconnected"),
        (2, _hang, rf"rank 2 on host {HOST} has sent no heartbeat for [56] s"),
        pytest.param(0, _hang, rf"rank 0 on host {HOST} has not answered for \d s", marks=pytest.mark.slow),
        (1, _fail, rf"rank 1 on host {HOST} stopped: OverflowError: out of range \(step 21, training\)"),
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


def test_strangers_neither_end_a_run_nor_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    coordinator = Coordinator(["a", "b"], LOST_AFTER_S, lambda: {"step": 7, "doing": "training"})
    coordinator.start()
    assert coordinator.address == "127.0.0.1"
    with contextlib.ExitStack() as opened:

        def connect() -> tuple[socket.socket, bytes]:
            connection = socket.create_connection(("127.0.0.1", coordinator.port), timeout=10)
            return opened.enter_context(connection), connection.recv(NONCE_BYTES)

        def is_closed(connection: socket.socket) -> bool:
            try:
                return connection.recv(1) == b""
            except ConnectionResetError:
                return True

        connect()[0].sendall(b"GET / HTTP/1.1")  # too short to be refused yet
        for sent in (
            b"[" * 3000 + b"\n",
            struct.pack("!I", 1) + bytes(32),
            struct.pack("!I", 1 << 31) + bytes(300),
            hello(coordinator.key, bytes(NONCE_BYTES), 1),  # to another nonce
        ):
            stranger, _ = connect()
            stranger.sendall(sent)
            assert is_closed(stranger)
        peer, nonce = connect()
        for byte in hello(coordinator.key, nonce, 1) + frame({"step": 3, "doing": "training"}):
            peer.sendall(bytes([byte]))
        assert peer.recv(RECEIVED_BYTES)  # an echo: it is known now
        second, nonce = connect()
        second.sendall(hello(coordinator.key, nonce, 1))
        assert is_closed(second)
        assert coordinator.is_alive()
    coordinator.stop()
    assert coordinator._loss == (
        "rank 1 on host b disconnected: it was killed, or its connection was cut (step 8, training)."
    )


def test_a_stranger_that_is_closed_to_admit_another_one_may_have_sent_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coordinator_module, "_MAX_STRANGERS", 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    coordinator = Coordinator(["a", "b"], LOST_AFTER_S, lambda: {"step": 7, "doing": "training"})
    address = ("127.0.0.1", coordinator.port)
    with socket.create_connection(address) as first:
        coordinator._handle_events()
        first.sendall(b"GET /")
        with socket.create_connection(address):  # both events are there at once
            coordinator._handle_events()
            assert len(coordinator._strangers) == 1
    coordinator._finished = lambda: True
    coordinator.run()


@pytest.mark.parametrize(
    ("name", "found", "address"),
    [
        ("localhost", [("127.0.0.1", 0)], "127.0.0.1"),
        ("127.0.0.1", [("127.0.0.1", 0)], "127.0.0.1"),
        ("node0", [("127.0.1.1", 0)], None),  # other hosts resolve it to another address
        ("node0", [("192.0.2.7", 0)], None),  # of no interface
        ("node0", [("127.0.0.1", 0), ("10.0.0.1", 0)], None),
    ],
)
def test_the_coordinator_listens_where_the_ranks_rendezvous(
    monkeypatch: pytest.MonkeyPatch, name: str, found: list[tuple[str, int]], address: str | None
) -> None:
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one) for one in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    listens_at, server = coordinator_module._listen(name)
    with server:
        assert listens_at == address
        assert ipaddress.ip_address(server.getsockname()[0]).is_unspecified == (address is None)


def test_one_process_needs_no_heartbeat() -> None:
    with Heartbeat(World(), LOST_AFTER_S) as heartbeat:
        heartbeat.report_progress(1, "training")
