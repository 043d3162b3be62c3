"""Runs, whole: several processes = one, killed and resumed = uninterrupted, and every option takes steps."""

import json
import math
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import pytest
import torch
from conftest import sample_members, start_training, write_tar
from helpers.encoders import export_bundle
from helpers.worlds import Program, run_programs
from rich.console import Console
from safetensors.torch import load_file

from mmrl import cli
from mmrl.config import config_differences, load_config
from mmrl.data.batches import Batch
from mmrl.distributed import comm
from mmrl.engine.checkpoint import Checkpoints
from mmrl.errors import InputError, RunStopped
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.model import bundle
from mmrl.model.footprint import model_flops
from mmrl.train.log import TrainingLog
from mmrl.train.preflight import prepare
from mmrl.train.step import StepResult
from mmrl.train.trainer import Trainer, train

WriteConfig = Callable[..., Path]


def run(path: Path, *overrides: str) -> Path:
    return train(load_config(path, overrides))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / which / "model.safetensors")


def go_back_to(folder: Path, checkpoint: str) -> None:
    """As if the run had been lost after this checkpoint."""
    last = folder / "checkpoints" / "last"
    last.unlink()
    last.symlink_to(checkpoint)


def without_key_bias(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adam blows up the rounding of a gradient that is truly zero, as that of attention's key bias is."""
    return {name: tensor for name, tensor in state.items() if "in_proj_bias" not in name}


def test_a_run_leaves_what_it_promises(write_config: WriteConfig) -> None:
    best = "evaluation.best={set: val, dim: 8, metric: R@10}"
    folder = run(write_config(), best, "evaluation.every=4", "train.duration=2 epochs", "checkpoint.every=2")
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["samples"] == 96
    assert list(lines[0]["loss_by_dim"]) == ["4", "8", "16"]
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["loss_by_dim"].values()) / 3)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["lr"] < lines[1]["lr"] == 1e-3
    result = json.loads((folder / "retrieval.json").read_text())
    assert list(result["dims"]) == ["16", "8", "4"]
    assert result["sets"]["val"]["dims"] == result["dims"]
    assert result["num_images"] == 48
    assert (folder / "report" / "recall_by_dim.png").stat().st_size > 5000
    assert "| 16 |" in (folder / "report" / "report.md").read_text()
    assert (folder / "checkpoints" / "best").resolve().name.startswith("step-")
    best = (folder / "checkpoints" / "best").resolve()
    assert json.loads((best / "retrieval.json").read_text())["step"] == int(best.name.removeprefix("step-"))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.is_symlink())
    assert set(kept) >= {"step-6", "step-8"}
    assert len(kept) <= 3
    assert config_differences(load_config(folder / "config.yaml"), load_config(folder / "config.yaml")) == []
    encoder = bundle.open_model(folder)
    assert encoder.nested_dims == (4, 8, 16)


def test_flops_are_told_where_the_devices_peak_is_known(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Console(record=True, width=200)
    path = write_config(evaluation={})
    assert "model_flops_utilisation" not in metrics(train(load_config(path, ["train.duration=1"]), said))[-1]
    assert "FLOPs" not in said.export_text()
    monkeypatch.setattr("mmrl.train.log.peak_flops", lambda device, precision: 1e12)
    last = metrics(train(load_config(path, [f"run={path.parent}/known"]), said))[-1]
    flops = model_flops(load_config(path).model, 12, sweeps=2)
    share = flops * last["samples_per_second"] / 12 / 1e12
    assert last["model_flops_utilisation"] == pytest.approx(share)
    assert f"model FLOPs utilisation {100 * share:.1f} %" in said.export_text()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(write_config: WriteConfig, tmp_path: Path) -> None:
    """All in one launch of two processes, since their imports take most of the time."""
    path, two, half = write_config(engine={"lost_after_seconds": 5}), tmp_path / "two", tmp_path / "half"
    one = run(path)
    # The second starts a finished run again. Every rank must return: one that waited for rank 0 would end with an
    # error, and a scheduler would requeue the job.
    cases = (f"run={two}", f"run={two} resume=auto", f"run={half} checkpoint.every=4")
    start_training(path, 2, tmp_path, *cases)
    alone, together = metrics(one), metrics(two)
    for first, second in zip(alone, together, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], abs=2e-5)
        assert second["loss_by_dim"] == pytest.approx(first["loss_by_dim"], abs=2e-5)
    close: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(without_key_bias(weights(two)), without_key_bias(weights(one)), **close)
    scores = [json.loads((folder / "retrieval.json").read_text()) for folder in (one, two)]
    assert scores[0]["num_images"] == scores[1]["num_images"]
    # One process resumes what two began.
    go_back_to(half, "step-4")
    resumed = run(path, f"run={half}", "checkpoint.every=4", "resume=auto")
    torch.testing.assert_close(without_key_bias(weights(resumed)), without_key_bias(weights(one)), **close)


