"""The turn in the middle of a run: nothing changes at the full dim, and every prefix begins with the most."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import start_training
from rich.console import Console

from mmrl import config as configs
from mmrl import distributed, nesting, turn
from mmrl.data.sources import open_reader
from mmrl.evaluate import sets
from mmrl.model import bundle
from mmrl.preflight import prepare
from mmrl.train import Trainer, train

WriteConfig = Callable[..., Path]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def embedded(trainer: Trainer, shards: Path) -> tuple[torch.Tensor, torch.Tensor]:
    encoder = trainer.encoder
    found = sets.embed(open_reader(str(shards)), encoder.model, encoder.image_spec, encoder.tokenise)
    return F.normalize(found.image_ND.double(), dim=-1), F.normalize(found.text_MD.double(), dim=-1)


def trained(path: Path, steps: int, *overrides: str) -> Trainer:
    config = configs.load(path, overrides)
    trainer = Trainer(config, prepare(config, distributed.start()), distributed.world(), Console(quiet=True))
    batches = trainer.stream.forever()
    for _ in range(steps):
        trainer.step([next(batches)])
    return trainer


def test_prefixes_are_trained_from_the_start_on(write_config: WriteConfig, tmp_path: Path) -> None:
    lines = metrics(train(configs.load(write_config(), ["nesting.start=0.65"])))
    assert [list(line["loss_by_dim"]) for line in lines] == [["16"]] * 5 + [["4", "8", "16"]] * 3
    plain = metrics(train(configs.load(write_config(), ["nesting={dims: [16]}", f"run={tmp_path}/plain"])))
    assert [line["loss"] for line in lines[:5]] == [line["loss"] for line in plain[:5]]
    # The full dim goes on where it was: the sixth step, too, begins with the plain weights, only turned.
    assert lines[5]["loss_by_dim"]["16"] == pytest.approx(plain[5]["loss"], abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_turn_changes_no_similarity_and_leads_with_the_principal_directions(
    write_config: WriteConfig, shards: Path, stage: int
) -> None:
    trainer = trained(write_config(), 4, f"engine.zero_stage={stage}", "nesting.start=0.65")
    trainer.engine.refresh()
    image_ND, text_MD = embedded(trainer, shards)
    moments = trainer.engine.moments()
    trainer._turn(None)
    trainer.engine.refresh()
    turned_image_ND, turned_text_MD = embedded(trainer, shards)
    torch.testing.assert_close(turned_image_ND @ turned_text_MD.T, image_ND @ text_MD.T, rtol=0, atol=1e-6)
    moment_DD = (image_ND.T @ image_ND / len(image_ND) + text_MD.T @ text_MD / len(text_MD)) / 2
    most_D = torch.linalg.eigvalsh(moment_DD).flip(0).cumsum(0)
    for dim in (4, 8, 16):
        kept = sum(x[:, :dim].square().sum(1).mean() for x in (turned_image_ND, turned_text_MD)) / 2
        assert kept == pytest.approx(most_D[dim - 1].item(), abs=1e-5)
    # The optimiser goes on in the turned coordinates: R of the mean, and the squares' sum is what it was.
    found = turn.find("run", trainer.encoder, trainer.plan.reader)
    torch.testing.assert_close(found.rotation_DD.abs(), torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-3)
    after = trainer.engine.moments()
    assert after.keys() == moments.keys()
    axes = bundle.embedding_axes(trainer.encoder.model_cfg)
    rotation_DD = nesting.principal_rotation(moment_DD)
    for label, value in moments.items():
        kind, _, name = label.partition("/")
        if name not in axes:
            assert torch.equal(after[label], value)
        elif kind == "exp_avg":
            torch.testing.assert_close(
                after[label], nesting.turned(value, axes[name], rotation_DD), rtol=1e-3, atol=1e-6
            )
        else:
            assert (after[label] >= 0).all()
            torch.testing.assert_close(after[label].sum(), value.sum(), rtol=1e-4, atol=0)
            assert not torch.allclose(after[label], value)


def test_a_start_of_0_turns_before_the_first_step(write_config: WriteConfig, tmp_path: Path, shards: Path) -> None:
    path = write_config(optim={"lr": 1e-12}, evaluation={})
    plain = metrics(train(configs.load(path, ["nesting={dims: [16]}", f"run={tmp_path}/plain"])))
    folder = train(configs.load(path, ["nesting.start=0.0"]))
    first = metrics(folder)[0]["loss_by_dim"]
    assert list(first) == ["4", "8", "16"]
    assert first["16"] == pytest.approx(plain[0]["loss"], abs=1e-5)
    encoder = bundle.load(folder / "checkpoints" / "last")
    found = sets.embed(open_reader(str(shards)), encoder.model, encoder.image_spec, encoder.tokenise)
    image_ND, text_MD = (F.normalize(x.double(), dim=-1) for x in (found.image_ND, found.text_MD))
    moment_DD = (image_ND.T @ image_ND / len(image_ND) + text_MD.T @ text_MD / len(text_MD)) / 2
    torch.testing.assert_close(moment_DD.diagonal(), torch.linalg.eigvalsh(moment_DD).flip(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((5, 3), 0), ((3, 5), 1), ((2, 5, 3), 1)])
def test_a_weight_is_turned_along_its_axis(shape: tuple[int, ...], axis: int) -> None:
    weight, matrix_DD = torch.randn(shape), torch.randn(5, 5, dtype=torch.float64)
    expected = torch.tensordot(matrix_DD, weight.double(), ([1], [axis])).movedim(0, axis).float()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(nesting.turned(weight, axis, matrix_DD), expected)


def test_each_dims_scale_begins_with_the_full_dims(write_config: WriteConfig) -> None:
    trainer = trained(write_config(), 4, "model.logit_scale.per_dim=true", "nesting.start=0.65")
    before = trainer.engine.model.log_logit_scale.detach().clone()
    assert before[0] == before[1] != before[2]
    trainer._turn(None)
    assert torch.equal(trainer.engine.model.log_logit_scale, before[2:].expand(3))


def test_stages_and_processes_turn_alike(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(
        train={"batch_size": 12, "duration": 10}, evaluation={}, nesting={"dims": [16, 4, 8], "start": 0.4}
    )
    whole = train(configs.load(path, [f"run={tmp_path}/whole"]))
    cases = [f"run={tmp_path}/zero{stage} engine.zero_stage={stage} train.micro_batch=3" for stage in range(4)]
    start_training(path, 2, tmp_path / "script.py", *cases)
    for stage in range(4):
        values = [line["loss"] for line in metrics(tmp_path / f"zero{stage}")]
        assert values == pytest.approx([line["loss"] for line in metrics(whole)], abs=1e-4), stage
