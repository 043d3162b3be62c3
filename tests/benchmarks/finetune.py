"""Fine-tunes plain models with and without nesting, and prints the recall of each recipe by dim.

    python tests/benchmarks/finetune.py --cache runs/claims [--sets starter world] [--world DIR] [--seeds 0]
        [--steps 150]

Run it after claims.py has trained the plain runs in the cache. Each of them is exported in the layout of open_clip
and trained for --steps more steps with its weights as `model.pretrained`. The learning rates are a fifth of the
quickstart's, except for that of the learnable rotation, which starts from the identity. The rows:

    plain, truncated                                    no more steps
    mmrl rotate                                         no more steps
    150 plain steps                                     the full dim only
    150 nested steps                                    nesting.rotation, as the quickstart
    rotated, then 150 nested steps, equal weights, no rotation
                                                        nesting.rotate_at_start, then the published method
    rotated, then 150 nested steps                      nesting.rotate_at_start, then as the quickstart

It prints a Markdown table: R@1 on the held-out artist in %, the mean of both directions and of the seeds.
"""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import claims_embed
import claims_scores
import torch
from claims_runs import DATA_SETS, PLAIN, RECIPE, Plan, Run, full_plan, plan_runs
from rich.console import Console

from mmrl.config import dump_config, load_config
from mmrl.export import bundles
from mmrl.train.trainer import train

SHARE_OF_LR = 0.2
LEARNING_RATES = ("lr", "lr_token_embedding", "lr_logit_scale")


def recipes(plan: Plan, steps: int) -> dict[str, list[str]]:
    """Row → its overrides of the plain run's config."""
    full, dims = f"dims: [{plan.dims[0]}]", f"dims: {plan.dims}"
    distillation = f"loss.distillation={load_config(RECIPE).loss.distillation}"
    rotated = f"rotated, then {steps} nested steps"
    return {
        f"{steps} plain steps": [f"nesting={{{full}, rotation: false}}"],
        f"{steps} nested steps": [f"nesting={{{dims}}}", distillation],
        f"{rotated}, equal weights, no rotation": [f"nesting={{{dims}, rotation: false, rotate_at_start: true}}"],
        rotated: [f"nesting={{{dims}, rotate_at_start: true}}", distillation],
    }


def fine_tuned(plain: Run, name: str, overrides: Sequence[str], steps: int) -> Run:
    """The run that starts from a plain run's weights. The weights are exported here if they are not yet."""
    optim = load_config(RECIPE).optim
    rates = {rate: getattr(optim, rate) for rate in LEARNING_RATES}
    overrides = [
        *overrides,
        f"train.duration={steps} steps",
        f"optim.warmup={max(1, steps // 16)} steps",
        f"checkpoint.every={steps} steps",
        *(f"optim.{rate}={SHARE_OF_LR * value}" for rate, value in rates.items() if value is not None),
    ]
    source = plain.folder / "open_clip"
    if not source.exists():
        bundles.export(str(plain.last), source, [plain.dims[0]], "open_clip")
    base = plain.folder / "fine_tuned.yaml"
    base.write_text(dump_config(plain.config))
    digest = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:10]
    folder = plain.folder.with_name(f"{plain.folder.name}-and-{steps}-{digest}")
    files = [f"run={folder}", f"model.pretrained={source / 'open_clip_model.safetensors'}"]
    return replace(plain, arm=name, config=load_config(base, [*overrides, *files]))


def r1(runs: Sequence[Run], dim: int, prefix: str = claims_embed.LAST) -> float:
    """R@1 in % on the first test set; the mean of both directions and of the runs."""
    test = next(iter(runs[0].data_set.tests))
    return 100 * claims_scores.quick_recall(claims_embed.load_tests(runs, test, prefix), dim, 1)


def table(plan: Plan, data_set: str, steps: int) -> str:
    """Train the runs that are missing; returns a Markdown table."""
    plain = [run for run in plan_runs(plan) if run.data_set.name == data_set and run.arm == PLAIN]
    rows = [("plain, truncated", plain, claims_embed.LAST), ("mmrl rotate", plain, claims_embed.ROTATED)]
    for name, overrides in recipes(plan, steps).items():
        tuned = [fine_tuned(run, name, overrides, steps) for run in plain]
        for run in tuned:
            train(run.config, Console(quiet=True))
            claims_embed.embed_tests(run, run.last, claims_embed.LAST)
        rows.append((name, tuned, claims_embed.LAST))
    lines = [f"| {data_set} | {' | '.join(map(str, plan.dims))} |", f"|---|{'---:|' * len(plan.dims)}"]
    for name, runs, prefix in rows:
        lines.append(f"| {name} | {' | '.join(f'{r1(runs, dim, prefix):.1f}' for dim in plan.dims)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/claims"), help="the cache of claims.py")
    parser.add_argument("--world", type=Path, default=Path("runs/world"), help="the output of world.py")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=("starter",))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    plan = full_plan(given.world, given.cache, seeds, given.sets)
    for data_set in given.sets:
        print(table(plan, data_set, given.steps), flush=True)


if __name__ == "__main__":
    main()
