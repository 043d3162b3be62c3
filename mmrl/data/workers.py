"""A function over many items, several at a time in processes of their own, the results in the order of the items.

Each worker has a pipe to itself, so that one which the system kills in the middle of an answer is noticed; with the one
pipe that all workers of a concurrent.futures pool share, the rest of the answer would be waited for without end.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from mmrl.errors import RunStopped

T = TypeVar("T")
R = TypeVar("R")
# Items in work or waiting for those before them, for each worker: enough that one slow item stops nobody at once.
_IN_FLIGHT = 3


def usable_cores() -> int:
    """Cores that this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers(Generic[T, R]):
    """`count` processes that apply `function`, or this process itself where `count` is 1; a context."""

    def __init__(self, function: Callable[[T], R], count: int, preload: str) -> None:
        """`preload` names the module that is imported once for all workers."""
        self._function, self._count, self._preload = function, count, preload
        self._process_at: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Self:
        if self._count > 1:
            # Not forked from this process, whose threads may hold locks.
            context = get_context("forkserver")
            context.set_forkserver_preload([self._preload])
            with _interrupts_waiting():
                for _ in range(self._count):
                    here, there = context.Pipe()
                    process = context.Process(target=_serve, args=(there, self._function), daemon=True)
                    process.start()
                    there.close()
                    self._process_at[here] = process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._process_at.values():
            process.terminate()
        for connection, process in self._process_at.items():
            process.join()
            connection.close()

    def map(self, items: Iterable[T]) -> Iterator[R]:
        """The results in the order of the items, of which only so many are taken as the workers need.

        Raises:
            RunStopped: a worker has ended, as when the system kills it.
        """
        if self._count == 1:
            yield from map(self._function, items)
            return
        left, idle = iter(items), list(self._process_at)
        window: deque[list[R]] = deque()  # a place for each item in flight, empty until its result is there
        place_of: dict[Connection, list[R]] = {}
        while True:
            while idle and len(window) < _IN_FLIGHT * self._count and (item := next(left, None)) is not None:
                connection = idle.pop()
                place_of[connection] = []
                window.append(place_of[connection])
                try:
                    connection.send(item)
                except OSError:
                    raise self._loss(connection) from None
            if not window:
                return
            for connection in wait(list(place_of), timeout=0 if window[0] else None):
                assert isinstance(connection, Connection)
                try:
                    place_of.pop(connection).append(connection.recv())
                except (EOFError, OSError):
                    raise self._loss(connection) from None
                idle.append(connection)
            if window[0]:
                yield window.popleft()[0]

    def _loss(self, connection: Connection) -> RunStopped:
        process = self._process_at[connection]
        process.join(timeout=5)
        how = f"with exit code {process.exitcode}"
        if process.exitcode == -signal.SIGKILL:
            how = "killed by the system, as happens when memory runs out"
        return RunStopped(
            f"A worker process ended early, {how}; start again with the same arguments and fewer --workers."
        )


@contextmanager
def _interrupts_waiting() -> Iterator[None]:
    """Ctrl-C waits until the end of this; processes started in it never see it, this one ends them."""
    resource_tracker.ensure_running()  # its start would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life, which ends with the other end of the pipe."""
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
