"""The way of claims.py from nothing to the page, and its statistics against mmrl.retrieval and plain formulas."""

import json
from dataclasses import replace
from pathlib import Path

import claims
import claims_report
import claims_scores
import numpy as np
import pytest
from claims_scores import Draws, Embeddings, Measured

import mmrl


def embeddings(count: int, concepts: int, seed: int = 0) -> Embeddings:
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, count, 12)).astype(np.float32)
    group = rng.permutation(np.arange(count) % concepts)
    caption, caption_group = np.concatenate([text, image]), np.concatenate([group, group])
    return Embeddings(
        image + 3 * rng.normal(size=(concepts, 12))[group].astype(np.float32), text, group, caption, caption_group
    )


@pytest.mark.parametrize("concepts", [40, 9])
def test_scores_of_each_query_average_to_those_of_the_evaluation(concepts: int) -> None:
    one = embeddings(40, concepts)
    expected = mmrl.retrieval(
        one.image_ND, one.text_ND, image_group_N=one.group_N, text_group_M=one.group_N, dims=[12, 3]
    )
    for dim in (12, 3):
        for direction in claims_scores.CROSS:
            rank_Q, average_Q = claims_scores.per_query(one, dim, direction)
            for k in (1, 5, 10):
                assert (rank_Q <= k).mean() == pytest.approx(expected[dim][direction][f"R@{k}"])
            assert average_Q.mean() == pytest.approx(expected[dim][direction]["mAP"])


def test_a_picture_is_no_answer_to_itself() -> None:
    one = embeddings(40, 9)
    rank_Q, _ = claims_scores.per_query(one, 12, "image_to_image")
    unit = one.image_ND / np.linalg.norm(one.image_ND, axis=1, keepdims=True)
    score = unit @ unit.T
    np.fill_diagonal(score, -np.inf)
    same = one.group_N[score.argmax(1)] == one.group_N
    assert ((rank_Q == 1) == same).all()
    assert np.isnan(claims_scores.per_query(embeddings(40, 40), 12, "image_to_image")[0]).all()
    rank_Q, _ = claims_scores.per_query(embeddings(40, 40), 12, "text_to_text")  # two captions of each
    assert rank_Q.shape == (80,)
    assert not np.isnan(rank_Q).any()


def test_captions_that_begin_with_another_of_their_concept_are_no_queries() -> None:
    captions = ["red heart: love", "red heart", "coeur rouge", "red heart", "red", "red heart"]
    assert claims._distinct([0, 0, 0, 0, 1, 1], captions) == [1, 2, 4]


def test_an_interval_is_that_of_resampled_concepts_and_seeds() -> None:
    group = np.arange(400)
    hits_SQ = (np.random.default_rng(0).random((1, 400)) < 0.3).astype(float)
    one = Draws(group, 1).measure(hits_SQ, group)
    low, high = one.interval
    spread = 1.96 * np.sqrt(hits_SQ.mean() * (1 - hits_SQ.mean()) / 400)
    assert one.value == pytest.approx(hits_SQ.mean())
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
    # Queries of one concept come and go together: four copies of each tell no more.
    four = np.repeat(group, 4)
    copies = Draws(four, 1).measure(np.repeat(hits_SQ, 4, axis=1), four)
    assert copies.interval == pytest.approx((low, high), abs=0.01)
    # Seeds that differ widen it, and a difference of equals has no width.
    two = Draws(group, 2).measure(np.concatenate([hits_SQ, np.zeros_like(hits_SQ)]), group)
    assert two.interval[0] == 0
    assert (one - one).interval == (0, 0)


def test_a_direction_in_which_a_set_is_found_by_chance_tells_nothing() -> None:
    one = embeddings(400, 200)
    arms = [("plain, d only", 12, [one])]
    assert claims_report._tells(claims_scores.score_all(arms), "image_to_image", 12)
    strangers = embeddings(2000, 1000)
    strangers = replace(strangers, group_N=np.random.default_rng(3).permutation(strangers.group_N))
    found = claims_scores.score_all([("plain, d only", 12, [strangers])])
    assert "image_to_image" in found["plain, d only"][12]
    assert not claims_report._tells(found, "image_to_image", 12)


def test_ratios_and_means_are_taken_within_each_draw() -> None:
    one, two = Measured(2.0, np.array([1.0, 3.0])), Measured(4.0, np.array([2.0, 4.0]))
    assert (one / two).draws_R.tolist() == [0.5, 0.75]
    assert claims_scores.mean_of([one, two]).draws_R.tolist() == [1.5, 3.5]


def test_arms_differ_in_their_nesting_alone(tmp_path: Path) -> None:
    runs = claims.plan_runs(claims.tiny_plan(tmp_path))
    assert len(runs) == 2 * 2 * 3
    assert len({run.folder for run in runs}) == len(runs)
    one_world = [run for run in runs if run.world.name == "starter" and run.seed == 0]
    learnt = [claims.hyperparameters(run.config) for run in one_world]
    differing = {key for values in learnt for key in values if values[key] != learnt[0][key]}
    assert differing == {"nesting.dims"}
    assert {run.arm: run.config.nesting.dims for run in one_world} == {
        "plain": [64],
        "plain, 8 only": [8],
        "nested, equal": [64, 8],
    }


def test_a_world_that_is_not_whole_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        claims.main(["--world", str(tmp_path), "--cache", str(tmp_path / "cache")])
    assert ended.value.code == 2
    assert "world.py" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--cache", str(tmp_path), "--out", str(tmp_path / "never")]
    claims.main(arguments)
    page = tmp_path / "tiny" / "page" / "starter"
    text = (page / "results.md").read_text()
    assert "These numbers mean nothing" in text
    assert not (tmp_path / "never").exists()
    for picture in ("recall_by_dim", "recall_over_steps", "any_cut", "blocks"):
        assert (page / f"{picture}.png").stat().st_size > 10_000
    numbers = json.loads((page / "results.json").read_text())
    arms = numbers["starter"]["tests"]["test-artist"]
    assert set(arms) == set(claims_report.COLOURS)
    # The starter's walk is tested on concepts of several artists, whose longer captions begin with their names.
    assert {*claims_scores.CROSS, "image_to_image"} == set(arms["nested"]["8"])
    assert "| image→image on test-artist: R@1 at 64, less plain's |" in text
    # Turning changes nothing at the full dim.
    for arm in ("rotated", "nested"):
        for direction, metrics in arms[arm]["64"].items():
            for metric, (value, _, _) in metrics.items():
                assert value == pytest.approx(arms["truncated"]["64"][direction][metric][0], abs=0.01)
    # The same command again trains nothing, and writes the same page.
    capsys.readouterr()
    claims.main(arguments)
    assert "12 runs, 0 of them to do" in capsys.readouterr().out
    assert (page / "results.md").read_text() == text
