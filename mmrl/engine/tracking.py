"""Writes a run's metrics: progress bar or plain lines, metrics.jsonl, evaluations.jsonl, boards. Rank 0 only."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from PIL import Image
from rich.console import Console
from rich.progress import TextColumn

from mmrl.data.index import BAD_SAMPLES
from mmrl.engine.boards import Board, TensorBoard, Wandb
from mmrl.output.appended import AppendedLines, drop_later_steps, read_records
from mmrl.output.console import print_line
from mmrl.output.progress import progress_bar
from mmrl.settings import Settings, machine_field

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
# The metrics whose values at all dims are drawn in one chart.
_CHARTED = ("R@1", "R@10", "top1")


class TrackingConfig(Settings):
    """What is logged during a run."""

    log_every: int = machine_field(20, ge=1)
    """Steps between two lines of metrics.jsonl."""
    tensorboard: bool = machine_field(False)
    """Also write TensorBoard event files to RUN/tensorboard: curves, recall by dim, and the first results of some
    queries of each evaluation set."""
    wandb: bool | str = machine_field(False)
    """The same to Weights & Biases: the name of a project, or true for the project mmrl. With WANDB_MODE=offline the
    files stay in RUN/wandb."""
    profile: bool = machine_field(False)
    """Trace steps 4 to 6 after the start to RUN/profile/rank-N.json, for chrome://tracing or Perfetto."""

    @property
    def has_board(self) -> bool:
        """Whether pictures are shown anywhere."""
        return self.tensorboard or bool(self.wandb)


class Tracker:
    """Logs metrics and messages of a run."""

    def __init__(self, folder: Path, config: TrackingConfig, start: int, total: int, console: Console) -> None:
        self.console = console
        self._folder = folder
        self._files = {
            name: AppendedLines(folder / name, self.print_lines) for name in (METRICS, EVALUATIONS, BAD_SAMPLES)
        }
        for name in self._files:  # a run that is resumed logs the later steps again
            drop_later_steps(folder / name, start, self.print_lines)
        self._boards: list[Board] = [TensorBoard(folder, start)] if config.tensorboard else []
        if config.wandb:
            self._boards.append(Wandb(folder, config.wandb))
        self._total = total
        self._start_time, self._start = time.monotonic(), start
        self._bar = progress_bar(console, TextColumn("{task.fields[metrics]}"), transient=False)
        self._task = self._bar.add_task("step", total=total, completed=start, metrics="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        for file in self._files.values():
            file.close()
        self._on_boards(lambda board: board.close())

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._bar.update(self._task, completed=step)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record to metrics.jsonl and the boards, and shows loss and throughput on the console."""
        self._files[METRICS].append(record)
        metrics = f"loss {record['loss']:.3f}  {record['samples_per_second']:,.0f} samples/s"
        self._bar.update(self._task, metrics=metrics)
        step = record["step"]
        if not self.console.is_terminal:
            elapsed = time.monotonic() - self._start_time
            left = int(elapsed / max(step - self._start, 1) * (self._total - step))
            line = f"step {step:,}/{self._total:,}  {metrics}  {left // 60}:{left % 60:02} left"
            self.console.print(line, highlight=False)
        self._on_boards(lambda board: board.scalars(dict(_flatten(record)), step))

    def evaluation(self, record: Mapping[str, Any], pictures: Mapping[str, Image.Image] | None = None) -> None:
        """Appends an evaluation to evaluations.jsonl, and to the boards as SET/DIRECTION/METRIC/DIM.

        Args:
            record: {"step": …, "samples": …, "sets": {set: its entry in retrieval.json}}.
            pictures: by tag, for the boards.
        """
        self._files[EVALUATIONS].append(record)
        step = record["step"]
        self._on_boards(lambda board: board.scalars(_scores(record), step))
        for tag, picture in (pictures or {}).items():
            self._on_boards(lambda board, tag=tag, picture=picture: board.picture(tag, picture, step))
        if not self._boards:
            return
        evaluations = self.evaluations()
        curves_of: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for tag in _scores(record):
            if tag.split("/")[-2] in _CHARTED:
                curves_of[tag.rpartition("/")[0]][tag] = [_scores(one).get(tag, math.nan) for one in evaluations]
        for title, curves in curves_of.items():
            steps = [one["step"] for one in evaluations]
            self._on_boards(lambda board, args=(title, steps, curves): board.recall_by_dim(*args))

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations of the run so far, in the order of steps."""
        return read_records(self._folder / EVALUATIONS)[0]

    def print_lines(self, *lines: Any) -> None:
        """Prints strings or rich renderables above the progress bar."""
        for line in lines:
            print_line(self.console, line) if isinstance(line, str) else self.console.print(line, highlight=False)

    def bad_samples(self, step: int, records: list[dict[str, Any]]) -> None:
        """Appends skipped samples to bad_samples.jsonl."""
        self._files[BAD_SAMPLES].append(*({"step": step, **record} for record in records))

    def _on_boards(self, write: Callable[[Board], None]) -> None:
        for board in list(self._boards):
            try:
                write(board)
            except OSError as error:
                self.print_lines(f"{board.name} cannot be written any more ({error}); the run goes on without it.")
                self._boards.remove(board)


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    """SET/DIRECTION/METRIC/DIM -> value."""
    return {
        f"{name}/{score}/{dim}": value
        for name, result in record["sets"].items()
        for dim, by_direction in result["dims"].items()
        for score, value in _flatten(by_direction)
    }


def _flatten(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            pairs.append((prefix + name, float(value)))
    return pairs
