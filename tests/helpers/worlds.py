"""Processes on this machine: a world of several with gloo, or one that runs a program.

They are forked: from the tests' process, or from a fork server that has imported torch, DeepSpeed and mmrl, which takes
seconds, and has done nothing else.
"""

import multiprocessing
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

_INHERITED: list[object] = []
_PRELOADED: set[int | None] = set()


def run_in_world(size: int, work: Callable[[Path], None], folder: Path, start_method: str = "fork") -> None:
    """Runs work(folder) on `size` processes. Those that go backward need the start method "forkserver", since a fork of
    a process that has may refuse to."""
    if torch.cuda.is_available():  # a fork cannot use CUDA, not even to find that it may not
        start_method = "forkserver"
    if start_method == "forkserver":
        preload()
    torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        _child, (size, work, folder, secrets.token_hex(4)), nprocs=size, start_method=start_method
    )


def preload() -> None:
    """Starts the fork server with what takes long to import. One that `WorkerPool` has started is replaced."""
    server: Any = forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
    if server._forkserver_pid is None or server._forkserver_pid not in _PRELOADED:
        server._stop()
        server.set_forkserver_preload(["helpers.preloaded"])
        server.ensure_running()
        _PRELOADED.add(server._forkserver_pid)


class Program:
    """A program in a process of its own: `main` with these arguments, such as `mmrl.cli.main`."""

    def __init__(
        self, main: Callable[[], None], arguments: list[str], folder: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        """`folder` is for what it prints."""
        preload()
        name = secrets.token_hex(4)
        self._printed = [folder / f"{name}.out", folder / f"{name}.err"]
        context, values = multiprocessing.get_context("forkserver"), dict(environ or {})
        self.process = context.Process(target=_run, args=(main, arguments, self._printed, values))
        self.process.start()

    def wait(self, timeout: float = 300) -> tuple[int | None, str, str]:
        """Its exit code, minus the signal if one ended it, and what it printed to stdout and stderr."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(self._printed[1].read_text())
        out, err = (path.read_text() for path in self._printed)
        return self.process.exitcode, out, err


def run_programs(
    size: int, main: Callable[[], None], arguments: list[str], folder: Path
) -> list[tuple[int | None, str, str]]:
    """The results of `size` processes of a program, with torchrun's variables if there are several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    programs = []
    for rank in range(size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        environ = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
        programs.append(Program(main, arguments, folder, environ))
    return [program.wait() for program in programs]


def _run(main: Callable[[], None], arguments: list[str], printed: list[Path], environ: dict[str, str]) -> None:
    for number, path in enumerate(printed, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ |= environ
    sys.argv = ["mmrl", *arguments]
    main()


def drop_inherited_group() -> None:
    """In a forked process: forgets the process group that it has if another test of its parent has trained.

    The group's destructor would wait for threads that a fork does not have, so a reference is kept.
    """
    if dist.is_initialized():
        _INHERITED.append(dist.group.WORLD)
        dist.distributed_c10d._update_default_pg(None)


def _child(rank: int, size: int, work: Callable[[Path], None], folder: Path, name: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    drop_inherited_group()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{name}", rank=rank, world_size=size)
    try:
        work(folder)
    finally:
        dist.destroy_process_group()
