"""Budgets and numbers as users write them; the advice on options whose losses are known."""

from typing import Any

import pytest
import torch

from mmrl.errors import InputError
from mmrl.evaluate.analysis.advice import (
    Budget,
    advice_lines,
    advise,
    describe,
    format_bytes,
    format_count,
    parse_budget,
    parse_count,
)
from mmrl.evaluate.analysis.bootstrap import Bootstrap
from mmrl.evaluate.analysis.compression import Option

QUERIES = 4000


def option(dim: int, precision: str, hits: int, candidates: int = 0) -> Option:
    """An option that answers the first `hits` queries."""
    rank_Q = torch.where(torch.arange(QUERIES) < hits, 1.0, 99.0).double()
    return Option(dim, precision, rank_Q, candidates, 64 if candidates else 0)


FULL = option(64, "fp32", 3000)


def advice_on(*options: Option, budget: str = "recall_drop=1%") -> dict[str, Any]:
    return advise([FULL, *options], parse_budget(budget), Bootstrap(torch.arange(QUERIES)), 10**8)


def chosen(answer: dict[str, Any] | None) -> tuple[int, str] | None:
    return None if answer is None else (answer["dim"], answer["precision"])


def test_the_smallest_within_the_budget_is_named() -> None:
    narrower = option(32, "fp32", 2990), option(32, "int8", 2980), option(16, "fp32", 2900)
    advice = advice_on(option(64, "int8", 2999), *narrower)
    assert chosen(advice["smallest"]) == (32, "int8")
    assert chosen(advice["dim"]) == (32, "fp32")
    assert advice["smallest"]["lost"]["value"] == pytest.approx(20 / 3000)
    assert advice["smallest"]["lost"]["low"] < 20 / 3000 < advice["smallest"]["lost"]["high"]
    assert advice["smallest"]["saved"] == (256 - 32) * 10**8
    assert advice["smallest"]["times_smaller"] == 8


def test_confirmed_means_the_whole_interval_is_within_the_budget() -> None:
    advice = advice_on(option(64, "int8", 2999), option(32, "int8", 2972))
    assert chosen(advice["smallest"]) == (32, "int8")
    assert not advice["smallest"]["within_budget_surely"]
    assert chosen(advice["sure"]) == (64, "int8")
    assert chosen(advice_on(option(64, "int8", 2972))["sure"]) is None


def test_a_dim_counts_only_if_all_larger_ones_do() -> None:
    advice = advice_on(option(32, "int8", 2900), option(16, "int8", 3000), option(64, "int8", 3000))
    assert chosen(advice["smallest"]) == (64, "int8")


def test_percentage_points_are_not_relative() -> None:
    lossy = option(32, "fp32", 2965)  # 35 of 4000 queries: 0.875 points, 1.17 % of what was found
    assert chosen(advice_on(lossy)["dim"]) == (64, "fp32")
    assert chosen(advice_on(lossy, budget="recall_drop=0.9pp")["dim"]) == (32, "fp32")


def test_two_stages_are_advised_separately() -> None:
    advice = advice_on(option(32, "binary", 1000), option(32, "binary", 2990, 20), option(32, "binary", 2995, 50))
    assert advice["two_stage"]["candidates"] == 20
    assert chosen(advice["smallest"]) == (64, "fp32")
    assert advice_lines(advice) == (
        "the full vector, 64-d fp32",
        "no smaller dim or codec loses at most 1 % of R@10, text→image",
    )
    assert describe(advice["two_stage"], advice).startswith(
        "32-d binary + 20 reranked: 64x smaller, R@10 −0.3 % (−0.5…"
    )
    assert advice["two_stage"]["commands"] == [
        "mmrl embed MODEL SHARDS EMBEDDINGS --dim 64",
        "mmrl index EMBEDDINGS INDEX --code binary --dim 32 --candidates 20",
    ]


def test_the_advice_has_two_lines() -> None:
    advice = advice_on(option(64, "int8", 3000), option(32, "int8", 2972))
    first, second = advice_lines(advice)
    lost = advice["smallest"]["lost"]
    assert first == (
        "32-d int8: 8x smaller, R@10 −0.9 % "
        f"(−{100 * lost['high']:.1f}…−{100 * lost['low']:.1f} at 95 %, 4,000 queries)"
    )
    assert second.startswith(
        "confirmed to lose at most 1 % of R@10, text→image: 64-d int8: 4x smaller, R@10 ±0.0 % (−0."
    )
    confirmed = advice_on(option(32, "int8", 3000))
    assert advice_lines(confirmed)[0].startswith("32-d int8: 8x smaller, R@10 ±0.0 % (−0.")
    assert advice_lines(confirmed)[1] == "confirmed to lose at most 1 % of R@10, text→image, at 95 %"
    assert "R@10 +3.3 % (2." in advice_lines(advice_on(option(32, "int8", 3100)))[0]
    unconfirmed = advice_lines(advice_on(option(32, "int8", 2972)))[1]
    assert unconfirmed.endswith(": only the full vector; more queries confirm smaller ones")
    of_texts = advice_on(option(32, "int8", 3000), budget="recall_drop=1%,direction=image_to_text")
    assert of_texts["smallest"]["commands"][0].endswith("--precision int8 --texts")
    points = advice_on(option(32, "int8", 2990), budget="recall_drop=0.5pp,metric=R@5")
    assert ", R@5 −0.2 points (" in advice_lines(points)[0]


def test_queries_of_one_item_are_named() -> None:
    advice = advise([FULL, option(32, "int8", 3000)], Budget(), Bootstrap(torch.arange(QUERIES) // 4), 10**8)
    assert advice_lines(advice)[0].endswith(" at 95 %, 4,000 queries of 1,000 items)")


def test_a_model_that_finds_nothing_gets_no_advice() -> None:
    nothing = option(64, "fp32", 0)
    advice = advise([nothing, option(32, "int8", 0)], Budget(), Bootstrap(torch.arange(QUERIES)), 1000)
    assert advice_lines(advice) == (
        "no recommendation",
        "the full vector finds no positive among the first 10 of any query",
    )


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("recall_drop=1%", Budget()),
        ("recall_drop=0.5pp,metric=R@5", Budget(0.005, False, 5)),
        (" recall_drop = .5 % , direction=image_to_text", Budget(0.005, True, 10, "image_to_text")),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1%", "'1%' is not understood; write recall_drop=1%"),
        ("recall_drop=1", "'1' is not a number up to 100 with % or pp"),
        ("recall_drop=101%", "not a number up to 100"),
        ("recall_drop=1%,recall_drop=2%", "not understood"),
        ("metric=R@10", "recall_drop is missing"),
        ("recall_drop=1%,metric=mAP", "is not a recall; write e.g. metric=R@10"),
        ("recall_drop=1%,metric=R@0", "is not a recall; write e.g. metric=R@10"),
        ("recall_drop=1%,direction=up", "allowed: image_to_text, text_to_image"),
    ],
)
def test_other_budgets_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_budget(text)


def test_numbers_are_read_and_written() -> None:
    assert [parse_count(text) for text in ("100M", "2.5b", "80K", "1_000", "7")] == [10**8, 25 * 10**8, 80_000, 1000, 7]
    for text in ("", "0", "-3", "1e6", "many", "5X"):
        with pytest.raises(InputError, match="is not a number of vectors"):
            parse_count(text)
    assert [format_count(n) for n in (10**8, 25 * 10**8, 80_000, 999)] == ["100M", "2.5B", "80K", "999"]
    assert [format_bytes(n) for n in (12, 204_800_000_000, 999_999)] == ["12 bytes", "205 GB", "1 MB"]
