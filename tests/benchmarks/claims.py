"""Does nesting keep its promises? Trains and evaluates every rival on two real sets, and writes a page on each.

    python tests/benchmarks/claims.py --world DIR [--seeds 0,1,2] [--worlds starter world] [--jobs 2]
        [--cache runs/claims] [--out tests/benchmarks/claims]

DIR is what tests/benchmarks/world.py built. It takes hours on two cores (each finished run is told, with how many are
left), and may be stopped at any time: the same command goes on where it stood, since every run lies in the cache under
the hash of its config. Each run has one thread, and --jobs of them go on at a time: two runs beside each other are
faster than one after the other on two threads.

The arms, all of the same data, steps and schedule (those of configs/quickstart.yaml, shorter) and of the same towers
(claims_towers.json: the quickstart's, for pictures of 32 x 32 pixels, so that all of it takes hours and not days):

    plain           the loss at the full dim alone                                   trained
    plain, d only   the loss at one smaller dim alone, a model for each              trained
    truncated       plain, cut
    rotated         plain, turned by its principal directions (`mmrl rotate --steps 0` on the training set), cut
    PCA             plain, by principal components of both modalities, each centred by its own training mean
    nested, equal   all dims with equal weights, from the first step on              trained
    nested          as in configs/quickstart.yaml, whose nesting.start is 1: plain, and turned after the last step; so
                    it is made of the plain run (tests/test_turn.py: the towers are the same) by `mmrl rotate`, which
                    turns as a run does, but finds the principal directions to begin with from the whole training set

The test sets are opened here alone, on each run's last checkpoint: nothing is chosen by them. `--tiny` walks the same
way in a minute, on a handful of pictures and steps, to test the way; its pages say that they are no result.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import claims_report
import numpy as np
import torch
import torch.nn.functional as F
from claims_scores import Embeddings
from rich.console import Console

from mmrl import nesting
from mmrl.config import Config, load_config
from mmrl.data.sources import open_reader
from mmrl.errors import InputError, RunStopped
from mmrl.evaluate import sets
from mmrl.model import bundle
from mmrl.rotation import learned
from mmrl.rotation.command import rotate_model
from mmrl.settings import hyperparameters
from mmrl.train.trainer import train

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "configs" / "quickstart.yaml"
TOWERS = Path(__file__).parent / "claims_towers.json"
CURVE_POINTS = 6
_DONE = "done.json"
_FORMAT = 3
_TINY_TOWERS = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class World:
    """A data set: what is trained on, what is tested on, for how long."""

    name: str
    train: str
    tests: dict[str, str]
    steps: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All that is to be run."""

    worlds: list[World]
    dims: list[int]
    """Descending; the first is the full dim."""
    seeds: list[int]
    cache: Path
    overrides: tuple[str, ...] = ()
    curves: bool = True

    def arms(self) -> dict[str, list[str]]:
        """The trained arms, each with what it changes in the recipe."""
        full, *smaller = self.dims
        shown = json.dumps(self.dims)
        return {
            "plain": [f"nesting={{dims: [{full}]}}"],
            **{f"plain, {dim} only": [f"nesting={{dims: [{dim}]}}"] for dim in smaller},
            "nested, equal": [f"nesting={{dims: {shown}}}"],
        }


@dataclass
class Run:
    """One training: its config, and where it lies."""

    world: World
    arm: str
    seed: int
    config: Config
    curve: bool = field(default=False)

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last"


# ------------------------------------------------------------------------------------------------ training


def plan_runs(plan: Plan) -> list[Run]:
    """Every training, seed by seed, so that an early stop leaves whole seeds."""
    runs = []
    for seed in plan.seeds:
        for world in plan.worlds:
            for arm, changes in plan.arms().items():
                curve = plan.curves and not arm.endswith("only")
                config = _config(plan, world, changes, seed, curve)
                name = f"{world.name}-{arm}-seed{seed}".replace(", ", "-").replace(" ", "-")
                place = plan.cache / f"{name}-{_hash(config, world)}"
                runs.append(Run(world, arm, seed, config.model_copy(update={"run": str(place)}), curve))
    return runs


