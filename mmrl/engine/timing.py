"""Times the phases of a step, measures throughput and peak memory, and records profiler traces."""

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


class StepTimer:
    """Seconds per phase of a step, summed since the last `pop_seconds`.

    On a GPU, phases are timed by CUDA events without synchronising. What overlaps there, such as the reduction of
    gradients during the backward pass, counts to the phase that it runs under. Phases do not nest.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[_Mark, _Mark]]] = defaultdict(list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside this context to the phase `name`."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans[name].append((start, self._mark()))

    def pop_seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase and resets them."""
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds = {name: sum(_seconds(*span) for span in spans) for name, spans in self._spans.items()}
        self._spans.clear()
        return seconds

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1000


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: allocated GPU memory, or resident memory without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure of a forked process starts with that of its parent
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    # macOS reports bytes, other systems KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Trace:
    """Profiles a few steps to FOLDER/rank-N.json, in the format of chrome://tracing and Perfetto."""

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
        """Called after each optimizer step."""
        if self._profiler is not None:
            self._profiler.step()

    def stop(self) -> None:
        """Ends the trace, even if the run had too few steps."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.file))


class ThroughputMeter:
    """Steps per second since the last query, without paused time."""

    def __init__(self, step: int) -> None:
        self._step, self._since = step, time.monotonic()

    def steps_per_second(self, step: int) -> float:
        """The rate from the step of the last query, or of the construction, to `step`."""
        now = time.monotonic()
        rate = (step - self._step) / (now - self._since)
        self._step, self._since = step, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside this context."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start
