"""Where a step's time goes, in each process; and a trace of a few steps for those who want to see all of it."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_Mark = float | torch.cuda.Event


class StepClock:
    """Seconds by part of a step, summed up since they were last taken.

    On a GPU a part is timed by events in its stream, so that nobody waits for it; what overlaps there (the reduction of
    gradients during the backward pass) counts to the part that it runs under. Parts do not nest.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[_Mark, _Mark]]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside to `name`."""
        began = self._mark()
        try:
            yield
        finally:
            self._spans[name].append((began, self._mark()))

    def take(self) -> dict[str, float]:
        """The seconds of each part, and begins anew."""
        if self._on_gpu:
            torch.cuda.synchronize()
        taken = {name: sum(_seconds(*span) for span in spans) for name, spans in self._spans.items()}
        self._spans.clear()
        return taken

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(began: _Mark, ended: _Mark) -> float:
    if isinstance(began, float) and isinstance(ended, float):
        return ended - began
    assert isinstance(began, torch.cuda.Event)
    assert isinstance(ended, torch.cuda.Event)
    return began.elapsed_time(ended) / 1000


def peak_memory(device: torch.device) -> int:
    """Bytes that this process held at most: of the GPU's memory where it has one, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells of a process begins with what its parent held
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Trace:
    """A trace of a few steps in the format of Chrome's and Perfetto's viewers, FOLDER/rank-N.json."""

    _WAIT, _STEPS = 2, 3

    def __init__(self, folder: Path, rank: int, is_wanted: bool) -> None:
        self._profiler: Any = None
        if not is_wanted:
            return
        self.file = folder / f"rank-{rank}.json"
        self._profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=self._WAIT, warmup=1, active=self._STEPS, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            profile_memory=True,
        )
        self._profiler.start()

    def step(self) -> None:
        """After each optimiser step."""
        if self._profiler is not None:
            self._profiler.step()

    def stop(self) -> None:
        """Ends a trace that the run was too short for."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.file))


class Pacer:
    """Steps a second since the last time that it was asked, less the pauses."""

    def __init__(self, step: int) -> None:
        self._step, self._since = step, time.monotonic()

    def steps_per_second(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self._step) / (now - self._since)
        self._step, self._since = step, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began
