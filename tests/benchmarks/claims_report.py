"""The page of claims.py: targets, convergence and tables of recall. Its plots are in claims_plots.py."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import claims_plots
import numpy as np
from claims_runs import NESTED, PLAIN, PLAIN_D, PLAIN_ROTATED, DataSet
from claims_scores import (
    METRICS,
    SAME,
    ByDirection,
    Curves,
    Embeddings,
    Measured,
    Scores,
    cross,
    nearest_step,
    score_all,
    score_curves,
    steps_to_reach,
)

_CHANCE = 0.01
_MAX_SHARE_OF_STEPS = 0.8
_MIN_KEPT_EARLY = 0.9
_MIN_KEPT = {4: ("a quarter", 0.98), 8: ("an eighth", 0.95)}
"""Full dim / dim → its name, and the share of R@10 it has to keep in image→image and text→text."""
_ROW_OF_CURVE = {PLAIN: "plain, truncated"}


@dataclass(frozen=True)
class Results:
    """The embeddings of all arms on one data set."""

    data_set: DataSet
    dims: list[int]
    """Descending; the first is the full dim."""
    seeds: list[int]
    tests: dict[str, list[tuple[str, int, list[Embeddings]]]]
    """Test set → (arm, dim, one of each seed)."""
    curves: dict[str, dict[int, list[Embeddings]]]
    """Arm → step → one of each seed, on the first test set."""
    rotations: dict[str, list[dict[str, Any]]]
    """Arm → what `mmrl rotate` measured on the training set, for each seed."""


@dataclass(frozen=True)
class Scored:
    """The scores of all arms on one data set."""

    tests: dict[str, Scores]
    curves: Curves
    convergence: dict[str, dict[int, Measured]]
    """Arm → dim → share of the steps until R@1 reaches the final one of a separately trained model of that dim."""
    kept_early: dict[str, dict[int, Measured]]
    """Arm → dim → share of the full dim's R@10, at the checkpoint nearest to a third of the steps."""
    early_step: int


def write(out: Path, results: Results, tiny: bool) -> Path:
    """Write OUT/results.md, OUT/results.json and four plots; returns the path of results.md."""
    out.mkdir(parents=True, exist_ok=True)
    scored = _score(results)
    (out / "results.md").write_text(_page(results, scored, tiny), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(_as_json(results, scored), indent=1) + "\n")
    first = next(iter(results.tests))
    claims_plots.draw_by_dim(out / "recall_by_dim.png", scored.tests)
    claims_plots.draw_over_steps(out / "recall_over_steps.png", scored.curves, scored.tests[first])
    claims_plots.draw_any_dim(out / "any_cut.png", results.tests[first], results.dims)
    claims_plots.draw_blocks(out / "blocks.png", results.tests[first], results.dims)
    return out / "results.md"


def _score(results: Results) -> Scored:
    tests = {test: score_all(arms) for test, arms in results.tests.items()}
    curves = score_curves(results.curves, results.dims)
    final, total = tests[next(iter(tests))][PLAIN_D], results.data_set.steps
    recall = {
        arm: {dim: {step: cross(one, "R@1") for step, one in steps.items()} for dim, steps in by_dim.items()}
        for arm, by_dim in curves.items()
    }
    full = results.dims[0]
    early_step = nearest_step(next(iter(results.curves.values())), total / 3)
    return Scored(
        tests,
        curves,
        {
            arm: {dim: steps_to_reach(curve, cross(final[dim], "R@1"), total) for dim, curve in by_dim.items()}
            for arm, by_dim in recall.items()
        },
        {
            arm: {
                dim: cross(by_dim[dim][early_step], "R@10") / cross(by_dim[full][early_step], "R@10")
                for dim in results.dims
            }
            for arm, by_dim in curves.items()
        },
        early_step,
    )


