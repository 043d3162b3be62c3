"""Ctrl-C, and the SIGTERM of a batch system: the current step ends, a checkpoint is written, and the run stops."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mmrl.distributed import comm

_RANKS = 1 << 18  # so that float32 holds each code exactly


class StopRequest:
    """Whether a signal has asked this process to stop after its current step."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, number: int, _frame: Any) -> None:
        if self._number and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self._number = number
        # print() would raise RuntimeError if the signal came while the program prints.
        with suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step …\n".encode())

    def code(self) -> int:
        """A number for the signal and this rank, of which the maximum over ranks is taken; 0 without a signal."""
        return self._number and self._number * _RANKS + comm.world().rank

    def describe(self, code: int) -> str:
        """The signal of such a maximum, and its rank if this one has received none: "SIGTERM to rank 3"."""
        number, rank = divmod(code, _RANKS)
        return signal.Signals(number).name + ("" if self._number else f" to rank {rank}")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within, Ctrl-C and SIGTERM set a flag instead of ending the process."""
    stop = StopRequest()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
