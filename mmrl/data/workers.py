"""A process pool that maps a function over items, with results in the order of the items.

Each worker has its own pipe, so that the death of one is noticed. In concurrent.futures all workers share one result
pipe, and the pool hangs if the system kills a worker while it writes a result.
"""

import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Any, Generic, Self, TypeVar

from mmrl.errors import InputError, RunStopped

MAX_PREFETCH = 4
"""Batches that each DataLoader worker prepares in advance, if the shared memory has room for them."""
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 (a constant of Linux)
T = TypeVar("T")
R = TypeVar("R")
# Items per worker that are in work or wait for an earlier item: one slow item does not stall the other workers at once.
_IN_FLIGHT = 3


def usable_cores() -> int:
    """CPU cores that this process may use; in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool(Generic[T, R]):
    """Context manager: `count` processes that apply `function`, or this process itself if `count` is 1."""

    def __init__(self, function: Callable[[T], R], count: int, preload: str) -> None:
        """`preload` is the module that the fork server imports once for all workers."""
        self._function, self._count, self._preload = function, count, preload
        self._process_of: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Self:
        if self._count > 1:
            # Not forked from this process, whose threads may hold locks.
            context = get_context("forkserver")
            context.set_forkserver_preload([self._preload])
            with _sigint_blocked():
                for _ in range(self._count):
                    here, there = context.Pipe()
                    process = context.Process(target=_worker_loop, args=(there, self._function), daemon=True)
                    process.start()
                    there.close()
                    self._process_of[here] = process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._process_of.values():
            process.terminate()
        for connection, process in self._process_of.items():
            process.join()
            connection.close()

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """Yields the results in the order of the items, which are consumed only as fast as workers need them.

        Raises:
            RunStopped: a worker has died, e.g. because memory ran out.
        """
        if self._count == 1:
            yield from map(self._function, items)
            return
        remaining, idle = iter(items), list(self._process_of)
        window: deque[list[R]] = deque()  # one list per item in flight, empty until its result is there
        result_of: dict[Connection, list[R]] = {}
        while True:
            while idle and len(window) < _IN_FLIGHT * self._count and (item := next(remaining, None)) is not None:
                connection = idle.pop()
                result_of[connection] = []
                window.append(result_of[connection])
                try:
                    connection.send(item)
                except OSError:
                    raise self._death_of(connection) from None
            if not window:
                return
            for connection in wait(list(result_of), timeout=0 if window[0] else None):
                assert isinstance(connection, Connection)
                try:
                    result_of.pop(connection).append(connection.recv())
                except (EOFError, OSError):
                    raise self._death_of(connection) from None
                idle.append(connection)
            if window[0]:
                yield window.popleft()[0]

    def _death_of(self, connection: Connection) -> RunStopped:
        process = self._process_of[connection]
        process.join(timeout=5)
        how = f"exit code {process.exitcode}"
        if process.exitcode == -signal.SIGKILL:
            how = "killed by the system, most likely because memory ran out"
        return RunStopped(f"A worker process died ({how}); run the same command again with fewer --workers.")


def default_workers(batch_bytes: int, in_use: int, processes: int) -> int:
    """DataLoader workers of each process: its share of the cores but one, if /dev/shm has room for a batch of each. The
    arguments are those of `fitting_prefetch`."""
    room = free_shared_memory() / processes / batch_bytes - in_use
    return max(0, min(usable_cores() // processes - 1, int(min(room, 2**16))))


def fitting_prefetch(workers: int, batch_bytes: int, in_use: int, processes: int) -> int:
    """How many batches each DataLoader worker can prepare in advance, at most MAX_PREFETCH: what /dev/shm has room for.

    Args:
        batch_bytes: the bytes of the tensors of a batch.
        in_use: the batches that a process has taken from its workers and not released yet.
        processes: the processes of this host, which share the memory; each has `workers`.

    Raises:
        InputError: there is no room for one batch per worker.
    """
    if not workers:
        return MAX_PREFETCH
    free = free_shared_memory()
    needed = [processes * batch_bytes * (workers * n + in_use) for n in range(1, MAX_PREFETCH + 1)]
    if needed[0] > free:
        raise InputError(
            f"data.workers: {workers} workers on each of {processes} processes pass batches of "
            f"{batch_bytes / 1e6:,.1f} MB through {_SHARED_MEMORY}, which needs {needed[0] / 1e6:,.0f} MB and has "
            f"{free / 1e6:,.0f} MB free; give the container more (docker run --shm-size="
            f"{math.ceil(needed[-1] / 2**20)}m; in Kubernetes an emptyDir with medium: Memory at {_SHARED_MEMORY}), or "
            "lower data.workers (0 needs none) or train.micro_batch."
        )
    return sum(one <= free for one in needed)


def free_shared_memory() -> float:
    """Free bytes of /dev/shm; infinite on a system that keeps shared memory elsewhere."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except FileNotFoundError:
        return 0.0 if sys.platform == "linux" else math.inf
    return float(status.f_bavail * status.f_frsize)


