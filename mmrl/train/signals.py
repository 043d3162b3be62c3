"""Ctrl-C, and the SIGTERM of a batch system: the present step is finished, a checkpoint written, and the run ends."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether a signal has asked the run to end after its present step."""

    def __init__(self) -> None:
        self.asked = False
        self.name = ""

    def __call__(self, number: int, _frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.asked, self.name = True, signal.Signals(number).name
        print(f"\n{self.name}: stopping after this step …", file=sys.stderr)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM let the step finish and a checkpoint be written."""
    stop = Stop()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
