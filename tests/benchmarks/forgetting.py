"""What fine-tuning gains on a new set and what it forgets of the old one: all weights, last blocks, LoRA, a teacher.

    python tests/benchmarks/forgetting.py --world runs/world [--seeds 0] [--steps 150] [--jobs 2]
        [--cache runs/forgetting] [--out tests/benchmarks/forgetting.md]

A model is trained on the starter set by configs/quickstart.yaml, to its end, and fine-tuned on the world set by each
recipe, at two learning rates: a fifth of the quickstart's, and the quickstart's.

    all weights
    last block        model.train_last_blocks=1: a transformer block of the text tower, a stage of the image tower
    LoRA              model.lora={rank: 8, towers: text}, model.lock_image: the image tower, a NFNet, takes no adapters
    its own teacher   all weights, with the model before fine-tuning as `teacher`

It writes a Markdown page: R@1 at 256-d and 32-d on the world's held-out concepts (the new set) and on the starter's
held-out artist (the old set), the mean of both directions and of the seeds. No recipe is chosen by these sets.
Resumable: run the same command again.
"""

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from claims_embed import load_tests, train_and_embed
from claims_runs import RECIPE, DataSet, Run, full_plan
from claims_scores import quick_recall
from finetune import LEARNING_RATES

from mmrl.config import load_config

DIMS = (256, 32)
SHARES = (0.2, 1.0)
BEFORE = "before"


def recipes(source: Path) -> dict[str, list[str]]:
    """Recipe → its overrides."""
    return {
        "all weights": [],
        "last block": ["model.train_last_blocks=1"],
        "LoRA": ["model.lora={rank: 8, towers: text}", "model.lock_image=true"],
        "its own teacher": [f"teacher={{model: {source}}}", "loss.distillation=0"],
    }


def source_run(starter: DataSet, world: DataSet, cache: Path, seed: int) -> Run:
    """The model before fine-tuning, and the test sets of both."""
    config = load_config(RECIPE, [f"run={cache / f'source-seed{seed}'}", f"seed={seed}", "resume=auto"])
    tests = {"new": world.tests["test-concepts"], "old": starter.tests["test-artist"]}
    return Run(replace(starter, tests=tests), BEFORE, seed, list(DIMS), config)


def tuned_runs(source: Run, new: DataSet, steps: int) -> list[Run]:
    """One run per recipe and learning rate, each from the source's last checkpoint."""
    optim, found = load_config(RECIPE).optim, []
    for share in SHARES:
        rates = {rate: getattr(optim, rate) for rate in LEARNING_RATES}
        for name, overrides in recipes(source.last).items():
            arm = f"{name}, {share:g} x the learning rate"
            folder = f"{name}-{share:g}-seed{source.seed}".replace(" ", "-")
            config = load_config(
                RECIPE,
                [
                    f"run={source.folder.parent / folder}",
                    f"seed={source.seed}",
                    "resume=auto",
                    f"model.name={source.last}",
                    f"data.train={new.train}",
                    *new.overrides,
                    f"train.duration={steps} steps",
                    f"optim.warmup={steps // 16} steps",
                    f"checkpoint.every={steps} steps",
                    "evaluation={every: 1000000 steps}",
                    *(f"optim.{rate}={share * value}" for rate, value in rates.items() if value is not None),
                    *overrides,
                ],
            )
            found.append(replace(source, arm=arm, config=config))
    return found


def table(runs: Sequence[Run]) -> list[str]:
    """Markdown: one line per recipe."""
    lines = [
        f"| recipe | {' | '.join(f'{test} set, {dim}-d' for test in ('new', 'old') for dim in DIMS)} |",
        f"|---|{'---:|' * 2 * len(DIMS)}",
    ]
    for arm in dict.fromkeys(run.arm for run in runs):
        seeds = [run for run in runs if run.arm == arm]
        cells = [100 * quick_recall(load_tests(seeds, test), dim, 1) for test in ("new", "old") for dim in DIMS]
        lines.append(f"| {arm} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "forgetting.md")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    starter, world = full_plan(given.world, given.cache, seeds, ["starter", "world"]).data_sets
    sources = [source_run(starter, world, given.cache, seed) for seed in seeds]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for one in as_completed([pool.submit(train_and_embed, run) for run in sources if not run.is_done]):
            print(one.result(), flush=True)
        tuned = [run for source in sources for run in tuned_runs(source, world, given.steps)]
        for one in as_completed([pool.submit(train_and_embed, run) for run in tuned if not run.is_done]):
            print(one.result(), flush=True)
    head = (
        f"# Fine-tuning and forgetting\n\nR@1 in %, the mean of both directions and of {len(seeds)} seed(s), after "
        f"{given.steps} steps on the new set, world; the old set is starter. Written by\n"
        "tests/benchmarks/forgetting.py, whose head describes the recipes.\n"
    )
    lines = table([*sources, *tuned])
    given.out.write_text("\n".join([head, *lines]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
