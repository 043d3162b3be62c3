"""`mmrl eval` with a budget, other models and a report, then `mmrl compare`, as a user types them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmrl import cli
from mmrl.evaluate import command
from mmrl.model import bundle, towers, two_tower
from mmrl.model.two_tower import LogitScaleConfig


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles of random weights."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        built = towers.build(towers.TowersConfig(name=str(tiny_model)))
        model = two_tower.from_towers(built, LogitScaleConfig(), num_dims=3)
        one = bundle.make_bundle(model, built, (4, 8, 16))
        folders.append(tmp_path_factory.mktemp(f"model{seed}") / f"run{seed}")
        bundle.save(one, folders[-1], one.state(), {})
    return folders[0], folders[1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `mmrl …` in this process; returns its exit code and what it prints."""

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return command


def test_the_report_of_a_model_with_a_baseline(
    models: tuple[Path, Path], shards: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    first, second = models
    out = tmp_path / "scores"
    budget = ("--budget", "recall_drop=5%,metric=R@5", "--vectors", "2M")
    sets = (f"val={shards}", f"again={shards}")
    code, shown, _ = run("eval", first, *sets, "--compare", second, "--out", out, *budget)
    assert code == 0
    flat = " ".join(shown.split())
    assert "val, confirmed to lose at most 5 % of R@5, text→image" in flat
    assert "again, confirmed" not in flat, "the advice of the other sets is in the report"
    assert "report/index.html" in flat
    files = {path.name for path in (out / "report").iterdir()}
    assert files == {"index.html", "val.items.jsonl", "again.items.jsonl", "ranks.safetensors"}
    result = json.loads((out / "retrieval.json").read_text())
    assert result["sets"]["val"]["analysis"]["advice"]["vectors"] == 2_000_000
    assert "run1, PCA" in result["analysis"]["baselines"]["image_to_text"]
    page = (out / "report" / "index.html").read_text()
    assert page.count("data:image/webp") >= 5
    assert "run1, PCA" in page
    assert "for 2M vectors, instead of" in page
    assert f"mmrl embed {first} {shards} EMBEDDINGS --dim" in page

    # Without a budget, a report or a baseline, only the scores are computed, and they are the same.
    code, shown, _ = run("eval", first, f"val={shards}", "--json")
    plain = json.loads(shown)
    assert "analysis" not in plain
    assert plain["dims"] == result["dims"]

    code, shown, _ = run("eval", second, f"val={shards}", "--out", tmp_path / "twin", "--json")
    assert json.loads(shown)["analysis"]["advice"]["budget"]["recall_drop"] == 0.01
    code, shown, _ = run("compare", out, tmp_path / "twin", "--json")
    compared = json.loads(shown)
    assert compared["runs"] == ["scores", "twin"]
    assert compared["sets"]["val"]["image_to_text"]["8"]["R@10"]["twin"]["lead"]["low"] <= 0.5
    assert run("compare", out)[0] == 2


@pytest.mark.slow
def test_graphs_score_like_the_weights_they_were_made_from(
    models: tuple[Path, Path], shards: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    graphs, out = tmp_path / "graphs", tmp_path / "scores"
    assert run("export", models[0], graphs, "--dim", "8", "--format", "onnx")[0] == 0
    code, shown, error = run("eval", graphs, f"val={shards}", "--dims", "8,4", "--out", out, "--json")
    assert code == 0, error
    found = json.loads(shown)
    wanted = json.loads(run("eval", models[0], f"val={shards}", "--dims", "8,4", "--json")[1])
    assert list(found["dims"]) == ["8", "4"]
    for dim, directions in wanted["dims"].items():
        for direction, scores in directions.items():
            # Rounding may swap two nearly equal scores.
            one_query = 1.01 / found["num_images"]
            near = {name: pytest.approx(value, abs=one_query) for name, value in scores.items() if "_rank" not in name}
            assert {name: found["dims"][dim][direction][name] for name in near} == near
    assert "<dt>ONNX graphs</dt><dd>fp32</dd>" in (out / "report" / "index.html").read_text()
    # Graphs can be a baseline, too.
    code, shown, error = run("eval", models[0], f"val={shards}", "--dims", "16,8", "--compare", graphs, "--json")
    assert code == 0, error
    baselines = json.loads(shown)["analysis"]["baselines"]["text_to_image"]
    assert list(baselines["graphs"]) == ["8"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--budget", "1%"), "budget: '1%' is not understood; write recall_drop=1%"),
        (("--vectors", "lots"), "vectors: 'lots' is not a number of vectors; write e.g. 100M"),
        (("--compare", "nowhere"), "model: nowhere does not exist"),
        (
            ("--budget", "recall_drop=1%", "--directions", "image_to_image"),
            "budget: needs the directions image_to_text and text_to_image",
        ),
    ],
)
def test_invalid_options_are_reported_before_anything_is_embedded(
    models: tuple[Path, Path],
    shards: Path,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.setattr("mmrl.evaluate.sets.embed", None)  # would raise TypeError
    code, _, error = run("eval", models[0], shards, *options)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1


def test_a_set_is_named_by_its_url_without_the_query() -> None:
    """Names are those of files and stand in the report: a signed URL is too long for the first, and no secret of it
    belongs into the second."""
    signed = f"https://host/x/val.tar?X-Amz-Signature={'0' * 300}"
    assert command._named([signed, "https://host/test/?token=a/b", "c?d.tar"]) == {
        "val": signed,
        "test": "https://host/test/?token=a/b",
        "c?d": "c?d.tar",
    }
