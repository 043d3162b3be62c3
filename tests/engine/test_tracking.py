"""What a run appends to its folder, and what is left of it when the run resumes from an earlier step."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrl.engine.tracking import Tracker, TrackingConfig


def tracker(folder: Path, start: int = 0) -> Tracker:
    return Tracker(folder, TrackingConfig(tensorboard=True), start, 10, Console(quiet=True))


def evaluation(step: int, value: float) -> dict[str, Any]:
    dims = {dim: {"text_to_image": {"R@1": value, "mAP": value + 0.1}} for dim in ("16", "8")}
    return {"step": step, "samples": 4 * step, "sets": {"val": {"dims": dims, "num_images": 3}}}


def metrics(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "samples_per_second": 2.0}


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(point.step, round(point.value, 5)) for point in events.Scalars(tag)]


def test_evaluations_of_later_steps_are_dropped_on_resume(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        for step in (0, 4, 8):
            first.evaluation(evaluation(step, step / 100))
            first.log(metrics(step))
    assert [one["step"] for one in first.evaluations()] == [0, 4, 8]
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 9, "sam')  # killed while writing
    with tracker(tmp_path, start=4) as resumed:
        assert resumed.evaluations() == [evaluation(0, 0.0), evaluation(4, 0.04)]
        resumed.evaluation(evaluation(6, 0.5))
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 4, 6]
    assert curve(tmp_path, "val/text_to_image/R@1/8") == [(0, 0.0), (4, 0.04), (6, 0.5)]
    assert curve(tmp_path, "val/text_to_image/mAP/16") == [(0, 0.1), (4, 0.14), (6, 0.6)]
    assert curve(tmp_path, "loss") == [(0, 1.0), (4, 1.0)]


def test_a_new_run_starts_without_evaluations(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        assert first.evaluations() == []
        first.evaluation(evaluation(0, 0.0))
    with tracker(tmp_path) as second:
        assert second.evaluations() == []