class LostBatchWatch:
    """Context manager: kills DataLoader's workers when none makes progress while a batch is awaited.

    A thread does so, since the process that awaits the batch can be blocked where no timeout applies: it takes the
    batch's memory from a worker, which may hang. The workers' death ends that wait; `error` says what happened.
    """

    def __init__(self, workers: Sequence[BaseProcess], progress: Callable[[], int | None], lost_after_s: float) -> None:
        """`progress` returns a number that changes with each loaded sample; None if a longer wait is expected."""
        self.error: RunStopped | None = None
        self._workers, self._progress, self._lost_after_s = workers, progress, lost_after_s
        self._is_awaiting, self._done = False, threading.Event()

    def __enter__(self) -> Self:
        if self._workers:
            handler = signal.getsignal(signal.SIGCHLD)
            if callable(handler) and not isinstance(handler, _WhileAwaiting) and _in_main_thread():
                signal.signal(signal.SIGCHLD, _WhileAwaiting(handler))
            threading.Thread(target=self._run, name="lost batches", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @contextmanager
    def awaiting(self) -> Iterator[None]:
        """Within, a batch is awaited. Raises DataLoader's RuntimeError if a worker has died."""
        self._is_awaiting, _WhileAwaiting.is_on = True, _in_main_thread()
        try:
            handler = signal.getsignal(signal.SIGCHLD)
            if self._workers and isinstance(handler, _WhileAwaiting):
                handler(signal.SIGCHLD, None)
            yield
        finally:
            self._is_awaiting = _WhileAwaiting.is_on = False

    def _run(self) -> None:
        before, since = self._progress(), time.monotonic()
        while not self._done.wait(self._lost_after_s / 10):
            now = self._progress()
            if now != before or now is None or not self._is_awaiting:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > 0.8 * self._lost_after_s:  # so that the run has ended in time
                self.error = RunStopped(
                    f"data: a batch was lost: for {self._lost_after_s:.0f} s no DataLoader worker has loaded a sample; "
                    "check that the file system of the shards answers, or raise engine.lost_after_seconds if one "
                    "sample takes longer, then resume."
                )
                for worker in self._workers:
                    worker.kill()  # not terminate(): a process that hangs may not react to SIGTERM
                return


class _WhileAwaiting:
    """DataLoader's handler of SIGCHLD, but only while a batch is awaited. It raises an error if a worker has died: at
    any other line, e.g. of a checkpoint, that error could be lost or do harm."""

    is_on = False

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self._handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_on:
            self._handler(number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block. Processes started in it never receive it; their parent ends them."""
    resource_tracker.ensure_running()  # its start would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_loop(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Applies the function to received items until the other end of the pipe is closed."""
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        result = function(item)
        try:
            connection.send(result)
        except OSError:
            return
