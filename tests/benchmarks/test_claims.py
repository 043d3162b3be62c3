"""claims.py from training to the page on tiny towers, and its statistics against mmrl.retrieval and plain formulas."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import claims
import claims_embed
import claims_plots
import claims_report
import claims_runs
import claims_scores
import numpy as np
import pytest
from claims_scores import CROSS, Draws, Embeddings, Measured

import mmrl
from mmrl.errors import InputError
from mmrl.settings import hyperparameters


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
        for direction in CROSS:
            rank_Q, average_Q = claims_scores.per_query(one, dim, direction)
            for k in (1, 5, 10):
                assert (rank_Q <= k).mean() == pytest.approx(expected[dim][direction][f"R@{k}"])
            assert average_Q.mean() == pytest.approx(expected[dim][direction]["mAP"])


def test_an_image_is_not_in_the_gallery_of_its_own_query() -> None:
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


def test_captions_that_start_with_another_of_their_concept_are_left_out() -> None:
    captions = ["red heart: love", "red heart", "coeur rouge", "red heart", "red", "red heart"]
    assert claims_embed._text_queries([0, 0, 0, 0, 1, 1], captions) == [1, 2, 4]


def test_an_interval_is_that_of_resampled_concepts_and_seeds() -> None:
    group = np.arange(400)
    hits_SQ = (np.random.default_rng(0).random((1, 400)) < 0.3).astype(float)
    one = Draws(group, 1).measure(hits_SQ, group)
    low, high = one.interval
    spread = 1.96 * np.sqrt(hits_SQ.mean() * (1 - hits_SQ.mean()) / 400)
    assert one.value == pytest.approx(hits_SQ.mean())
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1)
    # Queries of one concept are drawn together, so four copies of each query leave the interval as it is.
    four = np.repeat(group, 4)
    copies = Draws(four, 1).measure(np.repeat(hits_SQ, 4, axis=1), four)
    assert copies.interval == pytest.approx((low, high), abs=0.01)
    # Seeds that differ widen it; a value minus itself is exactly 0.
    two = Draws(group, 2).measure(np.concatenate([hits_SQ, np.zeros_like(hits_SQ)]), group)
    assert two.interval[0] == 0
    assert (one - one).interval == (0, 0)


def test_a_direction_at_chance_level_has_no_signal() -> None:
    one = embeddings(400, 200)
    found = claims_scores.score_all([("plain, d only", 12, [one])])
    assert claims_report._has_signal(found, "image_to_image")
    unrelated = embeddings(2000, 1000)
    unrelated = replace(unrelated, group_N=np.random.default_rng(3).permutation(unrelated.group_N))
    found = claims_scores.score_all([("plain, d only", 12, [unrelated])])
    assert "image_to_image" in found["plain, d only"][12]
    assert not claims_report._has_signal(found, "image_to_image")


def test_ratios_and_means_are_taken_within_each_draw() -> None:
    one, two = Measured(2.0, np.array([1.0, 3.0])), Measured(4.0, np.array([2.0, 4.0]))
    assert (one / two).draws_R.tolist() == [0.5, 0.75]
    assert claims_scores.mean_of([one, two]).draws_R.tolist() == [1.5, 3.5]


def test_steps_to_reach_a_target_on_a_curve_whose_crossing_is_known() -> None:
    # Values, then one draw per column.
    curve = {
        100: Measured(0.10, np.array([0.10, 0.40, 0.10, 0.05])),
        200: Measured(0.30, np.array([0.20, 0.30, 0.10, 0.15])),
        400: Measured(0.40, np.array([0.30, 0.50, 0.10, 0.15])),
    }
    target = Measured(0.35, np.array([0.25, 0.20, 0.20, 0.15]))
    found = claims_scores.steps_to_reach(curve, target, 400)
    assert found.value == pytest.approx(300 / 400)
    # On the second segment; before the first checkpoint, on the line from 0; never; exactly at a checkpoint.
    assert found.draws_R.tolist() == pytest.approx([300 / 400, 50 / 400, np.inf, 200 / 400])
    # The first crossing counts, even if the curve falls below the target later.
    falls = {1: Measured(0.2, np.array([0.2])), 2: Measured(0.1, np.array([0.1])), 4: Measured(0.3, np.array([0.3]))}
    assert claims_scores.steps_to_reach(falls, Measured(0.2, np.array([0.2])), 4).value == pytest.approx(0.25)
    assert claims_scores.steps_to_reach(falls, Measured(0.0, np.array([0.0])), 4).value == 0


def test_the_share_of_the_steps_is_infinite_in_the_draws_that_never_reach_the_target() -> None:
    shares = Measured(0.6, np.array([0.5] * 900 + [np.inf] * 100))
    assert shares.interval == (0.5, np.inf)
    assert claims_report._share(shares) == "0.60 [0.50, > 1]"
    assert claims_report._share(Measured(np.inf, np.full(10, np.inf))) == "> 1 [> 1, > 1]"


def test_a_curve_is_compared_with_its_target_on_the_same_draws() -> None:
    seeds = [embeddings(200, 100), embeddings(200, 100, seed=1)]
    final = claims_scores.score_all([("plain, d only", 12, seeds)])["plain, d only"][12]
    curve = claims_scores.score_curves({"plain": {5: seeds}}, [12])["plain"][12]
    assert (claims_scores.cross(curve[5], "R@1") - claims_scores.cross(final, "R@1")).interval == (0, 0)
    assert set(curve[5]) == set(CROSS)


@pytest.mark.parametrize(
    ("value", "interval", "unit", "bound", "reached"),
    [
        (0.0, (-0.02, 0.02), "%", 0.0, "yes"),
        (-0.0004, (-0.02, 0.02), "%", 0.0, "yes"),  # -0.0 as shown
        (-0.004, (-0.02, 0.02), "%", 0.0, "no, but within the interval"),
        (-0.004, (-0.006, -0.002), "%", 0.0, "no"),
        (-0.004, (-0.006, -0.002), "%", -0.005, "yes"),
        (0.7, (0.6, np.inf), "share of steps", 0.8, "yes"),
        (0.9, (0.7, np.inf), "share of steps", 0.8, "no, but within the interval"),
        (np.inf, (0.9, np.inf), "share of steps", 0.8, "no"),
        (np.inf, (0.9, np.inf), "share of steps", None, "–"),
    ],
)
def test_a_target_is_reached_by_the_value_as_shown(
    value: float, interval: tuple[float, float], unit: Any, bound: float | None, reached: str
) -> None:
    measured = Measured(value, np.repeat(interval, 50))
    assert claims_report.Target("", unit, measured, bound).row()[-1] == reached


def test_arms_differ_only_in_nesting_and_distillation(tmp_path: Path) -> None:
    plan = claims_runs.tiny_plan(tmp_path)
    runs = claims_runs.plan_runs(plan)
    assert len(runs) == 2 * 7
    assert len({run.folder for run in runs}) == len(runs)
    one_seed = [run for run in runs if run.seed == 0]
    values = [hyperparameters(run.config) for run in one_seed]
    differing = {key for one in values for key in one if one[key] != values[0][key]}
    assert differing - {"nesting.prefix_gradient.end", "nesting.prefix_gradient.power"} == {
        "nesting.dims",
        "nesting.rotation",
        "loss.distillation",
    }
    recipe = claims_runs.load_config(claims_runs.RECIPE)
    ours, published = (True, recipe.loss.distillation), (False, 0.0)
    assert {
        run.arm: (run.config.nesting.dims, (run.config.nesting.rotation, run.config.loss.distillation))
        for run in one_seed
    } == {
        "plain": ([64], published),
        "plain, 16 only": ([16], published),
        "plain, 8 only": ([8], published),
        "nested, equal weights, no rotation": ([64, 16, 8], published),
        "nested": ([64, 16, 8], ours),
        "nested 64/16, equal weights, no rotation": ([64, 16], published),
        "nested 64/16": ([64, 16], ours),
    }


def test_arms_are_chosen_by_name(tmp_path: Path) -> None:
    plan = claims_runs.tiny_plan(tmp_path)
    assert claims._chosen_arms(plan, ["plain, d only", "nested"]) == {"plain, 16 only", "plain, 8 only", "nested"}
    assert claims._chosen_arms(plan, None) == set(plan.arms())
    with pytest.raises(InputError, match=r'"turned" is not a trained arm; choose from "plain", "plain, d only"'):
        claims._chosen_arms(plan, ["turned"])


def test_an_incomplete_larger_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        claims.main(["--world", str(tmp_path), "--cache", str(tmp_path / "cache")])
    assert ended.value.code == 2
    assert "world.py" in capsys.readouterr().err


@pytest.mark.slow
def test_from_training_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--cache", str(tmp_path), "--out", str(tmp_path / "never")]
    page = tmp_path / "tiny" / "page" / "starter"
    claims.main([*arguments, "--arms", "plain"])
    printed = capsys.readouterr().out
    assert "2 runs, 2 of them to do" in printed
    assert "No pages written: 12 runs of other arms are not trained (plain, 16 only;" in printed
    assert not page.exists()
    claims.main(arguments)
    assert "14 runs, 12 of them to do" in capsys.readouterr().out
    text = (page / "results.md").read_text()
    assert "These numbers mean nothing" in text
    assert not (tmp_path / "never").exists()
    for plot in ("recall_by_dim", "recall_over_steps", "any_cut", "blocks"):
        assert (page / f"{plot}.png").stat().st_size > 10_000
    numbers = json.loads((page / "results.json").read_text())
    arms = numbers["tests"]["test-artist"]
    large = {"nested 64/16", "nested 64/16, equal weights, no rotation"}
    assert set(arms) == set(claims_plots.STYLES) | large
    assert {arm: set(by_dim) for arm, by_dim in arms.items()} == {
        arm: {"64", "16"} if arm in large else {"64", "16", "8"} for arm in arms
    }
    # This test set has concepts by several artists, but each of its longer captions starts with the name.
    assert {*CROSS, "image_to_image"} == set(arms["nested"]["8"])
    assert "| image→image on test-artist: R@1 at 64 minus plain's, points |" in text
    # A rotation does not change the full dim.
    for rotated, source in (("plain + rotate", "truncated"), ("nested + rotate", "nested")):
        for direction, metrics in arms[rotated]["64"].items():
            for metric, (value, _, _) in metrics.items():
                assert value == pytest.approx(arms[source]["64"][direction][metric][0], abs=0.01)
    # The last point of a curve is the last checkpoint, and plain reaches its own final recall.
    assert set(numbers["curves"]) == set(claims_runs.WITH_CURVE)
    assert set(numbers["curves"]["nested"]["16"]) == {"1", "2", "3"}
    for direction in CROSS:
        assert numbers["curves"]["nested"]["16"]["3"][direction] == arms["nested"]["16"][direction]
    value, _, high = numbers["share_of_steps_to_final_recall_of_that_dim"]["plain"]["64"]
    assert 0 <= value <= high <= 1
    # The same command again trains nothing, and writes the same page.
    claims.main(arguments)
    assert "14 runs, 0 of them to do" in capsys.readouterr().out
    assert (page / "results.md").read_text() == text
