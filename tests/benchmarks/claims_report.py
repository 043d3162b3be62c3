"""The statistics of claims.py, its page and its three pictures.

An interval holds the middle 95 % of what 1,000 draws give, each of them a draw of concepts (all queries of a concept
together) and of seeds, with replacement. A difference of two arms is taken within each draw: the same queries, the
same seeds.

Shapes: N pictures and their names, M distinct captions, S seeds, Q queries and G gallery rows of one direction, C
concepts, R draws.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrl.nesting import cut

METRICS = ("R@1", "R@5", "R@10", "mAP")
CROSS, SAME = ("image_to_text", "text_to_image"), ("image_to_image", "text_to_text")
DRAWS = 1000
REFERENCE = "plain, d only"
COLOURS = {
    "plain, d only": "#222222",
    "truncated": "#c8553d",
    "rotated": "#1b6ca8",
    "PCA": "#7fb2d8",
    "nested, equal": "#9bd1b3",
    "nested": "#2a9d6f",
    "nested, rotated": "#8a6fb0",
}


@dataclass(frozen=True)
class Embeddings:
    """A test set; equal groups are positives."""

    image_ND: np.ndarray
    text_ND: np.ndarray
    """Of each picture's name."""
    group_N: np.ndarray
    caption_MD: np.ndarray
    """Of all that an item is called, where there is more: in other words, in other languages. None begins with another
    of its item, which would be found by its letters."""
    caption_group_M: np.ndarray

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        beside = path.with_name(f".{path.name}")
        with beside.open("wb") as file:
            np.savez(file, **{one.name: getattr(self, one.name) for one in fields(self)})
        beside.replace(path)

    @staticmethod
    def load(path: Path) -> "Embeddings":
        with np.load(path) as arrays:
            return Embeddings(**arrays)

    def sides(self, direction: str, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The queries and the gallery, cut to `dim`, and the groups of both."""
        image, text = (self.image_ND, self.group_N), (self.text_ND, self.group_N)
        caption = self.caption_MD, self.caption_group_M
        (query, query_group), (gallery, gallery_group) = {
            "image_to_text": (image, text),
            "text_to_image": (text, image),
            "image_to_image": (image, image),
            "text_to_text": (caption, caption),
        }[direction]
        query_QD, gallery_GD = (cut(torch.from_numpy(rows), dim).numpy() for rows in (query, gallery))
        return query_QD, gallery_GD, query_group, gallery_group


@dataclass(frozen=True)
class Measured:
    """A number, and what it was in each draw."""

    value: float
    draws_R: np.ndarray

    def __sub__(self, other: "Measured") -> "Measured":
        return Measured(self.value - other.value, self.draws_R - other.draws_R)

    def __truediv__(self, other: "Measured") -> "Measured":
        return Measured(self.value / max(other.value, 1e-9), self.draws_R / np.maximum(other.draws_R, 1e-9))

    @property
    def interval(self) -> tuple[float, float]:
        low, high = np.quantile(self.draws_R, (0.025, 0.975))
        return float(low), float(high)


def mean_of(several: Sequence[Measured]) -> Measured:
    return Measured(float(np.mean([one.value for one in several])), np.mean([one.draws_R for one in several], axis=0))


# ------------------------------------------------------------------------------------------------ scores


def per_query(embeddings: Embeddings, dim: int, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """The rank of each query's best positive and its average precision, by brute force: (Q,) each; NaN where a query
    has no positive. Ranks and ties are those of mmrl.retrieval."""
    query_QD, gallery_GD, query_group_Q, gallery_group_G = embeddings.sides(direction, dim)
    score_QG = query_QD @ gallery_GD.T
    positive_QG = query_group_Q[:, None] == gallery_group_G
    other_QG = np.where(positive_QG, -np.inf, score_QG)
    if direction in SAME:
        np.fill_diagonal(positive_QG, False)
    count_Q = positive_QG.sum(1)
    mine_QG = torch.from_numpy(np.where(positive_QG, score_QG, -np.inf))
    best_first_QP = mine_QG.topk(max(1, int(count_Q.max())), dim=1).values.numpy()
    place_QP = np.stack(
        [n + (other_QG >= best_first_QP[:, n - 1, None]).sum(1) for n in range(1, best_first_QP.shape[1] + 1)], axis=1
    ).astype(float)
    nth_P = np.arange(1, place_QP.shape[1] + 1)
    has_QP = nth_P <= count_Q[:, None]
    some = np.where(count_Q > 0, 1.0, np.nan)
    average_Q = (nth_P / place_QP * has_QP).sum(1) / np.maximum(count_Q, 1) * some
    return place_QP[:, 0] * some, average_Q


class Draws:
    """The draws of one test set, shared by all that is measured on it."""

    def __init__(self, group_N: np.ndarray, seeds: int) -> None:
        self.concepts = np.unique(group_N)
        rng = np.random.default_rng(0)
        count = len(self.concepts)
        self._weight_RC = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)
        # The same for all test sets, since the same models are behind them.
        self._seed_RS = np.random.default_rng(1).integers(0, seeds, size=(DRAWS, seeds))

    def measure(self, value_SQ: np.ndarray, group_Q: np.ndarray) -> Measured:
        """The mean of a score over queries and seeds."""
        known_Q = ~np.isnan(value_SQ[0])
        place_Q, value_SQ = np.searchsorted(self.concepts, group_Q[known_Q]), value_SQ[:, known_Q]
        count_C = np.bincount(place_Q, minlength=len(self.concepts))
        sum_SC = np.stack([np.bincount(place_Q, row, minlength=len(self.concepts)) for row in value_SQ])
        mean_RS = self._weight_RC @ sum_SC.T / (self._weight_RC @ count_C)[:, None]
        return Measured(float(value_SQ.mean()), np.take_along_axis(mean_RS, self._seed_RS, axis=1).mean(1))


def scores(seeds: Sequence[Embeddings], dim: int, draws: Draws) -> dict[str, dict[str, Measured]]:
    """Direction → metric → what was measured; directions without a positive are left out."""
    found = {}
    for direction in (*CROSS, *SAME):
        group_Q = seeds[0].caption_group_M if direction == "text_to_text" else seeds[0].group_N
        both = [per_query(one, dim, direction) for one in seeds]
        rank_SQ, average_SQ = (np.stack(rows) for rows in zip(*both, strict=True))
        if np.isnan(rank_SQ).all():
            continue
        found[direction] = {
            metric: draws.measure(np.where(np.isnan(rank_SQ), np.nan, rank_SQ <= int(metric[2:])), group_Q)
            for metric in METRICS
            if metric != "mAP"
        } | {"mAP": draws.measure(average_SQ, group_Q)}
    return found


Scores = dict[str, dict[int, dict[str, dict[str, Measured]]]]
"""Arm → dim → direction → metric."""


def score_all(arms: Sequence[tuple[str, int, list[Embeddings]]]) -> Scores:
    draws = Draws(arms[0][2][0].group_N, len(arms[0][2]))
    found: Scores = {}
    for arm, dim, seeds in arms:
        found.setdefault(arm, {})[dim] = scores(seeds, dim, draws)
    return found


def cross(one: dict[str, dict[str, Measured]], metric: str) -> Measured:
    """The mean of image→text and text→image."""
    return mean_of([one[direction][metric] for direction in CROSS])


# ------------------------------------------------------------------------------------------------ the page


def write(
    out: Path, results: Mapping[str, Mapping[str, Any]], dims: Sequence[int], seeds: Sequence[int], tiny: bool
) -> Path:
    """OUT/results.md, results.json and three pictures."""
    out.mkdir(parents=True, exist_ok=True)
    scored = {(world, test): score_all(arms) for world, one in results.items() for test, arms in one["tests"].items()}
    warning = "**A walk through a few pictures and steps, to test the program. These numbers mean nothing.**\n\n"
    parts = [
        "# Nesting and its rivals\n\n" + (warning if tiny else ""),
        f"`make claims` writes this page. Seeds {', '.join(map(str, seeds))}; the arms are told in "
        "tests/benchmarks/claims.py. In %, the mean of image→text and text→image; brackets hold 95 % of 1,000 draws "
        "of concepts and seeds.\n\n",
        "![recall by dim](recall_by_dim.png)\n\n![recall over steps](recall_over_steps.png)\n\n"
        "![recall at any cut](any_cut.png)\n\n",
    ]
    for world, one in results.items():
        parts.append(f"## {world}\n\n{_about(one['ranks'])}\n\n{_verdicts(scored, results, world, dims)}\n")
        for test in one["tests"]:
            parts.append(f"### {world}, {test}\n\n")
            parts += [_table(scored[world, test], dims, metric) for metric in METRICS]
            parts.append(_differences(scored[world, test], dims))
            parts += [_table(scored[world, test], dims, "R@1", way) for way in SAME if _has(scored[world, test], way)]
    (out / "results.md").write_text("".join(parts), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(_as_json(scored, results), indent=1) + "\n")
    _draw_by_dim(out / "recall_by_dim.png", scored)
    _draw_over_steps(out / "recall_over_steps.png", results, dims)
    _draw_any_cut(out / "any_cut.png", results, dims)
    return out / "results.md"


def _percent(one: Measured) -> str:
    low, high = one.interval
    return f"{100 * one.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _table(found: Scores, dims: Sequence[int], metric: str, direction: str | None = None) -> str:
    """Of one direction, or the mean of the two between pictures and texts."""
    title = metric if direction is None else f"{metric}, {_arrow(direction)}"
    lines = [[title, *map(str, dims)], ["---", *["---:"] * len(dims)]]
    for arm, by_dim in found.items():
        shown = (by_dim[dim][direction][metric] if direction else cross(by_dim[dim], metric) for dim in dims)
        lines.append([arm, *map(_percent, shown)])
    return _markdown(lines)


def _has(found: Scores, direction: str) -> bool:
    return all(direction in one for by_dim in found.values() for one in by_dim.values())


def _arrow(direction: str) -> str:
    return direction.replace("_to_", "→")


def _differences(found: Scores, dims: Sequence[int]) -> str:
    lines = [[f"R@1 less that of “{REFERENCE}”", *map(str, dims)], ["---", *["---:"] * len(dims)]]
    for arm, by_dim in found.items():
        if arm != REFERENCE:
            reference = found[REFERENCE]
            lines.append([arm, *(_percent(cross(by_dim[d], "R@1") - cross(reference[d], "R@1")) for d in dims)])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def _about(ranks: Mapping[str, Any]) -> str:
    rank = float(np.mean(ranks["effective_rank"]))
    shares = ranks["share_of_second_moment"]
    kept = ", ".join(f"{dim}: {100 * np.mean([one[dim] for one in shares]):.1f}" for dim in reversed(shares[0]))
    return f"The plain model's effective rank on the training set is {rank:.1f}; its rotation keeps, in %, at {kept}."


def _verdicts(
    scored: Mapping[tuple[str, str], Scores], results: Mapping[str, Any], world: str, dims: Sequence[int]
) -> str:
    """Each claim of nested training, on the first test set that can tell: what was aimed at, and what came out."""
    tests, full = list(results[world]["tests"]), dims[0]
    test, found = tests[0], scored[world, tests[0]]

    def r1(arm: str, dim: int) -> Measured:
        return cross(found[arm][dim], "R@1")

    def r10(arm: str, dim: int) -> Measured:
        return cross(found[arm][dim], "R@10")

    claims = [(f"R@1 at {full}, less plain's", 0.0, r1("nested", full) - r1(REFERENCE, full))]
    for dim in dims[1:]:
        own = r1("nested", dim) - r1(REFERENCE, dim)
        claims.append((f"R@1 at {dim}, less that of a model of that dim", -0.005, own))
    claims += [(f"R@1 at {dim}, less PCA's of plain", 0.0, r1("nested", dim) - r1("PCA", dim)) for dim in dims]
    shares = [one for one in (("a quarter", full // 4, 0.98), ("an eighth", full // 8, 0.95)) if one[1] in dims]
    for name, dim, least in shares:
        claims.append((f"R@10 that {name} of the dims keeps", least, r10("nested", dim) / r10("nested", full)))
    means = [{arm: mean_of([r10(arm, dim) for dim in dims]) for arm in ("nested", "truncated")}] * len(CROSS)
    for way in SAME:
        that = next((one for one in tests if _has(scored[world, one], way)), None)
        if that is None:
            continue
        by_arm, of = scored[world, that], f"{_arrow(way)} on {that}: "
        tax = by_arm["nested"][full][way]["R@1"] - by_arm[REFERENCE][full][way]["R@1"]
        claims.append((f"{of}R@1 at {full}, less plain's", 0.0, tax))
        kept = {dim: by_arm["nested"][dim][way]["R@10"] for dim in dims}
        claims += [(f"{of}R@10 that {name} keeps", least, kept[dim] / kept[full]) for name, dim, least in shares]
        means.append({arm: mean_of([by_arm[arm][dim][way]["R@10"] for dim in dims]) for arm in ("nested", "truncated")})
    nested, truncated = (mean_of([one[arm] for one in means]) for arm in ("nested", "truncated"))
    claims.append(
        (f"mean R@10 over the dims and {len(means)} directions, as a share of plain's, cut", 1.03, nested / truncated)
    )
    lines = [[f"{world}, {test}: the nested model's", "aim", "measured", "reached"], ["---", "---:", "---:", "---"]]
    for what, aim, one in claims:
        lines.append([what, f"≥ {100 * aim:g}", _percent(one), "yes" if one.value >= aim else "no"])
    ratio = steps_to_reach(results[world]["curves"], full)
    lines.append([f"steps to plain's last R@1 at {full}, as a share of plain's", "< 100", *_steps_cells(ratio)])
    return _markdown(lines)


def _steps_cells(ratio: float | None) -> list[str]:
    if ratio is None:
        return ["not reached", "no"]
    return [f"{100 * ratio:.0f}", "yes" if ratio < 1 else "no"]


def steps_to_reach(curves: Mapping[str, Mapping[int, list[Embeddings]]], dim: int) -> float | None:
    """After which share of plain's steps the nested model has plain's last R@1 at `dim`, between the points of the
    curve by a straight line; None if it never has."""
    plain, nested = (
        {step: _quick(seeds, dim, 1) for step, seeds in curves[arm].items()} for arm in ("plain", "nested")
    )
    last = max(plain)
    goal, before, at_before = plain[last], 0, 0.0
    for step, value in nested.items():
        if value >= goal:
            share = (goal - at_before) / max(value - at_before, 1e-9)
            return (before + share * (step - before)) / last
        before, at_before = step, value
    return None


def _quick(seeds: Sequence[Embeddings], dim: int, k: int) -> float:
    """R@k, the mean of both directions and all seeds, without intervals."""
    ranks = [per_query(one, dim, direction)[0] for one in seeds for direction in CROSS]
    return float(np.nanmean([rank <= k for rank in ranks]))


def _as_json(scored: Mapping[tuple[str, str], Scores], results: Mapping[str, Any]) -> dict[str, Any]:
    """Every number and interval, every direction."""
    found: dict[str, Any] = {world: {"ranks": one["ranks"], "tests": {}} for world, one in results.items()}
    for (world, test), arms in scored.items():
        found[world]["tests"][test] = {
            arm: {
                str(dim): {
                    direction: {metric: [one.value, *one.interval] for metric, one in metrics.items()}
                    for direction, metrics in by_direction.items()
                }
                for dim, by_direction in by_dim.items()
            }
            for arm, by_dim in arms.items()
        }
    return found


# ------------------------------------------------------------------------------------------------ the pictures


def _panels(path: Path, titles: Sequence[str], draw: Any, ylabel: str, xlabel: str, log: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(titles), 4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    for number, title in enumerate(titles):
        axes = figure.add_subplot(1, len(titles), number + 1)
        draw(title, axes)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(0, None)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path)


def _draw_by_dim(path: Path, scored: Mapping[tuple[str, str], Scores]) -> None:
    panel_of = {f"{world}, {test}": found for (world, test), found in scored.items()}

    def draw(title: str, axes: Any) -> None:
        for arm, by_dim in panel_of[title].items():
            measured = {dim: cross(one, "R@1") for dim, one in by_dim.items()}
            values = np.array([100 * one.value for one in measured.values()])
            low, high = 100 * np.array([one.interval for one in measured.values()]).T
            axes.plot(list(measured), values, marker="o", markersize=3, color=COLOURS[arm], label=arm)
            axes.fill_between(list(measured), low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)

    _panels(path, list(panel_of), draw, "R@1, %", "dim", log=True)


def _draw_over_steps(path: Path, results: Mapping[str, Any], dims: Sequence[int]) -> None:
    small = min(dims, key=lambda dim: abs(dim - 16))

    def draw(title: str, axes: Any) -> None:
        for arm, steps in results[title]["curves"].items():
            for dim, dash in ((dims[0], "-"), (small, "--")):
                values = [100 * _quick(seeds, dim, 1) for seeds in steps.values()]
                colour = COLOURS.get(arm, COLOURS["truncated"])
                axes.plot(list(steps), values, dash, color=colour, marker="o", markersize=3, label=f"{arm}, {dim}")

    _panels(path, list(results), draw, "R@1, %", "steps", log=False)


def _draw_any_cut(path: Path, results: Mapping[str, Any], dims: Sequence[int]) -> None:
    cuts = sorted({round(2 ** (half / 4)) for half in range(4 * (dims[0].bit_length() - 1) + 1)} | set(dims))

    def draw(title: str, axes: Any) -> None:
        tests = results[title]["tests"]
        for arm, dim, seeds in tests[next(iter(tests))]:
            if dim == dims[0] and arm != REFERENCE:
                values = [100 * _quick(seeds, one, 10) for one in cuts]
                axes.plot(cuts, values, color=COLOURS[arm], label=arm)

    _panels(path, list(results), draw, "R@10, %", "any dim", log=True)
