"""Runs that also compare images with images and texts with texts, or learn from a teacher."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import start_training
from safetensors.torch import load_file

from mmrl.config import load_config
from mmrl.errors import InputError, RunStopped
from mmrl.search.embed import embed_images
from mmrl.search.mine import MineOptions, mine_negatives
from mmrl.train import sides
from mmrl.train.trainer import train

WriteConfig = Callable[..., Path]
LOSS = {"image_image": 0.5, "text_text": 0.3, "label_smoothing": 0.1}
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint but attention's key bias, whose true gradient is zero: Adam blows it up."""
    state = load_file(folder / "checkpoints" / "last" / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if "in_proj_bias" not in name}


def losses(folder: Path) -> list[dict[str, Any]]:
    names = ("loss", "loss_by_dim", "image_image_by_dim", "text_text_by_dim", "tower_loss", "distillation_by_dim")
    return [{name: line[name] for name in names if name in line} for line in metrics(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    for first, second in zip(losses(one), losses(other), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, abs=3e-5), name
    torch.testing.assert_close(weights(other), weights(one), **CLOSE)


def test_second_members_in_micro_batches_and_after_a_resume(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(loss=LOSS, evaluation={}, checkpoint={"every": "5 steps"})
    whole = train(load_config(path))
    for line in metrics(whole):
        terms = {name: line[f"{name}_by_dim"] for name in ("image_image", "text_text")}
        assert all(list(one) == ["4", "8", "16"] for one in terms.values())
        prefixes = line["loss_by_dim"], terms["image_image"], terms["text_text"]
        parts = [weight * (one["4"] + one["8"]) / 2 for weight, one in zip((1, 0.5, 0.3), prefixes, strict=True)]
        full = sum(weight * one["16"] for weight, one in zip((1, 0.5, 0.3), prefixes, strict=True))
        assert line["prefix_loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert line["tower_loss"] == pytest.approx(full + line["prefix_gradient"] * sum(parts), rel=1e-5)
    assert_same_run(whole, train(load_config(path, [f"run={tmp_path}/micro", "train.micro_batch=4"])))

    resumed = train(load_config(path, [f"run={tmp_path}/resumed"]))
    last = resumed / "checkpoints" / "last"  # as if the run had been lost after step 5, the first of an epoch
    last.unlink()
    last.symlink_to("step-5")
    train(load_config(path, [f"run={tmp_path}/resumed", "resume=auto"]))
    assert losses(resumed) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_learn_what_one_does(write_config: WriteConfig, tmp_path: Path, processes: int) -> None:
    path = write_config(loss=LOSS, evaluation={})
    one = train(load_config(path))
    stages = (0, 2, 3) if processes == 2 else (0, 1)
    start_training(path, processes, tmp_path, *(f"run={tmp_path}/stage-{n} engine.zero_stage={n}" for n in stages))
    for stage in stages:
        assert_same_run(one, tmp_path / f"stage-{stage}")


def test_a_teacher_is_live_or_stored(write_config: WriteConfig, shards: Path, tmp_path: Path) -> None:
    teacher = str(train(load_config(write_config(seed=1, run=f"{tmp_path}/teacher", evaluation={}))))
    sections: dict[str, Any] = {"evaluation": {}, "data": {"train": str(shards)}}
    path = write_config("student.yaml", **sections, teacher={"model": teacher, "weight": 0.7})
    live = train(load_config(path))
    for line in metrics(live):
        assert list(line["distillation_by_dim"]) == ["4", "8", "16"]
        full = line["loss_by_dim"]["16"] + 0.7 * line["distillation_by_dim"]["16"]
        assert line["tower_loss"] == pytest.approx(full + line["prefix_gradient"] * line["prefix_loss"], rel=1e-5)
    plain = train(load_config(write_config("plain.yaml", run=f"{tmp_path}/plain", **sections)))
    first, last = (metrics(live)[i]["distillation_by_dim"]["16"] for i in (0, -1))
    assert last < first
    assert losses(plain)[-1]["loss"] != losses(live)[-1]["loss"]

    embed_images(teacher, str(shards), tmp_path / "embedded", precisions=["fp32"], texts=True, quiet=True)
    stored = [f"run={tmp_path}/stored", f"teacher.embeddings={tmp_path}/embedded"]
    for one, other in zip(losses(live), losses(train(load_config(path, stored))), strict=True):
        assert all(other[name] == pytest.approx(value, abs=5e-4) for name, value in one.items())  # stored in fp16
    assert_same_run(live, train(load_config(path, [f"run={tmp_path}/micro", "train.micro_batch=4"])))


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"loss": {"image_text": 0}}, "at least one of image_text, image_image and text_text must be above 0"),
        (
            {"loss": {"name": "sigmoid", "image_image": 1}},
            "image_text, image_image and text_text require name: infonce",
        ),
        ({"teacher": {"model": "x"}, "loss": {"distillation": 1}}, "teacher: requires .* no loss.distillation"),
        (
            {"teacher": {"model": "x", "embeddings": "y"}, "data": {"train": "z", "mask_equal_captions": False}},
            "teacher.embeddings: requires data.mask_equal_captions",
        ),
    ],
)
def test_what_cannot_work_is_refused(write_config: WriteConfig, sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_config(write_config(**sections))


def test_a_teacher_that_lacks_what_is_trained_on(write_config: WriteConfig, shards: Path, tmp_path: Path) -> None:
    teacher = str(train(load_config(write_config(seed=1, run=f"{tmp_path}/teacher", evaluation={}))))
    first = next(iter(sorted(shards.iterdir())))
    embed_images(teacher, str(first), tmp_path / "embedded", precisions=["fp32"], texts=True, quiet=True)
    path = write_config("student.yaml", evaluation={})
    values = yaml.safe_load(path.read_text()) | {"teacher": {"model": teacher, "embeddings": f"{tmp_path}/embedded"}}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"lacks the sample .* run mmrl embed --texts on the training shards"):
        train(load_config(path))
    path.write_text(yaml.safe_dump(values | {"teacher": {"model": teacher, "embeddings": str(tmp_path)}}))
    with pytest.raises(InputError, match=r"embeddings.parquet does not exist; give the output folder of mmrl embed"):
        train(load_config(path))


