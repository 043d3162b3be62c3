"""Worker processes: a pool with results in order, and the memory and the lost batches of DataLoader's workers.

Each worker of the pool has its own pipe, so that the death of one is noticed. In concurrent.futures all workers share
one result pipe, and the pool hangs if the system kills a worker while it writes a result.
"""

import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Self, TypeVar

from mmrl.errors import InputError, RunStopped

UNIT_ROWS = 256
"""The most rows that a DataLoader worker loads at a time, which bounds its memory."""
# What each DataLoader worker prepares in advance: this many samples, but not more than this many units.
_SAMPLES_AHEAD, _UNITS_AHEAD = 512, 4
# Bytes that a worker with augmentation allocates, besides this many times those of a unit (tests/benchmarks/data.py).
_WORKER_BYTES, _UNITS_HELD = 300e6, 4
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 (a constant of Linux)
_CPU_LIMIT = "/sys/fs/cgroup/cpu.max"  # as Docker and Kubernetes set it
T = TypeVar("T")
R = TypeVar("R")
# Items per worker that are in work or wait for an earlier item: one slow item does not stall the other workers at once.
_IN_FLIGHT = 3


def usable_cores() -> int:
    """CPU cores that this process may use; in a container fewer than the machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max" is no limit
        quota, period = map(int, Path(_CPU_LIMIT).read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


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

    def __exit__(self, *_: object) -> None:
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


def unit_count(rows: int) -> int:
    """The number of units of at most UNIT_ROWS rows that a micro-batch is loaded in."""
    return -(-rows // UNIT_ROWS)


@dataclass(frozen=True)
class LoaderMemory:
    """The memory, in bytes, of the DataLoader workers of a host, which pass units of a micro-batch in shared memory."""

    sample_bytes: int
    rows: int
    """Of a batch, on each process."""
    micro_batch: int
    processes: int
    """Of the host; each has its own workers."""
    pins: bool = False
    """Whether units are copied to page-locked memory at once. Else those of a step, unless they are joined, stay in
    shared memory while those of the next step are loaded."""
    others: float = 0.0
    """Bytes of workers that run at the same time: those of evaluation."""

    @property
    def unit_bytes(self) -> int:
        """The bytes of the tensors of a unit."""
        return -(-self.micro_batch // unit_count(self.micro_batch)) * self.sample_bytes

    @property
    def _taken(self) -> int:
        """Units that a process has taken from its workers and not released yet."""
        joined = unit_count(self.micro_batch)
        return 1 if self.pins else joined if joined > 1 else 2 * self.rows // self.micro_batch

    def units_ahead(self, workers: int) -> int:
        """Units that each worker should prepare in advance: together at least a batch and one unit of each worker, so
        that they load a batch while another one is trained on."""
        units = self.rows // self.micro_batch * unit_count(self.micro_batch)
        samples = self.unit_bytes // self.sample_bytes
        return max(min(_UNITS_AHEAD, -(-_SAMPLES_AHEAD // samples)), 1 + -(-units // max(workers, 1)))

    def shared(self, workers: int, units_ahead: int) -> int:
        """Bytes of shared memory."""
        return self.processes * self.unit_bytes * (workers * units_ahead + self._taken) if workers else 0

    def private(self, workers: int) -> float:
        """Bytes of the workers themselves."""
        return self.processes * workers * (_WORKER_BYTES + _UNITS_HELD * self.unit_bytes)

    def default_workers(self, share: float = 0.5) -> int:
        """Workers of each process: its share of the cores but one, as far as the shared memory has room for a unit of
        each, and this share of the memory for themselves."""
        room = free_shared_memory() / self.processes / self.unit_bytes - self._taken
        room = min(room, share * host_memory() / self.private(1))
        return max(0, min(usable_cores() // self.processes - 1, int(min(room, 2**16))))

    def fitting_units_ahead(self, workers: int) -> int:
        """As `units_ahead`, or fewer: what /dev/shm has room for.

        Raises:
            InputError: there is no room for one unit per worker, or too little memory for the workers.
        """
        if not workers:
            return 1
        wanted, free = self.units_ahead(workers), free_shared_memory()
        who = f"data.workers: {workers} workers on each of {self.processes} processes"
        if (needed := self.shared(workers, 1)) > free:
            raise InputError(
                f"{who} pass units of {self.unit_bytes / 1e6:,.1f} MB through {_SHARED_MEMORY}, which needs "
                f"{needed / 1e6:,.0f} MB and has {free / 1e6:,.0f} MB free; give the container more (docker run "
                f"--shm-size={math.ceil(self.shared(workers, wanted) / 2**20)}m; in Kubernetes an emptyDir with "
                f"medium: Memory at {_SHARED_MEMORY}), or lower data.workers (0 needs none)."
            )
        if (needed := self.shared(workers, 1) + self.private(workers) + self.others) > (memory := host_memory()):
            beside = f", with {self.others / 1e9:,.1f} GB of those that decode for evaluation" * (self.others > 0)
            raise InputError(
                f"{who} need about {needed / 1e9:,.1f} GB of memory{beside}, and this host or container has "
                f"{memory / 1e9:,.1f} GB; lower data.workers."
            )
        return max(n for n in range(1, wanted + 1) if self.shared(workers, n) <= free)


def host_memory() -> float:
    """Bytes of memory that the processes of this host may use together; in a container fewer than the machine has."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no limit
            limits.append(int(Path(path).read_text()))
    return min(limits)


def free_shared_memory() -> float:
    """Free bytes of /dev/shm; infinite on a system that keeps shared memory elsewhere."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except FileNotFoundError:
        return 0.0 if sys.platform == "linux" else math.inf
    return float(status.f_bavail * status.f_frsize)


def start_new_session(_worker: int) -> None:
    """Moves a worker to its own session. Ctrl-C, and SIGTERM in many batch systems, go to the whole process group, but
    the trainer still needs a batch for its last step. It ends its workers itself, with SIGTERM, so that is not ignored.
    """
    os.setsid()


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
            # DataLoader notices a dead worker itself, on a loaded machine perhaps late.
            has_ended = wait([worker.sentinel for worker in self._workers], timeout=0)
            if now is None or now != before or not self._is_awaiting or has_ended:
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
