"""Ctrl-C, and the SIGTERM of a batch system: the current step ends, a checkpoint is written, and the run stops."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopRequest:
    """Whether a signal has asked this process to stop after its current step."""

    def __init__(self) -> None:
        self.requested = False
        self.signal_name = ""

    def __call__(self, number: int, _frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C stops at once
        self.requested, self.signal_name = True, signal.Signals(number).name
        print(f"\n{self.signal_name}: stopping after this step …", file=sys.stderr)


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
