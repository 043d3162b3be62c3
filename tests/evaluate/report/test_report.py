"""The report of a synthetic set with every section, rendered by a real browser; the comparison of runs."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawing

from mmrl.data.index import Problem
from mmrl.data.samples import BadSample, Sample
from mmrl.errors import InputError
from mmrl.evaluate import sets
from mmrl.evaluate.analysis.advice import Budget
from mmrl.evaluate.analysis.run import Analysis, analyse
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.evaluate.report.compare import compare_runs
from mmrl.evaluate.report.examples import choose_examples, thumbnails
from mmrl.evaluate.report.page import SetReport, render_page
from mmrl.evaluate.report.plots import COLOURS, Curve, recall_by_dim
from mmrl.evaluate.report.stored_ranks import RANKS_FILE, write_ranks
from mmrl.evaluate.report.write import build_set_report, write_items
from mmrl.evaluate.sets import Embedded
from mmrl.images.decode import to_tensor

COUNT, DIMS, HOSTILE = 1100, [16, 8, 4], 'a <b>"bold"</b> & <script>alert(1)</script>'
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Drawings:
    """Generated images; every third cannot be read."""

    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return COUNT

    def read_image(self, number: int) -> tuple[Sample, torch.Tensor]:
        if number % 3 == 2:
            raise BadSample(Problem("x.tar", str(number), "gone"))
        return Sample(f"key{number}", b"", ["x"], -1), to_tensor(drawing(number)[0])


def make_set(seed: int, noise: float = 0.7) -> Embedded:
    rng = torch.Generator().manual_seed(seed)
    image_ND = torch.randn(COUNT, 16, generator=rng) * torch.linspace(1.5, 0.5, 16)
    text_MD = image_ND + noise * torch.randn(COUNT, 16, generator=rng)
    return Embedded(
        keys=[f"key{number}" for number in range(COUNT)],
        captions=[HOSTILE, *(f"caption {number}" for number in range(1, COUNT))],
        image_ND=image_ND,
        text_MD=text_MD,
        image_of_text_M=torch.arange(COUNT),
        image_group_N=torch.arange(COUNT) // 2,
        bad=[],
        sample_indices=list(range(COUNT)),
    )


def evaluated(
    embedded: Embedded, others: dict[str, Embedded] | None = None, budget: Budget | None = None
) -> tuple[dict[str, Any], Analysis]:
    result = sets.score(embedded, DIMS)
    analysis = analyse(embedded, DIMS, budget or Budget(), 10**8, others)
    result["analysis"] = analysis.json
    return result, analysis


@pytest.fixture(scope="module")
def first() -> tuple[Embedded, dict[str, Any], Analysis]:
    embedded = make_set(0)
    return embedded, *evaluated(embedded, {"twin": make_set(0, noise=1.5)})


@pytest.fixture(scope="module")
def folder(first: tuple[Embedded, dict[str, Any], Analysis], tmp_path_factory: pytest.TempPathFactory) -> Path:
    embedded, result, analysis = first
    result = {
        **result,
        "degraded": {"num_queries": 5, "jpeg": {"severities": {"quality 5": {str(d): {"R@1": 0.5} for d in DIMS}}}},
    }
    out = tmp_path_factory.mktemp("run")
    part = build_set_report("val", result, analysis, embedded, Drawings())
    hidden = SetReport("<i>other</i>", {**result, "num_bad": 3, "folds": 2})
    classes = {"classification": {"accuracy": 0.5}}
    labelled = {"shop": {"dims": {"16": classes}, "chance": classes, "num_images": 7, "num_classes": 2}}
    write_items(out / "val.items.jsonl", embedded, analysis, 10)
    (out / "report").mkdir()
    page = render_page(f"runs/{HOSTILE}", [part, hidden], labelled, {"Model": HOSTILE})
    (out / "report" / "index.html").write_text(page)
    write_ranks(out / "report", {"val": (embedded, analysis)})
    sets.write_retrieval_json(out, sets.as_retrieval_json({"val": result}))
    return out


def test_the_analysis_is_json_and_does_not_change_the_scores(first: tuple[Embedded, dict[str, Any], Analysis]) -> None:
    embedded, result, analysis = first
    again = json.loads(json.dumps(result, allow_nan=False))
    assert {key: value for key, value in again.items() if key != "analysis"} == sets.score(embedded, DIMS)
    for direction in ("text_to_image", "image_to_text"):
        for dim in ("16", "8", "4"):
            interval = analysis.json["intervals"][direction][dim]["R@10"]
            assert interval["value"] == pytest.approx(result["dims"][dim][direction]["R@10"])
            assert interval["low"] < interval["value"] < interval["high"]
    assert set(analysis.json["baselines"]["text_to_image"]) == {"pca", "best_dims", "random_dims", "twin", "twin, PCA"}
    paired = analysis.json["paired"]["text_to_image"]
    assert paired["full"]["16"]["lead"]["value"] == 0
    assert paired["twin"]["16"]["lead"]["low"] > 0  # the noisier twin
    assert paired["twin"]["16"]["p"] < 0.01
    other = analysis.json["other_direction"]
    assert other["compression"]["direction"] == other["advice"]["budget"]["direction"] == "image_to_text"
    reversed_, _ = evaluated(embedded, budget=Budget(direction="image_to_text"))
    assert reversed_["analysis"]["advice"] == other["advice"]
    assert reversed_["analysis"]["compression"] == other["compression"]
    assert reversed_["analysis"]["other_direction"]["advice"] == analysis.json["advice"]
    found = analysis.json["found_from"]
    assert found["items"] == sum(found[key] for key in ("4", "8", "16", "never")) == COUNT / 2


def test_one_tower_is_analysed_from_first_to_second_members(
    first: tuple[Embedded, dict[str, Any], Analysis], tmp_path: Path
) -> None:
    """The oracle: the analysis of text→image, with the same vectors as images."""
    embedded, _, of_both = first
    alone = replace(embedded, image_ND=torch.zeros(COUNT, 0), second={"text": (embedded.image_ND, torch.arange(COUNT))})
    result, analysis = evaluated(alone, budget=Budget(direction="text_to_text"))
    assert "other_direction" not in analysis.json
    assert analysis.json["intervals"] == {"text_to_text": of_both.json["intervals"]["text_to_image"]}
    for name in ("smallest", "sure", "dim", "two_stage"):
        one, other = (of["advice"][name] for of in (analysis.json, of_both.json))
        assert (one is None) == (other is None)
        if one is not None:
            assert {**one, "commands": None} == {**other, "commands": None}
    assert "--second" in analysis.json["advice"]["smallest"]["commands"][0]
    report = build_set_report("faq", result, analysis, alone, Drawings())
    page = render_page("runs/faq", [report], {}, {})
    assert "text→text" in page
    assert "Other direction" not in page
    for run in ("one", "two"):
        (tmp_path / run / "report").mkdir(parents=True)
        write_ranks(tmp_path / run / "report", {"faq": (alone, analysis)})
        sets.write_retrieval_json(tmp_path / run, sets.as_retrieval_json({"faq": result}))
    compared = compare_runs([tmp_path / "one", tmp_path / "two"], quiet=True)
    assert compared["sets"]["faq"]["text_to_text"]["16"]["R@1"]["two"]["lead"]["value"] == 0


def test_queries_are_sampled_beyond_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"pairs": 110_000, "least": 1, "most": 1000}
    for name in ("_BASELINE_LIMITS", "_COMPRESSION_LIMITS"):
        monkeypatch.setattr(f"mmrl.evaluate.analysis.run.{name}", limits)
    result, _ = evaluated(make_set(1))
    assert result["analysis"]["baseline_queries"] == 100
    assert result["analysis"]["compression"]["queries"] == 100
    assert result["analysis"]["compression"]["gallery"] == result["analysis"]["compression"]["all_queries"] == COUNT
    page = render_page("run", [SetReport("val", result)], {}, {})
    assert "100 queries, gallery of 1,100 (sampled from 1,100 queries)" in page
    assert "measured on up to 100 queries" in page


def test_a_baseline_of_other_samples_is_refused(first: tuple[Embedded, dict[str, Any], Analysis]) -> None:
    embedded, _, _ = first
    other = make_set(0)
    other.captions[3] = "else"
    with pytest.raises(InputError, match="twin read other samples"):
        analyse(embedded, DIMS, Budget(), 1, {"twin": other})


def test_examples_show_the_nearest_images(first: tuple[Embedded, dict[str, Any], Analysis]) -> None:
    embedded, _, analysis = first
    task, ranked = analysis.tasks["text_to_image"], analysis.ranked["text_to_image"]
    chosen = choose_examples(task, embedded.captions, {d: p.rank_Q for d, p in ranked.items()}, ranked[16].query_Q, 4)
    assert {example.kind for example in chosen} >= {
        "found at both dims",
        "lost at the short dim",
        "missed at both dims",
    }
    for example in chosen:
        row = embedded.captions.index(example.query)
        for results in example.results:
            x, y = embedded.text_MD[row, : results.dim].numpy(), embedded.image_ND[:, : results.dim].numpy()
            score = y @ x / np.linalg.norm(y, axis=1) / np.linalg.norm(x)
            rows = np.argsort(-score, kind="stable")[:5].tolist()
            assert results.images == [(one, one // 2 == row // 2) for one in rows]
            ranks = [n for n, (_, is_positive) in enumerate(results.images, 1) if is_positive]
            assert (results.rank in ranks) if results.rank <= 5 else not ranks
    shown = thumbnails(Drawings(), embedded, [0, 1, 2, 0])
    assert list(shown) == [0, 1]  # the third cannot be read
    assert shown[0].startswith("data:image/webp;base64,")


def test_the_page_is_self_contained_and_has_every_section(folder: Path) -> None:
    page = (folder / "report" / "index.html").read_text()
    assert "<script" not in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page.replace("xlink:href", "href"))
    assert not re.search(r"url\((?!#)|@import", page)
    assert not re.findall("|".join(light for light, _ in COLOURS.values()), page.partition("</style>")[2])
    identities = re.findall(r'\bid="([^"]*)"', page)
    assert len(identities) == len(set(identities))
    assert "<b>" not in page.replace('<div class="tile"><b>', "")  # the hostile caption and title are escaped
    assert "vs PCA of the full vector" in page
    assert "Other direction, image→text: " in page
    for words in ("Recall by dim", "Bytes against recall", "What each block of dims adds", "Example queries"):
        assert words in page
    for words in (
        "From which dim on",
        "Degraded images",
        "Zero-shot classification",
        "3 bad samples",
        "Method</h2>",
    ):
        assert words in page


def test_the_ranks_of_every_query_are_listed(folder: Path, first: tuple[Embedded, dict[str, Any], Analysis]) -> None:
    embedded, _, _ = first
    lines = [json.loads(line) for line in (folder / "val.items.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * COUNT
    plain = rank_queries(embedded.text_MD, embedded.image_ND, embedded.text_group_M, embedded.image_group_N, DIMS)
    mine = next(line for line in lines if line["query"] == "caption 7")
    assert mine["rank"] == {str(dim): int(plain[dim].rank_Q[7]) for dim in DIMS}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@in_a_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_in_a_browser(folder: Path, browser: Any, width: int, theme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    address = (folder / "report" / "index.html").as_uri()
    page.goto(address)
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert not messages
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
    too_wide = """[...document.querySelectorAll('main *')].filter(one => !one.closest('.wide') &&
        one.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(one => one.className)"""
    assert page.evaluate(too_wide) == []
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert page.locator("figure svg").count() == 12
    # Text of the page and of the plots contrasts with the background, in both themes.
    light = """selector => { const rgb = getComputedStyle(document.querySelector(selector))[selector.includes('text') ?
        'fill' : selector == 'body' ? 'backgroundColor' : 'color'].match(/[0-9.]+/g).map(Number);
        return (0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]) / 255 }"""
    behind, ink, label = (page.evaluate(light, selector) for selector in ("body", "h1", "figure svg text"))
    assert (behind < 0.2) == (theme == "dark")
    assert abs(behind - ink) > 0.6
    assert abs(behind - label) > 0.4
    page.close()


# ------------------------------------------------------------------------------------------------ compare


@pytest.fixture(scope="module")
def noisier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same set."""
    out = tmp_path_factory.mktemp("noisier")
    embedded = make_set(0, noise=1.0)
    result, analysis = evaluated(embedded)
    (out / "report").mkdir()
    write_ranks(out / "report", {"val": (embedded, analysis)})
    sets.write_retrieval_json(out, sets.as_retrieval_json({"val": result}))
    return out