def _config(plan: Plan, world: World, changes: Sequence[str], seed: int, curve: bool) -> Config:
    overrides = [
        f"seed={seed}",
        f"data.train={world.train}",
        "resume=auto",
        "evaluation={every: 1000000 steps}",  # nothing is chosen, so nothing is looked at on the way
        f"model.name={TOWERS}",
        f"train.duration={world.steps} steps",
        f"optim.warmup={max(1, world.steps // 16)} steps",
        *plan.overrides,
        *world.overrides,
        *changes,
    ]
    config = load_config(RECIPE, overrides)
    every = max(1, -(-world.steps // CURVE_POINTS)) if curve else world.steps
    checkpoint = config.checkpoint.model_copy(update={"every": f"{every} steps", "keep": CURVE_POINTS + 1})
    return config.model_copy(update={"checkpoint": checkpoint})


def _hash(config: Config, world: World) -> str:
    """Of all that decides what is learnt, wherever the files lie, and of what is kept of a run."""
    towers = json.loads(Path(config.model.name).read_text())
    decides = {**hyperparameters(config), "model.name": towers, "data.train": world.name, "claims.format": _FORMAT}
    text = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def train_all(runs: Sequence[Run], jobs: int, console: Console) -> None:
    """Whatever is not finished yet, so many at a time."""
    left = [run for run in runs if not (run.folder / _DONE).exists()]
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
    """Trains and measures, or goes on with it; says what was done."""
    began = time.monotonic()
    train(run.config, Console(quiet=True))
    measure(run)
    _tidy(run)
    return f"{run.world.name}, {run.arm}, seed {run.seed}: {time.monotonic() - began:.0f} s"


def _tidy(run: Run) -> None:
    """Keeps the last encoder alone: what resuming and the curve needed is done with."""
    last = run.last.resolve()
    for checkpoint in (run.folder / "checkpoints").glob("step-*"):
        if checkpoint.resolve() != last:
            shutil.rmtree(checkpoint)
    shutil.rmtree(last / "training", ignore_errors=True)
    (run.folder / _DONE).write_text(json.dumps({"finished": True}))


# ------------------------------------------------------------------------------------------------ embedding


def measure(run: Run) -> None:
    """Embeds the test sets by the run's last encoder, and what follows from it without training."""
    embed_tests(run, run.last, "")
    if run.curve:
        for checkpoint in sorted((run.folder / "checkpoints").glob("step-*")):
            first = next(iter(run.world.tests))
            embed_tests(run, checkpoint, f"{checkpoint.name}-", only=first)
    if run.arm == "plain":
        width = bundle.open_model(run.last).dim
        dims = sorted(dim for dim in load_config(RECIPE).nesting.dims if dim <= width)
        _turn(run, "rotated", dims, captions=1, steps=0)
        _turn(run, "nested", dims, captions=None, steps=learned.STEPS)
        _fit_pca(run)


def _turn(run: Run, name: str, dims: Sequence[int], captions: int | None, steps: int) -> None:
    """Turns the run's encoder by its training set, unless that is done, and embeds the test sets."""
    turned = run.folder / name
    if not turned.exists():
        rotate_model(str(run.last), run.world.train, turned, dims=dims, captions=captions, steps=steps, quiet=True)
    embed_tests(run, turned, f"{name}-")


def embed_tests(run: Run, encoder: Path, prefix: str, only: str | None = None) -> None:
    """Writes the embeddings of the test sets beside the run, unless they are there."""
    for name, shards in run.world.tests.items():
        path = run.folder / f"{prefix}{name}.npz"
        if not path.exists() and only in (None, name):
            _embed(encoder, shards).save(path)


def _embed(encoder: Path, shards: str, captions: int | None = None) -> Embeddings:
    opened = bundle.open_model(encoder)
    found = sets.embed(open_reader(shards), opened.model, opened.image_spec, opened.tokenise, captions=captions)
    image_ND, text_MD = (F.normalize(rows.double(), dim=-1).float().numpy() for rows in (found.image_ND, found.text_MD))
    group_N, group_M = found.image_group_N.numpy(), found.text_group_M.numpy()
    _, name_N = np.unique(found.image_of_text_M.numpy(), return_index=True)  # a sample's first text is its name
    distinct = _distinct(group_M.tolist(), found.captions)
    return Embeddings(image_ND, text_MD[name_N], group_N, text_MD[distinct], group_M[distinct])


def _distinct(groups: Sequence[int], captions: Sequence[str]) -> list[int]:
    """Which captions are kept for text→text: none begins with another one that is kept of its group."""
    kept: dict[int, list[int]] = {}
    for number in sorted(range(len(captions)), key=lambda number: len(captions[number])):
        of_group = kept.setdefault(groups[number], [])
        if not any(captions[number].startswith(captions[other]) for other in of_group):
            of_group.append(number)
    return sorted(number for of_group in kept.values() for number in of_group)


def _fit_pca(run: Run) -> None:
    """Principal components of unit vectors, both modalities together, each centred by its own mean: embeddings of the
    test sets in that basis."""
    paths = {name: run.folder / f"pca-{name}.npz" for name in run.world.tests}
    if all(path.exists() for path in paths.values()):
        return
    trained = _embed(run.last, run.world.train, captions=1)
    means = [rows.astype(np.float64).mean(0) for rows in (trained.image_ND, trained.text_ND)]
    moments = [
        (rows - mean).T @ (rows - mean) / len(rows)
        for rows, mean in zip((trained.image_ND, trained.text_ND), means, strict=True)
    ]
    rotation = nesting.principal_rotation(torch.from_numpy(sum(moments) / 2)).numpy()
    for name, path in paths.items():
        plain = Embeddings.load(run.folder / f"{name}.npz")
        image_ND, text_ND, caption_MD = (
            ((rows - mean) @ rotation.T).astype(np.float32)
            for rows, mean in zip((plain.image_ND, plain.text_ND, plain.caption_MD), [*means, means[1]], strict=True)
        )
        Embeddings(image_ND, text_ND, plain.group_N, caption_MD, plain.caption_group_M).save(path)


# ------------------------------------------------------------------------------------------------ what is compared


def curves(runs: Sequence[Run], world: World, test: str) -> dict[str, dict[int, list[Embeddings]]]:
    """Arm → step → one of each seed."""
    found: dict[str, dict[int, list[Embeddings]]] = {}
    for run in runs:
        if run.world.name == world.name and run.curve:
            for path in run.folder.glob(f"step-*-{test}.npz"):
                step = int(path.name.split("-")[1])
                found.setdefault(run.arm, {}).setdefault(step, []).append(Embeddings.load(path))
    return {arm: dict(sorted(steps.items())) for arm, steps in found.items()}


def compared(plan: Plan, runs: Sequence[Run], world: World, test: str) -> Iterator[tuple[str, int, list[Embeddings]]]:
    """(arm, dim, one of each seed): the arms as they are shown."""

    def of(arm: str, prefix: str = "") -> list[Embeddings]:
        mine = [run for run in runs if run.world.name == world.name and run.arm == arm]
        return [Embeddings.load(run.folder / f"{prefix}{test}.npz") for run in mine]

    full = plan.dims[0]
    shown = {
        "truncated": of("plain"),
        "rotated": of("plain", "rotated-"),
        "PCA": of("plain", "pca-"),
        "nested, equal": of("nested, equal"),
        "nested": of("plain", "nested-"),
    }
    for dim in plan.dims:
        yield "plain, d only", dim, of("plain" if dim == full else f"plain, {dim} only")
        for arm, embeddings in shown.items():
            yield arm, dim, embeddings


def ranks(runs: Sequence[Run], world: World) -> dict[str, Any]:
    """What the plain models' rotations tell of the world: effective rank and the share that each prefix keeps."""
    mine = [run for run in runs if run.world.name == world.name and run.arm == "plain"]
    told = [bundle.read_manifest(run.folder / "rotated")["rotation"] for run in mine]
    return {
        "effective_rank": [one["effective_rank"] for one in told],
        "share_of_second_moment": [one["share_of_second_moment"] for one in told],
    }


# ------------------------------------------------------------------------------------------------ the command


def full_plan(world: Path, cache: Path, seeds: list[int], worlds: Sequence[str]) -> Plan:
    """What is published: the named ones of both sets."""
    if "world" in worlds and not (world / "NOTICE").is_file():
        raise InputError(f"world: {world} is not whole; build it: python tests/benchmarks/world.py {world}")
    recipe = load_config(RECIPE).nesting
    assert recipe.start == 1, "the nested arm is made of the plain one"
    dims = sorted(recipe.dims, reverse=True)
    small = World(
        "starter",
        "starter:train",
        {"test-artist": "starter:test-artist", "test-concepts": "starter:test-concepts"},
        steps=600,
    )
    larger = World(
        "world",
        str(world / "train"),
        {name: str(world / name) for name in ("test-artist", "test-concepts")},
        steps=700,
        overrides=("data.captions=[0.35, 0.35, 0.3]",),
    )
    return Plan([one for one in (small, larger) if one.name in worlds], dims, seeds, cache)


def tiny_plan(cache: Path) -> Plan:
    """The same way with toy towers, on a few steps. The pictures are validation ones: no test set is opened for it."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "towers.json").write_text(json.dumps(_TINY_TOWERS))
    pictures, concepts = "starter:val-pictures", "starter:val-concepts"
    worlds = [
        World("starter", pictures, {"test-artist": concepts}, 3),
        World("world", concepts, {"test-artist": pictures}, 3),
    ]
    overrides = (f"model.name={cache / 'towers.json'}", "train.batch_size=16", "tracking.log_every=1")
    return Plan(worlds, [64, 8], [0, 1], cache, overrides)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train and evaluate every rival of nesting; write the results.")
    parser.add_argument("--world", type=Path, default=Path("runs/world"), help="what world.py built")
    parser.add_argument("--cache", type=Path, default=Path("runs/claims"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "claims", help="folder of the pages")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--worlds", nargs="+", choices=("starter", "world"), default=("starter", "world"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--tiny", action="store_true", help="test the way; no result")
    given = parser.parse_args(arguments)
    console = Console()
    try:
        if given.tiny:
            plan, out = tiny_plan(given.cache / "tiny"), given.cache / "tiny" / "page"
        else:
            seeds = [int(seed) for seed in given.seeds.split(",")]
            plan = full_plan(given.world, given.cache, seeds, given.worlds)
            out = given.out
        runs = plan_runs(plan)
        left = sum(not (run.folder / _DONE).exists() for run in runs)
        console.print(f"{len(runs)} runs, {left} of them to do; the same command goes on where it was stopped")
        train_all(runs, given.jobs, console)
    except (InputError, RunStopped) as error:
        parser.exit(2 if isinstance(error, InputError) else 1, f"{error}\n")
    for world in plan.worlds:
        results = {
            "tests": {test: list(compared(plan, runs, world, test)) for test in world.tests},
            "curves": curves(runs, world, next(iter(world.tests))),
            "ranks": ranks(runs, world),
        }
        page = claims_report.write(out / world.name, {world.name: results}, plan.dims, plan.seeds, tiny=given.tiny)
        console.print(f"Written: {page}")


if __name__ == "__main__":
    main()
