"""Losses and weights do not depend on ZeRO stage, micro-batches or number of processes, which may change on resume."""

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
from helpers import reference
from helpers.worlds import run_in_world
from rich.console import Console
from safetensors.torch import load_file

from mmrl.config import load_config
from mmrl.data.sources import open_training_set
from mmrl.data.stream import Stream
from mmrl.distributed import comm
from mmrl.engine import optim
from mmrl.engine.engine import Engine, EngineConfig
from mmrl.engine.loss_scale import LossScale
from mmrl.errors import InputError, RunStopped
from mmrl.losses.inputs import NestedLoss
from mmrl.model import bundle, towers, two_tower
from mmrl.model.rotation import NestedRotation
from mmrl.model.two_tower import MatryoshkaCLIP, ProjectedTower
from mmrl.nesting import rotate_weight
from mmrl.train.preflight import prepare
from mmrl.train.trainer import train

WriteConfig = Callable[..., Path]
STEPS = 20


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights without attention's bias: the key bias has a zero gradient, whose rounding errors Adam amplifies."""
    state = load_file(run / "checkpoints" / "last" / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if "in_proj_bias" not in name}


def plain_run(
    path: Path, scaler: torch.amp.GradScaler | None = None
) -> tuple[list[float], dict[str, torch.Tensor], torch.amp.GradScaler]:
    """The same training in plain PyTorch: one process, no DeepSpeed, the reference loss; fp16 if a scaler is given."""
    in_half, scaler = scaler is not None, scaler or torch.amp.GradScaler("cpu", enabled=False)
    config, dims = load_config(path), [4, 8, 16]
    torch.manual_seed(config.seed)
    built = towers.build(config.model)
    model = two_tower.from_towers(built, config.model.logit_scale, 1)
    optimizer = optim.build(model, built.model_cfg, config.optim)
    rotation, log_scale_k = NestedRotation(16, dims), torch.nn.Parameter(model.log_logit_scale.detach().repeat(2))
    of_prefixes = torch.optim.Adam(
        [
            {"params": rotation.parameters(), "lr": 0.0, "peak_lr": config.optim.lr_rotation},
            {"params": [log_scale_k], "lr": 0.0, "peak_lr": config.optim.lr},
        ],
        betas=(config.optim.betas[0], config.optim.betas[1]),
        eps=config.optim.eps,
    )
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
        for each in (optimizer, of_prefixes):
            each.zero_grad()
            optim.set_lr(each, optim.lr_factor(config.optim, step, STEPS, 2, 0))
        batch = next(batches)
        with torch.autocast("cpu", torch.float16, enabled=in_half):
            image_BD, text_BD, scale, _ = model(batch.image, batch.text)
        assert image_BD is not None
        assert text_BD is not None
        pair, scale_K = (image_BD.float(), text_BD.float()), torch.cat([log_scale_k.exp(), scale])
        arguments = (scale_K, dims, rotation.weight, None, batch.group)
        full, _, by_dim = reference.rotated_nested_info_nce(pair[0], pair[1], *arguments)
        a = config.nesting.prefix_gradient.at(step + 1, STEPS)
        # The value of x, and a of its gradient.
        weakened = [a * x + (1 - a) * x.detach() for x in pair]
        _, prefixes, _ = reference.rotated_nested_info_nce(weakened[0], weakened[1], *arguments)
        scaler.scale(full + prefixes).backward()
        scaler.unscale_(optimizer)
        skips = not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or 1e9)
        for parameter in (*rotation.parameters(), log_scale_k):
            assert parameter.grad is not None
            parameter.grad /= scaler.get_scale()
        scaler.step(optimizer)
        if not skips:
            of_prefixes.step()
        scaler.update()
        values.append(sum(loss.item() for loss in by_dim.values()) / 3)
    return values, folded_weights(model, built, rotation.matrix(), log_scale_k), scaler


