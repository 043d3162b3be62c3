"""Cost of training all dims in every step: a step with a learnable rotation compared with other steps.

    python tests/benchmarks/nested_step.py [--model quickstart] [--rounds 15]
    python tests/benchmarks/nested_step.py --model ViT-B-32 --batch 1024 [--rounds 5]

The rows, whose steps alternate in every round; ratios are taken within a round, and their median is shown:

    full dim       the loss at the full dim only
    plain mean     all dims, nesting.rotation: false
    rotation       all dims, with a learnable rotation: the default

For the quickstart's towers a step is `Trainer.step` on the same batch. For others, whose step takes minutes on a CPU,
the towers are timed on a part of the batch (their time is linear in the pairs), the loss and its backward pass and the
rotation's update on the whole batch, and the sums are compared.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from mmrl.config import load_config
from mmrl.distributed import comm
from mmrl.engine.optim import OptimConfig
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce
from mmrl.losses.rotated import rotated_nested_info_nce
from mmrl.model import towers, two_tower
from mmrl.model.two_tower import LogitScaleConfig
from mmrl.nesting import Nesting
from mmrl.train.prefixes import Prefixes
from mmrl.train.preflight import prepare
from mmrl.train.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TOWER_PAIRS = 32
Step = Callable[[], object]


def quickstart_steps(folder: Path) -> dict[str, Step]:
    """A step of the quickstart's recipe, and the same without its smaller dims or without its rotation."""
    rows = {"full dim": "nesting.dims=[256]", "plain mean": "nesting.rotation=false", "rotation": "seed=0"}
    steps: dict[str, Step] = {}
    for name, override in rows.items():
        config = load_config(RECIPE, [f"run={folder}/{name}", "evaluation={}", override])
        trainer = Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))
        batch = next(trainer.stream.forever())
        steps[name] = lambda trainer=trainer, batch=batch: trainer.step([batch])
    return steps


def loss_steps(width: int, batch: int) -> dict[str, Step]:
    """The loss, its backward pass and the rotation's update, on random embeddings."""
    dims = [width >> halvings for halvings in range(4)]
    image_BD, text_BD = (x.requires_grad_() for x in torch.randn(2, batch, width).unbind())
    prefixes = Prefixes(
        Nesting.from_dims(dims, None, width), torch.zeros(1), OptimConfig(lr=1e-3), None, torch.device("cpu")
    )
    options = InfoNCEOptions(distillation=1.0)
    scale_K = torch.full((len(dims),), 20.0)

    def with_rotation() -> None:
        arguments = (scale_K, dims, prefixes.rotation, 0.3, None, None, options)
        rotated_nested_info_nce(image_BD, text_BD, *arguments).total.backward()
        prefixes._module.log_scale_k.grad = torch.zeros(len(dims) - 1)
        prefixes.reduce()
        prefixes.step(1.0, skip=False)

    return {
        "full dim": lambda: nested_info_nce(image_BD, text_BD, 20.0, [width]).total.backward(),
        "plain mean": lambda: nested_info_nce(image_BD, text_BD, 20.0, dims).total.backward(),
        "rotation": with_rotation,
    }


def tower_step(name: str) -> tuple[Step, int]:
    """Forward and backward of both towers on TOWER_PAIRS pairs; the embedding's width."""
    built = towers.build(towers.TowersConfig(name=name))
    model = two_tower.from_towers(built, LogitScaleConfig(), 1)
    side = built.image_spec.height
    pixels = torch.zeros(TOWER_PAIRS, 3, side, side, dtype=torch.uint8)
    tokens = built.tokenise(["a photo of a cat"] * TOWER_PAIRS)

    def step() -> None:
        image_BD, text_BD, _, _ = model(pixels, tokens)
        (image_BD.sum() + text_BD.sum()).backward()

    return step, built.embed_dim


def seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each row in each round; the order is reversed in every other round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up
    for index in range(rounds):
        for name in list(steps)[:: 1 if index % 2 else -1]:
            times[name].append(seconds(steps[name]))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart", help="quickstart, or an open_clip model")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if given.model == "quickstart":
        with tempfile.TemporaryDirectory() as folder:
            times = measure(quickstart_steps(Path(folder)), given.rounds)
    else:
        step, width = tower_step(given.model)
        step()
        of_towers = statistics.median(seconds(step) for _ in range(3)) * given.batch / TOWER_PAIRS
        times = measure(loss_steps(width, given.batch), given.rounds)
        for name, values in times.items():
            print(f"loss, {name}: {1000 * statistics.median(values):.0f} ms")
        print(f"towers, {given.batch} pairs: {of_towers:.1f} s")
        times = {name: [of_towers + value for value in values] for name, values in times.items()}
    for name, values in times.items():
        ratio = statistics.median(one / other for one, other in zip(values, times["full dim"], strict=True))
        mean = statistics.median(one / other for one, other in zip(values, times["plain mean"], strict=True))
        print(f"{name:12} {statistics.median(values):8.3f} s  {ratio:.3f} x full dim  {mean:.3f} x plain mean")


if __name__ == "__main__":
    main()
