"""The planner against what is really allocated, stored and sent."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import write_tar
from helpers.encoders import pair_members
from helpers.worlds import run_in_world
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mmrl.cli import app
from mmrl.config import load_config, parse_config
from mmrl.data.workers import LoaderMemory
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.hardware import peak_flops
from mmrl.losses.nested_infonce import nested_info_nce
from mmrl.losses.rotated import rotated_nested_info_nce
from mmrl.model import bundle, footprint, registry, two_tower
from mmrl.model.footprint import Footprint
from mmrl.model.rotation import NestedRotation
from mmrl.train import costs, plan
from mmrl.train.preflight import bytes_per_sample

WriteConfig = Callable[..., Path]
MODEL = Footprint(
    parameters=400_000_000,
    trained=400_000_000,
    embed_dim=512,
    activations_fixed=1e9,
    activations_per_pair=100e6,
    forward_flops_per_pair=1e11,
    backward_flops_per_pair=2e11,
)


def _allocated_at_the_peak(work: Callable[[], object]) -> float:
    """Bytes that PyTorch's own allocator holds at the most while it works, beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    held = peak = 0.0
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.grad_checkpointing=true"], pytest.param(["model.lock_image=true"], marks=pytest.mark.slow)],
    ids=str,
)
def test_activations_are_those_of_the_real_towers(
    write_config: WriteConfig, tiny_model: Path, overrides: list[str], tmp_path: Path
) -> None:
    values = json.loads(tiny_model.read_text())
    values["vision_cfg"] |= {"layers": 3, "width": 64}
    values["text_cfg"] |= {"layers": 3, "width": 64}
    (tmp_path / "planned.json").write_text(json.dumps(values))
    config = load_config(write_config(model={"name": str(tmp_path / "planned.json")}), overrides)
    predicted = footprint.measure(config.model, in_16_bits=False, on_gpu=False)
    built = bundle.initial_towers(config.model)
    model = two_tower.from_towers(built, config.model.logit_scale, 1).train()
    assert predicted.parameters == sum(p.numel() for p in model.parameters())
    assert predicted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for size in (8, 32):

        def step(size: int = size) -> None:
            pixels = torch.zeros(size, 3, 32, 32, dtype=torch.uint8)
            image_BD, text_BD, scale, _ = model(pixels, torch.zeros(size, 12, dtype=torch.int64))
            (image_BD.sum() + text_BD.sum() + scale.sum()).backward()

        step()
        measured = _allocated_at_the_peak(step)
        expected = predicted.activations_fixed + size * predicted.activations_per_pair
        assert expected == pytest.approx(measured, rel=0.1), size


