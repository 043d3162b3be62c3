"""What training for photo→photo and text→text search gains over training image–text pairs alone; and what a step costs.

    python tests/benchmarks/modalities.py --world runs/world [--sets starter world] [--seeds 0,1,2] [--jobs 2]
        [--cache runs/modalities] [--out tests/benchmarks/modalities.md]
    python tests/benchmarks/modalities.py --cost [--rounds 15]

The first form trains two arms on each set, with the data, steps and towers of claims.py:

    without        configs/quickstart.yaml: image–text pairs alone
    photo search   the same with configs/photo_search.yaml's loss.image_image and data.augment.second
    all sides      on the world: with loss.text_text too

It scores the last checkpoints on the test sets, which nothing was selected on: R@1 of image→image (other drawings of
the same concept, most of them by other artists), of degraded images among the originals (the mean over 12 kinds and
severities of `mmrl eval --degrade`), of text→image and of text→text (other names of the concept, also in other
languages). Differences are paired, with 95 % bootstrap intervals over concepts and seeds. It writes a Markdown page.
Resumable: run the same command again.

The second form prints the time of a step with image_image, less that of the second images' own forward and backward
pass, as a multiple of a step without. The three are timed in turn in every round.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from claims_embed import embed_tests, load_tests
from claims_runs import DATA_SETS, Plan, Run, full_plan, plan_runs
from claims_scores import Draws, Measured, per_query
from nested_step import Step, measure
from rich.console import Console

from mmrl.config import load_config
from mmrl.data.sources import open_reader
from mmrl.distributed import comm
from mmrl.evaluate import degrade, sets
from mmrl.inference.evaluated import open_encoder
from mmrl.train.preflight import prepare
from mmrl.train.trainer import Trainer, train

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "photo_search.yaml"
WITHOUT, PHOTOS, ALL = "without", "photo search", "all sides"
TEXT_TEXT = 0.5
DIMS = (256, 64, 32)
DIRECTIONS = ("image_to_image", "text_to_image", "text_to_text")
_DEGRADED_QUERIES = 300


class ModalitiesPlan(Plan):
    """The two arms of one set: without the other terms, and with them."""

    def arms(self) -> dict[str, list[str]]:
        values = yaml.safe_load(RECIPE.read_text())
        second = json.dumps(values["data"]["augment"]["second"])
        photos = [f"loss.image_image={values['loss']['image_image']}", f"data.augment.second={second}"]
        if self.data_sets[0].name == "starter":  # its texts are names and lists of keywords
            return {WITHOUT: [], PHOTOS: photos}
        return {WITHOUT: [], ALL: [*photos, f"loss.text_text={TEXT_TEXT}"]}


def train_one(run: Run) -> str:
    """Trains and scores a run, or resumes it; returns one line about it."""
    began = time.monotonic()
    train(run.config, Console(quiet=True))
    embed_tests(run, run.last, "")
    encoder = open_encoder(str(run.last))
    for name, shards in run.data_set.tests.items():
        reader = open_reader(shards)
        embedded = sets.embed(reader, encoder, captions=1)
        scores = degrade.score_degraded(reader, encoder, embedded, DIMS, _DEGRADED_QUERIES)
        (run.folder / f"degraded-{name}.json").write_text(json.dumps(scores))
    run.done_file.write_text(json.dumps({"finished": True}))
    return f"{run.data_set.name}, {run.arm}, seed {run.seed}: {time.monotonic() - began:.0f} s"


def recalls(runs: Sequence[Run], test: str, dim: int) -> dict[str, Measured]:
    """R@1 of each direction, and of degraded images, over the seeds."""
    seeds = load_tests(runs, test)
    draws, found = Draws(seeds[0].group_N, len(seeds)), {}
    for direction in DIRECTIONS:
        group_Q = seeds[0].caption_group_M if direction == "text_to_text" else seeds[0].group_N
        rank_SQ = np.stack([per_query(one, dim, direction)[0] for one in seeds])
        if np.isfinite(rank_SQ[0]).any():
            found[direction] = draws.measure(np.where(np.isnan(rank_SQ), np.nan, rank_SQ <= 1), group_Q)
    of_seeds = []
    for run in runs:
        scores = json.loads((run.folder / f"degraded-{test}.json").read_text())
        kinds = [one["severities"] for one in scores.values() if isinstance(one, dict)]
        of_seeds.append(statistics.mean(entry[str(dim)]["R@1"] for kind in kinds for entry in kind.values()))
    resampled = np.random.default_rng(0).integers(0, len(runs), (1000, len(runs)))
    found["degraded"] = Measured(statistics.mean(of_seeds), np.array(of_seeds)[resampled].mean(1))
    return found


def table(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Markdown: one line per test set, direction and dim."""
    data_set = plan.data_sets[0]
    _, with_terms = plan.arms()
    lines = [
        f"| {data_set.name}: test set | R@1 in % of | dim | without | {with_terms} | difference (95 %) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for test in data_set.tests:
        of_arm = {arm: [run for run in runs if run.arm == arm] for arm in plan.arms()}
        for dim in DIMS:
            before, after = (recalls(of_arm[arm], test, dim) for arm in (WITHOUT, with_terms))
            for name, one in before.items():
                gain = after[name] - one
                low, high = gain.interval
                shown = name.replace("_to_", "→")
                lines.append(
                    f"| {test} | {shown} | {dim} | {100 * one.value:.1f} | {100 * after[name].value:.1f} | "
                    f"{100 * gain.value:+.1f} ({100 * low:+.1f} … {100 * high:+.1f}) |"
                )
    return lines


def print_cost(rounds: int) -> None:
    """Times steps of the quickstart's towers."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, overrides in {"without": [], "image_image": ["loss.image_image=1"]}.items():
            config = load_config(
                ROOT / "configs" / "quickstart.yaml", [f"run={folder}/{name}", "evaluation={}", *overrides]
            )
            trainer = Trainer(config, prepare(config, comm.start()), comm.world(), Console(quiet=True))
            trainers[name] = trainer, next(trainer.stream.forever())
        trainer, batch = trainers["without"]

        def second_images() -> None:
            image_BD, _, _, _ = trainer.engine(batch.image, None)
            trainer.engine.backward(image_BD.float().square().sum(), last=True)
            trainer.engine.optimizer.zero_grad()

        steps: dict[str, Step] = {name: partial(one.step, [batch]) for name, (one, batch) in trainers.items()}
        times = measure(steps | {"second images alone": second_images}, rounds)
    for name, values in times.items():
        print(f"{name:20} {1000 * statistics.median(values):8.1f} ms")
    rounds_of = zip(*(times[name] for name in ("image_image", "second images alone", "without")), strict=True)
    ratio = statistics.median((step - alone) / without for step, alone, without in rounds_of)
    print(f"(image_image - second images alone) / without: {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("runs/modalities"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "modalities.md")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    if given.cost:
        print_cost(given.rounds)
        return
    seeds = [int(seed) for seed in given.seeds.split(",")]
    plans = []
    for name in given.sets:
        plan = full_plan(given.world, given.cache, seeds, [name])
        plans.append(ModalitiesPlan(**vars(plan)))
    runs = [plan_runs(plan) for plan in plans]
    left = sorted((run for some in runs for run in some if not run.is_done), key=lambda run: run.seed)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for number, one in enumerate(as_completed([pool.submit(train_one, run) for run in left]), 1):
            print(f"{one.result()}; {len(left) - number} left", flush=True)
    head = f"R@1, {len(seeds)} seeds; written by tests/benchmarks/modalities.py"
    pages = ["\n".join(table(plan, some)) for plan, some in zip(plans, runs, strict=True)]
    given.out.write_text("\n\n".join([f"# Photo→photo and text→text\n\n{head}.", *pages]) + "\n")
    print("\n\n".join(pages))


if __name__ == "__main__":
    main()
