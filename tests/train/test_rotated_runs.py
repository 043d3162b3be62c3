"""Runs with a learnable rotation: who receives which gradient, and what checkpoints hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import start_training
from helpers.checkpoints import without_hashes
from helpers.encoders import export_bundle
from rich.console import Console

from mmrl import nesting
from mmrl.config import Config, load_config
from mmrl.data.sources import open_reader
from mmrl.distributed import comm
from mmrl.engine.checkpoint import read_checkpoint
from mmrl.engine.optim import OptimConfig
from mmrl.errors import InputError
from mmrl.evaluate import sets
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.model import bundle
from mmrl.nesting import Nesting
from mmrl.train import prefixes
from mmrl.train.prefixes import Prefixes
from mmrl.train.preflight import prepare
from mmrl.train.rotate import rotation_of_run
from mmrl.train.trainer import Trainer, train

WriteConfig = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("short_rotations")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def new_trainer(config: Config) -> Trainer:
    return Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))


def take_steps(trainer: Trainer, steps: int) -> None:
    batches = trainer.stream.forever()
    for _ in range(steps):
        trainer.step([next(batches)])
    trainer._update_encoder()


def similarities(encoder: bundle.Bundle, shards: Path) -> torch.Tensor:
    found = sets.embed(open_reader(str(shards)), encoder)
    image_ND, text_ND = (F.normalize(rows.double(), dim=-1) for rows in (found.image_ND, found.text_MD))
    return image_ND @ text_ND.T


def test_every_step_trains_every_dim(write_config: WriteConfig) -> None:
    path = write_config(
        nesting={"dims": [16, 4, 8], "weights": [2.0, 1.0, 3.0]}, loss={"distillation": 0.5}, evaluation={}
    )
    lines = metrics(train(load_config(path)))
    weight = {"16": 2, "4": 1, "8": 3}
    for step, line in enumerate(lines, 1):
        by_dim, kl_by_dim = line["loss_by_dim"], line["distillation_by_dim"]
        assert list(by_dim) == ["4", "8", "16"]
        assert list(kl_by_dim) == ["4", "8"]
        assert line["loss"] == pytest.approx(sum(weight[dim] * by_dim[dim] for dim in by_dim) / 6)
        assert line["prefix_gradient"] == pytest.approx(0.3 * (step / 8) ** 2)
        smaller = {dim: by_dim[dim] + 0.5 * kl_by_dim[dim] for dim in kl_by_dim}
        assert line["prefix_loss"] == pytest.approx((smaller["4"] + 3 * smaller["8"]) / 4)
        assert line["tower_loss"] == pytest.approx(by_dim["16"] + line["prefix_gradient"] * line["prefix_loss"])
        assert len(line["logit_scale"]) == 3
    assert lines[-1]["logit_scale"][0] != lines[-1]["logit_scale"][2]
    assert (
        "prefix_gradient"
        not in metrics(train(load_config(path, ["run=" + str(path.parent / "published"), "nesting.rotation=false"])))[0]
    )


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_rotation_is_not_part_of_the_towers_clipping(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Without a gradient from the smaller dims the towers are those of a plain run, however large the rotation's is."""
    path = write_config(evaluation={}, optim={"lr": 1e-3, "clip_norm": 0.1})
    plain = train(load_config(path, [f"run={tmp_path}/plain", "nesting.dims=[16]", f"engine.zero_stage={stage}"]))

    def large_gradients(module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            parameter.register_hook(lambda grad: 1e6 * grad)

    create = prefixes._PrefixModule.__init__

    def with_large_gradients(self: torch.nn.Module, *arguments: Any) -> None:
        create(self, *arguments)  # pyright: ignore[reportArgumentType]
        large_gradients(self)

    monkeypatch.setattr(prefixes._PrefixModule, "__init__", with_large_gradients)
    nested = train(load_config(path, ["nesting.prefix_gradient=0", f"engine.zero_stage={stage}"]))
    for one, other in zip(metrics(plain), metrics(nested), strict=True):
        assert other["loss_by_dim"]["16"] == pytest.approx(one["loss"], abs=1e-6)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert one["grad_norm"] > 0.1, "so that clipping acts"
    # Weights as they are trained, before the rotation is folded into them.
    states = [read_checkpoint(folder / "checkpoints" / "step-8").training_weights for folder in (plain, nested)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("overrides", [[], ["engine.zero_stage=3"], ["train.ema=0.5"]], ids=" ".join)
def test_the_encoder_is_the_trained_model_with_the_rotation_folded_in(
    write_config: WriteConfig, shards: Path, overrides: list[str]
) -> None:
    trainer = new_trainer(load_config(write_config(), ["optim.lr_rotation=0.05", *overrides]))
    take_steps(trainer, 4)
    trained, encoder = trainer._trained, trainer.encoder
    torch.testing.assert_close(similarities(encoder, shards), similarities(trained, shards), rtol=0, atol=1e-6)
    texts = trained.tokenise(["a red square", "green stripes"])
    assert trainer._prefixes is not None
    rotation_DD, log_scale_K = trainer._prefixes.folded(trained.model.log_logit_scale)
    assert (rotation_DD - torch.eye(16)).abs().max() > 0.05
    is_average = not torch.equal(rotation_DD, trainer._prefixes.rotation.matrix())
    assert is_average == (overrides == ["train.ema=0.5"])
    with torch.no_grad():
        expected_ND = trained.model.encode_text(texts).double() @ rotation_DD.T
        torch.testing.assert_close(encoder.model.encode_text(texts).double(), expected_ND, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.model.log_logit_scale, log_scale_K)


def test_a_truncated_export_has_the_scale_of_its_dim(write_config: WriteConfig, tmp_path: Path) -> None:
    folder = train(load_config(write_config(evaluation={}), ["optim.lr_logit_scale=0.1"]))
    scales = metrics(folder)[-1]["logit_scale"]
    export_bundle(str(folder), tmp_path / "cut", 8)
    cut = bundle.load(tmp_path / "cut")
    assert cut.nested_dims == (4, 8)
    # The logged scales are those before the last update.
    assert cut.model.logit_scale[-1].item() == pytest.approx(scales[1], rel=0.02)


def test_rotating_at_the_start_changes_no_full_dim_similarity(
    write_config: WriteConfig, tmp_path: Path, shards: Path
) -> None:
    path = write_config(optim={"lr": 1e-12, "lr_rotation": 0.0}, evaluation={})
    plain = train(load_config(path, [f"run={tmp_path}/plain", "nesting.dims=[16]"]))
    for run, override in (("learned", "nesting.rotation=true"), ("published", "nesting.rotation=false")):
        folder = train(load_config(path, [f"run={tmp_path}/{run}", "nesting.rotate_at_start=true", override]))
        first = metrics(folder)[0]["loss_by_dim"]
        assert first["16"] == pytest.approx(metrics(plain)[0]["loss"], abs=1e-5)
        # The learning rate is next to nothing, so the end is the rotated beginning.
        before, after = (bundle.load(one / "checkpoints" / "last") for one in (plain, folder))
        torch.testing.assert_close(similarities(after, shards), similarities(before, shards), rtol=0, atol=1e-6)
        rotation_DD, _ = rotation_of_run("run", before_with_dims(before), open_reader(str(shards)))
        texts = before.tokenise(["a red square", "green stripes"])
        torch.testing.assert_close(
            after.model.encode_text(texts).double(),
            before.model.encode_text(texts).double() @ rotation_DD.T,
            rtol=0,
            atol=1e-5,
        )


def before_with_dims(encoder: bundle.Bundle) -> bundle.Bundle:
    from dataclasses import replace

    return replace(encoder, nested_dims=(4, 8, 16))


def test_rotating_at_the_end_changes_what_is_saved_and_not_what_is_trained(
    write_config: WriteConfig, tmp_path: Path, shards: Path
) -> None:
    path = write_config(train={"batch_size": 24, "duration": 6, "ema": 0.9}, checkpoint={"every": 4})
    as_trained = train(load_config(path, [f"run={tmp_path}/as-trained"]))
    rotated = train(load_config(path, ["nesting.rotate_at_end=true"]))
    assert [line["loss"] for line in metrics(rotated)] == [line["loss"] for line in metrics(as_trained)]
    old, new = (bundle.load(folder / "checkpoints" / "last") for folder in (as_trained, rotated))
    assert new.nested_dims == (4, 8, 16)
    torch.testing.assert_close(similarities(new, shards), similarities(old, shards), rtol=0, atol=1e-6)
    texts = old.tokenise(["a red square", "green stripes", "x"])
    assert (new.model.encode_text(texts) - old.model.encode_text(texts)).abs().max() > 0.01
    states = [read_checkpoint(folder / "checkpoints" / "step-6") for folder in (as_trained, rotated)]
    for name in ("training_weights", "average_weights", "prefixes", "moments"):
        one, other = (getattr(state, name) for state in states)
        assert one.keys() == other.keys()
        changed = [key for key in one if not torch.equal(one[key], other[key])]
        assert not changed, name
    # The scores of the last step are those of the encoder that is saved.
    scores = json.loads((rotated / "checkpoints" / "last" / "retrieval.json").read_text())["dims"]
    own = evaluate_model(str(rotated), [str(shards)], EvalOptions(captions=1), quiet=True)["dims"]
    assert own["4"]["text_to_image"]["mAP"] == pytest.approx(scores["4"]["text_to_image"]["mAP"], abs=1e-6)
    # Resumed from before the end, it ends with the same.
    checkpoints = rotated / "checkpoints"
    (checkpoints / "last").unlink()
    shutil.rmtree(checkpoints / "step-6")
    (checkpoints / "last").symlink_to("step-4")
    again = bundle.load(train(load_config(path, ["nesting.rotate_at_end=true", "resume=auto"])) / "checkpoints/last")
    assert all(torch.equal(again.state()[name], value) for name, value in new.state().items())


def test_patience_ends_a_run_that_no_longer_improves(write_config: WriteConfig) -> None:
    path = write_config(optim={"lr": 1e-12, "lr_rotation": 0.0}, train={"batch_size": 12, "duration": 8})
    arguments = [
        "evaluation.best={set: val, dim: 8, metric: R@10}",
        "evaluation.every=1",
        "evaluation.patience=2",
    ]
    console = Console(record=True, width=200)
    folder = train(load_config(path, arguments), console)
    assert "Stopped at step 3 of 8: the last 2 evaluations were not better" in console.export_text()
    assert metrics(folder)[-1]["step"] == 3
    assert (folder / "checkpoints" / "last").resolve().name == "step-3"
    assert (folder / "checkpoints" / "best").resolve().name == "step-1"
    # It is finished; without patience it goes on.
    train(load_config(path, [*arguments, "resume=auto"]), console)
    assert f"This run is finished: {folder}" in console.export_text()
    train(load_config(path, [*arguments, "resume=auto", "evaluation.patience=null"]), console)
    assert metrics(folder)[-1]["step"] == 8


def test_a_checkpoint_without_a_rotation_cannot_be_resumed(write_config: WriteConfig) -> None:
    path = write_config(evaluation={}, checkpoint={"every": 4})
    folder = train(load_config(path))
    (folder / "checkpoints" / "last" / "training" / "prefixes.safetensors").unlink()
    without_hashes(folder / "checkpoints" / "last")
    with pytest.raises(InputError, match=r"step-8 has no rotation .* earlier version wrote it"):
        train(load_config(path, ["resume=auto"]))


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((5, 3), 0), ((3, 5), 1), ((2, 5, 3), 1)])
def test_a_weight_is_rotated_along_its_axis(shape: tuple[int, ...], axis: int) -> None:
    weight, matrix_DD = torch.randn(shape), torch.randn(5, 5, dtype=torch.float64)
    expected = torch.tensordot(matrix_DD, weight.double(), ([1], [axis])).movedim(0, axis).float()  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(nesting.rotate_weight(weight, axis, matrix_DD), expected)


