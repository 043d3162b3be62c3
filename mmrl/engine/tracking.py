"""Metrics out: a progress bar or plain lines, metrics.jsonl, TensorBoard. The main process only."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data.index import BAD_SAMPLES
from mmrl.errors import InputError
from mmrl.settings import Settings, machine

METRICS = "metrics.jsonl"


class TrackingConfig(Settings):
    """What is written while a run goes on."""

    log_every: int = Field(default=20, ge=1, json_schema_extra={"machine": True})
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = machine(False)
    """Also write TensorBoard's event files to RUN/tensorboard."""
    profile: bool = machine(False)
    """Trace steps 4 to 6 after the start, to RUN/profile/rank-N.json (chrome://tracing or Perfetto)."""


class Tracker:
    """Where a run's numbers go."""

    def __init__(self, folder: Path, config: TrackingConfig, start: int, total: int, console: Console) -> None:
        self.console = console
        self._folder = folder
        for name in (METRICS, BAD_SAMPLES):
            _forget_after(folder / name, start)
        self._metrics = (folder / METRICS).open("a")
        self._board = _tensorboard(folder / "tensorboard", start) if config.tensorboard else None
        self._total = total
        self._began, self._start = time.monotonic(), start
        self._bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=start, numbers="")

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
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def log(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same on the screen."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        numbers = f"loss {record['loss']:.3f}  {record['samples_per_second']:,.0f} samples/s"
        self._bar.update(self._task, numbers=numbers)
        step = record["step"]
        if not self.console.is_terminal:
            left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
            clock = f"{int(left) // 60}:{int(left) % 60:02}"
            self.console.print(f"step {step:,}/{self._total:,}  {numbers}  {clock} left", highlight=False)
        if self._board is not None:
            for name, value in _flat(record):
                self._board.add_scalar(name, value, step)

    def say(self, *lines: Any) -> None:
        """Something to read, above the bar."""
        for line in lines:
            text = isinstance(line, str)
            self.console.print(line, highlight=False, markup=not text, soft_wrap=text)

    def bad_samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Lists what was skipped."""
        with (self._folder / BAD_SAMPLES).open("a") as file:
            file.writelines(json.dumps({"step": step, **record}) + "\n" for record in records)


def _forget_after(path: Path, step: int) -> None:
    """A resumed run makes the steps after its checkpoint again: their earlier lines go, so that each stands once."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True) if step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text("".join(kept))
    beside.replace(path)


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tracking.tensorboard: TensorBoard is not installed; run pip install 'mmrl-clip[tensorboard]'."
        ) from None
    return SummaryWriter(str(folder), purge_step=start + 1)


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            pairs.append((prefix + name, float(value)))
    return pairs
