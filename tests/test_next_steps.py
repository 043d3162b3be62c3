"""The command that each command names at its end, as a user can type it."""

import shlex
import sys
from pathlib import Path

import pytest

from mmrl.output import next_steps


def typed(shown: str) -> list[list[str]]:
    head, *lines = shown.splitlines()
    assert head == "Next:"
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(autouse=True)
def _by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])


def test_paths_are_quoted(tmp_path: Path) -> None:
    run = tmp_path / "my run"
    assert typed(next_steps.after_train(run, {"val": "shards/a b", "many": ["x", "y"]}, run / "eval")) == [
        ["mmrl", "eval", str(run), "val=shards/a b", "--out", str(run / "eval")]
    ]
    assert typed(next_steps.after_train(run, {}, run / "eval"))[0][3] == "SHARDS"
    assert typed(next_steps.after_pack(Path("out"), held_out=True)) == [
        ["mmrl", "check", "out/train"],
        ["mmrl", "train", "--data", "out/train", "--val", "out/val"],
    ]
    one_tower = ["model.towers=image", "loss.image_text=0", "loss.image_image=1"]
    assert typed(next_steps.after_pack(Path("out"), held_out=False, towers="image")) == [
        ["mmrl", "check", "out", "--towers", "image"],
        ["mmrl", "train", "--data", "out", *one_tower],
    ]


def test_output_of_a_run_goes_into_its_folder(tmp_path: Path) -> None:
    exported = ["mmrl", "export", str(tmp_path), "encoder-64", "--dim", "64"]
    assert typed(next_steps.after_eval(str(tmp_path), 256, 64, "val")) == [exported]
    (tmp_path / "config.yaml").write_text("data: {train: shards/train}\nevaluation: {sets: {}}\n")
    exported[3] = str(tmp_path / "encoder-64")
    assert typed(next_steps.after_eval(str(tmp_path), 256, 64, "val")) == [exported]
    embedded = ["mmrl", "embed", str(tmp_path), "val", str(tmp_path / "embeddings")]
    assert typed(next_steps.after_eval(str(tmp_path), 64, 64, "val")) == [embedded]
    assert typed(next_steps.after_eval(str(tmp_path), 64, 64, "val", second=True)) == [[*embedded, "--second"]]
    second = [f"run={tmp_path}-negatives", "data.negatives=1", "data.negatives_from=mined"]
    assert typed(next_steps.after_mine(f"{tmp_path}/", Path("mined"))) == [
        ["mmrl", "train", str(tmp_path / "config.yaml"), *second]
    ]
    encoder = tmp_path / "encoders"
    assert typed(next_steps.after_export(str(tmp_path), encoder, [64, 32])) == [
        ["mmrl", "embed", str(encoder / "32"), "shards/train", str(encoder / "32-embeddings")]
    ]
    assert typed(next_steps.after_export("open_clip:X:random", encoder, [64]))[0][3] == "SHARDS"


def test_only_an_index_is_built_that_can_be() -> None:
    embeddings = Path("runs/encoder-64-embeddings")
    assert typed(next_steps.after_embed(embeddings, [{"precision": "fp32"}, {"precision": "int8"}])) == [
        ["mmrl", "index", str(embeddings), "runs/encoder-64-index"]
    ]
    assert "Next:" not in next_steps.after_embed(embeddings, [{"precision": "int8"}])


def test_the_program_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "mmrl"
    monkeypatch.setattr(sys, "argv", [str(program)])
    monkeypatch.setenv("PATH", "")
    assert typed(next_steps.after_index(Path("index"))) == [[str(program), "serve", "index"]]
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert typed(next_steps.after_index(Path("index"))) == [["mmrl", "serve", "index"]]
