"""The turn of a run: nothing changes at the full dim, and every prefix begins with the most."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import start_training
from rich.console import Console

from mmrl import nesting, turn
from mmrl.config import load_config
from mmrl.data.sources import open_reader
from mmrl.distributed import comm
from mmrl.engine.timing import ThroughputMeter
from mmrl.evaluate import sets
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.model import bundle
from mmrl.train.preflight import prepare
from mmrl.train.trainer import Trainer, train

WriteConfig = Callable[..., Path]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def embedded(trainer: Trainer, shards: Path) -> tuple[torch.Tensor, torch.Tensor]:
    encoder = trainer.encoder
    found = sets.embed(open_reader(str(shards)), encoder.model, encoder.image_spec, encoder.tokenise)
    return F.normalize(found.image_ND.double(), dim=-1), F.normalize(found.text_MD.double(), dim=-1)


def trained(path: Path, steps: int, *overrides: str) -> Trainer:
    config = load_config(path, overrides)
    trainer = Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))
    batches = trainer.stream.forever()
    for _ in range(steps):
        trainer.step([next(batches)])
    return trainer


def test_prefixes_are_trained_from_the_start_on(write_config: WriteConfig, tmp_path: Path) -> None:
    lines = metrics(train(load_config(write_config(), ["nesting.start=0.65"])))
    assert [list(line["loss_by_dim"]) for line in lines] == [["16"]] * 5 + [["4", "8", "16"]] * 3
    plain = metrics(train(load_config(write_config(), ["nesting={dims: [16]}", f"run={tmp_path}/plain"])))
    assert [line["loss"] for line in lines[:5]] == [line["loss"] for line in plain[:5]]
    # The full dim goes on where it was: the sixth step, too, begins with the plain weights, only turned.
    assert lines[5]["loss_by_dim"]["16"] == pytest.approx(plain[5]["loss"], abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_turn_changes_no_similarity_and_turns_the_optimiser_too(
    write_config: WriteConfig, shards: Path, stage: int
) -> None:
    trainer = trained(write_config(), 4, f"engine.zero_stage={stage}", "nesting.start=0.65")
    trainer.engine.gather_full_model()
    with trainer._in_evaluation(trainer.encoder.model):  # in which some layers round otherwise
        found = turn.find("run", trainer.encoder, trainer.prepared.reader)
    image_ND, text_MD = embedded(trainer, shards)
    moments = trainer.engine.moments()
    trainer._rotate(ThroughputMeter(4))
    trainer.engine.gather_full_model()
    turned_image_ND, turned_text_MD = embedded(trainer, shards)
    torch.testing.assert_close(turned_image_ND @ turned_text_MD.T, image_ND @ text_MD.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(turned_image_ND, image_ND @ found.rotation_DD.T, rtol=0, atol=1e-6)
    # The optimiser goes on in the turned coordinates: R of the mean, and the squares' sum is what it was.
    after = trainer.engine.moments()
    assert after.keys() == moments.keys()
    axes = bundle.embedding_axes(trainer.encoder.model_cfg)
    for label, value in moments.items():
        kind, _, name = label.partition("/")
        if name not in axes:
            assert torch.equal(after[label], value)
        elif kind == "exp_avg":
            torch.testing.assert_close(
                after[label], nesting.rotate_weight(value, axes[name], found.rotation_DD), rtol=1e-3, atol=1e-6
            )
        else:
            assert (after[label] >= 0).all()
            torch.testing.assert_close(after[label].sum(), value.sum(), rtol=1e-4, atol=0)
            assert not torch.allclose(after[label], value)


def test_a_start_of_0_turns_before_the_first_step(write_config: WriteConfig, tmp_path: Path, shards: Path) -> None:
    path = write_config(optim={"lr": 1e-12}, evaluation={})
    plain = metrics(train(load_config(path, ["nesting={dims: [16]}", f"run={tmp_path}/plain"])))
    folder = train(load_config(path, ["nesting.start=0.0"]))
    first = metrics(folder)[0]["loss_by_dim"]
    assert list(first) == ["4", "8", "16"]
    assert first["16"] == pytest.approx(plain[0]["loss"], abs=1e-5)
    # The rate is next to nothing, so the end is the plain beginning, turned.
    before, after = (bundle.load(run / "checkpoints" / "last") for run in (tmp_path / "plain", folder))
    begun = turn.find("run", dataclasses.replace(before, nested_dims=(4, 8, 16)), open_reader(str(shards)))
    texts = before.tokenise(["a red square", "green stripes"])
    torch.testing.assert_close(
        after.model.encode_text(texts).double(),
        before.model.encode_text(texts).double() @ begun.rotation_DD.T,
        rtol=0,
        atol=1e-5,
    )


def test_a_start_of_1_is_the_plain_run_turned_at_its_end(
    write_config: WriteConfig, tmp_path: Path, shards: Path
) -> None:
    path = write_config(train={"batch_size": 24, "duration": 6, "ema": 0.9})
    plain = train(load_config(path, ["nesting={dims: [16]}", f"run={tmp_path}/plain"]))
    nested = train(load_config(path, ["nesting.start=1"]))
    assert [line["loss"] for line in metrics(nested)] == [line["loss"] for line in metrics(plain)]
    old, new = (bundle.load(folder / "checkpoints" / "last") for folder in (plain, nested))
    assert new.nested_dims == (4, 8, 16)
    texts = old.tokenise(["a red square", "green stripes", "x"])
    old_ND, new_ND = (F.normalize(one.model.encode_text(texts).double(), dim=-1) for one in (old, new))
    torch.testing.assert_close(new_ND @ new_ND.T, old_ND @ old_ND.T, rtol=0, atol=1e-6)
    assert (new_ND - old_ND).abs().max() > 0.1
    # What the run shows of itself at its end is the turned encoder.
    scores = json.loads((nested / "retrieval.json").read_text())["sets"]["val"]["dims"]
    last = str(nested / "checkpoints" / "last")
    own = evaluate_model(last, [str(shards)], EvalOptions(captions=1), quiet=True)["dims"]
    assert own["4"]["text_to_image"]["mAP"] == pytest.approx(scores["4"]["text_to_image"]["mAP"], abs=1e-6)


@pytest.mark.slow
def test_a_start_of_1_can_be_resumed(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(nesting={"dims": [16, 4], "start": 1}, checkpoint={"every": 5})
    whole = train(load_config(path, [f"run={tmp_path}/whole"]))
    folder = train(load_config(path))
    checkpoints = folder / "checkpoints"
    (checkpoints / "last").unlink()
    shutil.rmtree(checkpoints / "step-8")
    (checkpoints / "last").symlink_to("step-5")
    train(load_config(path, ["resume=auto"]))
    one, two = (bundle.load(run / "checkpoints" / "last").state() for run in (whole, folder))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((5, 3), 0), ((3, 5), 1), ((2, 5, 3), 1)])
def test_a_weight_is_turned_along_its_axis(shape: tuple[int, ...], axis: int) -> None:
    weight, matrix_DD = torch.randn(shape), torch.randn(5, 5, dtype=torch.float64)
    expected = torch.tensordot(matrix_DD, weight.double(), ([1], [axis])).movedim(0, axis).float()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(nesting.rotate_weight(weight, axis, matrix_DD), expected)


def test_each_dims_scale_begins_with_the_full_dims(write_config: WriteConfig) -> None:
    trainer = trained(write_config(), 4, "model.logit_scale.per_dim=true", "nesting.start=0.65")
    before = trainer.engine.model.log_logit_scale.detach().clone()
    assert before[0] == before[1] != before[2]
    trainer._rotate(ThroughputMeter(4))
    assert torch.equal(trainer.engine.model.log_logit_scale, before[2:].expand(3))


@pytest.mark.slow
def test_stages_and_processes_turn_alike(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(
        train={"batch_size": 12, "duration": 10}, evaluation={}, nesting={"dims": [16, 4, 8], "start": 0.4}
    )
    whole = metrics(train(load_config(path, [f"run={tmp_path}/whole"])))
    cases = [f"run={tmp_path}/zero{stage} engine.zero_stage={stage} train.micro_batch=3" for stage in range(4)]
    start_training(path, 2, tmp_path / "script.py", *cases)
    for stage in range(4):
        lines = metrics(tmp_path / f"zero{stage}")
        assert [line["loss"] for line in lines[:4]] == pytest.approx([line["loss"] for line in whole[:4]], abs=1e-4)
        # No turn changes the full dim. The prefixes, though, see the rounding of the steps before through 300 of Adam,
        # and the steps after it, whose Adam is another in other directions, see more of it.
        assert lines[4]["loss_by_dim"]["16"] == pytest.approx(whole[4]["loss_by_dim"]["16"], abs=1e-4), stage
        assert lines[4]["loss"] == pytest.approx(whole[4]["loss"], abs=0.05), stage
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], abs=0.3), stage
