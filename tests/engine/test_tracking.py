"""What a run appends to its folder, and what is left of it when the run resumes from an earlier step."""

import io
import json
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from mmrl.engine.tracking import Tracker, TrackingConfig
from mmrl.errors import InputError


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


@pytest.mark.parametrize(
    "damage", [b"\0\0\0", b"[" * 100_000, b'{"step": 4, "loss"', b"{}", b"[1]", b"\xff\xfe", b'{"step": "four"}']
)
def test_a_damaged_line_is_left_out_and_reported(tmp_path: Path, damage: bytes) -> None:
    with tracker(tmp_path) as first:
        for step in (2, 4, 6):
            first.log(metrics(step))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]))
    shown = io.StringIO()
    with Tracker(tmp_path, TrackingConfig(), 6, 10, Console(file=shown, width=500)) as resumed:
        resumed.log(metrics(8))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 6, 8]
    assert f"{path}: line 2 is damaged and left out." in shown.getvalue()


def test_lines_wait_in_memory_while_the_disk_is_full(tmp_path: Path) -> None:
    shown, before = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "metrics.jsonl"
    with Tracker(tmp_path, TrackingConfig(), 0, 10, Console(file=shown, width=500)) as one:
        one.log(metrics(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        try:
            one.log(metrics(2))
            one.log(metrics(3))
            assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        one.log(metrics(4))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    text = shown.getvalue()
    assert text.count("metrics.jsonl cannot be written (") == 1
    assert "metrics.jsonl is written again, with all lines." in text


def test_a_new_run_starts_without_evaluations(tmp_path: Path) -> None:
    with tracker(tmp_path) as first:
        assert first.evaluations() == []
        first.evaluation(evaluation(0, 0.0))
    with tracker(tmp_path) as second:
        assert second.evaluations() == []


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: blocks of 32 KiB, in which chunks have a checksum, a length and a kind."""
    position, record = 7, b""  # behind the file's own header
    while position + 7 <= len(log):
        if (left := 2**15 - position % 2**15) < 7:  # the end of a block is padded
            position += left
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        record += log[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield record
            record = b""


def test_tensorboard_shows_recall_by_dim_and_pictures(tmp_path: Path) -> None:
    with tracker(tmp_path) as one:
        for step in (2, 4):
            one.evaluation(evaluation(step, step / 100), {"val/query-1": Image.new("RGB", (8, 8), "red")})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [shown.step for shown in events.Images("val/query-1")] == [2, 4]
    stored = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout: Any = vars(layout_pb2)["Layout"].FromString(stored)
    chart = layout.category[0].chart[0]
    assert chart.title == "val/text_to_image/R@1"
    assert list(chart.multiline.tag) == [f"val/text_to_image/R@1/{dim}" for dim in ("16", "8")]


def test_a_board_that_cannot_be_closed_ends_no_run(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    shown = io.StringIO()
    with Tracker(tmp_path, TrackingConfig(tensorboard=True), 0, 10, Console(file=shown, width=200)) as one:
        one._boards[0].close = full  # pyright: ignore[reportAttributeAccessIssue]
    assert "TensorBoard cannot be written any more ([Errno 28] No space left on device)" in shown.getvalue()


@pytest.mark.slow
def test_wandb_offline_has_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mmrl-clip[wandb]'")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    with Tracker(tmp_path, TrackingConfig(wandb="shop"), 0, 10, Console(quiet=True)) as one:
        for step in (2, 4):
            one.log(metrics(step))
            one.evaluation(evaluation(step, step / 100), {"val/query-1": Image.new("RGB", (8, 8), "red")})
    wandb.teardown()  # else the file is written a moment later
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    parse: Any = vars(wandb_internal_pb2)["Record"].FromString
    records = [parse(data) for data in leveldb_records(file.read_bytes())]
    logged = [{".".join(item.nested_key): item.value_json for item in one.history.item} for one in records]
    for tag, values in (("loss", [1, 1]), ("val/text_to_image/R@1/8", [0.02, 0.04])):
        rows = [row for row in logged if tag in row]
        assert [int(row["step"]) for row in rows] == [2, 4]
        assert [float(row[tag]) for row in rows] == values
    assert {item.key: item.value_json for one in records for item in one.run.config.update}["seed"] == "7"
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/val/query-1*.png"))) == 2
    tables = [
        json.loads(path.read_text())["data"]
        for path in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.json")
    ]
    assert sorted(max(tables, key=len)) == [[2, "16", 0.02], [2, "8", 0.02], [4, "16", 0.04], [4, "8", 0.04]]
    assert (tmp_path / "wandb/id.txt").read_text().strip() in file.name


def test_a_board_that_cannot_be_used_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb is not installed; run pip install 'mmrl-clip\[wandb\]'"):
        Tracker(tmp_path, TrackingConfig(wandb=True), 0, 10, Console(quiet=True))