@pytest.mark.parametrize("locks_image", [False, True])
def test_operations_are_those_of_the_real_step(
    write_config: WriteConfig, tiny_model: Path, locks_image: bool, tmp_path: Path
) -> None:
    """torch's counter over a real forward and backward."""
    values = json.loads(tiny_model.read_text())
    values["vision_cfg"] |= {"layers": 4, "width": 64}
    (tmp_path / "counted.json").write_text(json.dumps(values))
    model_config = load_config(
        write_config(model={"name": str(tmp_path / "counted.json"), "lock_image": locks_image})
    ).model
    built = bundle.initial_towers(model_config)
    model = two_tower.from_towers(built, model_config.logit_scale, 1).train()
    with FlopCounterMode(display=False) as counter:
        image_BD, text_BD, _, _ = model(
            torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, 12, dtype=torch.int64)
        )
        (image_BD.sum() + text_BD.sum()).backward()
    of_loss = 8.0 * 8**2 * 16
    assert footprint.model_flops(model_config, 8) - of_loss == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("Tesla T4", 65),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1060", None),
    ],
)
def test_a_peak_is_known_or_not(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    expected = None if tflops is None else tflops * 1e12
    assert peak_flops(torch.device("cuda"), "bf16") == peak_flops(torch.device("cuda"), "fp16") == expected
    assert peak_flops(torch.device("cuda"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


@pytest.mark.parametrize(("batch", "width", "rotates"), [(512, 256, False), (2048, 128, False), (2048, 128, True)])
def test_the_losss_memory(write_config: WriteConfig, batch: int, width: int, rotates: bool) -> None:
    nesting = {"dims": [16, 64, width], "rotation": rotates}
    config = load_config(write_config(train={"batch_size": batch, "duration": 1}, nesting=nesting))
    model = Footprint(0, 0, width, 0, 0, 0, 0)
    image_BD, text_BD = torch.randn(2, batch, width).unbind()
    rows = (image_BD.requires_grad_(), text_BD.requires_grad_())

    rotation = NestedRotation(width)

    def step() -> None:
        if rotates:
            rotated_nested_info_nce(*rows, 20.0, [16, 64, width], rotation, 0.3).total.backward()
        else:
            nested_info_nce(*rows, 20.0, [16, 64, width]).total.backward()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmrl.losses.sweep._cache_bytes", lambda: 1 << 19)  # small tiles: the rest is what is planned
        measured = _allocated_at_the_peak(step)
    predicted = costs.loss_bytes(config, model, gpus=1)
    assert 0.5 * predicted < measured < 1.1 * predicted


def _live_bytes(folder: Path) -> None:
    """What one process keeps between two steps, in units of 4 bytes a parameter."""
    import gc

    from mmrl.engine.engine import Engine, EngineConfig
    from mmrl.model.two_tower import MatryoshkaCLIP, ProjectedTower

    def live() -> int:
        gc.collect()
        storages = {}
        for one in gc.get_objects():
            if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu":
                storages[one.untyped_storage()._cdata] = one.untyped_storage().nbytes()
        return sum(storages.values())

    found = {}
    for stage in (0, 1, 2):
        before = live()
        linear = [torch.nn.Linear(256, 256, bias=False) for _ in range(8)]
        model = MatryoshkaCLIP(ProjectedTower(torch.nn.Sequential(*linear)), ProjectedTower(linear[0]), torch.ones(1))
        count = sum(p.numel() for p in model.parameters())
        groups = [{"params": list(model.parameters())[1:]}, {"params": list(model.parameters())[:1]}]
        engine = Engine(model, torch.optim.AdamW(groups), EngineConfig(zero_stage=stage), 1.0, 2)
        for _ in range(2):
            image_BD, text_BD, scale, _ = engine(torch.randn(2, 256), torch.randn(2, 256))
            engine.backward(image_BD.sum() + text_BD.sum() + scale.sum(), last=True)
            engine.step()
            del image_BD, text_BD, scale
        found[stage] = (live() - before) / 4 / count
        del engine, model, linear, groups
    torch.save(found, folder / f"rank{comm.world().rank}.pt")


@pytest.mark.slow
def test_weights_and_optimiser_state_are_what_deepspeed_keeps(tmp_path: Path) -> None:
    run_in_world(2, _live_bytes, tmp_path, "forkserver")
    found = torch.load(tmp_path / "rank0.pt")
    for stage in (0, 1, 2):
        weights, _, optimizer = costs.state_bytes(MODEL, stage, gpus=2)
        assert found[stage] == pytest.approx((weights + optimizer) / 4 / MODEL.parameters, rel=0.05), stage


def test_what_fits(write_config: WriteConfig) -> None:
    config = load_config(write_config(train={"batch_size": 32768, "duration": "1 epochs"}))
    large = plan.plan_resources(config, gpus=64, memory_gb=80, measured=MODEL)
    assert (large.best, large.stages[0].micro_batch, large.pairs_per_gpu) == (0, 512, 512)
    small = plan.plan_resources(config, gpus=64, memory_gb=24, measured=MODEL)
    micro = small.stages[0].micro_batch
    assert small.best == 0
    assert micro is not None
    assert micro < 512
    assert small.stages[0].total_gb <= 24
    # Twice as many pairs would not have fitted, and the second forward costs time.
    assert small.stages[0].total_gb + micro * 0.1 > 24 * 0.95
    assert small.stages[0].step_seconds > large.stages[0].step_seconds
    # Whole gradients do not fit beside divided weights: they are divided at each micro-batch.
    giant = dataclasses.replace(MODEL, parameters=3_000_000_000, trained=3_000_000_000)
    narrow = plan.plan_resources(config, gpus=64, memory_gb=24, measured=giant)
    assert narrow.best == 2
    assert narrow.stages[2].reduce_each_micro_batch
    assert not small.stages[2].reduce_each_micro_batch
    advice = r"Lowest stage that fits: engine.zero_stage=2 train.micro_batch=\d+ engine.reduce_each_micro_batch=true"
    assert any(re.fullmatch(advice, line) for line in plan.plan_lines(narrow))
    nothing = plan.plan_resources(config, gpus=64, memory_gb=4, measured=MODEL)
    assert nothing.best is None
    assert any("Nothing fits" in line for line in plan.plan_lines(nothing))


@pytest.mark.parametrize("rotates", [False, True])
def test_the_network_carries_what_the_formulas_say(rotates: bool) -> None:
    config = parse_config(
        {
            "run": "x",
            "model": {"name": "m"},
            "nesting": {"dims": [128, 256, 512], "rotation": rotates},
            "data": {"train": "x"},
            "optim": {"lr": 1e-3},
            "train": {"batch_size": 1024, "duration": 1},
        },
        "test",
    )
    loss = 1024 * (4 * 512 + 16) + 2 * 4 * 3 * 1024 + 4 * 1024 * 512
    if rotates:
        loss = 2 * loss + 2 * 4 * 512**2
    gradients = 4 * MODEL.trained
    for stage, accumulation, moved, moved_each in (
        (0, 4, 2, 2), (1, 4, 3, 3), (2, 1, 3, 3), (2, 4, 3, 9), (3, 1, 3, 3), (3, 4, 13, 16),
    ):  # fmt: skip
        for each, times in ((False, moved), (True, moved_each)):
            traffic, _ = costs.traffic_of(config, MODEL, 4, stage, accumulation, "fp32", each)
            assert traffic == pytest.approx((loss + times * gradients) * 3 / 4)
    assert costs.traffic_of(config, MODEL, 1, 2, 1, "fp32") == (0.0, 0)


def test_slower_gpus_take_longer(write_config: WriteConfig) -> None:
    config = load_config(
        write_config(train={"batch_size": 32768, "duration": "100 steps"}, engine={"precision": "auto"}),
        ["data.workers=null"],
    )
    plans = {gpu: plan.plan_resources(config, 64, gpu, 24, measured=MODEL) for gpu in ("h100", "a100", "l4", "t4")}
    assert [plans[gpu].precision for gpu in plans] == ["bf16", "bf16", "bf16", "fp32"]
    hours = [one.hours for one in plans.values() if one.hours is not None]
    assert len(hours) == 4
    assert hours == sorted(hours)
    best = plans["a100"].stages[plans["a100"].best or 0]
    assert hours[1] == pytest.approx(100 * best.step_seconds / 3600)
    host = plans["a100"].host
    assert host is not None
    assert host.images_s == pytest.approx(32768 / best.step_seconds / 8)
    assert host.workers_per_gpu * 450 * 8 >= host.images_s
    sample = bytes_per_sample(registry.read_model_cfg(config.model.name))
    memory = LoaderMemory(sample, 512, best.micro_batch or 1, 8, pins=True)
    decoding, workers = LoaderMemory(sample, 256, 256, 8), host.workers_per_gpu  # as many decode for evaluation
    shared = memory.shared(workers, memory.units_ahead(workers)) + decoding.shared(workers, 1)
    assert (host.shared_gb, host.workers_gb) == pytest.approx(
        (shared / 1e9, (memory.private(workers) + decoding.private(workers)) / 1e9)
    )
    assert memory.private(workers) > 0.1e9 * 8 * workers
    faster = plan.plan_resources(config, 64, "a100", 24, measured=MODEL, tflops=1e4, gigabytes=1e4).host
    assert faster is not None
    assert faster.workers_per_gpu > host.workers_per_gpu
    assert any(line.startswith("Time of the run: about") for line in plan.plan_lines(plans["a100"]))
    distilled = config.model_copy(update={"loss": config.loss.model_copy(update={"distillation": 1.0})})
    passes = distilled.model_copy(update={"loss": distilled.loss.model_copy(update={"kernels": "torch"})})
    traffic = [costs.loss_memory_traffic(one) for one in (config, distilled, passes)]
    assert [one / traffic[0] for one in traffic] == pytest.approx([1, 40 / 36, 208 / 36])
    with pytest.raises(InputError, match="gpu: 'h1000' is not known; choose from h100-pcie, "):
        plan.plan_resources(config, 64, "h1000", measured=MODEL)
    in_bf16 = load_config(write_config(engine={"precision": "bf16"}))
    with pytest.raises(InputError, match="a t4 has no bf16 instructions; set it to fp16 or fp32"):
        plan.plan_resources(in_bf16, 2, "t4", measured=MODEL)


@pytest.mark.parametrize("side", ["text", "image"])
def test_one_tower_is_planned(write_config: WriteConfig, tiny_model: Path, side: str, tmp_path: Path) -> None:
    """Half of the model alone: a pair has two of its members, and only shards with such members are counted."""
    shards = write_tar(tmp_path / "pairs.tar", [member for n in range(24) for member in pair_members(side, n)])
    config = load_config(
        write_config(
            model={"name": str(tiny_model), "towers": side},
            loss={"image_text": 0, f"{side}_{side}": 1},
            data={"train": str(shards), "workers": None},
            evaluation={},
        )
    )
    planned = plan.plan_resources(config, 2)
    built = bundle.initial_towers(config.model)
    clip = two_tower.from_towers(built, config.model.logit_scale, 1).train()
    assert planned.parameters == sum(p.numel() for p in clip.parameters())
    assert (planned.steps_per_epoch, planned.notes) == (2, [])
    inputs = {"image": torch.zeros(16, 3, 32, 32, dtype=torch.uint8), "text": torch.zeros(16, 12, dtype=torch.int64)}
    with FlopCounterMode(display=False) as counter:
        getattr(clip, f"encode_{side}")(inputs[side]).sum().backward()
    of_loss = config.sweeps * 8.0 * 8**2 * 16
    counted = footprint.model_flops(config.model, 8, config.sweeps, config.rows_per_pair) - of_loss
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)
    pair_bytes = {"text": 2 * 12 * 8, "image": 2 * 3 * 32 * 32}
    assert bytes_per_sample(registry.read_model_cfg(str(tiny_model)), config.rows_per_pair) == pair_bytes[side] + 32
    best, host = planned.stages[planned.best or 0], planned.host
    assert host is not None
    assert host.images_s == pytest.approx(0 if side == "text" else 2 * 12 / best.step_seconds)
    assert host.workers_per_gpu >= 1
    assert any("images/s" in line for line in plan.plan_lines(planned)) == (side == "image")


def test_the_command_prints_a_plan_and_refuses_what_cannot_be(write_config: WriteConfig) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["plan", str(write_config()), "--gpus", "2", "--memory", "16", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["best"] == 0
    assert result["steps_per_epoch"] == 4
    assert len(result["stages"]) == 4
    refused = runner.invoke(app, ["plan", str(write_config()), "--gpus", "5"])
    assert isinstance(refused.exception, InputError)
    assert "12 cannot be divided over 5 processes; use a multiple of 5, e.g. 10" in str(refused.exception)
    refused = runner.invoke(app, ["plan", str(write_config()), "--gpus", "2", "train.micro_batch=4"])
    assert "share of the batch, 6, cannot be divided into micro-batches of 4; use 3" in str(refused.exception)
