"""What is learnt does not depend on how the work is divided: ZeRO stages, micro-batches, processes."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import start_training
from helpers.worlds import run_in_world
from rich.console import Console
from safetensors.torch import load_file

from mmrl import config as configs
from mmrl.data.sources import open_training_set
from mmrl.data.stream import Stream
from mmrl.distributed import comm
from mmrl.engine import optim
from mmrl.engine.engine import Engine, EngineConfig
from mmrl.engine.loss_scale import LossScale
from mmrl.errors import InputError, RunStopped
from mmrl.losses import reference
from mmrl.losses.inputs import NestedLoss
from mmrl.model import towers, two_tower
from mmrl.model.two_tower import Encoder, MatryoshkaCLIP
from mmrl.train.preflight import prepare
from mmrl.train.trainer import train

WriteConfig = Callable[..., Path]
STEPS = 20


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Adam blows up the rounding of a gradient that is truly zero, as that of attention's key bias is."""
    state = load_file(run / "checkpoints" / "last" / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if "in_proj_bias" not in name}


def plain_run(
    path: Path, scaler: torch.amp.GradScaler | None = None
) -> tuple[list[float], dict[str, torch.Tensor], torch.amp.GradScaler]:
    """The same training in plain PyTorch: one process, no DeepSpeed, the reference's formula; in float16 with a
    scaler."""
    in_half, scaler = scaler is not None, scaler or torch.amp.GradScaler("cpu", enabled=False)
    config = configs.load(path)
    torch.manual_seed(config.seed)
    built = towers.build(config.model)
    model = two_tower.from_towers(built, config.model.logit_scale, 1)
    optimizer = optim.build(model, built.model_cfg, config.optim)
    stream = Stream(
        open_training_set(config.data),
        config.train.batch_size,
        seed=config.seed,
        image=built.image_spec,
        text=built.tokenise,
        config=config.data,
    )
    batches, values = stream.forever(), []
    for step in range(STEPS):
        optim.set_lr(optimizer, optim.lr_factor(config.optim, step, STEPS, 2, 0))
        batch = next(batches)
        with torch.autocast("cpu", torch.float16, enabled=in_half):
            image_BD, text_BD, scale, _ = model(batch.image, batch.text)
        assert image_BD is not None
        assert text_BD is not None
        total, _ = reference.nested_info_nce(image_BD.float(), text_BD.float(), scale, [4, 8, 16], groups=batch.group)
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or 1e9)
        scaler.step(optimizer)
        scaler.update()
        values.append(total.item())
    weights = {name: tensor for name, tensor in model.state_dict().items() if "in_proj_bias" not in name}
    return values, weights, scaler


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_stages_micro_batches_and_processes_learn_the_same(
    write_config: WriteConfig, tmp_path: Path, processes: int
) -> None:
    path = write_config(train={"batch_size": 12, "duration": STEPS}, evaluation={})
    cases = [(stage, micro) for stage in range(4) for micro in (None, 12 // processes // 4)]
    arguments = [
        f"run={tmp_path}/zero{stage}-{micro} engine.zero_stage={stage} train.micro_batch={micro or 12 // processes}"
        for stage, micro in cases
    ]
    start_training(path, processes, tmp_path / "script.py", *arguments)
    values, weights, _ = plain_run(path)
    for stage, micro in cases:
        run = tmp_path / f"zero{stage}-{micro}"
        assert losses(run) == pytest.approx(values, abs=2e-5), (stage, micro)
        torch.testing.assert_close(final_weights(run), weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stages", [(0, 2), pytest.param((1, 3), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("start_scale", "micro_batches"), [(2.0**16, [12]), (2.0**12, [4])])
def test_float16_follows_plain_pytorchs_scaler(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stages: Sequence[int],
    start_scale: float,
    micro_batches: list[int],
) -> None:
    """The losses, within float16's rounding of 5e-4, the skipped steps, and the scale after them. From 65,536 down some
    steps are skipped; not the same with micro-batches, whose parts of a sum may overflow where the whole does not."""
    monkeypatch.setattr("mmrl.engine.engine.LossScale", partial(LossScale, value=start_scale))
    path = write_config(train={"batch_size": 12, "duration": STEPS}, evaluation={}, engine={"precision": "fp16"})
    values, _, scaler = plain_run(path, torch.amp.GradScaler("cpu", start_scale))
    assert (scaler.get_scale() < start_scale) == (start_scale == 2**16)
    for stage, micro in ((stage, micro) for stage in stages for micro in micro_batches):
        overrides = [f"run={tmp_path}/half{stage}-{micro}", f"engine.zero_stage={stage}", f"train.micro_batch={micro}"]
        run = train(configs.load(path, overrides), Console(quiet=True))
        assert losses(run) == pytest.approx(values, abs=5e-3), (stage, micro)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["loss_scale"] == scaler.get_scale()
        assert last["skipped_steps"] == math.log2(start_scale / scaler.get_scale())


@pytest.mark.slow
def test_float16_skips_the_same_steps_at_each_stage_on_three_processes(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    path = write_config(train={"batch_size": 12, "duration": STEPS}, evaluation={}, engine={"precision": "fp16"})
    runs = [tmp_path / f"half{stage}" for stage in range(4)]
    cases = [f"run={run} engine.zero_stage={stage} train.micro_batch=2" for stage, run in enumerate(runs)]
    start_training(path, 3, tmp_path / "script.py", *cases)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for stage in (1, 2, 3):
        assert losses(runs[stage]) == pytest.approx(losses(runs[0]), abs=5e-3), stage
        for key in ("loss_scale", "skipped_steps"):
            assert [line[key] for line in lines[stage]] == [line[key] for line in lines[0]], stage
    assert lines[0][-1]["skipped_steps"] > 0


def test_float16s_scale_goes_on_and_gives_up(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(evaluation={}, engine={"precision": "fp16"}, checkpoint={"every": 4, "keep": 9})
    folder, said = tmp_path / "run", Console(record=True, width=200)
    whole = (train(configs.load(path), said) / "metrics.jsonl").read_text().splitlines()
    assert "fp16's gradients overflowed in 1 step(s), which were skipped (1 so far)" in said.export_text()
    as_far_as(folder, 4)
    train(configs.load(path, ["resume=auto"]))
    for before, after in zip(whole, (folder / "metrics.jsonl").read_text().splitlines(), strict=True):
        for key in ("loss", "loss_scale", "skipped_steps", "grad_norm"):
            assert json.loads(before)[key] == json.loads(after)[key], key
    # Gradients that overflow at any scale are not the precision's fault.
    monkeypatch.setattr(Engine, "_step_alone", lambda _: math.inf)
    with pytest.raises(RunStopped, match=r"Step 17: the gradient's norm is inf.*lower optim.lr"):
        train(configs.load(path, ["run=" + str(tmp_path / "hopeless"), "train.duration=40"]))


def _collective_calls(folder: Path) -> None:
    """How many of each kind a step makes, by stage and number of micro-batches."""
    from mmrl.engine import grad_cache
    from mmrl.losses.nested_infonce import nested_info_nce

    def loss_of(image_bD: torch.Tensor, text_bD: torch.Tensor, scale: torch.Tensor, _: object) -> NestedLoss:
        return nested_info_nce(image_bD, text_bD, scale, [8, 16])

    counts = {}
    for stage, parts, each in _REDUCED:
        torch.manual_seed(0)
        towers_of = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)) for _ in range(2)]
        model = MatryoshkaCLIP(Encoder(towers_of[0]), Encoder(towers_of[1]), torch.ones(1))
        groups = [{"params": list(model.image.parameters())}, {"params": list(model.text.parameters())}]
        groups.append({"params": [model.log_logit_scale]})
        config = EngineConfig(zero_stage=stage, reduce_each_micro_batch=each)
        engine = Engine(model, torch.optim.AdamW(groups), config, 1.0, 8 // parts)
        batch = list(zip(*(torch.randn(8, 16).split(8 // parts) for _ in range(2)), strict=True))
        for profile in (nullcontext(), torch.profiler.profile()):
            with profile:
                grad_cache.backward(engine, batch, loss_of, lambda _: None)
                engine.step()
        assert isinstance(profile, torch.profiler.profile)
        names = [event.name for event in profile.events() or []]
        counts[stage, parts, each] = Counter(name for name in names if name.startswith("gloo:"))
    if comm.world().is_rank_0:
        torch.save(counts, folder / "counts.pt")


_REDUCED = [
    (stage, *case) for stage in (0, 2, 3) for case in ((1, False), (4, False), (4, True)) if stage or not case[1]
]


def test_gradients_are_reduced_once_a_step(tmp_path: Path) -> None:
    """Whatever the number of micro-batches, unless it is wanted otherwise. Stage 3 gathers weights at each forward."""
    run_in_world(2, _collective_calls, tmp_path, "spawn")
    counts = torch.load(tmp_path / "counts.pt", weights_only=False)
    assert counts[0, 1, False] == counts[0, 4, False]
    assert counts[2, 1, False] == counts[2, 4, False]
    for stage in (2, 3):
        whole, parts, each = (counts[stage, *case]["gloo:all_reduce"] for case in ((1, False), (4, False), (4, True)))
        assert whole == parts == each - 3 > 0, stage


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.name=sigmoid"],
        ["model.lock_image=true"],
        ["model.lock_text=true", "model.logit_scale.per_dim=true", "engine.zero_stage=3"],
        ["model.grad_checkpointing=true", "loss.label_smoothing=0.1"],
        ["nesting.dims_per_step=2", "data.workers=1", "engine.zero_stage=1"],
        ["nesting.start=0.4", "loss.distillation=0.5"],
        ["engine.zero_stage=2", "engine.reduce_each_micro_batch=true"],
        ["engine.zero_stage=2", "engine.offload=true"],
    ],
    ids=" ".join,
)
def test_micro_batches_change_nothing_with_any_option(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    # The turn is by principal directions here: 300 steps of Adam would show the rounding of those before.
    monkeypatch.setattr("mmrl.rotation.learned.learn", lambda *_: None)
    path = write_config(evaluation={})
    whole = train(configs.load(path, [*overrides, f"run={tmp_path}/whole"]))
    parts = train(configs.load(path, [*overrides, f"run={tmp_path}/parts", "train.micro_batch=4"]))
    assert losses(parts) == pytest.approx(losses(whole), abs=2e-5)
    torch.testing.assert_close(final_weights(parts), final_weights(whole), rtol=0, atol=1e-4)


def as_far_as(run: Path, step: int) -> None:
    """As if the run had been lost after this step."""
    last = run / "checkpoints" / "last"
    last.unlink()
    last.symlink_to(f"step-{step}")


def test_a_run_goes_on_at_any_stage(write_config: WriteConfig, tmp_path: Path) -> None:
    """Momentum carries what came before, so a moment that is lost or put elsewhere shows in the losses."""
    sections = {"train": {"batch_size": 12, "duration": STEPS}, "checkpoint": {"every": 4, "keep": 9}, "evaluation": {}}
    whole = train(configs.load(write_config(**sections), [f"run={tmp_path}/whole", "data.workers=0"]))
    path = write_config(**sections)
    for done, stage, offload in ((0, 2, False), (4, 0, False), (8, 3, True), (12, 1, True), (16, 3, False)):
        if done:
            as_far_as(tmp_path / "run", done)
        overrides = [f"engine.zero_stage={stage}", f"engine.offload={offload}", "resume=auto"]
        train(configs.load(path, overrides))
        assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=2e-5), stage
        torch.testing.assert_close(final_weights(tmp_path / "run"), final_weights(whole), rtol=0, atol=1e-4)


def test_a_run_goes_on_at_another_stage_in_another_world(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(
        train={"batch_size": 12, "duration": STEPS}, evaluation={}, checkpoint={"every": 5, "keep": 9}, resume="auto"
    )
    script, run = tmp_path / "script.py", tmp_path / "run"
    whole = train(configs.load(path, [f"run={tmp_path}/whole"]))
    for done, processes, stage in ((0, 2, 3), (5, 1, 1), (10, 3, 2), (15, 2, 3)):
        if done:
            as_far_as(run, done)
        start_training(path, processes, script, f"engine.zero_stage={stage}")
        assert losses(run) == pytest.approx(losses(whole), abs=2e-5), (processes, stage)
    torch.testing.assert_close(final_weights(run), final_weights(whole), rtol=0, atol=1e-4)


def test_dropout_is_the_same_in_both_forwards(write_config: WriteConfig, tmp_path: Path, tiny_model: Path) -> None:
    """With patch dropout, the second forward's embeddings must be those that the loss saw: the model learns to fit one
    batch as well as without micro-batches, and a resumed step repeats the drawn patches."""
    values = json.loads(tiny_model.read_text())
    values["vision_cfg"]["patch_dropout"] = 0.5
    (tmp_path / "dropout.json").write_text(json.dumps(values))
    path = write_config(model={"name": str(tmp_path / "dropout.json")}, evaluation={}, checkpoint={"every": "4 steps"})
    seen: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if module.training:
            seen.append(output.detach().clone())

    original = towers.build

    def build(config: towers.TowersConfig) -> towers.Towers:
        built = original(config)
        built.image.register_forward_hook(remember)
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "build", build)
        folder = train(configs.load(path, ["train.micro_batch=4"]))
    assert len(seen) == 8 * 2 * 3
    for step in range(8):
        first, second = seen[6 * step : 6 * step + 3], seen[6 * step + 3 : 6 * step + 6]
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        assert not torch.equal(first[0], first[1])
    before = losses(folder)
    last = folder / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("step-4")
    train(configs.load(path, ["train.micro_batch=4", "resume=auto"]))
    assert losses(folder) == before


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.micro_batch=5"], r"train.micro_batch: a process's share of the batch, 12, cannot .* of 5; take 4"),
        (["train.micro_batch=24"], r"cannot be divided into parts of 24; take 12"),
        (["train.ema=0.9", "engine.zero_stage=3"], r"train.ema: .* take engine.zero_stage=2"),
        (["engine.offload=true"], r"engine.*offload: ZeRO moves .*; take zero_stage 1, 2 or 3"),
        (["engine.deepspeed={zero_optimization: {stage: 1}}"], r"deepspeed.zero_optimization.stage: 1 contradicts 0"),
        (["engine.deepspeed={fp16: {enabled: true}}"], r"deepspeed.fp16 cannot be set here"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(
    write_config: WriteConfig, overrides: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        prepare(configs.load(write_config(), overrides), comm.start())
    assert not (tmp_path / "run").exists()
