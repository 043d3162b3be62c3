"""The model card and the lines that `mmrl export` prints."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.encoders import save_random_encoder
from huggingface_hub import ModelCard

import mmrl
from mmrl.export import bundles
from mmrl.export.card import summary, write
from mmrl.export.formats import base
from mmrl.model.manifest import hash_files, read_manifest
from mmrl.rotation.command import rotate_model


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of step 5."""
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("source"))


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """A run with the checkpoints step-5, which is `best`, and step-9, which is `last` and nested at 4 as well."""
    folder = tmp_path / "run"
    for step, link, dims in ((5, "best", [8, 16]), (9, "last", [4, 8, 16])):
        checkpoint = shutil.copytree(source, folder / "checkpoints" / f"step-{step}")
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        changed = {"source": {"step": step, "run": "run"}, "nested_dims": dims}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest | changed))
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


def test_a_card_publishes_no_password(run: Path, tmp_path: Path) -> None:
    spec = "https://me:s3cret@host/{00..10}.tar?token=s3cret"
    for data in ({"train": [spec, "pipe:curl -u s3cret url"]}, {"sources": [{"shards": spec}]}):
        (run / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "tiny"}, "data": data}))
        card = export_card(run, tmp_path / next(iter(data)))
        assert card.count("https://host/{00..10}.tar") == 2  # in the sentence and in the recipe
        assert "s3cret" not in card


def test_scores_are_those_of_the_exported_step(run: Path, tmp_path: Path) -> None:
    write_scores(run, step=9)
    last = export_card(run / "checkpoints" / "last", tmp_path / "last")
    assert "Exported from `run`, step 9." in last
    assert "Scores of step 9" in last
    assert "| 8 | 25.0 |" in last
    assert "Trained dims: 8, 4.\n" in last
    assert "Step 9 of a run with mmrl on `shards/train`. The run's config:" in last
    best = export_card(run, tmp_path / "best")  # the run's best checkpoint is step 5
    assert "| 25.0 |" not in best
    assert "no stored scores of the exported step (5)" in best
    assert "`mmrl eval best SHARDS`" in best
    assert "Trained dims: 8.\n" in best


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


def test_a_card_names_a_dim_that_was_not_trained_and_not_measured(run: Path, tmp_path: Path) -> None:
    write_scores(run, step=9)
    card = export_card(run / "checkpoints" / "last", tmp_path / "out", 12)
    assert "Trained dims: 8, 4. This encoder's own dim, 12, is not one of them.\n" in card
    assert "| 8 | 25.0 |" in card
    assert "The run was not evaluated at 12 dims. To measure them: `mmrl eval out SHARDS`." in card
    assert "Trained dims: none up to 3.\n" in export_card(run / "checkpoints" / "last", tmp_path / "tiny", 3)
    assert "was not evaluated at" not in export_card(run / "checkpoints" / "last", tmp_path / "trained", 8)


def test_an_export_of_an_export_follows_the_first_one(run: Path, tmp_path: Path) -> None:
    write_scores(run, step=9)
    export_card(run / "checkpoints" / "last", tmp_path / "first", 8)
    card = export_card(tmp_path / "first", tmp_path / "second", 5)
    assert "Exported from `run`, step 9. The embeddings equal its 16-d embeddings, truncated to 5 dims" in card
    assert "Trained dims: 4. This encoder's own dim, 5, is not one of them.\n" in card
    assert "| 25.0 |" not in card
    assert "Not recorded: this encoder was not exported from a checkpoint in a run folder." in card
    assert read_manifest(tmp_path / "second")["source"]["step"] == 9


def test_a_rotation_at_the_end_is_not_claimed_of_an_earlier_step(run: Path, tmp_path: Path) -> None:
    with (run / "config.yaml").open("a") as config:
        config.write("nesting: {dims: [16, 8, 4], rotate_at_end: true}\n")
    card = export_card(run, tmp_path / "out")
    assert "Step 5 of a run with mmrl on `shards/train`. `rotate_at_end` rotated the run's last step only." in card
    assert "Trained dims: 8.\n" in card  # every step trains every dim
    assert "`mmrl rotate`" not in card


