"""mmrl.retrieval against brute force and the reference libraries; errors."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.oracles import brute_force, by_clip_benchmark, by_trec_eval, unit

import mmrl
from mmrl.errors import InputError
from mmrl.evaluate.ranking.retrieval import chance


@pytest.mark.parametrize(("images", "texts", "groups"), [(37, 90, None), (20, 20, 6), (5, 300, 3), (1, 2, None)])
def test_scores_equal_brute_force(images: int, texts: int, groups: int | None) -> None:
    rng = np.random.default_rng(images)
    image_ND, text_MD = rng.normal(size=(images, 24)), rng.normal(size=(texts, 24))
    how: dict[str, Any]
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


@pytest.mark.parametrize(("images", "texts"), [(61, 305), (130, 187)])
def test_scores_equal_the_reference_libraries(images: int, texts: int) -> None:
    rng = np.random.default_rng(texts)
    image_of_text = np.concatenate([np.arange(images), rng.integers(0, images, texts - images)])
    image_ND = rng.normal(size=(images, 48))
    text_MD = image_ND[image_of_text] + 3 * rng.normal(size=(texts, 48))
    result = mmrl.retrieval(image_ND, text_MD, image_of_text, dims=[48, 7], ks=(1, 5, 10))
    for dim in (48, 7):
        score_NM = unit(image_ND, dim) @ unit(text_MD, dim).T
        positive_NM = np.arange(images)[:, None] == image_of_text
        for way, score, positive in (
            ("image_to_text", score_NM, positive_NM),
            ("text_to_image", score_NM.T.copy(), positive_NM.T.copy()),
        ):
            ours = result[dim][way]
            for k in (1, 5, 10):
                assert ours[f"R@{k}"] == pytest.approx(by_clip_benchmark(score, positive, k), abs=1e-6)
            for name, value in by_trec_eval(score, positive).items():
                assert ours[name] == pytest.approx(value, abs=1e-6)


def test_folds_are_averaged() -> None:
    image_of_text = np.arange(120) // 2
    rng = np.random.default_rng(0)
    image_ND, text_MD = rng.normal(size=(60, 8)), rng.normal(size=(120, 8))
    folded = mmrl.retrieval(image_ND, text_MD, image_of_text, dims=[8], folds=3)[8]
    parts = [
        mmrl.retrieval(image_ND[n : n + 20], text_MD[2 * n : 2 * n + 40], image_of_text[:40], dims=[8])[8]
        for n in (0, 20, 40)
    ]
    for way, scores in folded.items():
        for name, value in scores.items():
            assert value == pytest.approx(np.mean([part[way][name] for part in parts]))
    with pytest.raises(InputError, match="60 images cannot be divided into 7 equal folds"):
        mmrl.retrieval(image_ND, text_MD, image_of_text, folds=7)


def test_ties_count_against_the_query() -> None:
    constant = np.ones((10, 4), np.float32)
    scores = mmrl.retrieval(constant, constant)[4]["image_to_text"]
    assert scores["R@1"] == scores["R@5"] == 0
    assert scores["R@10"] == 1
    assert scores["median_rank"] == 10


def test_rows_without_a_group_have_no_positives() -> None:
    x, none = torch.eye(4), torch.full((4,), -1)
    with pytest.raises(InputError, match="no query has a positive"):
        mmrl.retrieval(x, x, image_group_N=none, text_group_M=none)
    scores = mmrl.retrieval(x, x, image_group_N=torch.tensor([-1, 5, -1, 6]), text_group_M=torch.tensor([-1, 5, 6, 6]))
    assert scores[4]["text_to_image"]["R@1"] == pytest.approx(2 / 3)


def test_chance_equals_the_mean_over_random_orders() -> None:
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
        ({"image_ND": np.full((3, 4), np.nan)}, "image_ND: contains values that are not finite"),
        ({"image_ND": np.zeros((0, 4))}, "at least one row"),
        ({"text_MD": np.full((3, 4), 1e30)}, "text_MD: contains values beyond 1e"),
        ({"ks": (0, 5)}, "ks: .* distinct whole numbers from 1"),
        ({"ks": (5.0,)}, "ks: .* distinct whole numbers from 1"),  # else the key of its recall is R@5.0
        ({"ks": ("5",)}, "ks: .* distinct whole numbers from 1"),
        ({"dims": [5]}, "5 is out of range"),
        ({"text_MD": np.ones((5, 4))}, "image_of_text_M: needed"),
        ({"text_MD": np.ones((3, 2))}, "widths 4 and 2 differ"),
        ({"image_of_text_M": np.array([0, 1, 3])}, "must name images 0 to 2"),
        ({"image_of_text_M": np.array([0, 1, np.nan])}, "must name images 0 to 2"),
        ({"image_of_text_M": np.zeros((3, 1), int)}, r"groups: shapes \(3,\) and \(3, 1\) for 3 images and 3 texts"),
        ({"image_group_N": np.arange(3)}, "give both or neither"),
        ({"image_of_text_M": np.zeros(3, int), "folds": 3}, "no query has a positive"),  # two folds without texts
        ({"image_group_N": np.arange(3), "text_group_M": np.arange(3) + 5}, "no query has a positive"),
    ],
)
def test_invalid_arguments_are_named(arguments: dict[str, object], says: str) -> None:
    good = {"image_ND": np.ones((3, 4)), "text_MD": np.ones((3, 4))}
    with pytest.raises(InputError, match=says):
        mmrl.retrieval(**{**good, **arguments})  # pyright: ignore[reportArgumentType]
