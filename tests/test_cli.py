"""The commands in the order of a user's workflow: pack, train, eval, export, load."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing
from typer.core import TyperGroup
from typer.main import get_command

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


def next_command(shown: str) -> list[str]:
    """The arguments of the first command that the last lines name."""
    line = shown.rpartition("Next:\n")[2].splitlines()[0]
    program, *arguments = shlex.split(line, comments=True)
    assert program == "mmrl"
    return arguments


def test_workflow_from_a_folder_of_images_to_embeddings(
    tmp_path: Path, run: Callable[..., str], write_config: WriteConfig
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(30):
        image, caption, _ = drawing(number)
        image.save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(caption)
    shards = str(tmp_path / "shards")
    shown = run("pack", photos, shards, "--samples-per-shard", 12)
    assert next_command(shown) == ["check", shards]
    assert f"mmrl train --data {shards} " in shown

    config = write_config(data={"train": shards}, evaluation={"sets": {"val": {"shards": shards}}})
    shown = run("train", config, "train.duration=12 steps")
    assert "30 pairs, 2 steps per epoch of 12 (each epoch leaves out another 6), 12 steps" in shown
    assert "val: 30 images, 30 texts; recall in %" in shown
    folder = tmp_path / "run"
    typed = []
    while (arguments := next_command(shown))[0] != "serve":
        typed.append(arguments[0])
        shown = run(*arguments)
        if typed[-1] == "eval":
            page = folder / "eval" / "report" / "index.html"
            assert page.is_file()
            assert str(page) in shown
            assert len(shown.splitlines()) <= 30
    assert typed == ["eval", "export", "embed", "index"]
    assert (Path(arguments[1]) / "manifest.json").is_file()
    assert "This run is finished" in run("train", config, "train.duration=12 steps", "resume=auto")

    out = tmp_path / "scores"
    result = json.loads(run("eval", folder, shards, f"again={shards}", "--dims", "4,16,9", "--out", out, "--json"))
    assert list(result["dims"]) == ["16", "9", "4"]
    assert list(result["sets"]) == ["shards", "again"]
    assert json.loads((out / "retrieval.json").read_text()) == result
    trained = json.loads((folder / "retrieval.json").read_text())
    assert result["dims"]["16"] == trained["dims"]["16"]
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


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What `mmrl …` prints when it refuses its arguments."""
    monkeypatch.setattr(sys, "argv", ["mmrl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("train c.yaml train.duration=40 epochs seed=1", "mmrl train c.yaml 'train.duration=40 epochs' seed=1"),
        ("train c.yaml seed=1 train.duration = 40 epochs", "mmrl train c.yaml seed=1 'train.duration=40 epochs'"),
        ("train --data a evaluation.sets={v: {shards: x}}", "mmrl train --data a 'evaluation.sets={v: {shards: x}}'"),
        ("plan c.yaml train.duration=40 epochs --gpus 8", "mmrl plan c.yaml 'train.duration=40 epochs' --gpus 8"),
        ("train --data s/0.tar s/1.tar s/2.tar seed=1", "mmrl train --data 's/*.tar' seed=1"),
        ("embed M s/0.tar s/1.tar out --dim 8", "mmrl embed M 's/*.tar' out --dim 8"),
    ],
)
def test_a_value_or_a_pattern_without_quotes_is_answered_with_the_line_to_type(
    typed: str, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(capsys, monkeypatch, *typed.split()).endswith(f": {line}")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("train", "config: missing; give a YAML file, or your images or shards: mmrl train --data photos."),
        ("train c.yaml --dims 8", "dims: goes with --data, which is missing; of a config, change keys by KEY=VALUE."),
        ("train --from runs/a --val b", "val: goes with --data, which is missing"),
        ("train c.yaml d.yaml", "'d.yaml': write KEY=VALUE, e.g. train.batch_size=128; besides its options"),
        ("config init smal", "preset: there is no preset 'smal'. Did you mean 'small'?"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    typed: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert says in refused(capsys, monkeypatch, *typed.split())


def test_every_command_takes_dim_and_dims() -> None:
    group = get_command(cli.app)
    assert isinstance(group, TyperGroup)
    options = [tuple(one.opts) for command in group.commands.values() for one in command.params]
    of_dims = [names for names in options if {"--dim", "--dims"} & {*names}]
    assert len(of_dims) == 8
    assert all({"--dim", "--dims"} <= {*names} for names in of_dims)


def test_the_version_and_a_preset_are_printed(run: Callable[..., str]) -> None:
    assert run("--version") == f"mmrl {mmrl.__version__}\n"
    assert run("config", "init", "finetune") == Path("mmrl/presets/finetune.yaml").read_text()


def test_check_takes_a_config_with_changed_keys(
    run: Callable[..., str], write_config: WriteConfig, shards: Path
) -> None:
    path = write_config(data={"train": "nowhere"})
    shown = run("check", "--config", path, f"data.train={shards}/part-0.tar", "train.batch_size=10", "--json")
    plan = json.loads(shown)["plan"]
    assert plan["steps_per_epoch"] == 2


def test_the_quickstart_ends_on_one_screen() -> None:
    """After the training, make shows its command lines, and only one of them prints: mmrl eval, at most 30 lines."""
    recipe = (Path(__file__).parents[1] / "Makefile").read_text().partition("\nquickstart:")[2].partition("\n\n")[0]
    train, *commands = recipe.splitlines()[1:]
    assert "mmrl train" in train
    printing = [command for command in commands if "mmrl" in command and "--json > " not in command]
    assert ["mmrl eval" in command or command.startswith("\t@echo") for command in printing] == [True, True]
    assert len(commands) + 30 <= 40