def test_a_rotated_encoder_claims_neither_training_nor_scores_of_its_original(
    run: Path, shards: Path, tmp_path: Path
) -> None:
    write_scores(run, step=5)
    rotate_model(str(run), str(shards), tmp_path / "rotated", dims=[4, 16], steps=0, quiet=True)
    export_card(tmp_path / "rotated", tmp_path / "first", 8)
    for card in (
        export_card(tmp_path / "rotated", tmp_path / "out", 6),
        export_card(tmp_path / "first", tmp_path / "b", 6),
    ):
        assert (
            "Exported from `run`, step 5, rotated by `mmrl rotate`. The embeddings equal the rotated encoder's " in card
        )
        assert "16-d embeddings, truncated to 6 dims" in card
        assert "Nested dims: 4, those of `mmrl rotate`, which rotated the embedding of a trained model without" in card
        assert "This encoder's own dim, 6, is not one of them." in card
        assert "rained dims" not in card
        assert "| 25.0 |" not in card
        assert "Not recorded" in card
    assert read_manifest(tmp_path / "b")["rotation"] == read_manifest(tmp_path / "rotated")["rotation"]


def test_an_open_clip_model_that_was_rotated_is_called_so(tiny_model: Path, shards: Path, tmp_path: Path) -> None:
    rotate_model(f"open_clip:{tiny_model}:random", str(shards), tmp_path / "rotated", steps=0, quiet=True)
    card = export_card(tmp_path / "rotated", tmp_path / "out")
    assert (
        f"Exported from `{tiny_model.name}:random`, rotated by `mmrl rotate`. The embeddings equal the rotated" in card
    )
    assert "Nested dims: 8, those of `mmrl rotate`" in card


def test_a_card_can_be_edited(source: Path, tmp_path: Path) -> None:
    export_card(source, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("Edited.\n")
    mmrl.load(tmp_path / "out")
    assert "README.md" not in hash_files(tmp_path / "out")


def test_inputs_that_a_tool_reads_otherwise_are_named(source: Path, tmp_path: Path) -> None:
    export_card(source, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    contract = manifest["contract"] | {
        "hard_texts": {"count": 200, "tokenised_differently": ["x", "Â£5"], "worst_cosine_error": 0.3, "worst": "x"},
        "hard_images_cosine_error": {"landscape": 5e-4, "CMYK": None, "rotated by EXIF": 0.25, "transparent": 1e-3},
    }
    write(tmp_path, "out", base.get_format("bundle"), manifest | {"contract": contract}, None, None)
    text = (tmp_path / "README.md").read_text()
    assert (
        "Texts: training's token ids for 198 of 200 difficult texts, cosine error up to 3e-01 for the others, e.g. 'x'."
    ) in text
    assert "Images: cosine error up to 1e-03; CMYK refused; rotated by EXIF 2e-01." in text
    assert "Clean such texts first: `html.unescape(html.unescape(ftfy.fix_text(text)))`." in text
    assert "If CMYK: convert to RGB first. If rotated by EXIF: apply `PIL.ImageOps.exif_transpose` first." in text


@pytest.mark.slow
def test_variants_are_listed(source: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "online"
    bundles.export(str(source), out, [8], "onnx", quantize=["int8"], measure_shards=str(shards))
    assert "| int8" in (out / "README.md").read_text()
    manifest = read_manifest(out)
    first, texts, images, *others = summary(out, manifest).splitlines()
    assert "8-d encoder" in first
    assert "texts: training's token ids for all 200 difficult texts, cosine error up to " in texts
    assert "images: cosine error up to " in images
    assert [text.split(":")[0].strip() for text in others] == ["fp32", "int8"]
    assert sum("the default" in text for text in others) == 1
    del manifest["variants"]["int8"]["recall"]
    assert "--measure SHARDS" in summary(out, manifest).splitlines()[-1]
