"""What the tables say of scores that look odd, and what fits on a screen."""

from typing import Any

from rich.console import Console

from mmrl.evaluate.report.tables import all_tables, brief_tables, recall_markdown, score_notes, table

WAYS = ("image_to_text", "text_to_image")


def entry(recall_of: dict[str, float], **more: Any) -> dict[str, Any]:
    """A set's entry in retrieval.json with these R@10."""

    def scores(value: float) -> dict[str, dict[str, float]]:
        return {way: {"R@1": value / 2, "R@10": value} for way in WAYS}

    dims = {dim: scores(value) for dim, value in recall_of.items()}
    return {"dims": dims, "chance": scores(0.1), "num_images": 5, "num_texts": 6, "num_bad": 0, **more}


def analysis(low: float, metric: str = "R@10") -> dict[str, Any]:
    """The part of an analysis that says how a 4-d prefix compares with the full vector."""
    paired = {way: {"full": {"4": {"lead": {"value": 0.1, "low": low, "high": 0.2}, "p": 0.01}}} for way in WAYS}
    return {"paired": paired, "advice": {"budget": {"metric": metric}, "smallest": {"dim": 4}}}


def printed(tables: list[Any]) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(*tables, sep="\n")
    return capture.get()


def test_a_prefix_above_the_full_vector_is_explained() -> None:
    assert score_notes(entry({"8": 0.5, "4": 0.5, "2": 0.4})) == []
    odd = entry({"8": 0.5, "4": 0.6, "2": 0.4})
    assert score_notes(odd) == [
        f"{way} R@10 of 4-d is 10.0 points above 8-d: mmrl eval --out tests whether by chance"
        for way in ("image→text", "text→image")
    ]
    assert (
        "10.0 points above 8-d: that may be chance (−1.0 to 20.0 at 95 %)"
        in score_notes({**odd, "analysis": analysis(-0.01)})[0]
    )
    assert score_notes({**odd, "analysis": analysis(0.01)})[0].endswith(
        "8-d: the later dims hold more noise than signal for these queries (1.0 to 20.0 at 95 %)"
    )
    assert "tests whether by chance" in score_notes({**odd, "analysis": analysis(0.01, "R@1")})[0]
    in_folds = score_notes({**odd, "analysis": analysis(0.01), "folds": 5})
    assert in_folds[0].endswith("8-d: mmrl eval --out without --folds tests whether by chance")


def test_names_are_shown_as_they_are() -> None:
    """Not as rich's markup, which leaves out [new] and fails at [/old], and without control characters."""
    shown = printed([table("photos [new] \x1b[31m", [["dim", "run[v2]", "[/old]"], ["8", "1.0", "2.0"]])])
    for words in ("photos [new] \\x1b[31m", "run[v2]", "[/old]"):
        assert words in shown


def test_equal_captions_are_a_row_and_a_sentence() -> None:
    ceiling = {"image_to_text": {"R@1": 0.25, "R@10": 0.5}, "text_to_image": {"R@1": 1.0, "R@10": 1.0}}
    tied = entry({"8": 0.2}, ceiling=ceiling)
    note = "items of different groups have equal captions, so no model can exceed image→text R@1 25.0 %, R@10 50.0 %"
    assert score_notes(tied) == [note]
    assert "limit │ 25.0 │ 50.0 │ 100.0 │ 100.0" in " ".join(printed(all_tables({"val": tied})).split())
    markdown = recall_markdown("val", tied)
    assert "| limit | 25.0 | 50.0 | 100.0 | 100.0 |" in markdown
    assert f"I{note[1:]}." in markdown
    earlier = entry({"8": 0.2}, ceiling={"image_to_text": {"R@1": 0.25}, "text_to_image": {"R@1": 1.0}})
    assert "| limit | 25.0 |  | 100.0 |  |" in recall_markdown("val", earlier)


def test_few_queries_are_named() -> None:
    few = entry({"8": 0.2}, num_queries={"image_to_text": 5, "image_to_image": 4})
    assert score_notes(few) == ["image→image has 4 queries only, and each of them is 25.0 % of the scores"]
    assert score_notes(few, WAYS) == []
    assert score_notes(entry({"8": 0.2}, num_queries={"image_to_image": 5000})) == []


def test_three_dims_of_the_first_set_fit_on_a_screen() -> None:
    dims = {str(dim): 0.5 for dim in (64, 32, 16, 8, 4)}
    classes = {"classification": {"top1": 0.3, "top5": 0.6, "mean_per_class": 0.3}}
    shop = {"dims": {"64": classes}, "chance": classes, "num_images": 7, "num_classes": 5, "num_bad": 0}

    def shown(first: dict[str, Any]) -> list[str]:
        lines = printed(brief_tables({"val": first, "shop": shop})).splitlines()
        assert lines[-1] == "shop: zero-shot accuracy: 64d 30.0"
        assert len(lines) <= 14
        return [line.split()[1] for line in lines if line.startswith("│")]

    assert shown(entry(dims)) == ["64", "16", "4", "chance"]
    advised = {"advice": {"smallest": {"dim": 32}, "budget": {"metric": "R@10"}}}
    assert shown(entry(dims, analysis=advised)) == ["64", "32", "4", "chance"]