def test_mined_negatives_in_micro_batches(write_config: WriteConfig, shards: Path, tmp_path: Path) -> None:
    model = str(train(load_config(write_config(seed=1, run=f"{tmp_path}/model", evaluation={}))))
    mine_negatives(model, str(shards), tmp_path / "mined", MineOptions(num=3, margin=0.0), quiet=True)
    data = {"train": str(shards), "negatives": 2, "negatives_from": f"{tmp_path}/mined", "negatives_images": True}
    path = write_config(evaluation={}, data=data)
    whole = train(load_config(path))
    plain = train(load_config(path, [f"run={tmp_path}/plain", "data.negatives=0"]))
    first, without = losses(whole)[0]["loss_by_dim"], losses(plain)[0]["loss_by_dim"]
    assert all(first[dim] > without[dim] for dim in first)  # of equal weights, among more candidates
    assert_same_run(whole, train(load_config(path, [f"run={tmp_path}/micro", "train.micro_batch=4"])))


def test_a_loss_that_is_not_finite_names_the_pair_whose_second_text_it_is_from(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "split", _with_nan(sides.split))
    path = write_config(loss={"text_text": 0.5}, evaluation={})
    says = r"Step 1: the loss is nan \(NaN or infinite: 1 of 12 embeddings of rank 0 on host .* \(samples .*\)\)\."
    with pytest.raises(RunStopped, match=says):
        train(load_config(path))


def _with_nan(split: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*arguments: Any) -> Any:
        image_bD, text_bD, second, negatives = split(*arguments)
        marks_b1 = torch.ones(len(text_bD), 1)
        marks_b1[2] = float("nan")
        return image_bD, text_bD, dataclasses.replace(second, text_bD=second.text_bD * marks_b1), negatives

    return changed
