"""Checks on one GPU what a CPU cannot show, in at most ten minutes; prints a table and writes it as JSON:

    python tests/gpu/accept.py [--out accept.json] [--only kernels loss …]

kernels: errors of the compiled Triton kernels, compared with float64 and with the PyTorch operations that they replace.
loss: time and peak memory of the nested loss at K = 4, compared with open_clip's loss at the full dim and with memeff's
    nested loss, if that is installed. memeff needs `pip install memeff`.
step: pairs per second of the engine with ViT-B-32 in bfloat16, compared with plain PyTorch, at each ZeRO stage, and
    with torch.compile. The batch stays on the GPU.
waits: how often the host waits for the GPU in a step of `mmrl train`.
resume: `mmrl train configs/quickstart.yaml`, killed and resumed, compared with a run that was not.
trainers: samples per second of `mmrl train` and of open_clip's trainer on equal shards and towers, if the packages that
    tests/benchmarks/train_throughput.py names are installed.

Rows with a target pass or fail; others are for the record. test_accept.py runs the same code with tiny sizes on a CPU.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from rich.console import Console

from mmrl.config import load_config
from mmrl.distributed import comm
from mmrl.engine import grad_cache, optim
from mmrl.engine.engine import Engine, EngineConfig
from mmrl.engine.optim import OptimConfig
from mmrl.losses.inputs import NestedLoss
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce
from mmrl.model import registry, towers, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig, MatryoshkaCLIP
from mmrl.train.preflight import prepare
from mmrl.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Sizes:
    """What is measured; `model` is a name or a file."""

    model: str = "ViT-B-32"
    step_pairs: int = 1024
    loss_pairs: int = 32_768
    width: int = 512
    kernel_pairs: int = 2_048
    repeats: int = 10
    stages: tuple[int, ...] = (0, 1, 2, 3)
    steps: int = 120


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    section: str
    name: str
    value: float
    unit: str
    target: str = ""
    passed: bool | None = None
    """None without a target."""


Section = Callable[[Sizes], Iterator[Row]]


def kernels(sizes: Sizes) -> Iterator[Row]:
    """Largest error of loss and gradients, as a share of the largest true value."""
    device = comm.world().device
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return
    B, dims = sizes.kernel_pairs, [sizes.width >> n for n in range(4)]
    groups = torch.arange(B, device=device) // 3
    cases = {
        "plain": InfoNCEOptions(),
        "smoothing": InfoNCEOptions(label_smoothing=0.1),
        "positives": InfoNCEOptions(same_group="positive"),
        "distillation": InfoNCEOptions(distillation=1.0),
    }
    for name, options in cases.items():
        for dtype, scale in ((torch.float32, 20.0), (torch.bfloat16, 20.0), (torch.bfloat16, 100.0)):
            pair = _embeddings(B, sizes.width, dtype)
            truth = _value_and_grads([x.double() for x in pair], scale, dims, groups, options)
            errors = {}
            for kind in ("triton", "torch"):
                found = _value_and_grads(pair, scale, dims, groups, options.model_copy(update={"kernels": kind}))
                errors[kind] = max(
                    ((one.double() - true).abs().max() / true.abs().max()).item()
                    for one, true in zip(found, truth, strict=True)
                )
            bound = 2 * errors["torch"] + 1e-6
            label = f"{name}, {str(dtype)[6:]}, scale {scale:.0f}"
            yield Row("kernels", label, errors["triton"], "", f"<= {bound:.1e}", errors["triton"] <= bound)


def _value_and_grads(
    pair: Sequence[torch.Tensor], scale: float, dims: list[int], groups: torch.Tensor, options: InfoNCEOptions
) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in pair]
    total = nested_info_nce(leaves[0], leaves[1], scale, dims, None, groups, options).total
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def loss(sizes: Sizes) -> Iterator[Row]:
    """Milliseconds and peak GiB beyond the embeddings, forward and backward, bfloat16 embeddings."""
    device = comm.world().device
    dims = [sizes.width >> n for n in range(4)]
    scale = torch.tensor(30.0, device=device, requires_grad=True)
    rows: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
        "open_clip, full dim": lambda x, y: ClipLoss()(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale),
        "mmrl, 4 dims": lambda x, y: nested_info_nce(x, y, scale, dims).total,
        "mmrl, 4 dims, PyTorch operations": lambda x, y: (
            nested_info_nce(x, y, scale, dims, options=InfoNCEOptions(kernels="torch")).total
        ),
    }
    if device.type == "cuda" and importlib.util.find_spec("memeff"):
        from memeff import MemoryEfficientMatryoshkaCLIPLoss  # pyright: ignore[reportMissingImports]

        rows["memeff, 4 dims"] = MemoryEfficientMatryoshkaCLIPLoss(sorted(dims), temperature=1 / 30)
    pair = [x.requires_grad_() for x in _embeddings(sizes.loss_pairs, sizes.width, torch.bfloat16)]
    baseline = 0.0
    for name, function in rows.items():
        with torch.autocast(device.type, torch.bfloat16):
            seconds, peak = _measure(
                lambda function=function: torch.autograd.grad(function(*pair), pair), sizes.repeats
            )
        baseline = baseline or seconds
        yield Row("loss", name, 1e3 * seconds, "ms")
        yield Row("loss", f"{name}: compared with open_clip", seconds / baseline, "x")
        if device.type == "cuda":
            yield Row("loss", f"{name}: peak", peak / 2**30, "GiB")


def step(sizes: Sizes) -> Iterator[Row]:
    """Pairs per second of a whole step."""
    plain_rate = sizes.step_pairs / _measure(_plain_step(sizes), sizes.repeats)[0]
    yield Row("step", "plain PyTorch", plain_rate, "pairs/s")
    rates: dict[str, float] = {}
    cases = {f"ZeRO stage {stage}": EngineConfig(precision="bf16", zero_stage=stage) for stage in sizes.stages}
    if sizes.repeats > 1:  # compiling takes a minute
        cases["torch.compile"] = EngineConfig(precision="bf16", compile=True)
    for name, config in cases.items():
        seconds, peak = _measure(_engine_step(sizes, config), sizes.repeats)
        rates[name] = sizes.step_pairs / seconds
        yield Row("step", name, rates[name], "pairs/s")
        if comm.world().device.type == "cuda":
            yield Row("step", f"{name}: peak", peak / 2**30, "GiB")
    of_plain = rates["ZeRO stage 0"] / plain_rate
    yield Row("step", "ZeRO stage 0 compared with plain PyTorch", of_plain, "x", ">= 0.97", of_plain >= 0.97)
    for stage in sizes.stages[1:]:
        of_0 = rates[f"ZeRO stage {stage}"] / rates["ZeRO stage 0"]
        yield Row("step", f"ZeRO stage {stage} compared with stage 0", of_0, "x", ">= 0.95", of_0 >= 0.95)


def _model(sizes: Sizes) -> tuple[MatryoshkaCLIP, torch.optim.Optimizer, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    built = towers.build(TowersConfig(name=sizes.model))
    device = comm.world().device
    model = two_tower.from_towers(built, LogitScaleConfig(), 1).train().to(device)
    side, text = registry.input_side(built.model_cfg), built.model_cfg["text_cfg"]
    pixels = torch.randint(256, (sizes.step_pairs, 3, side, side), dtype=torch.uint8, device=device)
    tokens = torch.randint(1, 400, (sizes.step_pairs, text["context_length"]), device=device)
    return model, optim.build(model, built.model_cfg, OptimConfig(lr=1e-4)), (pixels, tokens)


def _loss_of(
    image_bD: torch.Tensor | None, text_bD: torch.Tensor | None, scale: torch.Tensor, _bias: object
) -> NestedLoss:
    assert image_bD is not None
    return nested_info_nce(image_bD, text_bD, scale, [image_bD.shape[1] >> n for n in range(4)])


def _plain_step(sizes: Sizes) -> Callable[[], object]:
    model, optimizer, batch = _model(sizes)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            outputs: Any = model(*batch)
        _loss_of(*outputs).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def _engine_step(sizes: Sizes, config: EngineConfig) -> Callable[[], object]:
    model, optimizer, batch = _model(sizes)
    engine = Engine(model, optimizer, config, 1.0, sizes.step_pairs)

    def run() -> None:
        grad_cache.backward(engine, [batch], _loss_of, lambda _: None)
        engine.step()

    return run


def waits(sizes: Sizes) -> Iterator[Row]:
    """Operations of one step of `mmrl train` for which the host waits."""
    if comm.world().device.type != "cuda":
        return  # tests/train/test_feed.py counts them on a CPU
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(QUICKSTART, [f"run={folder}/run", "evaluation={}", "data.cache=false", "data.workers=2"])
        trainer = Trainer(config, prepare(config, comm.world()), comm.world(), Console(quiet=True))
        for _ in range(5):
            trainer.step(trainer._feed.take())
        batches = trainer._feed.take()
        sys.path.insert(0, str(ROOT / "tests"))
        from helpers.host_syncs import host_syncs

        with host_syncs(trainer.engine.device) as found:
            trainer.step(batches)
    print("\n".join(found))
    yield Row("waits", "per step", len(found), "", "<= 2", len(found) <= 2)


def resume(sizes: Sizes) -> Iterator[Row]:
    """The loss of the last step, of a run that is killed and resumed and of one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        every, last = sizes.steps // 3, []
        for name, kill_at in (("whole", None), ("killed", sizes.steps // 2)):
            run = Path(folder) / name
            command = [sys.executable, "-m", "mmrl.cli", "train", str(QUICKSTART), f"run={run}", "resume=auto"]
            command += ["evaluation={}", f"train.duration={sizes.steps}", f"checkpoint.every={every}", "optim.warmup=5"]
            command += ["tracking.log_every=1", f"train.batch_size={min(128, sizes.step_pairs)}"]
            if kill_at is not None:
                with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
                    while process.poll() is None and len(_metrics(run)) < kill_at:
                        time.sleep(0.05)
                    os.killpg(process.pid, signal.SIGKILL)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            last.append(_metrics(run)[-1])
        assert [one["step"] for one in last] == [sizes.steps] * 2
        difference = abs(last[0]["loss"] / last[1]["loss"] - 1)
        # Sums by atomic adds differ in their last bits between two runs, and training amplifies that.
        yield Row("resume", "relative difference of the last loss", difference, "", "<= 0.05", difference <= 0.05)


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trainers(sizes: Sizes) -> Iterator[Row]:
    """Samples per second of whole trainings, from tests/benchmarks/train_throughput.py."""
    if sizes.repeats == 1 or importlib.util.find_spec("pandas") is None:
        return
    script = ROOT / "tests" / "benchmarks" / "train_throughput.py"
    command = [
        sys.executable,
        str(script),
        "--repeats",
        "1",
        "--workers",
        "4",
        "--rows",
        "open_clip",
        "mmrl, same crop",
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name, rate in re.findall(r"^(open_clip|mmrl, same crop) +([\d.]+) ", printed, re.MULTILINE):
        yield Row("trainers", name, float(rate), "samples/s")


SECTIONS: dict[str, Section] = {
    "kernels": kernels,
    "loss": loss,
    "step": step,
    "waits": waits,
    "resume": resume,
    "trainers": trainers,
}


def _embeddings(rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two correlated embeddings."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(rows, width, generator=generator)
    pair = [shared + 2 * torch.randn(rows, width, generator=generator) for _ in range(2)]
    return [x.to(comm.world().device, dtype) for x in pair]


def _measure(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds, and the peak of the GPU's memory beyond what was allocated before."""
    on_gpu = comm.world().device.type == "cuda"
    synchronise: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(1 + repeats // 5):
        run()
    synchronise()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        synchronise()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() - before if on_gpu else 0.0


def accept(sizes: Sizes, sections: Sequence[str]) -> dict[str, Any]:
    """Runs the sections and prints their rows; returns the content of the JSON file."""
    warnings.simplefilter("ignore")
    began, device = time.monotonic(), comm.start().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    rows: list[Row] = []
    for section in sections:
        for row in SECTIONS[section](sizes):
            verdict = "" if row.passed is None else f"{row.target:12} {'pass' if row.passed else 'FAIL'}"
            print(f"{row.section:9} {row.name:48} {row.value:12.4g} {row.unit:9} {verdict}", flush=True)
            rows.append(row)
    seconds = time.monotonic() - began
    return {"device": name, "torch": torch.__version__, "seconds": seconds, "rows": [asdict(row) for row in rows]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("accept.json"))
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "accept.py: no GPU is usable; the test suite runs its code on a CPU (tests/gpu/test_accept.py)."
        )
    result = accept(Sizes(), arguments.only)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    failed = [row["name"] for row in result["rows"] if row["passed"] is False]
    print(f"{result['seconds']:.0f} s; " + (f"FAILED: {', '.join(failed)}" if failed else "all targets are met"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
