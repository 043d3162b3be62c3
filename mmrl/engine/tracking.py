"""Writes a run's metrics: progress bar or plain lines, metrics.jsonl, evaluations.jsonl, TensorBoard. Rank 0 only."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import TextColumn

from mmrl.data.index import BAD_SAMPLES
from mmrl.errors import InputError
from mmrl.output.files import write_atomic
from mmrl.output.progress import progress_bar
from mmrl.settings import Settings, machine_field

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


class TrackingConfig(Settings):
    """What is logged during a run."""

    log_every: int = machine_field(20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = machine_field(False)
    """Also write TensorBoard event files to RUN/tensorboard."""
    profile: bool = machine_field(False)
    """Trace steps 4 to 6 after the start to RUN/profile/rank-N.json, for chrome://tracing or Perfetto."""


class Tracker:
    """Logs metrics and messages of a run."""

    def __init__(self, folder: Path, config: TrackingConfig, start: int, total: int, console: Console) -> None:
        self.console = console
        self._folder = folder
        for name in (METRICS, EVALUATIONS, BAD_SAMPLES):
            _drop_later_steps(folder / name, start)
        self._metrics = (folder / METRICS).open("a")
        self._board = _tensorboard(folder / "tensorboard", start) if config.tensorboard else None
        self._total = total
        self._start_time, self._start = time.monotonic(), start
        self._bar = progress_bar(console, TextColumn("{task.fields[metrics]}"), transient=False)
        self._task = self._bar.add_task("step", total=total, completed=start, metrics="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._bar.update(self._task, completed=step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record to metrics.jsonl and TensorBoard, and shows loss and throughput on the console."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        metrics = f"loss {record['loss']:.3f}  {record['samples_per_second']:,.0f} samples/s"
        self._bar.update(self._task, metrics=metrics)
        step = record["step"]
        if not self.console.is_terminal:
            elapsed = time.monotonic() - self._start_time
            left = int(elapsed / max(step - self._start, 1) * (self._total - step))
            line = f"step {step:,}/{self._total:,}  {metrics}  {left // 60}:{left % 60:02} left"
            self.console.print(line, highlight=False)
        if self._board is not None:
            for name, value in _flatten(record):
                self._board.add_scalar(name, value, step)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Appends an evaluation to evaluations.jsonl, and to TensorBoard as SET/DIRECTION/METRIC/DIM.

        Args:
            record: {"step": …, "samples": …, "sets": {set: its entry in retrieval.json}}.
        """
        with (self._folder / EVALUATIONS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is None:
            return
        for name, result in record["sets"].items():
            for dim, by_direction in result["dims"].items():
                for score, value in _flatten(by_direction):
                    self._board.add_scalar(f"{name}/{score}/{dim}", value, record["step"])

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations of the run so far, in the order of steps."""
        path = self._folder / EVALUATIONS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def print_lines(self, *lines: Any) -> None:
        """Prints strings or rich renderables above the progress bar."""
        for line in lines:
            is_text = isinstance(line, str)
            self.console.print(line, highlight=False, markup=not is_text, soft_wrap=is_text)

    def bad_samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Appends skipped samples to bad_samples.jsonl."""
        with (self._folder / BAD_SAMPLES).open("a") as file:
            file.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)


def _drop_later_steps(path: Path, step: int) -> None:
    """Removes lines of steps after `step`: a run resumed from there logs these steps again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True) if step else []
    write_atomic(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tracking.tensorboard: TensorBoard is not installed; run pip install 'mmrl-clip[tensorboard]'."
        ) from None
    return SummaryWriter(str(folder), purge_step=start + 1)


def _flatten(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            pairs.append((prefix + name, float(value)))
    return pairs