def _page(results: Results, scored: Scored, tiny: bool) -> str:
    name, seeds = results.data_set.name, ",".join(map(str, results.seeds))
    warning = "**Written by --tiny, which tests the program. These numbers mean nothing.**\n\n"
    sections = [
        f"# Nested training and its alternatives: {name}\n\n" + (warning if tiny else ""),
        f"Written by `python tests/benchmarks/claims.py --sets {name} --seeds {seeds}`; the head of that file defines "
        "the arms. Recall is in %, the mean of image→text and text→image if no direction is named. Brackets hold 95 % "
        "intervals: 1,000 paired bootstrap draws of concepts and seeds.\n\n",
        "![recall by dim](recall_by_dim.png)\n\n![recall over the steps](recall_over_steps.png)\n\n"
        "![recall at any prefix length](any_cut.png)\n\n![recall of each block of dims alone](blocks.png)\n\n",
        f"{_about(results)}\n\n## Targets\n\n{_targets(results, scored)}",
        f"## Convergence\n\n{_convergence(results, scored)}",
    ]
    for test, found in scored.tests.items():
        sections.append(f"## {test}\n\n")
        sections += [_table(found, results.dims, metric) for metric in METRICS]
        sections.append(_differences(found, results.dims))
        sections += [_table(found, results.dims, "R@1", one) for one in SAME if _has_signal(found, one)]
    return "".join(sections)


# ------------------------------------------------------------------------------------------------ tables


def _percent(one: Measured) -> str:
    low, high = map(_shown, one.interval)
    return f"{_shown(one.value)} [{low}, {high}]"


def _shown(value: float) -> float:
    """In %, rounded to one decimal, and never -0.0."""
    return round(100 * value, 1) + 0.0


def _share(one: Measured) -> str:
    """A share of the steps; "> 1" where the target is never reached."""
    value, low, high = (f"{part:.2f}" if math.isfinite(part) else "> 1" for part in (one.value, *one.interval))
    return f"{value} [{low}, {high}]"