def folded_weights(
    model: MatryoshkaCLIP, built: towers.Towers, rotation_DD: torch.Tensor, log_scale_k: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The weights with the rotation in both projections, without attention's bias."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if "in_proj_bias" not in name}
    for name, axis in bundle.embedding_axes(bundle.make_bundle(model, built, (1,))).items():
        weights[name] = rotate_weight(weights[name], axis, rotation_DD)
    weights["log_logit_scale"] = torch.cat([log_scale_k.detach(), weights["log_logit_scale"]])
    return weights


def assert_equal_training(run: Path, plain: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    assert losses(run) == pytest.approx(plain[0], abs=2e-5), run.name
    torch.testing.assert_close(final_weights(run), plain[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("stage", "micro_batch"), [(0, 3), (1, 12), (3, 12)])
def test_one_process_trains_like_plain_pytorch_at_any_zero_stage(
    write_config: WriteConfig, stage: int, micro_batch: int
) -> None:
    path = write_config(train={"batch_size": 12, "duration": STEPS}, evaluation={})
    run = train(load_config(path, [f"engine.zero_stage={stage}", f"train.micro_batch={micro_batch}"]))
    assert_equal_training(run, plain_run(path)[:2])


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_and_resume_like_plain_pytorch(
    write_config: WriteConfig, tmp_path: Path, processes: int
) -> None:
    """All in one launch, since importing torch and DeepSpeed takes most of the time."""
    path = write_config(
        train={"batch_size": 12, "duration": STEPS}, evaluation={}, checkpoint={"every": 10, "keep": 9}, resume="auto"
    )
    plain = plain_run(path)[:2]
    two, three, resumed = (tmp_path / name for name in ("stage2", "stage3", "resumed"))
    train(load_config(path, [f"run={resumed}", "engine.zero_stage=1"]))
    rewind(resumed, 10)
    stages = {two: 2, three: 3, resumed: 3}
    cases = [f"run={run} engine.zero_stage={stage} train.micro_batch=2" for run, stage in stages.items()]
    in_bf16 = {stage: tmp_path / f"bf16-{stage}" for stage in ((0, 2) if processes == 2 else (0, 1, 2, 3))}
    bf16 = "engine.precision=bf16 train.duration=6"
    cases += [f"run={run} engine.zero_stage={stage} {bf16}" for stage, run in in_bf16.items()]
    start_training(path, processes, tmp_path, *cases)
    for stage, run in in_bf16.items():
        # Gradients are reduced in float32. At stage 3, linear layers round the product before they add the bias.
        assert losses(run) == pytest.approx(losses(in_bf16[0]), abs=0.05 if stage == 3 else 2e-4), stage
    for run in (two, three, resumed):
        assert_equal_training(run, plain)
    rewind(three, 10)
    train(load_config(path, [f"run={three}", "engine.zero_stage=1"]))
    assert_equal_training(three, plain)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_training_equals_plain_pytorch_with_all_stages_micro_batches_and_processes(
    write_config: WriteConfig, tmp_path: Path, processes: int
) -> None:
    path = write_config(train={"batch_size": 12, "duration": STEPS}, evaluation={})
    cases = [(stage, micro_batches) for stage in range(4) for micro_batches in (1, 4)]
    runs = {case: tmp_path / f"stage{case[0]}-{case[1]}" for case in cases}
    arguments = [
        f"run={run} engine.zero_stage={stage} train.micro_batch={12 // processes // micro_batches}"
        for (stage, micro_batches), run in runs.items()
    ]
    start_training(path, processes, tmp_path, *arguments)
    plain = plain_run(path)[:2]
    for run in runs.values():
        assert_equal_training(run, plain)


@pytest.mark.parametrize("stages", [(0, 2), pytest.param((1, 3), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("start_scale", "micro_batch"), [(2.0**16, 12), (2.0**12, 4)])
def test_fp16_equals_plain_pytorch_with_gradscaler(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stages: Sequence[int],
    start_scale: float,
    micro_batch: int,
) -> None:
    """Losses within fp16 rounding, skipped steps and the final scale. Starting at 65,536, some steps are skipped; with
    micro-batches they could be others, since partial sums may overflow although their total does not."""
    monkeypatch.setattr("mmrl.engine.engine.LossScale", partial(LossScale, value=start_scale))
    path = write_config(train={"batch_size": 12, "duration": STEPS}, evaluation={}, engine={"precision": "fp16"})
    values, _, scaler = plain_run(path, torch.amp.GradScaler("cpu", start_scale))
    assert (scaler.get_scale() < start_scale) == (start_scale == 2**16)
    for stage in stages:
        overrides = [f"run={tmp_path}/stage{stage}", f"engine.zero_stage={stage}", f"train.micro_batch={micro_batch}"]
        run = train(load_config(path, overrides), Console(quiet=True))
        assert losses(run) == pytest.approx(values, abs=5e-3), stage
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["loss_scale"] == scaler.get_scale()
        assert last["skipped_steps"] == math.log2(start_scale / scaler.get_scale())


@pytest.mark.slow
def test_fp16_skips_the_same_steps_at_each_stage_on_three_processes(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(train={"batch_size": 12, "duration": STEPS}, evaluation={}, engine={"precision": "fp16"})
    runs = [tmp_path / f"stage{stage}" for stage in range(4)]
    cases = [f"run={run} engine.zero_stage={stage} train.micro_batch=2" for stage, run in enumerate(runs)]
    start_training(path, 3, tmp_path, *cases)
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for stage in (1, 2, 3):
        assert losses(runs[stage]) == pytest.approx(losses(runs[0]), abs=5e-3), stage
        for key in ("loss_scale", "skipped_steps"):
            assert [line[key] for line in lines[stage]] == [line[key] for line in lines[0]], stage
    assert lines[0][-1]["skipped_steps"] > 0


def test_fp16_loss_scale_resumes_and_is_exhausted_by_infinite_gradients(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(evaluation={}, engine={"precision": "fp16"}, checkpoint={"every": 4, "keep": 9})
    folder, console = tmp_path / "run", Console(record=True, width=200)
    whole = (train(load_config(path), console) / "metrics.jsonl").read_text().splitlines()
    assert "skipped 1 step(s) whose fp16 gradients overflowed (1 so far)" in console.export_text()
    rewind(folder, 4)
    train(load_config(path, ["resume=auto"]))
    for before, after in zip(whole, (folder / "metrics.jsonl").read_text().splitlines(), strict=True):
        for key in ("loss", "loss_scale", "skipped_steps", "grad_norm"):
            assert json.loads(before)[key] == json.loads(after)[key], key
    # Gradients that overflow at any scale are not caused by fp16.
    monkeypatch.setattr(Engine, "_step_without_zero", lambda _, values_N: [math.inf, *values_N.tolist()])
    with pytest.raises(RunStopped, match=r"Step 17: the gradient norm is inf.*lower optim.lr"):
        train(load_config(path, ["run=" + str(tmp_path / "exhausted"), "train.duration=40"]))


def _count_collectives(folder: Path) -> None:
    """Saves the number of collectives of each kind in a step, by stage, number of micro-batches and reduction."""
    from mmrl.engine import grad_cache
    from mmrl.losses.nested_infonce import nested_info_nce

    def loss_function(
        image_bD: torch.Tensor | None, text_bD: torch.Tensor | None, scale: torch.Tensor, _: object
    ) -> NestedLoss:
        return nested_info_nce(image_bD, text_bD, scale, [8, 16])

    counts = {}
    for stage, micro_batches, each in _REDUCTIONS:
        torch.manual_seed(0)
        towers_of = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)) for _ in range(2)]
        model = MatryoshkaCLIP(ProjectedTower(towers_of[0]), ProjectedTower(towers_of[1]), torch.ones(1))
        groups = [{"params": list(model.image.parameters())}, {"params": list(model.text.parameters())}]
        groups.append({"params": [model.log_logit_scale]})
        config = EngineConfig(zero_stage=stage, reduce_each_micro_batch=each)
        engine = Engine(model, torch.optim.AdamW(groups), config, 1.0, 8 // micro_batches)
        batch = list(zip(*(torch.randn(8, 16).split(8 // micro_batches) for _ in range(2)), strict=True))
        for profile in (nullcontext(), torch.profiler.profile()):
            with profile:
                grad_cache.backward(engine, batch, loss_function, lambda _: None)
                engine.step()
        assert isinstance(profile, torch.profiler.profile)
        names = [event.name for event in profile.events() or []]
        counts[stage, micro_batches, each] = Counter(name for name in names if name.startswith("gloo:"))
    if comm.world().is_rank_0:
        torch.save(counts, folder / "counts.pt")


_REDUCTIONS = [
    (stage, *case) for stage in (0, 2, 3) for case in ((1, False), (4, False), (4, True)) if stage or not case[1]
]


def test_gradients_are_reduced_once_per_step(tmp_path: Path) -> None:
    """Unless reduce_each_micro_batch is set. Only gradients are counted at stage 3, which also all-gathers weights."""
    run_in_world(2, _count_collectives, tmp_path, "forkserver")
    counts = torch.load(tmp_path / "counts.pt", weights_only=False)
    assert counts[0, 1, False] == counts[0, 4, False]
    assert counts[2, 1, False] == counts[2, 4, False]
    for stage in (2, 3):
        whole, once, each = (counts[stage, *case]["gloo:all_reduce"] for case in ((1, False), (4, False), (4, True)))
        assert whole == once == each - 3 > 0, stage


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.name=sigmoid", "nesting.rotation=false"],
        ["model.lock_image=true"],
        ["model.lock_text=true", "engine.zero_stage=3"],
        pytest.param(
            ["model.lock_text=true", "nesting.rotation=false", "model.logit_scale.per_dim=true", "engine.zero_stage=3"],
            marks=pytest.mark.slow,
        ),
        [
            *("model.grad_checkpointing=true", "loss.label_smoothing=0.1", "nesting.prefix_gradient=1"),
            *("data.workers=1", "engine.zero_stage=1"),
        ],
        ["nesting.rotate_at_start=true", "loss.distillation=0.5"],
        ["engine.zero_stage=2", "engine.reduce_each_micro_batch=true"],
        ["engine.zero_stage=2", "engine.offload=true"],
    ],
    ids=" ".join,
)
def test_micro_batches_do_not_change_training_with_any_option(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    # Rotate by PCA: the 300 Adam steps of the learned rotation would amplify rounding errors.
    monkeypatch.setattr("mmrl.rotation.learned.learn_rotation", lambda *_: None)
    path = write_config(evaluation={})
    whole = train(load_config(path, [*overrides, f"run={tmp_path}/whole"]))
    divided = train(load_config(path, [*overrides, f"run={tmp_path}/divided", "train.micro_batch=4"]))
    assert losses(divided) == pytest.approx(losses(whole), abs=2e-5)
    torch.testing.assert_close(final_weights(divided), final_weights(whole), rtol=0, atol=1e-4)


def rewind(run: Path, step: int) -> None:
    """Makes the checkpoint of this step the last one, as if the run had stopped there."""
    last = run / "checkpoints" / "last"
    last.unlink()
    last.symlink_to(f"step-{step}")


@pytest.mark.parametrize(
    "legs",
    [
        [(0, 2, False), (12, 3, True)],
        pytest.param(
            [(0, 2, False), (4, 0, False), (8, 3, True), (12, 1, True), (16, 3, False)], marks=pytest.mark.slow
        ),
    ],
)
def test_resuming_at_another_zero_stage_changes_nothing(
    write_config: WriteConfig, tmp_path: Path, legs: list[tuple[int, int, bool]]
) -> None:
    """A moment that is lost or misplaced shows in the losses. `legs`: first step, ZeRO stage, offload."""
    sections = {"train": {"batch_size": 12, "duration": STEPS}, "checkpoint": {"every": 4, "keep": 9}, "evaluation": {}}
    whole = train(load_config(write_config(**sections), [f"run={tmp_path}/whole", "data.workers=0"]))
    path = write_config(**sections)
    for step, stage, offload in legs:
        if step:
            rewind(tmp_path / "run", step)
        overrides = [f"engine.zero_stage={stage}", f"engine.offload={offload}", "resume=auto"]
        train(load_config(path, overrides))
        assert losses(tmp_path / "run") == pytest.approx(losses(whole), abs=2e-5), stage
        torch.testing.assert_close(final_weights(tmp_path / "run"), final_weights(whole), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_resuming_repeatedly_at_other_stages_and_processes_changes_nothing(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    path = write_config(
        train={"batch_size": 12, "duration": STEPS}, evaluation={}, checkpoint={"every": 5, "keep": 9}, resume="auto"
    )
    run = tmp_path / "run"
    whole = train(load_config(path, [f"run={tmp_path}/whole"]))
    for step, processes, stage in ((0, 2, 3), (5, 1, 1), (10, 3, 2), (15, 2, 3)):
        if step:
            rewind(run, step)
        start_training(path, processes, tmp_path, f"engine.zero_stage={stage}")
        assert losses(run) == pytest.approx(losses(whole), abs=2e-5), (processes, stage)
    torch.testing.assert_close(final_weights(run), final_weights(whole), rtol=0, atol=1e-4)


def test_dropout_is_the_same_in_both_forward_passes(
    write_config: WriteConfig, tmp_path: Path, tiny_model: Path
) -> None:
    """With patch dropout, GradCache's second forward pass must give the embeddings of the first, which the loss is
    computed from; and a resumed step must drop the same patches."""
    values = json.loads(tiny_model.read_text())
    values["vision_cfg"]["patch_dropout"] = 0.5
    (tmp_path / "dropout.json").write_text(json.dumps(values))
    path = write_config(model={"name": str(tmp_path / "dropout.json")}, evaluation={}, checkpoint={"every": "4 steps"})
    seen: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if module.training:
            seen.append(output.detach().clone())

    original = towers.build

    def build(config: towers.TowersConfig, require_weights: bool = False) -> towers.Towers:
        built = original(config, require_weights)
        built.image.register_forward_hook(remember)
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "build", build)
        folder = train(load_config(path, ["train.micro_batch=4"]))
    assert len(seen) == 8 * 2 * 3
    for step in range(8):
        first, second = seen[6 * step : 6 * step + 3], seen[6 * step + 3 : 6 * step + 6]
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        assert not torch.equal(first[0], first[1])
    before = losses(folder)
    rewind(folder, 4)
    train(load_config(path, ["train.micro_batch=4", "resume=auto"]))
    assert losses(folder) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.micro_batch=5"], r"train.micro_batch: a process's share of the batch, 12, cannot .* of 5; use 4"),
        (["train.micro_batch=24"], r"cannot be divided into micro-batches of 24; use 12"),
        (["train.ema=0.9", "engine.zero_stage=3"], r"train.ema: .* use engine.zero_stage=2"),
        (["engine.offload=true"], r"engine.*offload: requires ZeRO; set zero_stage to 1, 2 or 3"),
        (["engine.deepspeed={zero_optimization: {stage: 1}}"], r"deepspeed.zero_optimization.stage: 1 contradicts 0"),
        (["engine.deepspeed={fp16: {enabled: true}}"], r"deepspeed.fp16 cannot be set here"),
    ],
)
def test_invalid_options_are_refused_before_the_run(
    write_config: WriteConfig, overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        prepare(load_config(write_config(), overrides), comm.start())
    assert not (tmp_path / "run").exists()
