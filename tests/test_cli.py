"""The commands in the order of a user's workflow: pack, train, eval, export, load."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing

import mmrl
from mmrl import cli

WriteConfig = Callable[..., Path]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs `mmrl …` in this process; returns what it prints."""

    def command(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["mmrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    return command


def test_workflow_from_a_folder_of_images_to_embeddings(
    tmp_path: Path, run: Callable[..., str], write_config: WriteConfig
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(30):
        image, caption, _ = drawing(number)
        image.save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(caption)
    packed = json.loads(run("pack", photos, tmp_path / "shards", "--samples-per-shard", 12, "--json"))
    assert packed["samples"] == 30
    shards = str(tmp_path / "shards")

    config = write_config(data={"train": shards}, evaluation={"sets": {"val": {"shards": shards}}})
    shown = run("train", config, "train.duration=12 steps")
    assert "30 pairs, 2 steps per epoch of 12 (each epoch leaves out another 6), 12 steps" in shown
    assert "val: 30 images, 30 texts; recall in %" in shown
    folder = tmp_path / "run"
    assert "This run is finished" in run("train", config, "train.duration=12 steps", "resume=auto")

    out = tmp_path / "scores"
    result = json.loads(run("eval", folder, shards, f"again={shards}", "--dims", "4,16,9", "--out", out, "--json"))
    assert list(result["dims"]) == ["16", "9", "4"]
    assert list(result["sets"]) == ["shards", "again"]
    assert json.loads((out / "retrieval.json").read_text()) == result
    trained = json.loads((folder / "retrieval.json").read_text())
    assert result["dims"]["16"] == trained["dims"]["16"]
    shown = run("eval", folder, shards)
    assert "chance" in shown

    assert "16-d encoder" in run("export", folder, tmp_path / "one", "--dim", "16")
    both = json.loads(run("export", folder, tmp_path / "two", "--dim", "8,4", "--json"))
    assert list(both) == ["8", "4"]
    offline, online = mmrl.load(tmp_path / "one"), mmrl.load(tmp_path / "two" / "4")
    prefix = offline.encode_texts(["a red square"])[:, :4]
    np.testing.assert_allclose(
        online.encode_texts(["a red square"]), prefix / np.linalg.norm(prefix, axis=1, keepdims=True), atol=1e-6
    )
    # An exported encoder has the scores of its run.
    exported = json.loads(run("eval", tmp_path / "two" / "8", shards, "--json"))
    assert exported["dims"]["8"] == trained["dims"]["8"]


def test_config_schema_is_printed(run: Callable[..., str]) -> None:
    assert json.loads(run("config", "schema"))["title"] == "Config"
