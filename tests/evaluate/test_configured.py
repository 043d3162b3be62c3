"""The evaluation sets of a config, during training and in several processes; the history of their scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tar
from helpers.encoders import save_random_encoder
from helpers.labelled import NAMES, TEMPLATES, labelled_members, write_labelled
from helpers.worlds import run_in_world
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrl.config import load_config
from mmrl.data.sources import DataConfig
from mmrl.errors import InputError
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.evaluate.configured import check_best, open_configured
from mmrl.evaluate.sets import EvaluationConfig, as_retrieval_json, best_score
from mmrl.evaluate.zeroshot import ACCURACIES
from mmrl.model import bundle
from mmrl.train.trainer import train


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def random_encoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("encoder"))


def classification_set(labelled: Path, **more: Any) -> dict[str, Any]:
    """The config of the set."""
    return {
        "shards": str(labelled / "test"),
        "classes": str(labelled / NAMES),
        "templates": str(labelled / TEMPLATES),
        **more,
    }


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_both_kinds_of_sets_are_scored_and_tracked_during_training(
    write_config: Callable[..., Path], shards: Path, labelled: Path
) -> None:
    sets = {"colours": classification_set(labelled), "val": {"shards": str(shards), "captions": 1}}
    best = {"set": "colours", "dim": 8, "metric": "top1"}
    path = write_config(evaluation={"sets": sets, "every": "2 steps", "best": best, "dims": [16, 8, 4]})
    overrides = ["tracking.tensorboard=true", "train.duration=4 steps"]
    console = Console(record=True, width=200)
    folder = train(load_config(path, overrides), console)

    # Accuracy is that of `mmrl eval --classes` on the checkpoint.
    options = EvalOptions(dims=[16, 8, 4], classes=str(labelled / NAMES), templates=str(labelled / TEMPLATES))
    expected = evaluate_model(str(folder / "checkpoints/last"), [f"colours={labelled}/test"], options, quiet=True)
    retrieval = json.loads((folder / "retrieval.json").read_text())
    assert retrieval["sets"]["colours"] == expected["sets"]["colours"]
    assert retrieval["dims"] == retrieval["sets"]["val"]["dims"]  # the first retrieval set is at the top level

    history = evaluations(folder)
    assert [(one["step"], one["samples"]) for one in history] == [(2, 24), (4, 48)]
    assert history[-1]["sets"] == retrieval["sets"]
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for tag, set_name, dim, direction, metric in (
        ("colours/classification/top1/8", "colours", "8", "classification", "top1"),
        ("val/text_to_image/R@10/16", "val", "16", "text_to_image", "R@10"),
        ("val/image_to_text/mAP/4", "val", "4", "image_to_text", "mAP"),
    ):
        curve = [(point.step, point.value) for point in events.Scalars(tag)]
        scores = [one["sets"][set_name]["dims"][dim][direction][metric] for one in history]
        assert curve == [(2, pytest.approx(scores[0])), (4, pytest.approx(scores[1]))]

    steps = [one["sets"]["colours"]["dims"]["8"]["classification"]["top1"] for one in history]
    kept = (folder / "checkpoints" / "best").resolve().name
    assert kept == ("step-4" if steps[1] > steps[0] else "step-2")
    shown = console.export_text()
    first = history[0]["sets"]["colours"]["dims"]["16"]["classification"]["top1"]
    assert f"step 2  colours, zero-shot accuracy: 16d {100 * first:.1f}" in shown
    assert "colours: 40 images, 4 classes; zero-shot accuracy in %" in shown
    report = (folder / "report" / "report.md").read_text()
    assert "40 images, 4 classes; zero-shot accuracy in %." in report
    assert "(recall_by_step.png)" in report
    assert (folder / "report" / "recall_by_step.png").is_file()


def _score_in_a_world(folder: Path) -> None:
    torch.set_num_threads(1)
    encoder, config = (folder / "paths").read_text().split("\n")
    opened = open_configured(EvaluationConfig.model_validate_json(config), DataConfig())
    scores = {name: one.score(bundle.load(Path(encoder)), [16, 4]) for name, one in opened.items()}
    (folder / f"scores-{torch.distributed.get_rank()}.json").write_text(json.dumps(scores))


def test_processes_divide_the_scoring(random_encoder: Path, shards: Path, labelled: Path, tmp_path: Path) -> None:
    sets = {"colours": classification_set(labelled), "val": {"shards": str(shards)}}
    config = EvaluationConfig.model_validate({"sets": sets, "most_samples": 12})
    opened = open_configured(config, DataConfig())
    expected = {name: one.score(bundle.load(random_encoder), [16, 4]) for name, one in opened.items()}
    assert expected["colours"]["num_classes"] == 4
    assert expected["val"]["drawn"] == {"samples": len(opened["val"].reader), "of": 48}
    (tmp_path / "paths").write_text(f"{random_encoder}\n{config.model_dump_json()}")
    run_in_world(3, _score_in_a_world, tmp_path)
    for rank in range(3):
        assert json.loads((tmp_path / f"scores-{rank}.json").read_text()) == expected


def test_a_large_classification_set_is_subsampled(random_encoder: Path, labelled: Path) -> None:
    config = EvaluationConfig.model_validate({"sets": {"colours": classification_set(labelled)}, "most_samples": 5})
    result = open_configured(config, DataConfig())["colours"].score(bundle.load(random_encoder), [8])
    assert result["num_images"] == 20
    assert result["drawn"] == {"samples": 20, "of": 40}
    assert tuple(result["dims"]["8"]["classification"]) == ACCURACIES


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"captions": 1}, "evaluation.sets.colours.captions: a set with classes is scored by class"),
        ({"classes": None}, "evaluation.sets.colours.templates: given without classes; add classes"),
        ({"classes": "nowhere.txt"}, "evaluation.sets.colours.classes: the file nowhere.txt cannot be read"),
        ({"templates": "nowhere.txt"}, "evaluation.sets.colours.templates: the file nowhere.txt cannot be read"),
    ],
    ids=["captions", "templates alone", "no file", "no templates"],
)
def test_keys_that_do_not_fit_are_refused(labelled: Path, changes: dict[str, Any], says: str) -> None:
    config = EvaluationConfig.model_validate({"sets": {"colours": classification_set(labelled, **changes)}})
    with pytest.raises(InputError, match=says):
        open_configured(config, DataConfig())


def test_labels_that_are_no_indices_are_refused_before_training(labelled: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [member for n in range(3) for member in labelled_members(n, "red")])
    one = classification_set(labelled, shards=str(tmp_path / "a.tar"))
    with pytest.raises(InputError, match=r"none of the first 3 samples has the index of a class, 0 to 3, .*'red'"):
        open_configured(EvaluationConfig.model_validate({"sets": {"colours": one}}), DataConfig())


@pytest.mark.parametrize(
    ("best", "says"),
    [
        (None, "evaluation.patience: needs evaluation.best"),
        ({"set": "colours", "dim": 8}, "'R@10' is not measured; allowed: top1, top5, mean_per_class"),
        ({"set": "val", "dim": 8, "metric": "top1"}, "'top1' is not measured; allowed: R@1, R@5, R@10, mAP"),
        ({"set": "vla", "dim": 8}, "there is no evaluation set 'vla'. Did you mean 'val'"),
        ({"set": "val", "dim": 12}, "12 is not evaluated; evaluated are"),
    ],
    ids=["no best", "classification", "retrieval", "set", "dim"],
)
def test_a_score_that_is_not_measured_cannot_be_the_best(best: dict[str, Any] | None, says: str) -> None:
    sets = {"val": {"shards": "a.tar"}, "colours": {"shards": "b.tar", "classes": "imagenet"}}
    with pytest.raises(InputError, match=says):
        check_best(EvaluationConfig.model_validate({"sets": sets, "best": best, "patience": 2}), [16, 8])


def test_the_best_score_of_each_kind_of_set() -> None:
    def of_set(kind: str, value: float) -> dict[str, Any]:
        return {"chance": {kind: {}}, "dims": {"8": {kind: {"top1": value, "mean_rank": value}}}}

    results = {"colours": of_set("classification", 0.5), "val": of_set("image_to_text", 3.0)}
    sets = {"val": {"shards": "a.tar"}, "colours": {"shards": "b.tar", "classes": "imagenet"}}

    def score(**best: str) -> float:
        config = EvaluationConfig.model_validate({"sets": sets, "best": {"dim": 8, **best}})
        assert config.best is not None
        return best_score(config.best, results)

    assert score(set="colours", metric="top1", direction="image_to_text") == 0.5
    assert score(set="val", metric="mean_rank", direction="image_to_text") == -3.0
    assert as_retrieval_json(results)["dims"] == results["val"]["dims"]
    assert as_retrieval_json({"colours": results["colours"]})["dims"] == results["colours"]["dims"]
