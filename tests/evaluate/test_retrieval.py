"""Scores against brute force written from their definitions, one query at a time."""

import math

import numpy as np
import pytest
import torch

import mmrl
from mmrl.errors import InputError
from mmrl.evaluate.retrieval import chance


def brute_force(query: np.ndarray, gallery: np.ndarray, positive: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """Straight from the definitions: rank = 1 + the non-positives that score as high or higher."""
    hits: dict[int, list[bool]] = {k: [] for k in ks}
    precision, r_precision, gain, best = [], [], [], []
    for q in range(len(query)):
        if not positive[q].any():
            continue
        score = (query[q] * gallery).sum(1)
        mine = sorted(score[positive[q]], reverse=True)
        others = score[~positive[q]]
        places = [n + 1 + int((others >= value).sum()) for n, value in enumerate(mine)]
        best.append(places[0])
        for k in ks:
            hits[k].append(places[0] <= k)
        precision.append(np.mean([(n + 1) / place for n, place in enumerate(places)]))
        within = [(n + 1) / place for n, place in enumerate(places) if place <= len(places)]
        r_precision.append(sum(within) / len(places))
        ideal = sum(1 / math.log2(n + 2) for n in range(min(len(places), 10)))
        gain.append(sum(1 / math.log2(place + 1) for place in places if place <= 10) / ideal)
    scores = {f"R@{k}": float(np.mean(hits[k])) for k in ks}
    return {
        **scores,
        "mAP": float(np.mean(precision)),
        "mAP@R": float(np.mean(r_precision)),
        "nDCG@10": float(np.mean(gain)),
        "MRR": float(np.mean([1 / place for place in best])),
        "median_rank": float(np.median(best)),
        "mean_rank": float(np.mean(best)),
    }


def unit(x: np.ndarray, dim: int) -> np.ndarray:
    return x[:, :dim] / np.linalg.norm(x[:, :dim], axis=1, keepdims=True)


@pytest.mark.parametrize(("images", "texts", "groups"), [(37, 90, None), (20, 20, 6), (5, 300, 3), (1, 2, None)])
def test_scores_are_the_definitions(images: int, texts: int, groups: int | None) -> None:
    rng = np.random.default_rng(images)
    image_ND, text_MD = rng.normal(size=(images, 24)), rng.normal(size=(texts, 24))
    if groups is None:
        image_of_text = np.concatenate([np.arange(images), rng.integers(0, images, texts - images)])
        image_group, text_group, how = np.arange(images), image_of_text, {"image_of_text_M": image_of_text}
    else:
        image_group, text_group = rng.integers(0, groups, images), rng.integers(0, groups, texts)
        how = {"image_group_N": image_group, "text_group_M": text_group}
    result = mmrl.retrieval(image_ND, text_MD, dims=[24, 3], ks=(1, 2, 5), **how)
    assert list(result) == [24, 3]
    for dim in (24, 3):
        x, y = unit(image_ND, dim), unit(text_MD, dim)
        positive = image_group[:, None] == text_group[None, :]
        assert result[dim]["image_to_text"] == pytest.approx(brute_force(x, y, positive, (1, 2, 5)))
        assert result[dim]["text_to_image"] == pytest.approx(brute_force(y, x, positive.T, (1, 2, 5)))


def test_ties_count_against_the_query() -> None:
    constant = np.ones((10, 4), np.float32)
    scores = mmrl.retrieval(constant, constant)[4]["image_to_text"]
    assert scores["R@1"] == scores["R@5"] == 0
    assert scores["R@10"] == 1
    assert scores["median_rank"] == 10


def test_no_group_is_nobodys_group() -> None:
    x, none = torch.eye(4), torch.full((4,), -1)
    with pytest.raises(InputError, match="no query has a positive"):
        mmrl.retrieval(x, x, image_group_N=none, text_group_M=none)
    scores = mmrl.retrieval(x, x, image_group_N=torch.tensor([-1, 5, -1, 6]), text_group_M=torch.tensor([-1, 5, 6, 6]))
    assert scores[4]["text_to_image"]["R@1"] == pytest.approx(2 / 3)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(50, 8), torch.randn(50, 8)
    whole = mmrl.retrieval(x, y, dims=[8, 4])
    monkeypatch.setattr("mmrl.evaluate.tiles._CPU_TILE", 64)
    assert mmrl.retrieval(x, y, dims=[8, 4]) == whole


def test_chance_is_what_random_orders_give() -> None:
    group = torch.tensor([0] * 5 + [1] * 3 + [2])
    expected = chance(group, group, (1, 3))
    rng = torch.Generator().manual_seed(0)
    hits = [
        bool((group[torch.randperm(9, generator=rng)[:3]] == group[q]).any()) for q in range(9) for _ in range(2000)
    ]
    assert expected["R@3"] == pytest.approx(np.mean(hits), abs=0.01)
    assert expected["R@1"] == pytest.approx((25 + 9 + 1) / 81)
    assert chance(torch.arange(5), torch.arange(5), (10,)) == {"R@10": 1.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image_ND": np.full((3, 4), np.nan)}, "image_ND: holds numbers that are not finite"),
        ({"image_ND": np.zeros((0, 4))}, "at least one row"),
        ({"dims": [5]}, "5 is out of range"),
        ({"text_MD": np.ones((5, 4))}, "image_of_text_M: needed"),
        ({"text_MD": np.ones((3, 2))}, "widths 4 and 2 differ"),
        ({"image_of_text_M": np.array([0, 1, 3])}, "must name images 0 to 2"),
        ({"image_group_N": np.arange(3)}, "give both or neither"),
        ({"image_group_N": np.arange(3), "text_group_M": np.arange(3) + 5}, "no query has a positive"),
    ],
)
def test_unfit_arguments_are_named(arguments: dict[str, object], says: str) -> None:
    good = {"image_ND": np.ones((3, 4)), "text_MD": np.ones((3, 4))}
    with pytest.raises(InputError, match=says):
        mmrl.retrieval(**{**good, **arguments})  # pyright: ignore[reportArgumentType]