@pytest.mark.slow
def test_processes_rotate_alike(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(
        train={"batch_size": 12, "duration": 10}, nesting={"dims": [16, 4, 8], "rotate_at_start": True}, evaluation={}
    )
    start_training(path, 1, tmp_path, f"run={tmp_path}/whole")
    whole = metrics(tmp_path / "whole")
    cases = [f"run={tmp_path}/zero{stage} engine.zero_stage={stage} train.micro_batch=3" for stage in range(4)]
    start_training(path, 2, tmp_path, *cases)
    for stage in range(4):
        lines = metrics(tmp_path / f"zero{stage}")
        for line, expected in zip(lines, whole, strict=True):
            # The rotation is learned from the same embeddings bit for bit, also by one process of the same kind. Other
            # rounding, such as that of the tests' process, would be amplified by 300 steps of Adam.
            assert line["loss_by_dim"] == pytest.approx(expected["loss_by_dim"], abs=1e-3), stage


def test_a_run_resumed_from_step_0_is_not_rotated_again(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(
        evaluation={
            "sets": {"val": {"shards": load_config(write_config()).data.train, "captions": 1}},
            "at_start": True,
            "best": {"set": "val", "dim": 8},
        },
        checkpoint={"every": 8, "keep": 9},
    )
    arguments = ["nesting.rotate_at_start=true", "evaluation.patience=9"]
    whole = train(load_config(path, arguments))
    folder = tmp_path / "resumed"
    shutil.copytree(whole, folder, symlinks=True)
    (folder / "checkpoints" / "last").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-8")
    (folder / "checkpoints" / "last").symlink_to("step-0")
    train(load_config(path, [*arguments, f"run={folder}", "resume=auto"]))
    one, two = (bundle.load(run / "checkpoints" / "step-8").state() for run in (whole, folder))
    assert all(torch.equal(one[name], two[name]) for name in one)
    states = [read_checkpoint(run / "checkpoints" / "step-8").state for run in (whole, folder)]
    assert states[0] == states[1]


def test_a_run_out_of_patience_is_finished_though_the_rotation_at_the_end_helps(write_config: WriteConfig) -> None:
    path = write_config(optim={"lr": 1e-12, "lr_rotation": 0.0}, train={"batch_size": 12, "duration": 8})
    arguments = [
        "evaluation.best={set: val, dim: 4, metric: mean_rank}",
        "evaluation.every=1",
        "evaluation.patience=1",
        "nesting.rotate_at_end=true",
    ]
    folder = train(load_config(path, arguments))
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 2]
    ranks = [record["sets"]["val"]["dims"]["4"]["text_to_image"]["mean_rank"] for record in records]
    assert ranks[2] < ranks[1], "otherwise this test shows nothing"
    console = Console(record=True, width=200)
    train(load_config(path, [*arguments, "resume=auto"]), console)
    assert "This run is finished" in console.export_text()


def test_buffers_are_those_of_the_trained_model_though_no_longer_shared(write_config: WriteConfig) -> None:
    trainer = new_trainer(load_config(write_config()))
    for model in (trainer._trained.model, trainer.encoder.model):
        model.register_buffer("statistics", torch.zeros(2))
    trainer._trained.model.get_buffer("statistics").fill_(3)
    trainer._update_encoder()
    assert torch.equal(trainer.encoder.model.get_buffer("statistics"), torch.full((2,), 3.0))


def test_a_skipped_step_counts_for_the_average_as_for_the_towers() -> None:
    own = Prefixes(Nesting.from_dims([16, 8], None, 16), torch.zeros(1), OptimConfig(lr=0.1), 0.5, torch.device("cpu"))
    averages = []
    for skip in (False, False, True):
        (own.rotation(torch.eye(16))[:, 0].sum() + own.logit_scale_k.sum()).backward()
        own.step(1.0, skip)
        averages.append(own.folded(torch.zeros(1))[1][0])
    current = own._module.log_scale_k.detach()[0]
    assert averages[2] == pytest.approx((averages[1] + current) / 2)


def test_a_final_rotation_resets_scales_and_biases(write_config: WriteConfig) -> None:
    folder = train(
        load_config(
            write_config(evaluation={}),
            [
                "nesting={dims: [16, 4, 8], rotation: false, rotate_at_end: true}",
                "loss.name=sigmoid",
                "model.logit_scale.per_dim=true",
                "optim.lr_logit_scale=0.1",
            ],
        )
    )
    state, trained = bundle.load(folder / "checkpoints" / "last").state(), metrics(folder)[-1]["logit_bias"]
    assert len(set(trained)) == 3
    assert len(state["logit_bias"].unique()) == len(state["log_logit_scale"].unique()) == 1