def test_runs_are_compared_query_by_query(
    folder: Path, noisier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compare_runs([folder, noisier], out=tmp_path / "side-by-side")
    names = result["runs"]
    cells = result["sets"]["val"]["text_to_image"]["16"]["R@10"]
    mine, theirs = (json.loads((run / "retrieval.json").read_text()) for run in (folder, noisier))
    for name, scores in zip(names, (mine, theirs), strict=True):
        assert cells[name]["value"] == scores["dims"]["16"]["text_to_image"]["R@10"]
    difference = cells[names[1]]["value"] - cells[names[0]]["value"]
    assert cells[names[1]]["lead"]["value"] == pytest.approx(difference)
    assert cells[names[1]]["lead"]["high"] < 0
    assert "lead" not in cells[names[0]]
    shown = capsys.readouterr().out
    assert "val, text→image R@10, %" in shown
    assert "*" in shown
    assert json.loads((tmp_path / "side-by-side" / "compare.json").read_text()) == result
    assert "<svg" in (tmp_path / "side-by-side" / "index.html").read_text()


@in_a_browser
def test_the_comparison_in_a_browser(folder: Path, noisier: Path, tmp_path: Path, browser: Any) -> None:
    compare_runs([folder, noisier], out=tmp_path, quiet=True)
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto((tmp_path / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("figure svg").count() == 4
    page.close()


def test_runs_without_stored_ranks_are_compared_without_intervals(
    folder: Path, noisier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(noisier / "retrieval.json", tmp_path)
    result = compare_runs([folder, tmp_path], metrics=["mAP", "median_rank"])
    assert all(set(cell) == {"value"} for cell in result["sets"]["val"]["text_to_image"]["8"]["mAP"].values())
    assert "has no stored ranks; mmrl eval --out stores them" in capsys.readouterr().out


def test_different_sets_of_one_name_are_named_at_the_head(
    folder: Path,
    noisier: Path,
    first: tuple[Embedded, dict[str, Any], Analysis],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_set(0)
    other.captions[3] = "else"
    (tmp_path / "report").mkdir()
    write_ranks(tmp_path / "report", {"val": (other, first[2])})
    shutil.copy(noisier / "retrieval.json", tmp_path)
    result = compare_runs([folder, tmp_path], out=tmp_path / "out")
    assert "lead" not in str(result)
    head = capsys.readouterr().out.split("text→image")[0]
    assert "val: DIFFERENT SETS of this name, so the scores cannot be compared: " in head
    assert f"{tmp_path.name} on {COUNT:,} images and {COUNT:,} texts" in head
    assert "DIFFERENT SETS" in (tmp_path / "out" / "index.html").read_text()
    scores = json.loads((noisier / "retrieval.json").read_text())
    scores["sets"]["val"]["num_texts"] = 7
    (tmp_path / "retrieval.json").write_text(json.dumps(scores))
    shutil.rmtree(tmp_path / "report")
    compare_runs([folder, tmp_path])
    assert "on 1,100 images and 7 texts" in capsys.readouterr().out


def test_means_over_folds_get_no_intervals_of_the_whole_set(
    folder: Path, noisier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_folds = []
    for run in (folder, noisier):
        shutil.copytree(run / "report", tmp_path / run.name / "report")
        scores = json.loads((run / "retrieval.json").read_text())
        scores["sets"]["val"]["folds"] = 11
        (tmp_path / run.name / "retrieval.json").write_text(json.dumps(scores))
        in_folds.append(tmp_path / run.name)
    result = compare_runs(in_folds, metrics=["R@1"])
    assert all(set(cell) == {"value"} for cell in result["sets"]["val"]["text_to_image"]["8"]["R@1"].values())
    assert "no intervals: the scores are means over folds" in capsys.readouterr().out
    result = compare_runs([folder, in_folds[1]], metrics=["R@1"])
    assert "lead" not in str(result)
    assert "val: DIFFERENT FOLDS, so the scores cannot be compared: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["_old", r"lr $\foo$", "plain"])
def test_the_name_of_a_run_is_in_the_legend_as_it_is(name: str) -> None:
    scores = {"16": {"value": 0.5, "low": 0.4, "high": 0.6}, "8": {"value": 0.3, "low": 0.2, "high": 0.4}}
    svg = recall_by_dim([Curve(name, "model", scores), Curve("other", "pca", scores)], 0.1, "R@1", legend=True)
    assert re.findall(r">([^<]+)</text>", svg)[-3:] == ["chance", name, "other"]


def test_runs_that_cannot_be_compared_are_named(folder: Path, noisier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two run folders"):
        compare_runs([folder])
    with pytest.raises(InputError, match="is given twice"):
        compare_runs([folder, folder / "."])
    with pytest.raises(InputError, match=r"has no retrieval\.json; evaluate it with mmrl eval"):
        compare_runs([folder, tmp_path])
    with pytest.raises(InputError, match="'R@7' is not among the scores"):
        compare_runs([folder, noisier], metrics=["R@7"])
    scores = json.loads((noisier / "retrieval.json").read_text())
    (tmp_path / "retrieval.json").write_text(json.dumps({**scores, "sets": {"test": scores["sets"]["val"]}}))
    with pytest.raises(InputError, match="no set in common"):
        compare_runs([folder, tmp_path])
    (tmp_path / "retrieval.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        compare_runs([folder, tmp_path])
    for damaged in ("5", '{"dims": {}}', '{"sets": 3}', '{"sets": {"val": {"dims": {}}}}'):
        (tmp_path / "retrieval.json").write_text(damaged)
        with pytest.raises(InputError, match='has no "sets" of scores'):
            compare_runs([folder, tmp_path])
    more = json.loads((folder / "retrieval.json").read_text())
    for by_direction in more["sets"]["val"]["dims"].values():
        for of_direction in by_direction.values():
            of_direction["R@20"] = 1.0
    (tmp_path / "retrieval.json").write_text(json.dumps(more))
    with pytest.raises(InputError, match=f"'R@20' is not among the scores of {noisier}"):
        compare_runs([tmp_path, noisier], metrics=["R@20"])
    (tmp_path / "report").mkdir()
    (tmp_path / "retrieval.json").write_text(json.dumps(scores))
    (tmp_path / "report" / RANKS_FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        compare_runs([folder, tmp_path])