def _markdown(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A table; `left` are the columns that are aligned to the left."""
    head, *rows = lines
    align = ["---" if column in left else "---:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, align, *rows]) + "\n\n"


def _table(found: Scores, dims: Sequence[int], metric: str, direction: str | None = None) -> str:
    """One metric of all arms, of one direction or of the mean of image→text and text→image. "–": not a trained dim."""
    lines = [[metric if direction is None else f"{metric}, {_arrow(direction)}", *map(str, dims)]]
    for arm, by_dim in found.items():
        shown = {dim: one[direction][metric] if direction else cross(one, metric) for dim, one in by_dim.items()}
        lines.append([arm, *(_percent(shown[dim]) if dim in shown else "–" for dim in dims)])
    return _markdown(lines)


def _has_signal(found: Scores, direction: str) -> bool:
    """Whether plain at the full dim has an R@1 clearly above chance in this direction."""
    plain = found[PLAIN_D][max(found[PLAIN_D])]
    return direction in plain and plain[direction]["R@1"].value >= _CHANCE


def _arrow(direction: str) -> str:
    return direction.replace("_to_", "→")


def _differences(found: Scores, dims: Sequence[int]) -> str:
    lines = [[f"R@1 minus that of “{PLAIN_D}”, points", *map(str, dims)]]
    for arm, by_dim in found.items():
        if arm != PLAIN_D:
            less = {dim: cross(one, "R@1") - cross(found[PLAIN_D][dim], "R@1") for dim, one in by_dim.items()}
            lines.append([arm, *(_percent(less[dim]) if dim in less else "–" for dim in dims)])
    return _markdown(lines)


def _about(results: Results) -> str:
    ranks = {arm: np.mean([one["effective_rank"] for one in of_seeds]) for arm, of_seeds in results.rotations.items()}
    shares = [one["share_of_second_moment"] for one in results.rotations[PLAIN]]
    kept = ", ".join(f"{100 * np.mean([one[str(dim)] for one in shares]):.1f} at {dim}" for dim in results.dims)
    shown = ", ".join(f"{arm} {rank:.1f}" for arm, rank in ranks.items())
    return (
        f"Effective rank of the embeddings of the training set: {shown}. Share of the second moment in the prefixes of "
        f"“{PLAIN_ROTATED}”, in %: {kept}."
    )


def _convergence(results: Results, scored: Scored) -> str:
    test, final = next(iter(scored.tests.items()))
    dims, full, total = results.dims, results.dims[0], results.data_set.steps
    lines = [
        ["", *map(str, dims)],
        ["target: R@1 in %", *(_percent(cross(final[PLAIN_D][dim], "R@1")) for dim in dims)],
    ]
    for arm, by_dim in scored.convergence.items():
        lines.append([_ROW_OF_CURVE.get(arm, arm), *(_share(by_dim[dim]) for dim in dims)])
    early = [["", f"R@10 at {full}", *(f"kept at {dim}" for dim in dims[1:])]]
    for arm, by_dim in scored.kept_early.items():
        recall = cross(scored.curves[arm][full][scored.early_step], "R@10")
        early.append([_ROW_OF_CURVE.get(arm, arm), _percent(recall), *(_percent(by_dim[dim]) for dim in dims[1:])])
    points = len(next(iter(results.curves.values())))
    return (
        f"Share of all {total} steps after which R@1 on {test} first reaches the final R@1 of a model trained at that "
        f"dim only (at {full}: of plain). Linear between {points} checkpoints. “> 1”: not reached.\n\n"
        f"{_markdown(lines)}At step {scored.early_step}, the checkpoint nearest to a third of the steps: R@10 at the "
        f"full dim, and the share of it that each smaller dim keeps, in %.\n\n{_markdown(early)}"
    )


# ------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """One row of the table of targets."""

    what: str
    unit: Literal["%", "share of steps"]
    measured: Measured
    bound: float | None
    """What the value has to reach: at least (%), at most (share of steps). None: reported without a target."""

    def row(self) -> list[str]:
        shown = _percent(self.measured) if self.unit == "%" else _share(self.measured)
        if self.bound is None:
            return [self.what, "–", shown, "–"]
        return [
            self.what,
            f"≥ {_shown(self.bound):g}" if self.unit == "%" else f"≤ {self.bound:g}",
            shown,
            self._reached(),
        ]

    def _reached(self) -> str:
        assert self.bound is not None
        low, high = self.measured.interval
        # Compared as shown: one decimal of a percentage, two decimals of a share.
        if self.unit == "%":
            yes, maybe = round(self.measured.value, 3) >= self.bound, high >= self.bound
        else:
            yes, maybe = round(self.measured.value, 2) <= self.bound, low <= self.bound
        return "yes" if yes else "no, but within the interval" if maybe else "no"


def _targets(results: Results, scored: Scored) -> str:
    """The targets of nested training, and what was measured."""
    test, found = next(iter(scored.tests.items()))
    rows = [one.row() for one in _recall_targets(found, results.dims)]
    rows.insert(1, _margin_row(found, results))
    rows += [one.row() for one in _step_targets(results, scored)]
    rows += [one.row() for one in _same_modality_targets(scored.tests, results.dims)]
    head = [f"{results.data_set.name}, {test}, arm “{NESTED}”", "target", "measured", "reached"]
    return _markdown([head, *rows], left=(0, 3))


def _recall_targets(found: Scores, dims: Sequence[int]) -> list[Target]:
    """R@1 compared with plain, with a model of each dim alone, and with plain + rotate; differences in points."""

    def less(other: str, dim: int) -> Measured:
        return cross(found[NESTED][dim], "R@1") - cross(found[other][dim], "R@1")

    full, *smaller = dims
    rows = [Target(f"R@1 at {full} minus plain's, points", "%", less(PLAIN_D, full), 0.0)]
    for dim in smaller:
        what = f"R@1 at {dim} minus that of a model of that dim alone, points"
        rows.append(Target(what, "%", less(PLAIN_D, dim), -0.005 if dim <= 8 else 0.0))
    for dim in smaller:
        what = f"R@1 at {dim} minus that of {PLAIN_ROTATED}, points"
        rows.append(Target(what, "%", less(PLAIN_ROTATED, dim), 0.0 if dim <= 16 else -0.005))
    return rows


def _margin_row(found: Scores, results: Results) -> list[str]:
    full, margin = results.dims[0], results.data_set.margin
    low, _ = (cross(found[NESTED][full], "R@1") - cross(found[PLAIN_D][full], "R@1")).interval
    reached = "yes" if round(low, 3) >= -margin else "no"
    return ["the same, lower end of the interval, points", f"≥ {_shown(-margin):g}", f"{_shown(low)}", reached]


def _step_targets(results: Results, scored: Scored) -> list[Target]:
    """What small dims keep at a third of the steps, and the steps until each dim has converged."""
    full, *smaller = results.dims
    early = min(smaller, key=lambda dim: abs(dim - full // 8))
    what = f"R@10 that {early} of {full} dims keep at a third of the steps, %"
    rows = [Target(what, "%", scored.kept_early[NESTED][early], _MIN_KEPT_EARLY)]
    for dim in results.dims:
        other = "plain" if dim == full else "a model of that dim alone"
        what = f"share of the steps until R@1 at {dim} reaches the final one of {other}"
        bound = None if dim == full else _MAX_SHARE_OF_STEPS
        rows.append(Target(what, "share of steps", scored.convergence[NESTED][dim], bound))
    return rows


def _same_modality_targets(tests: dict[str, Scores], dims: Sequence[int]) -> list[Target]:
    """image→image and text→text, each on the first test set on which plain is clearly above chance."""
    full, rows = dims[0], []
    for direction in SAME:
        test = next((test for test, found in tests.items() if _has_signal(found, direction)), None)
        if test is None:
            continue
        plain, nested, of = tests[test][PLAIN_D], tests[test][NESTED], f"{_arrow(direction)} on {test}: "
        difference = nested[full][direction]["R@1"] - plain[full][direction]["R@1"]
        rows.append(Target(f"{of}R@1 at {full} minus plain's, points", "%", difference, 0.0))
        for part, (name, least) in _MIN_KEPT.items():
            if full // part in dims:
                kept = nested[full // part][direction]["R@10"] / nested[full][direction]["R@10"]
                rows.append(Target(f"{of}R@10 that {name} of the dims keeps, %", "%", kept, least))
    return rows


# ------------------------------------------------------------------------------------------------ JSON


def _as_json(results: Results, scored: Scored) -> dict[str, Any]:
    """All values with their intervals, [value, low, high]; null stands for a target that is never reached."""

    def numbers(one: Measured) -> list[float | None]:
        return [part if math.isfinite(part) else None for part in (one.value, *one.interval)]

    def by_direction(found: ByDirection) -> dict[str, dict[str, list[float | None]]]:
        return {name: {metric: numbers(one) for metric, one in metrics.items()} for name, metrics in found.items()}

    def by_dim(found: dict[str, dict[int, Measured]]) -> dict[str, dict[str, list[float | None]]]:
        return {arm: {str(dim): numbers(one) for dim, one in of_dims.items()} for arm, of_dims in found.items()}

    return {
        "data_set": results.data_set.name,
        "rotations": results.rotations,
        "share_of_steps_to_final_recall_of_that_dim": by_dim(scored.convergence),
        "share_of_full_dim_R@10_at_a_third": {"step": scored.early_step, **by_dim(scored.kept_early)},
        "tests": {
            test: {arm: {str(dim): by_direction(one) for dim, one in of_dims.items()} for arm, of_dims in found.items()}
            for test, found in scored.tests.items()
        },
        "curves": {
            arm: {
                str(dim): {str(step): by_direction(one) for step, one in steps.items()}
                for dim, steps in of_dims.items()
            }
            for arm, of_dims in scored.curves.items()
        },
    }
