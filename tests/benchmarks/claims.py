"""Compares nested training with its alternatives on two data sets, and writes a page of results for each.

    python tests/benchmarks/claims.py --world DIR [--seeds 0,1,2] [--sets starter world] [--arms ARM ...] [--jobs 2]
        [--cache runs/claims] [--out tests/benchmarks/claims]

DIR is the output of tests/benchmarks/world.py. It takes hours on two cores. Resumable: run the same command again;
every run is kept in the cache under the hash of its config. Each run uses one thread, and --jobs runs are trained at
the same time: two runs on one thread each are faster than one on two threads.

All arms share the data, steps, schedule and towers: configs/quickstart.yaml, but shorter, with towers for images of
32 x 32 pixels (claims_towers.json) so that everything takes hours and not days. Arms marked * are trained:

    plain *                              the full dim only
    plain, d only *                      one smaller dim d only, a model for each
    truncated                            plain, truncated to its first d dims
    plain + PCA                          plain, in its PCA basis; each modality is centred by its training mean
    plain + rotate                       plain, rotated by `mmrl rotate` on the training set
    nested, equal weights, no rotation * the published method: the mean of the InfoNCEs at all dims
    nested *                             ours: configs/quickstart.yaml
    nested + rotate                      nested, rotated by `mmrl rotate` on the training set, as nesting.rotate_at_end

Both nested recipes are also trained with the dims 256/128/64 only. --arms trains only some of the trained arms, e.g.
--arms plain nested; the pages are written when all arms are there.

The test sets are used here only, on the last checkpoints and for curves: nothing is selected on them. `--tiny` tests
the program in about a minute, on a few images and three steps; its page says that its numbers mean nothing.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import claims_report
import torch
from claims_embed import LAST, PCA_BASIS, ROTATED, ROTATED_FOLDER, load_tests, measure
from claims_report import Results
from claims_runs import (
    DATA_SETS,
    EQUAL,
    NESTED,
    NESTED_ROTATED,
    PCA,
    PLAIN,
    PLAIN_D,
    PLAIN_ROTATED,
    TRUNCATED,
    DataSet,
    Plan,
    Run,
    full_plan,
    plan_runs,
    tiny_plan,
)
from claims_scores import Embeddings
from rich.console import Console

from mmrl.errors import InputError, RunStopped
from mmrl.model import bundle
from mmrl.train.trainer import train

# ------------------------------------------------------------------------------------------------ training


def train_all(runs: Sequence[Run], jobs: int, console: Console) -> None:
    """Train and embed the runs that are not done, `jobs` at a time."""
    left = [run for run in runs if not run.is_done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = [pool.submit(train_one, run) for run in left]
        try:
            for number, one in enumerate(as_completed(waiting), 1):
                console.print(f"{one.result()}; {len(left) - number} left", highlight=False)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def train_one(run: Run) -> str:
    """Train and embed a run, or resume it; returns one line about it."""
    began = time.monotonic()
    train(run.config, Console(quiet=True))
    measure(run)
    _tidy(run)
    return f"{run.data_set.name}, {run.arm}, seed {run.seed}: {time.monotonic() - began:.0f} s"


def _tidy(run: Run) -> None:
    """Mark the run as done, and delete all but its last encoder: the rest served resuming and the curve."""
    last = run.last.resolve()
    for checkpoint in (run.folder / "checkpoints").glob("step-*"):
        if checkpoint.resolve() != last:
            shutil.rmtree(checkpoint)
    shutil.rmtree(last / "training", ignore_errors=True)
    run.done_file.write_text(json.dumps({"finished": True}))


# ------------------------------------------------------------------------------------------------ results


def collect(plan: Plan, runs: Sequence[Run], data_set: DataSet) -> Results:
    """The embeddings of all arms on one data set."""
    of_arm = {arm: [run for run in runs if run.data_set == data_set and run.arm == arm] for arm in plan.arms()}
    return Results(
        data_set=data_set,
        dims=plan.dims,
        seeds=plan.seeds,
        tests={test: list(_compared(plan, of_arm, test)) for test in data_set.tests},
        curves=_curves(of_arm, next(iter(data_set.tests))),
        rotations={arm: _rotation_facts(of_arm[arm]) for arm in (PLAIN, NESTED)},
    )


def _compared(plan: Plan, of_arm: dict[str, list[Run]], test: str) -> Iterator[tuple[str, int, list[Embeddings]]]:
    """(arm, dim, one of each seed), in the order of the tables."""
    full = plan.dims[0]
    for dim in plan.dims:
        yield PLAIN_D, dim, load_tests(of_arm[PLAIN if dim == full else f"plain, {dim} only"], test)
    shown = {
        TRUNCATED: (PLAIN, LAST, plan.dims),
        PCA: (PLAIN, PCA_BASIS, plan.dims),
        PLAIN_ROTATED: (PLAIN, ROTATED, plan.dims),
        EQUAL: (EQUAL, LAST, plan.dims),
        NESTED: (NESTED, LAST, plan.dims),
        NESTED_ROTATED: (NESTED, ROTATED, plan.dims),
        **{arm: (arm, LAST, plan.large_dims) for arm in plan.large_arms},
    }
    for name, (arm, prefix, dims) in shown.items():
        embeddings = load_tests(of_arm[arm], test, prefix)
        for dim in dims:
            yield name, dim, embeddings


def _curves(of_arm: dict[str, list[Run]], test: str) -> dict[str, dict[int, list[Embeddings]]]:
    """Arm → step → one of each seed."""
    found = {}
    for arm, runs in of_arm.items():
        if runs[0].has_curve:
            steps = sorted(int(path.name.split("-")[1]) for path in runs[0].folder.glob(f"step-*-{test}.npz"))
            found[arm] = {step: load_tests(runs, test, f"step-{step}-") for step in steps}
    return found


def _rotation_facts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What `mmrl rotate` measured on the training set, for each run: effective_rank, share_of_second_moment, …"""
    return [bundle.read_manifest(run.folder / ROTATED_FOLDER)["rotation"] for run in runs]


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare nested training with its alternatives.")
    parser.add_argument("--world", type=Path, default=Path("runs/world"), help="the output of world.py")
    parser.add_argument("--cache", type=Path, default=Path("runs/claims"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "claims", help="folder of the pages")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=DATA_SETS)
    parser.add_argument("--arms", nargs="+", help='trained arms, e.g. plain "plain, d only" (default: all)')
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of runs at the same time")
    parser.add_argument("--tiny", action="store_true", help="test the program; its numbers mean nothing")
    given = parser.parse_args(arguments)
    console = Console()
    try:
        if given.tiny:
            plan, out = tiny_plan(given.cache / "tiny"), given.cache / "tiny" / "page"
        else:
            seeds = [int(seed) for seed in given.seeds.split(",")]
            plan, out = full_plan(given.world, given.cache, seeds, given.sets), given.out
        runs = plan_runs(plan)
        chosen = [run for run in runs if run.arm in _chosen_arms(plan, given.arms)]
        left = sum(not run.is_done for run in chosen)
        console.print(f"{len(chosen)} runs, {left} of them to do. Resumable: run the same command again.")
        train_all(chosen, given.jobs, console)
    except (InputError, RunStopped) as error:
        parser.exit(2 if isinstance(error, InputError) else 1, f"{error}\n")
    missing = [run for run in runs if not run.is_done]
    if missing:
        arms = "; ".join(dict.fromkeys(run.arm for run in missing))
        console.print(f"No pages written: {len(missing)} runs of other arms are not trained ({arms}).", soft_wrap=True)
        return
    for data_set in plan.data_sets:
        page = claims_report.write(out / data_set.name, collect(plan, runs, data_set), tiny=given.tiny)
        console.print(f"Written: {page}")


def _chosen_arms(plan: Plan, names: Sequence[str] | None) -> set[str]:
    """The trained arms of these names.

    Raises:
        InputError: no arm has this name.
    """
    groups = plan.arm_groups()
    for name in names or ():
        if name not in groups:
            quoted = ", ".join(f'"{one}"' for one in groups)
            raise InputError(f'arms: "{name}" is not a trained arm; choose from {quoted}.')
    return {arm for name in names or groups for arm in groups[name]}


if __name__ == "__main__":
    main()
