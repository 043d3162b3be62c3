"""`mmrl check` for one tower: the bad samples are those that training skips, and nothing is asked of the other side."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import drawing, encoded, write_tar
from helpers.samples import SPEC, bad_members

from mmrl import cli
from mmrl.data.check.command import check_shards
from mmrl.data.check.findings import CheckResult, Spread
from mmrl.data.check.report import result_lines
from mmrl.data.check.shard import TokenCounter
from mmrl.data.sources import DataConfig, open_training_set
from mmrl.data.stream import Stream
from mmrl.errors import InputError

WriteConfig = Callable[..., Path]


def text_members() -> list[tuple[str, bytes]]:
    """30 questions with passages, of which two are equal; six without one, one of them with no text at all; and images
    that a run with a text tower does not read, one of them damaged."""
    members = []
    for number in range(30):
        metadata: dict[str, Any] = {"captions": [f"question {number}"], "second_text": f"passage {max(1, number)}"}
        if number >= 24:
            del metadata["second_text"]
        if number == 29:
            metadata = {}
        members.append((f"{number:05}.json", json.dumps(metadata).encode()))
    return [*members, ("00030.json", b"{"), ("00031.png", b"damaged"), ("00031.txt", b"question 31 " * 40)]


def image_members() -> list[tuple[str, bytes]]:
    """20 images without captions, 16 of them with a second one, of which one is damaged; one image is damaged."""
    members = [(f"{number:05}.png", encoded(drawing(number)[0])) for number in range(20)]
    members += [(f"{n:05}.second.webp", encoded(drawing(n + 50, size=48)[0], "WEBP")) for n in range(2, 17)]
    return sorted([*members, ("00001.second.jpg", b"damaged"), ("00020.png", b"damaged"), ("00021.txt", b"no image")])


def skipped(path: Path, *sides: str) -> dict[str, str]:
    """Key -> reason of each sample that training skips."""
    config = DataConfig(train=str(path), max_bad_fraction=1.0)
    stream = Stream(
        open_training_set(config, sides), 10, image=SPEC, config=config, sides=sides, second=frozenset(sides)
    )
    return {one.key: one.reason for _ in range(3) for batch in stream for one in batch.bad}


def found(path: Path, tmp_path: Path, **options: Any) -> tuple[CheckResult, dict[str, str]]:
    result = check_shards(path, workers=1, list_file=tmp_path / "bad.jsonl", quiet=True, **options)
    listed = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    return result, {one["key"]: one["reason"] for one in listed}


def test_texts_alone(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", text_members())
    tokens = TokenCounter(lambda texts: [len(text.split()) for text in texts], 10)
    result, bad = found(path, tmp_path, sides=["text"], tokens=tokens, batch_size=10)
    assert bad == skipped(path, "text")
    assert {key: reason.partition(":")[0] for key, reason in bad.items()} == {
        "00029": "no caption", "00030": "metadata not JSON",
    }  # fmt: skip
    (facts,) = result.sets
    assert (facts.captions, facts.second_texts, facts.second_images) == (30, 24, 0)
    assert facts.captions_of_sample == Spread(1, 1, 1)
    assert (facts.formats, facts.decoded, facts.shorter_side) == ({}, 0, None)
    assert facts.tokens is not None
    assert facts.tokens.cut == 1
    assert facts.characters == Spread(9, 10, 479)
    assert (result.duplicates.pictures, result.duplicates.captions_apart) == (0, 2)
    assert result.plan is not None
    assert (result.plan.steps_per_epoch, result.plan.left_out_per_epoch) == (3, 2)
    lines = result_lines(result)
    assert "  pairs     24 samples with a second text of their own, of 32" in lines
    assert not any(line.startswith("  images") for line in lines)
    assert check_shards(path, sides=["text"], workers=1, decode=False, quiet=True).notes == []
    of_images: dict[str, dict[str, Any]] = {
        "sheet": {"sheet_file": tmp_path / "sheet.png"}, "against": {"against": str(path)},
    }  # fmt: skip
    for name, option in of_images.items():
        with pytest.raises(InputError, match=f"{name}: .* texts alone have none; remove --{name}"):
            check_shards(path, sides=["text"], workers=1, quiet=True, **option)
    as_pairs = check_shards(path, workers=1, quiet=True)
    assert as_pairs.problems["no image"] == 31


def test_images_alone(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", image_members())
    sheet = tmp_path / "sheet.png"
    result, bad = found(path, tmp_path, sides=["image"], second=frozenset({"image"}), batch_size=10, sheet_file=sheet)
    assert bad == skipped(path, "image")
    assert bad.keys() == {"00001", "00020", "00021"}
    assert sheet.exists()
    (facts,) = result.sets
    assert (facts.captions, facts.second_texts, facts.second_images) == (0, 0, 16)
    assert facts.formats == {"PNG": 20, "WEBP": 15, "unknown": 2}
    assert facts.decoded == 20 + 15
    assert (facts.shorter_side, facts.small_pictures) == (Spread(32, 32, 48), 35)
    assert any(note.startswith("Second members of pairs: ") for note in result.notes)
    assert not any(line.startswith("  captions") for line in result_lines(result))
    # A run that compares no second images does not decode them; without a config it may.
    for second, expected in ((frozenset(), {"00020", "00021"}), (None, set(bad))):
        assert found(path, tmp_path, sides=["image"], second=second)[1].keys() == expected
    assert found(path, tmp_path, sides=["image"], decode=False)[1].keys() == {"00021"}


def test_both_towers_ask_for_what_they_did(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", bad_members())
    assert found(path, tmp_path)[1] == skipped(path, "image", "text")
    for side in ("text", "image"):
        assert found(path, tmp_path, sides=[side])[1] == skipped(path, side)


def test_the_towers_of_a_config_or_of_the_option_decide(
    tmp_path: Path, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str | Path) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["mmrl", "check", *map(str, arguments), "--workers", "1"])
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr()
        return said.out, said.err

    paths = {
        "text": write_tar(tmp_path / "t.tar", text_members()),
        "image": write_tar(tmp_path / "i.tar", image_members()),
    }
    for side, path in paths.items():
        of_option = json.loads(run(path, "--towers", side, "--json")[0])
        overrides = (f"model.towers={side}", "loss.image_text=0", f"loss.{side}_{side}=1", f"data.train={path}")
        of_config = json.loads(run("--config", write_config(), *overrides, "--json")[0])
        assert of_config["problems"] == of_option["problems"]
        assert of_config["bad_samples"] == len(skipped(path, side))
        assert (of_config["sets"][0]["tokens"] is None) == (side == "image")
        assert of_config["plan"]["samples_per_epoch"] == of_option["sets"][0]["samples"]
    assert "towers: --config says which towers there are" in run("--config", write_config(), "--towers", "text")[1]
    assert "--towers" in run(paths["text"], "--towers", "texts")[1]
