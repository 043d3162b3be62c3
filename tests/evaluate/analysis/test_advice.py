"""Budgets and numbers as users write them; the advice on options whose losses are known."""

from typing import Any

import pytest
import torch

from mmrl.errors import InputError
from mmrl.evaluate.analysis.advice import Budget, advise, parse_budget, parse_count, short_count, size_words, words
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


def test_sure_is_only_what_the_whole_interval_allows() -> None:
    advice = advice_on(option(64, "int8", 2999), option(32, "int8", 2972))
    assert chosen(advice["smallest"]) == (32, "int8")
    assert not advice["smallest"]["within_budget_surely"]
    assert chosen(advice["sure"]) == (64, "int8")
    assert chosen(advice_on(option(64, "int8", 2972))["sure"]) is None


def test_one_dims_luck_does_not_count() -> None:
    advice = advice_on(option(32, "int8", 2900), option(16, "int8", 3000), option(64, "int8", 3000))
    assert chosen(advice["smallest"]) == (64, "int8")


def test_points_are_not_shares() -> None:
    lossy = option(32, "fp32", 2965)  # 35 of 4000 queries: 0.875 points, 1.17 % of what was found
    assert chosen(advice_on(lossy)["dim"]) == (64, "fp32")
    assert chosen(advice_on(lossy, budget="recall_drop=0.9pp")["dim"]) == (32, "fp32")


def test_two_stages_are_apart() -> None:
    advice = advice_on(option(32, "binary", 1000), option(32, "binary", 2990, 20), option(32, "binary", 2995, 50))
    assert advice["two_stage"]["candidates"] == 20
    assert chosen(advice["smallest"]) == (64, "fp32")
    said = words(advice)
    assert said.headline == "Nothing below all 64 numbers in fp32 keeps within the budget."
    assert any("20 candidates are reranked" in line and "128 bytes each" in line for line in said.others)


def test_the_words_say_the_numbers() -> None:
    said = words(advice_on(option(64, "int8", 3000), option(32, "int8", 2972)))
    assert said.headline == "Probably 32 of 64 numbers as int8 will do; these queries confirm all 64 numbers as int8."
    assert "4,000 queries are too few to confirm it; if the estimate is right, about " in said.certainty
    assert said.others[0].startswith("Confirmed by these queries: 64-d int8, 64 bytes, 0.0 % lost")
    assert said.evidence.startswith("R@10, text→image, is 74.3 % instead of 75.0 %: 0.9 % lost (95 % interval ")
    assert said.saving == "100M vectors take 3.2 GB instead of 25.6 GB: 32 bytes each instead of 256, 8 times less."
    sure = words(advice_on(option(32, "int8", 3000)))
    assert sure.headline == "Keep 32 of 64 numbers as int8."
    assert sure.certainty == "The whole interval is within the budget, so 4,000 queries confirm it."
    nothing = words(advice_on(option(32, "int8", 2972)))
    assert nothing.headline.endswith("these queries confirm nothing below the full vector.")
    near = words(advice_on(option(32, "int8", 2970)))
    assert "so near the limit that 4,000 queries cannot tell on which side it lies" in near.certainty


def test_a_model_that_finds_nothing_gets_no_advice() -> None:
    nothing = option(64, "fp32", 0)
    advice = advise([nothing, option(32, "int8", 0)], Budget(), Bootstrap(torch.arange(QUERIES)), 1000)
    assert words(advice).headline.startswith("The full vector answers no query within the first 10")


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
        ("1%", "'1%' is not understood; write it as recall_drop=1%"),
        ("recall_drop=1", "'1' is no share such as 1% or 0.5pp"),
        ("recall_drop=101%", "no share"),
        ("recall_drop=1%,recall_drop=2%", "not understood"),
        ("metric=R@10", "recall_drop is missing"),
        ("recall_drop=1%,metric=mAP", "only recall has a budget"),
        ("recall_drop=1%,metric=R@0", "only recall has a budget"),
        ("recall_drop=1%,direction=up", "allowed are text_to_image, image_to_text"),
    ],
)
def test_other_budgets_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_budget(text)


def test_numbers_are_read_and_written() -> None:
    assert [parse_count(text) for text in ("100M", "2.5b", "80K", "1_000", "7")] == [10**8, 25 * 10**8, 80_000, 1000, 7]
    for text in ("", "0", "-3", "1e6", "many", "5X"):
        with pytest.raises(InputError, match="is no number of vectors"):
            parse_count(text)
    assert [short_count(n) for n in (10**8, 25 * 10**8, 80_000, 999)] == ["100M", "2.5B", "80K", "999"]
    assert [size_words(n) for n in (12, 204_800_000_000, 999_999)] == ["12 bytes", "205 GB", "1 MB"]
