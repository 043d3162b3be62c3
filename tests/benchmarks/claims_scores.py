"""The statistics of claims.py.

An interval holds the middle 95 % of what 1,000 draws give, each of them a draw of concepts (all queries of a concept
together) and of seeds, with replacement. A difference of two arms is taken within each draw: the same queries, the
same seeds.

Shapes: N pictures and their names, M distinct captions, S seeds, Q queries and G gallery rows of one direction, C
concepts, R draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from mmrl.nesting import truncate

METRICS = ("R@1", "R@5", "R@10", "mAP")
CROSS, SAME = ("image_to_text", "text_to_image"), ("image_to_image", "text_to_text")
DRAWS = 1000
_FEWEST_QUERIES = 30
REFERENCE = "plain, d only"


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

    def block(self, first: int, last: int) -> "Embeddings":
        """The numbers from `first` to before `last` alone."""
        rows = {name: getattr(self, name)[:, first:last] for name in ("image_ND", "text_ND", "caption_MD")}
        return replace(self, **rows)

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
        query_QD, gallery_GD = (truncate(torch.from_numpy(rows), dim).numpy() for rows in (query, gallery))
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
    """Direction → metric → what was measured; directions with too few queries that have a positive are left out."""
    found = {}
    for direction in (*CROSS, *SAME):
        group_Q = seeds[0].caption_group_M if direction == "text_to_text" else seeds[0].group_N
        both = [per_query(one, dim, direction) for one in seeds]
        rank_SQ, average_SQ = (np.stack(rows) for rows in zip(*both, strict=True))
        if (~np.isnan(rank_SQ[0])).sum() < _FEWEST_QUERIES:
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


def quick(seeds: Sequence[Embeddings], dim: int, k: int) -> float:
    """R@k, the mean of both directions and all seeds, without intervals."""
    ranks = [per_query(one, dim, direction)[0] for one in seeds for direction in CROSS]
    return float(np.nanmean([rank <= k for rank in ranks]))
