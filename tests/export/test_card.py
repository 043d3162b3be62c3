"""The model card and the lines that `mmrl export` prints."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.encoders import save_random_encoder
from huggingface_hub import ModelCard

import mmrl
from mmrl.export import bundles
from mmrl.export.card import summary
from mmrl.model.manifest import hash_files, read_manifest
from mmrl.rotation.command import rotate_model


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of step 5."""
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("source"))


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A run with the checkpoints step-5, which is `best`, and step-9, which is `last`."""
    folder = tmp_path / "run"
    for step, link in ((5, "best"), (9, "last")):
        checkpoint = shutil.copytree(source, folder / "checkpoints" / f"step-{step}")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"source": {"step": step, "run": "run"}}))
        (folder / "checkpoints" / link).symlink_to(f"step-{step}")
    (folder / "config.yaml").write_text("run: x\nmodel: {name: tiny}\ndata: {train: 'shards/train'}\n")
    return folder


def write_scores(run: Path, **step: int) -> None:
    """RUN/retrieval.json as training writes it, or without a step as `mmrl eval --out RUN` does."""
    scores = {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75}
    both = {"image_to_text": scores, "text_to_image": scores}
    values = {"dims": {"16": both, "8": both}, "num_images": 4, "num_texts": 4, "chance": both}
    (run / "retrieval.json").write_text(json.dumps({**step, **values, "sets": {"val": values}}))


def export_card(model: Path, out: Path, dim: int = 8) -> str:
    bundles.export(str(model), out, [dim])
    return (out / "README.md").read_text()


def test_hubs_read_the_front_matter(run: Path, tmp_path: Path) -> None:
    write_scores(run, step=5)
    bundles.export(str(run), tmp_path / "out", [8, 4], licence="apache-2.0")
    card = ModelCard.load(tmp_path / "out" / "8" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "mmrl")  # pyright: ignore[reportAttributeAccessIssue]
    assert "| 8 | 25.0 | 50.0 | 75.0 |" in card.text
    assert "| 16 |" not in card.text
    assert "`shards/train`" in card.text
    assert 'mmrl.load("8")' in card.text
    bundles.export(str(run), tmp_path / "out" / "unlicensed", [8])
    unlicensed = ModelCard.load(tmp_path / "out" / "unlicensed" / "README.md")
    assert unlicensed.data.license == "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_scores_are_those_of_the_exported_step(run: Path, tmp_path: Path) -> None:
    write_scores(run, step=9)
    last = export_card(run / "checkpoints" / "last", tmp_path / "last")
    assert "Exported from `run`, step 9." in last
    assert "Scores of step 9" in last
    assert "| 8 | 25.0 |" in last
    best = export_card(run, tmp_path / "best")  # the run's best checkpoint is step 5
    assert "| 25.0 |" not in best
    assert "no stored scores of the exported step (5)" in best
    assert "`mmrl eval best SHARDS`" in best


def test_a_checkpoint_carries_the_scores_of_its_own_step(run: Path, tmp_path: Path) -> None:
    write_scores(run, step=9)
    scores = json.loads((run / "retrieval.json").read_text())
    (run / "checkpoints" / "step-5" / "retrieval.json").write_text(json.dumps(scores | {"step": 5}))
    assert "Scores of step 5" in export_card(run, tmp_path / "best")


@pytest.mark.parametrize("scores", ["none", "without a step"])
def test_scores_of_an_unknown_step_are_not_shown(run: Path, tmp_path: Path, scores: str) -> None:
    if scores != "none":
        write_scores(run)
    card = export_card(run, tmp_path / "out")
    assert "| 25.0 |" not in card
    assert "no stored scores of the exported step (5)" in card


def test_a_rotated_encoder_does_not_show_the_scores_of_its_original(run: Path, shards: Path, tmp_path: Path) -> None:
    write_scores(run, step=5)
    rotate_model(str(run), str(shards), tmp_path / "rotated", steps=0, quiet=True)
    card = export_card(tmp_path / "rotated", tmp_path / "out")
    assert "| 25.0 |" not in card
    assert "Not recorded" in card


def test_a_card_can_be_edited(source: Path, tmp_path: Path) -> None:
    export_card(source, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("Edited.\n")
    mmrl.load(tmp_path / "out")
    assert "README.md" not in hash_files(tmp_path / "out")


def test_variants_are_listed(source: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "online"
    bundles.export(str(source), out, [8], "onnx", quantize=["int8"], measure_shards=str(shards))
    assert "| int8" in (out / "README.md").read_text()
    manifest = read_manifest(out)
    first, *others = summary(out, manifest).splitlines()
    assert "8-d encoder" in first
    assert [text.split(":")[0].strip() for text in others] == ["fp32", "int8"]
    assert sum("the default" in text for text in others) == 1
    del manifest["variants"]["int8"]["recall"]
    assert "--measure SHARDS" in summary(out, manifest).splitlines()[-1]
