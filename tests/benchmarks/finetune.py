"""A plain model made nested afterwards: what some steps more buy. Run by hand, after claims.py trained the plain ones:

    python tests/benchmarks/finetune.py --cache runs/claims [--worlds starter world] [--world DIR] [--seeds 0]
        [--steps 40 150]

Each plain run of claims.py is a start: exported in the layout of open_clip, trained on by `mmrl train`, its weights
being `model.pretrained`, at a fifth of the quickstart's learning rates, for some steps in which it is

    plain     trained at the full dim alone
    turned    the same, and turned after the last step (nesting.start=1)
    nested    turned before the first step, then trained at all dims (nesting.start=0), the full one weighing most

The rows of no more steps are `mmrl rotate --steps 0`, by principal directions, and `mmrl rotate`.

It prints a Markdown table: R@1 on the held-out artist in %, the mean of both directions and of the seeds.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import claims
import claims_scores
import numpy as np
import torch
from claims import Plan, Run
from claims_scores import Embeddings
from rich.console import Console

from mmrl.config import dump_config, load_config
from mmrl.export import bundles
from mmrl.train.trainer import train

SHARE_OF_LR = 0.2


def tuned(plain: Run, plan: Plan, kind: str, steps: int) -> Run:
    """The run that goes on from a plain one for so many steps."""
    recipe = load_config(claims.RECIPE)
    lrs = {name: getattr(recipe.optim, name) for name in ("lr", "lr_token_embedding", "lr_logit_scale")}
    source = plain.folder / "open_clip"
    light = [1.0, *[0.15] * (len(plan.dims) - 1)]
    nesting = {
        "plain": f"dims: [{plan.dims[0]}]",
        "turned": f"dims: {json.dumps(plan.dims)}, start: 1",
        "nested": f"dims: {json.dumps(plan.dims)}, weights: {json.dumps(light)}, start: 0",
    }
    changes = [
        f"nesting={{{nesting[kind]}}}",
        f"train.duration={steps} steps",
        f"optim.warmup={max(1, steps // 16)} steps",
        f"checkpoint.every={steps} steps",
        *(f"optim.{name}={SHARE_OF_LR * value}" for name, value in lrs.items() if value is not None),
    ]
    if not source.exists():
        bundles.export(str(plain.last), source, [plan.dims[0]], "open_clip")
    beside = plain.folder / "tuned.yaml"
    beside.write_text(dump_config(plain.config))
    name = f"{plain.folder.name}-and-{steps}-{hashlib.sha256(' '.join(changes).encode()).hexdigest()[:10]}"
    places = [f"run={plain.folder.with_name(name)}", f"model.pretrained={source / 'open_clip_model.safetensors'}"]
    config = load_config(beside, [*changes, *places])
    return replace(plain, arm=f"plain, then {steps} steps, {kind}", config=config, curve=False)


def r1(runs: Sequence[Run], dim: int, prefix: str = "") -> float:
    """In %, on the first test set; the mean of both directions and of the runs."""
    test = next(iter(runs[0].world.tests))
    found = [Embeddings.load(run.folder / f"{prefix}{test}.npz") for run in runs]
    ranks = [claims_scores.per_query(one, dim, way)[0] for one in found for way in claims_scores.CROSS]
    return 100 * float(np.mean([rank <= 1 for rank in ranks]))


def table(plan: Plan, name: str, steps: Sequence[int]) -> str:
    """Trains what is missing; a row for each number of steps."""
    runs = [run for run in claims.plan_runs(plan) if run.world.name == name]
    plain = [run for run in runs if run.arm == "plain"]
    rows = [
        ("plain, cut", plain, ""),
        ("plain, principal directions", plain, "rotated-"),
        ("plain, turned", plain, "nested-"),
    ]
    for kind, count in itertools.product(("plain", "turned", "nested"), steps):
        more = [tuned(run, plan, kind, count) for run in plain]
        for run in more:
            train(run.config, Console(quiet=True))
            claims.embed_tests(run, run.last, "")
        rows.append((more[0].arm, more, ""))
    lines = [f"| {name} | {' | '.join(map(str, plan.dims))} |", f"|---|{'---:|' * len(plan.dims)}"]
    for title, of_seeds, prefix in rows:
        lines.append(f"| {title} | {' | '.join(f'{r1(of_seeds, dim, prefix):.1f}' for dim in plan.dims)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("runs/claims"), help="the folder of claims.py's runs")
    parser.add_argument("--world", type=Path, default=Path("runs/world"), help="what world.py built")
    parser.add_argument("--worlds", nargs="+", choices=("starter", "world"), default=("starter",))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", nargs="+", type=int, default=(40, 150))
    given = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    plan = claims.full_plan(given.world, given.cache, seeds, given.worlds)
    for name in given.worlds:
        print(table(plan, name, given.steps), flush=True)


if __name__ == "__main__":
    main()
