"""What claims.py trains: its data sets, arms and runs, and the folder of each run.

CACHE/SET-ARM-seedS-HASH/           a run folder of `mmrl train`
    TEST.npz                        embeddings of a test set by the last checkpoint (claims_scores.Embeddings)
    rotate/, rotate-TEST.npz        the encoder after `mmrl rotate`, and its embeddings: arms "plain" and "nested"
    pca-TEST.npz                    the embeddings in the PCA basis: arm "plain"
    step-N-TEST.npz                 embeddings of the first test set at step N: arms with a curve
    done.json                       the run is trained and embedded
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrl.config import Config, load_config
from mmrl.errors import InputError
from mmrl.settings import hyperparameters

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "configs" / "quickstart.yaml"
TOWERS = Path(__file__).parent / "claims_towers.json"
DATA_SETS = ("starter", "world")

PLAIN, PLAIN_D = "plain", "plain, d only"
TRUNCATED, PCA, PLAIN_ROTATED = "truncated", "plain + PCA", "plain + rotate"
EQUAL, NESTED, NESTED_ROTATED = "nested, equal weights, no rotation", "nested", "nested + rotate"
WITH_CURVE = (PLAIN, EQUAL, NESTED)
CURVE_POINTS = 12
_PUBLISHED = "equal weights, no rotation"
_FORMAT = 3
_TINY_TOWERS = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class DataSet:
    """Training shards, test sets, and the length of a run on them."""

    name: str
    train: str
    tests: dict[str, str]
    """Name → shards; curves are computed on the first one."""
    steps: int
    margin: float
    """How far below plain the 95 % interval of nested may reach at the full dim, in R@1 of 0..1."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All runs: data sets x seeds x trained arms."""

    data_sets: list[DataSet]
    dims: list[int]
    """Descending; the first is the full dim."""
    large_dims: list[int]
    """Dims of the two arms that nest fewer dims."""
    seeds: list[int]
    cache: Path
    overrides: tuple[str, ...] = ()

    @property
    def large_arms(self) -> tuple[str, str]:
        """The two arms that nest only `large_dims`: the published method, and ours."""
        name = f"nested {'/'.join(map(str, self.large_dims))}"
        return f"{name}, {_PUBLISHED}", name

    def arms(self) -> dict[str, list[str]]:
        """Trained arm → its overrides of the recipe."""
        full, *smaller = self.dims
        large_equal, large_nested = self.large_arms
        return {
            PLAIN: _without_rotation([full]),
            **{f"plain, {dim} only": _without_rotation([dim]) for dim in smaller},
            EQUAL: _without_rotation(self.dims),
            NESTED: [f"nesting.dims={self.dims}"],
            large_equal: _without_rotation(self.large_dims),
            large_nested: [f"nesting.dims={self.large_dims}"],
        }

    def arm_groups(self) -> dict[str, list[str]]:
        """Name on the command line → trained arms. One name stands for the separate models of all smaller dims."""
        groups: dict[str, list[str]] = {}
        for arm in self.arms():
            groups.setdefault(PLAIN_D if arm.endswith(" only") else arm, []).append(arm)
        return groups


def _without_rotation(dims: Sequence[int]) -> list[str]:
    """The published method: the mean of the InfoNCEs at these dims and nothing else."""
    return [f"nesting={{dims: {list(dims)}, rotation: false}}", "loss.distillation=0.0"]


@dataclass
class Run:
    """One training."""

    data_set: DataSet
    arm: str
    seed: int
    dims: list[int]
    """The dims that are compared, trained or not."""
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last"

    @property
    def has_curve(self) -> bool:
        return self.arm in WITH_CURVE

    @property
    def done_file(self) -> Path:
        return self.folder / "done.json"

    @property
    def is_done(self) -> bool:
        return self.done_file.exists()


def plan_runs(plan: Plan) -> list[Run]:
    """All runs of the plan, seed by seed, so that an interrupted command leaves complete seeds."""
    runs = []
    for seed in plan.seeds:
        for data_set in plan.data_sets:
            for arm, overrides in plan.arms().items():
                config = _config(plan, data_set, arm, overrides, seed)
                name = f"{data_set.name}-{arm}-seed{seed}".replace(", ", "-").replace(" ", "-").replace("/", "-")
                folder = plan.cache / f"{name}-{_hash(config, data_set)}"
                runs.append(Run(data_set, arm, seed, plan.dims, config.model_copy(update={"run": str(folder)})))
    return runs


def _config(plan: Plan, data_set: DataSet, arm: str, overrides: Sequence[str], seed: int) -> Config:
    config = load_config(
        RECIPE,
        [
            f"seed={seed}",
            f"data.train={data_set.train}",
            "resume=auto",
            "evaluation={every: 1000000 steps}",  # the last checkpoint is used, so nothing is evaluated in between
            f"model.name={TOWERS}",
            f"train.duration={data_set.steps} steps",
            f"optim.warmup={max(1, data_set.steps // 16)} steps",
            *plan.overrides,
            *data_set.overrides,
            *overrides,
        ],
    )
    every = -(-data_set.steps // CURVE_POINTS) if arm in WITH_CURVE else data_set.steps
    checkpoint = config.checkpoint.model_copy(update={"every": f"{every} steps", "keep": CURVE_POINTS + 1})
    return config.model_copy(update={"checkpoint": checkpoint})


def _hash(config: Config, data_set: DataSet) -> str:
    """Hash of everything that affects what is learned and what is kept of a run, independent of file paths."""
    towers = json.loads(Path(config.model.name).read_text())
    values = {**hyperparameters(config), "model.name": towers, "data.train": data_set.name, "claims.format": _FORMAT}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def full_plan(world: Path, cache: Path, seeds: list[int], data_sets: Sequence[str]) -> Plan:
    """The published comparison, on the named data sets.

    Raises:
        InputError: `world`, the folder of the larger set, is needed and not complete.
    """
    if "world" in data_sets and not (world / "NOTICE").is_file():
        raise InputError(f"world: {world} is not complete; build it: python tests/benchmarks/world.py {world}")
    starter = DataSet(
        "starter",
        "starter:train",
        {"test-artist": "starter:test-artist", "test-concepts": "starter:test-concepts"},
        steps=600,
        margin=0.01,
    )
    larger = DataSet(
        "world",
        str(world / "train"),
        {name: str(world / name) for name in ("test-artist", "test-concepts")},
        steps=700,
        margin=0.005,
        overrides=("data.captions=[0.35, 0.35, 0.3]",),
    )
    dims = sorted(load_config(RECIPE).nesting.dims, reverse=True)
    large_dims = [dim for dim in dims if dim >= dims[0] // 4]
    return Plan([one for one in (starter, larger) if one.name in data_sets], dims, large_dims, seeds, cache)


def tiny_plan(cache: Path) -> Plan:
    """The same program with tiny towers and three steps. It reads validation images only, no test set."""
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "towers.json").write_text(json.dumps(_TINY_TOWERS))
    images, concepts = "starter:val-pictures", "starter:val-concepts"
    data_set = DataSet("starter", images, {"test-artist": concepts, "test-concepts": images}, steps=3, margin=0.01)
    overrides = (f"model.name={cache / 'towers.json'}", "train.batch_size=16", "tracking.log_every=1")
    return Plan([data_set], [64, 16, 8], [64, 16], [0, 1], cache, overrides)
