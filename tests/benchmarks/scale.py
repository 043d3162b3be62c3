"""The cost of micro-batches and of DeepSpeed, and the number of collectives per step:

    python tests/benchmarks/scale.py [--batch 64] [--micro-batch 16] [--repeats 7] [--threads 1]

Three measurements. Each alternates with its baseline in the same process; ratios are medians within a round.

1. GradCache (train.micro_batch): the step in micro-batches compared with the same step without. The bound for the
   second forward pass is 1 + f / (f + b), with f and b the forward and backward time without micro-batches. Also the
   towers alone, forward and backward, in micro-batches compared with one batch: a tower that is slower on small batches
   cannot meet the bound, whatever the trainer does. And the peak of PyTorch's allocator beyond weights and optimizer
   state: it should be that of one micro-batch plus the gradients, which are kept from the first micro-batch on.
2. DeepSpeed on one process compared with a step of plain PyTorch: the same towers, loss, clipping and AdamW.
3. The collectives of a step on two processes, for each ZeRO stage, with and without micro-batches, for one dim and for
   six: their number must not depend on the dims.

Towers: mmrl-starter (configs/quickstart.yaml), and for the first measurement also a ViT, whose matrix products are as
efficient on few images as on many. float32, random pixels and tokens; no data loading.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing

from mmrl.config import Config, load_config
from mmrl.distributed import comm
from mmrl.engine import grad_cache, optim
from mmrl.engine.engine import Engine, EngineConfig
from mmrl.engine.grad_cache import MicroBatch
from mmrl.losses.config import LossConfig, nested_loss
from mmrl.losses.inputs import NestedLoss
from mmrl.model import registry, towers, two_tower
from mmrl.model.two_tower import MatryoshkaCLIP
from mmrl.nesting import Nesting

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
RECIPE = load_config(QUICKSTART)
VIT = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 96, "layers": 6, "width": 384, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 4096, "width": 256, "heads": 4, "layers": 4},
}
ALL_DIMS = list(RECIPE.nesting.dims)
CLIP_NORM = 1.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.batch % arguments.micro_batch:
        parser.error(f"--micro-batch: {arguments.batch} is not a multiple of {arguments.micro_batch}")
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(f"batch {arguments.batch}, micro-batch {arguments.micro_batch}, load average {os.getloadavg()[0]:.2f}")
    comm.start()
    print("\n1. GradCache")
    _accumulation(arguments, RECIPE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit-benchmark.json"
        path.write_text(json.dumps(VIT))
        _accumulation(arguments, load_config(QUICKSTART, [f"model.name={path}"]))
    _deepspeed(arguments)
    comm.stop()
    _collectives()


def _accumulation(arguments: argparse.Namespace, recipe: Config) -> None:
    model, engine = _engine(arguments.batch, recipe=recipe)
    whole, micro_batches = (_batch(arguments.batch, size, recipe) for size in (None, arguments.micro_batch))

    def forward_and_backward(batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Seconds of the towers alone, without loss and optimizer."""
        forward = backward = 0.0
        for batch in batches:
            began = time.perf_counter()
            image_BD, text_BD, scale, _ = model(*batch)
            middle = time.perf_counter()
            (image_BD.sum() + text_BD.sum() + scale.sum()).backward()
            forward, backward = forward + middle - began, backward + time.perf_counter() - middle
        model.zero_grad()
        return forward, backward

    steps = {"one batch": partial(_step, engine, whole), "in micro-batches": partial(_step, engine, micro_batches)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    bounds, slowdowns = [], []
    for repeat in range(arguments.repeats + 1):
        forward, backward = forward_and_backward(whole)
        slowdown = sum(forward_and_backward(micro_batches)) / (forward + backward)
        taken = {name: _seconds(steps[name]) for name in (list(steps) if repeat % 2 else reversed(steps))}
        if repeat:  # the first one warms up
            bounds.append(1 + forward / (forward + backward))
            slowdowns.append(slowdown)
            for name, value in taken.items():
                seconds[name].append(value)
    ratios = [some / one for some, one in zip(seconds["in micro-batches"], seconds["one batch"], strict=True)]
    over = [ratio / bound for ratio, bound in zip(ratios, bounds, strict=True)]
    print(f"   {recipe.model.name.rpartition('/')[2]}")
    for name, values in seconds.items():
        print(f"   {name:18} {1e3 * statistics.median(values):8.0f} ms")
    print(f"   ratio {statistics.median(ratios):.3f}, bound 1 + f/(f+b) = {statistics.median(bounds):.3f}")
    print(f"   ratio to the bound {_spread(over)} (target: at most 1.05)")
    print(f"   the towers alone, in micro-batches / one batch: {_spread(slowdowns)}")
    one = _batch(arguments.micro_batch, recipe=recipe)
    peaks = {
        name: _peak_bytes(step) for name, step in (*steps.items(), ("one micro-batch", partial(_step, engine, one)))
    }
    for name, peak in peaks.items():
        print(f"   peak of {name:18} {peak / 2**20:8.1f} MiB")
    beyond = peaks["in micro-batches"] - peaks["one micro-batch"]
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    print(f"   beyond that of one micro-batch {beyond / 2**20:.1f} MiB; the gradients are {gradients / 2**20:.1f} MiB")


def _deepspeed(arguments: argparse.Namespace) -> None:
    model, engine = _engine(arguments.batch)
    plain = copy.deepcopy(model)
    optimizer = optim.build(plain, registry.read_model_cfg(RECIPE.model.name), RECIPE.optim)
    batch = _batch(arguments.batch)

    def plain_step() -> None:
        optimizer.zero_grad()
        _loss(ALL_DIMS, *plain(*batch[0])).total.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP_NORM)
        optimizer.step()

    ours, theirs = [], []
    for repeat in range(arguments.repeats + 1):
        pair = [(ours, partial(_step, engine, batch)), (theirs, plain_step)]
        for values, step in pair if repeat % 2 else reversed(pair):
            values.append(_seconds(step))
    ratios = [one / other for one, other in zip(ours[1:], theirs[1:], strict=True)]
    print("\n2. DeepSpeed on one process")
    for name, values in (("engine", ours), ("plain PyTorch", theirs)):
        print(f"   {name:18} {1e3 * statistics.median(values[1:]):8.0f} ms")
    print(f"   ratio {_spread(ratios)} (target: at most 1.05)")


