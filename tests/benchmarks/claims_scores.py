"""The statistics of claims.py: retrieval scores with 95 % bootstrap intervals.

An interval is the middle 95 % of 1,000 draws. Each draw resamples concepts (all queries of a concept together) and
seeds, with replacement. All arms share the draws, so differences and ratios are paired: the same queries, the same
seeds.

Shapes: N images and their names, M distinct captions, S seeds, Q queries and G gallery rows of one direction, C
concepts, R draws, T checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from mmrl.nesting import truncate

METRICS = ("R@1", "R@5", "R@10", "mAP")
CROSS, SAME = ("image_to_text", "text_to_image"), ("image_to_image", "text_to_text")
DRAWS = 1000
_MIN_QUERIES = 30


@dataclass(frozen=True)
class Embeddings:
    """A test set; equal groups are positives."""

    image_ND: np.ndarray
    text_ND: np.ndarray
    """The name of each image."""
    group_N: np.ndarray
    caption_MD: np.ndarray
    """All distinct captions, e.g. synonyms and other languages. None starts with another one of its group."""
    caption_group_M: np.ndarray

    def save(self, path: Path) -> None:
        """Write the file in one step: it is complete or absent."""
        partial = path.with_name(f".{path.name}")
        with partial.open("wb") as file:
            np.savez(file, **{one.name: getattr(self, one.name) for one in fields(self)})
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> "Embeddings":
        with np.load(path) as arrays:
            return Embeddings(**arrays)

    def block(self, first: int, last: int) -> "Embeddings":
        """Only the dims from `first` to before `last`."""
        rows = {name: getattr(self, name)[:, first:last] for name in ("image_ND", "text_ND", "caption_MD")}
        return replace(self, **rows)

    def sides(self, direction: str, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The queries and the gallery, truncated to `dim`, and the groups of both."""
        image, text = (self.image_ND, self.group_N), (self.text_ND, self.group_N)
        caption = self.caption_MD, self.caption_group_M
        (query, query_group), (gallery, gallery_group) = {
            "image_to_text": (image, text),
            "text_to_image": (text, image),
            "image_to_image": (image, image),
            "text_to_text": (caption, caption),
        }[direction]
        query_QD, gallery_GD = (truncate(torch.from_numpy(rows), dim).numpy() for rows in (query, gallery))
        return query_QD, gallery_GD, query_group, gallery_group


@dataclass(frozen=True)
class Measured:
    """A value, and its value in each draw."""

    value: float
    draws_R: np.ndarray

    def __sub__(self, other: "Measured") -> "Measured":
        return Measured(self.value - other.value, self.draws_R - other.draws_R)

    def __truediv__(self, other: "Measured") -> "Measured":
        return Measured(self.value / max(other.value, 1e-9), self.draws_R / np.maximum(other.draws_R, 1e-9))

    @property
    def interval(self) -> tuple[float, float]:
        # Without interpolation between draws, which may be infinite (steps_to_reach).
        low, high = np.quantile(self.draws_R, (0.025, 0.975), method="inverted_cdf")
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
    negative_QG = np.where(positive_QG, -np.inf, score_QG)
    if direction in SAME:
        np.fill_diagonal(positive_QG, False)
    count_Q = positive_QG.sum(1)
    positive_score_QG = torch.from_numpy(np.where(positive_QG, score_QG, -np.inf))
    best_first_QP = positive_score_QG.topk(max(1, int(count_Q.max())), dim=1).values.numpy()
    rank_QP = np.stack(
        [n + (negative_QG >= best_first_QP[:, n - 1, None]).sum(1) for n in range(1, best_first_QP.shape[1] + 1)],
        axis=1,
    ).astype(float)
    nth_P = np.arange(1, rank_QP.shape[1] + 1)
    has_QP = nth_P <= count_Q[:, None]
    nan_Q = np.where(count_Q > 0, 1.0, np.nan)
    average_Q = (nth_P / rank_QP * has_QP).sum(1) / np.maximum(count_Q, 1) * nan_Q
    return rank_QP[:, 0] * nan_Q, average_Q


class Draws:
    """The bootstrap draws of a test set. Equal arguments give equal draws."""

    def __init__(self, group_N: np.ndarray, seeds: int) -> None:
        self.concepts = np.unique(group_N)
        rng = np.random.default_rng(0)
        count = len(self.concepts)
        self._weight_RC = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(float)
        # Equal for all test sets, because they are embedded by the same models.
        self._seed_RS = np.random.default_rng(1).integers(0, seeds, size=(DRAWS, seeds))

    def measure(self, value_SQ: np.ndarray, group_Q: np.ndarray) -> Measured:
        """The mean of a score over queries and seeds."""
        known_Q = ~np.isnan(value_SQ[0])
        concept_Q, value_SQ = np.searchsorted(self.concepts, group_Q[known_Q]), value_SQ[:, known_Q]
        count_C = np.bincount(concept_Q, minlength=len(self.concepts))
        sum_SC = np.stack([np.bincount(concept_Q, row, minlength=len(self.concepts)) for row in value_SQ])
        mean_RS = self._weight_RC @ sum_SC.T / (self._weight_RC @ count_C)[:, None]
        return Measured(float(value_SQ.mean()), np.take_along_axis(mean_RS, self._seed_RS, axis=1).mean(1))