def _train_until_a_signal() -> None:
    """`mmrl train`; the last two arguments are a step and the signal that the last rank of at most two gets in it."""
    number, at, step = int(sys.argv.pop()), int(sys.argv.pop()), Trainer.step

    def signalled(self: Any, micro_batches: Sequence[Batch]) -> StepResult:
        if self.step_done == at - 1 and self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), number)
        return step(self, micro_batches)

    Trainer.step = signalled
    cli.main()


def _kill_at(path: Path, step: int, number: signal.Signals) -> tuple[int | None, str, str]:
    """Starts (or goes on with) a run that gets a signal during `step`."""
    arguments = ["train", str(path), "resume=auto", str(step), str(int(number))]
    return Program(_train_until_a_signal, arguments, path.parent).wait()


MEASURED = ("samples_per_second", "seconds_per_step", "peak_memory")


def test_a_run_tells_where_its_time_and_memory_go(write_config: WriteConfig, tmp_path: Path) -> None:
    folder = run(write_config(evaluation={}), "train.micro_batch=4", "tracking.profile=true", "tracking.log_every=2")
    for line in metrics(folder):
        spent = line["seconds_per_step"]
        assert spent.keys() == {"data", "towers", "loss", "backward", "optimizer"}
        assert 0 < sum(spent.values()) <= 12 / line["samples_per_second"]
        assert line["peak_memory"] > 1e8
    trace = json.loads((folder / "profile" / "rank-0.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 3


@pytest.mark.parametrize("kills", [(10,), pytest.param((10, 33), marks=pytest.mark.slow)], ids=["once", "twice"])
def test_killed_and_resumed_equals_uninterrupted(
    write_config: WriteConfig, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    sections = {"train": {"batch_size": 12, "duration": "60 steps", "ema": 0.9}, "checkpoint": {"every": "7 steps"}}
    whole = run(write_config(**sections))
    path = write_config("killed.yaml", run=str(tmp_path / "killed"), **sections)
    for step in kills:
        assert _kill_at(path, step, signal.SIGKILL)[0] == -signal.SIGKILL
    code, _, error = Program(cli.main, ["train", str(path), "resume=auto"], tmp_path).wait()
    assert code == 0, error
    got, expected = weights(tmp_path / "killed"), weights(whole)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    stripped = [
        [{k: v for k, v in line.items() if k not in MEASURED} for line in metrics(folder)]
        for folder in (whole, tmp_path / "killed")
    ]
    assert stripped[0] == stripped[1]


def test_sigterm_saves_and_says_how_to_go_on(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(train={"batch_size": 12, "duration": "5000 steps"})
    arguments = ["train", str(path), "3", str(int(signal.SIGTERM))]
    (code, _, error), (code_1, _, error_1) = run_programs(2, _train_until_a_signal, arguments, tmp_path)
    assert code == code_1 == 1
    assert "Stopped by SIGTERM to rank 1 at step 3 of" in error
    assert "SIGTERM: stopping after this step" in error_1
    assert "resume=auto" in error
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-3"
    assert metrics(tmp_path / "run")[-1]["step"] == 3


def test_a_loss_that_is_not_finite_stops_before_the_step(write_config: WriteConfig) -> None:
    path = write_config(optim={"lr": 1e30, "clip_norm": None}, checkpoint={"every": "1 steps"})
    says = r"Step 2: the loss is nan. The last good .*step-1; resume from it .*a lower optim.lr\."
    with pytest.raises(RunStopped, match=says):
        run(path)


def _train_with_a_killed_loader() -> None:
    step, number = Trainer.step, int(sys.argv.pop())

    def killing(self: Any, micro_batches: Sequence[Batch]) -> StepResult:
        if self.step_done == 2 and self.world.is_rank_0:
            os.kill(self.stream._loader._iterator._workers[0].pid, number)
            if number == signal.SIGSTOP:  # SIGTERM comes while the lost batch is awaited
                threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return step(self, micro_batches)

    Trainer.step = killing
    cli.main()


@pytest.mark.parametrize(
    ("number", "processes", "says"),
    [
        (signal.SIGKILL, 1, "mmrl: data: a DataLoader worker was killed ("),
        pytest.param(
            signal.SIGSTOP,
            1,
            "mmrl: data: a batch was lost: for 5 s no DataLoader worker has loaded a sample",
            marks=pytest.mark.slow,
        ),
        pytest.param(signal.SIGSTOP, 2, "mmrl: data: a batch was lost: for 5 s no", marks=pytest.mark.slow),
    ],
)
def test_a_killed_loader_process_is_one_sentence_and_no_hang(
    write_config: WriteConfig, tmp_path: Path, number: int, processes: int, says: str
) -> None:
    """In a process of its own: DataLoader would raise its error at whatever line the main process is."""
    path = write_config(evaluation={}, data={"train": str(tmp_path), "workers": 2}, engine={"lost_after_seconds": 5})
    write_tar(tmp_path / "a.tar", [m for n in range(48) for m in sample_members(n)])
    options = ["train", str(path), "train.duration=500", "checkpoint.every=1", str(int(number))]
    results = run_programs(processes, _train_with_a_killed_loader, options, tmp_path)
    errors = "".join(error for _, _, error in results)
    assert [code for code, _, _ in results] == [1] * processes
    assert says in errors
    assert "engine/checkpoint.py" not in errors
    assert processes > 1 or "Traceback" not in errors


@pytest.mark.parametrize(("has_products", "precision"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_what_the_machine_is_good_at(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, has_products: bool, precision: str
) -> None:
    monkeypatch.setattr("mmrl.engine.engine.has_native_bfloat16", lambda _: has_products)
    config = load_config(write_config(), ["engine.precision=auto", "train.duration=1"])
    trainer = Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))
    assert trainer.engine.precision == precision


def test_fine_tuning_starts_where_the_source_stood(
    write_config: WriteConfig, tiny_model: Path, tmp_path: Path, shards: Path
) -> None:
    open_clip.add_model_config(tiny_model)
    torch.manual_seed(8)
    source = open_clip.create_model("tiny-test")
    torch.save(source.state_dict(), tmp_path / "source.pt")
    pretrained = str(tmp_path / "source.pt")
    path = write_config(model={"name": str(tiny_model), "pretrained": pretrained})
    config = load_config(path, ["evaluation.at_start=true", "train.duration=1"])
    plan = prepare(config, comm.start())
    trainer = Trainer(config, plan, comm.world(), Console(quiet=True))
    before = trainer.score_sets()
    theirs = evaluate_model(
        f"open_clip:tiny-test:{pretrained}", [str(shards)], EvalOptions(dims=[16], captions=1), quiet=True
    )
    assert before["val"]["dims"]["16"].items() <= theirs["dims"]["16"].items()  # which has the other directions as well


_PUBLISHED = ["nesting.rotation=false"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["engine.zero_stage=1", "loss.label_smoothing=0.1", "loss.distillation=0.5", "loss.same_group=positive"],
        ["engine.zero_stage=2", "engine.precision=bf16", "optim.layer_decay=0.5", "optim.lr_projection=0"],
        ["engine.precision=bf16", "model.grad_checkpointing=true", "data.workers=2", "tracking.tensorboard=true"],
        [
            *("model.lock_image=true", "nesting.prefix_gradient={end: 1, power: 0.5}", "nesting.weights=[1,2,0.5]"),
            *("train.ema=0.5", "optim.schedule=constant", "optim.cooldown=3 steps"),
        ],
        [
            *_PUBLISHED,
            *("loss.name=sigmoid", "loss.same_group=positive", "model.logit_scale={per_dim: true, bias_init: -5.0}"),
            *("engine.zero_stage=1", "optim.lr_image=1e-4", "optim.schedule=rsqrt"),
        ],
        [*_PUBLISHED, "nesting.rotate_at_end=true", "train.ema=0.5", "model.logit_scale.per_dim=true"],
        ["nesting.rotate_at_start=true", "nesting.rotate_at_end=true", "engine.zero_stage=3", "model.lock_image=true"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
@pytest.mark.usefixtures("short_rotations")
def test_every_option_takes_steps_and_resumes(write_config: WriteConfig, overrides: list[str]) -> None:
    path = write_config(checkpoint={"every": "4 steps"})
    folder = run(path, *overrides)
    assert math.isfinite(metrics(folder)[-1]["loss"])
    whole = weights(folder)
    go_back_to(folder, "step-4")
    assert run(path, *overrides, "resume=auto") == folder
    again = weights(folder)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_sigmoid_loss_learns_its_bias(write_config: WriteConfig) -> None:
    folder = run(write_config(), *_PUBLISHED, "loss.name=sigmoid", "model.logit_scale.per_dim=true")
    lines = metrics(folder)
    assert lines[0]["logit_scale"] == pytest.approx([10, 10, 10], abs=0.1)
    assert lines[0]["logit_bias"] == pytest.approx([-10, -10, -10], abs=0.01)
    assert lines[-1]["logit_bias"] != lines[0]["logit_bias"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    export_bundle(str(folder), folder / "cut", 8)
    assert bundle.load(folder / "cut").model.state_dict()["logit_bias"].shape == (2,)


def test_locked_tower_and_zero_rate_stay_as_they_are(write_config: WriteConfig) -> None:
    path = write_config(checkpoint={"every": "1 steps", "keep": 9}, evaluation={})
    folder = run(path, "model.lock_image=true", "optim.lr_logit_scale=0")
    first, last = weights(folder, "step-1"), weights(folder, "step-8")
    moved = {name for name in last if not torch.equal(first[name], last[name])}
    assert "log_logit_scale" not in moved
    assert {name for name in moved if name.startswith("image")} == {"image.tower.proj"}
    assert any(name.startswith("text") for name in moved)


def test_a_run_that_stops_does_not_wait_for_space_on_a_full_disk(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def stop(*_: object) -> NoReturn:
        raise RunStopped("too many bad samples")

    monkeypatch.setattr(Checkpoints, "_write", full)
    monkeypatch.setattr(TrainingLog, "step", stop)  # of the second step
    path = write_config(checkpoint={"every": "1 steps"}, evaluation={}, tracking={"log_every": 2})
    with pytest.raises(RunStopped, match="too many bad samples"):
        run(path)
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]


def _train_with_a_full_disk() -> None:
    write = Checkpoints._write

    def limited(self: Checkpoints, partial: Path, snapshot: Any) -> None:
        if snapshot.step > 3:  # from here on no file may grow beyond what a manifest needs
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        write(self, partial, snapshot)

    Checkpoints._write = limited
    cli.main()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    write_config: WriteConfig, tmp_path: Path, processes: int
) -> None:
    path = write_config(checkpoint={"every": "3 steps"}, evaluation={}, engine={"timeout_minutes": 0.5})
    results = run_programs(processes, _train_with_a_full_disk, ["train", str(path)], tmp_path)
    errors = "".join(error for _, _, error in results)
    assert [code for code, _, _ in results] == [1] * processes
    output = "".join(shown for _, shown, _ in results)
    assert "The checkpoint of step 6 could not be written (" in output
    assert "mmrl: The checkpoint of step 8 could not be written (" in errors
    assert "step-3 is complete; run again with resume=auto." in errors
    assert "engine/checkpoint.py" not in errors
    folder = tmp_path / "run"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["last", "step-3"]
    assert run(path, "resume=auto") == folder
    assert metrics(folder)[-1]["step"] == 8


def test_a_start_that_is_not_surpassed_is_the_best(write_config: WriteConfig) -> None:
    best = "evaluation.best={set: val, dim: 8, metric: R@10}"
    said = Console(record=True, width=200)
    folder = train(load_config(write_config(), [best, "evaluation.at_start=true", "optim.lr=1"]), said)
    assert (folder / "checkpoints" / "best").resolve().name == "step-0"
    kept = json.loads((folder / "checkpoints" / "step-0" / "retrieval.json").read_text())["dims"]["8"]
    last = json.loads((folder / "retrieval.json").read_text())["dims"]["8"]
    row, spoilt = (
        [f"{100 * dim[way][f'R@{k}']:.1f}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
        for dim in (kept, last)
    )
    assert row != spoilt
    shown = said.export_text()
    assert ["8", *row] in [re.findall(r"[\d.]+", line) for line in shown.splitlines()]
    assert "checkpoints/best (step-0)" in shown


def test_a_damaged_checkpoint_is_named_and_not_resumed_from(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(evaluation={}, checkpoint={"every": "4 steps"})
    folder = run(path)
    moments = folder / "checkpoints" / "last" / "training" / "optimizer.safetensors"
    moments.write_bytes(moments.read_bytes()[:1000])
    run(path, "resume=auto")
    shown = capsys.readouterr()
    assert "step-8 is damaged: training/optimizer.safetensors is missing or is not the file that was" in shown.err
    assert "Resumed after step 4." in shown.out


def test_a_run_folder_is_never_mixed(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(evaluation={})
    folder = run(path)
    with pytest.raises(InputError, match=r"already holds a run \(last checkpoint step-8\); add resume=auto"):
        run(path)
    with pytest.raises(InputError, match=r"another config \(optim.lr: 0.001 -> 0.002\)"):
        run(path, "resume=auto", "optim.lr=2e-3")
    # What only says how the work is done may change.
    assert run(path, "resume=auto", "data.workers=1", "tracking.log_every=5") == folder
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="exists and is not a run folder"):
        run(path, f"run={tmp_path / 'mine'}")


@pytest.mark.slow
def test_compiled_towers_learn_the_same(write_config: WriteConfig, tmp_path: Path) -> None:
    eager = run(write_config(evaluation={}))
    compiled = run(write_config("compiled.yaml", run=str(tmp_path / "compiled"), evaluation={}), "engine.compile=true")
    losses = [[line["loss"] for line in metrics(folder)] for folder in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