def _collectives() -> None:
    print("\n3. Collectives per step, two processes, 1 dim / 6 dims")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
            _count, (folder,), nprocs=2, start_method="spawn"
        )
        print((Path(folder) / "counts").read_text(), end="")


def _count(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    lines = []
    for stage in range(4):
        for micro_batch in (8, 2):
            counts = []
            for dims in (ALL_DIMS[:1], ALL_DIMS):
                _, engine = _engine(micro_batch, stage)
                micro_batches = _batch(8, micro_batch)
                _step(engine, micro_batches, dims)
                with torch.profiler.profile() as profile:
                    _step(engine, micro_batches, dims)
                counts.append(sum(event.name.startswith("gloo:") for event in profile.events() or []))
            same = "the same" if counts[0] == counts[1] else "NOT the same"
            lines.append(
                f"   stage {stage}, {8 // micro_batch} micro-batch(es): {counts[0]:4} / {counts[1]:4}  {same}\n"
            )
    if rank == 0:
        (Path(folder) / "counts").write_text("".join(lines))
    dist.destroy_process_group()


def _engine(micro_batch: int, stage: int = 0, recipe: Config = RECIPE) -> tuple[MatryoshkaCLIP, Engine]:
    torch.manual_seed(0)
    built = towers.build(recipe.model)
    model = two_tower.from_towers(built, recipe.model.logit_scale, 1).train()
    optimizer = optim.build(model, built.model_cfg, recipe.optim)
    return model, Engine(model, optimizer, EngineConfig(zero_stage=stage), CLIP_NORM, micro_batch)


def _batch(size: int, micro_batch: int | None = None, recipe: Config = RECIPE) -> list[MicroBatch]:
    model_cfg = registry.read_model_cfg(recipe.model.name)
    side, text_cfg = registry.input_side(model_cfg), model_cfg["text_cfg"]
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (size, 3, side, side), generator=draw, dtype=torch.uint8)
    tokens = torch.randint(1, 400, (size, text_cfg["context_length"]), generator=draw)
    tokens[:, -1] = text_cfg["vocab_size"] - 1  # end of text: CLIP's text tower pools at the largest id
    rows = micro_batch or size
    return list(zip(pixels.split(rows), tokens.split(rows), strict=True))


def _loss(
    dims: Sequence[int],
    image_bD: torch.Tensor | None,
    text_bD: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> NestedLoss:
    assert image_bD is not None
    groups = torch.arange(len(image_bD)) + comm.world().rank * len(image_bD)
    nested = Nesting.from_dims(dims, None, image_bD.shape[1])
    return nested_loss(LossConfig(), image_bD, text_bD, scale, bias, nested, groups)


def _step(engine: Engine, micro_batches: Sequence[MicroBatch], dims: Sequence[int] = ALL_DIMS) -> None:
    grad_cache.backward(engine, micro_batches, partial(_loss, dims), _seed)
    engine.step()


def _seed(micro_batch: int) -> None:
    torch.manual_seed(micro_batch)


def _seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _peak_bytes(step: Callable[[], object]) -> float:
    """Peak bytes of PyTorch's allocator during a step, beyond those before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return peak


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))})"


if __name__ == "__main__":
    main()