ByDirection = dict[str, dict[str, Measured]]
"""Direction → metric."""
Scores = dict[str, dict[int, ByDirection]]
"""Arm → dim."""
Curves = dict[str, dict[int, dict[int, ByDirection]]]
"""Arm → dim → step; only image→text and text→image."""


def scores(
    seeds: Sequence[Embeddings], dim: int, draws: Draws, directions: Sequence[str] = (*CROSS, *SAME)
) -> ByDirection:
    """All metrics by direction. A direction in which too few queries have a positive is left out."""
    found: ByDirection = {}
    for direction in directions:
        group_Q = seeds[0].caption_group_M if direction == "text_to_text" else seeds[0].group_N
        both = [per_query(one, dim, direction) for one in seeds]
        rank_SQ, average_SQ = (np.stack(rows) for rows in zip(*both, strict=True))
        if (~np.isnan(rank_SQ[0])).sum() < _MIN_QUERIES:
            continue
        found[direction] = {
            metric: draws.measure(np.where(np.isnan(rank_SQ), np.nan, rank_SQ <= int(metric[2:])), group_Q)
            for metric in METRICS
            if metric != "mAP"
        } | {"mAP": draws.measure(average_SQ, group_Q)}
    return found


def score_all(arms: Sequence[tuple[str, int, list[Embeddings]]]) -> Scores:
    """Scores of (arm, dim, one of each seed) on one test set."""
    draws = _draws_of(arms[0][2])
    found: Scores = {}
    for arm, dim, seeds in arms:
        found.setdefault(arm, {})[dim] = scores(seeds, dim, draws)
    return found


def score_curves(curves: Mapping[str, Mapping[int, list[Embeddings]]], dims: Sequence[int]) -> Curves:
    """Scores of arm → step → one of each seed, on the draws that `score_all` uses for this test set."""
    draws = _draws_of(next(iter(next(iter(curves.values())).values())))
    return {
        arm: {dim: {step: scores(seeds, dim, draws, CROSS) for step, seeds in steps.items()} for dim in dims}
        for arm, steps in curves.items()
    }


def _draws_of(seeds: Sequence[Embeddings]) -> Draws:
    return Draws(seeds[0].group_N, len(seeds))


def cross(one: ByDirection, metric: str) -> Measured:
    """The mean of image→text and text→image."""
    return mean_of([one[direction][metric] for direction in CROSS])


def quick_recall(seeds: Sequence[Embeddings], dim: int, k: int) -> float:
    """R@k, the mean of image→text and text→image and of all seeds, without an interval."""
    ranks = [per_query(one, dim, direction)[0] for one in seeds for direction in CROSS]
    return float(np.nanmean([rank <= k for rank in ranks]))


# ------------------------------------------------------------------------------------------------ convergence


def steps_to_reach(curve: Mapping[int, Measured], target: Measured, total: int) -> Measured:
    """The share of `total` steps after which a curve first reaches a target; infinite if it never does.

    Computed for the values and within each draw. Between two checkpoints, and from recall 0 at step 0 to the first
    one, the curve is a straight line.

    Args:
        curve: step → recall.
    """
    step_T = np.array([0, *curve])
    recall_TR = np.stack([np.append(one.value, one.draws_R) for one in curve.values()])
    recall_TR = np.concatenate([np.zeros_like(recall_TR[:1]), recall_TR])
    target_R = np.append(target.value, target.draws_R)
    reached_TR = recall_TR >= target_R - 1e-12  # equal means, summed in another order
    last_R = reached_TR.argmax(0)
    first_R = np.maximum(last_R - 1, 0)
    start_R, end_R = (np.take_along_axis(recall_TR, index_R[None], axis=0)[0] for index_R in (first_R, last_R))
    # The line rises to the target or above it. A target of 0 is reached at step 0, where both ends are one point.
    part_R = np.clip((target_R - start_R) / np.maximum(end_R - start_R, 1e-12), 0, 1)
    share_R = (step_T[first_R] + part_R * (step_T[last_R] - step_T[first_R])) / total
    share_R[~reached_TR.any(0)] = np.inf
    return Measured(float(share_R[0]), share_R[1:])


def nearest_step(curve: Mapping[int, object], step: float) -> int:
    """The checkpoint of a curve that is nearest to `step`."""
    return min(curve, key=lambda one: abs(one - step))
