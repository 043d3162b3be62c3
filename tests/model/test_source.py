"""The forms of MODEL, parsed and opened."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import IMAGES, TEXTS, export_bundle, save_random_encoder
from safetensors.torch import save_file

import mmrl
from mmrl.errors import InputError
from mmrl.export import bundles
from mmrl.inference.evaluated import open_encoder
from mmrl.model import bundle, towers
from mmrl.model.source import OpenClipModel, StoredModel, parse_model, with_random_weights
from mmrl.model.towers import TowersConfig


@pytest.fixture(scope="module")
def encoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize(
    ("text", "name", "pretrained", "is_random"),
    [
        ("open_clip:ViT-B-32:random", "ViT-B-32", "random", True),
        ("open_clip:ViT-B-32:laion2b_s34b_b79k", "ViT-B-32", "laion2b_s34b_b79k", False),
        ("open_clip:ViT-B-32:weights/step:3.safetensors", "ViT-B-32", "weights/step:3.safetensors", False),
        ("open_clip:configs/tiny.json:/data/w.pt", "configs/tiny.json", "/data/w.pt", False),
        ("open_clip:hf-hub:timm/ViT-B-16-SigLIP", "hf-hub:timm/ViT-B-16-SigLIP", None, False),
        ("open_clip:local-dir:/data/my:model", "local-dir:/data/my:model", None, False),
        ("local-dir:/data/my:model", "local-dir:/data/my:model", None, False),
        ("hf-hub:openai/clip-vit-base-patch32", "hf-hub:openai/clip-vit-base-patch32", None, False),
    ],
)
def test_open_clip_names_are_parsed(text: str, name: str, pretrained: str | None, is_random: bool) -> None:
    source = parse_model(text)
    assert source == OpenClipModel(text, name, pretrained)
    assert isinstance(source, OpenClipModel)
    assert source.is_random == is_random


def test_a_run_is_its_best_checkpoint_else_its_last(encoder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (10, 20):
        shutil.copytree(encoder, run / "checkpoints" / f"step-{step}")
    (run / "checkpoints" / "last").symlink_to("step-20")
    assert parse_model(run) == StoredModel(str(run), run / "checkpoints" / "last")
    (run / "checkpoints" / "best").symlink_to("step-10")
    assert parse_model(str(run)) == StoredModel(str(run), run / "checkpoints" / "best")
    checkpoint = run / "checkpoints" / "step-20"
    assert parse_model(checkpoint) == StoredModel(str(checkpoint), checkpoint)


@pytest.mark.parametrize(
    "model",
    ["nowhere", "ViT-B-32", "openclip:ViT-B-32", "open_clip:", "open_clip::tag",
     "open_clip:local-dir:", "open_clip:hf-hub:", "hf-hub:", "hf-hub:org/name:tag", "{folder}", "{folder}/notes"],
)  # fmt: skip
def test_other_forms_are_answered_with_the_allowed_ones(model: str, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    with pytest.raises(InputError, match=r"^model: .* allowed: a run folder, .* or sentence-transformers\.$"):
        parse_model(model.format(folder=tmp_path))


@pytest.mark.parametrize("model", ["open_clip:ViT-B-32", "open_clip:ViT-B-32:", "open_clip:configs/tiny.json"])
def test_random_weights_are_wanted_or_refused(model: str) -> None:
    with pytest.raises(InputError, match=r"names no weights, so its towers would be random; .* add --random-weights"):
        parse_model(model)
    source = parse_model(with_random_weights(model))
    assert isinstance(source, OpenClipModel)
    assert source.is_random
    named = "open_clip:ViT-B-32:laion2b_s34b_b79k"
    assert with_random_weights(named) == named


def test_files_and_folders_that_lack_the_architecture(tmp_path: Path) -> None:
    (tmp_path / "logs" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "logs" / "checkpoints" / "epoch_3.pt"
    checkpoint.write_bytes(b"")
    for model in (checkpoint, tmp_path / "logs"):
        with pytest.raises(InputError, match=rf"lack|without an architecture.*open_clip:NAME:{checkpoint}"):
            parse_model(model)


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(InputError, match="has no checkpoint yet"):
        parse_model(tmp_path)


def test_a_local_dir_opens_like_the_export_in_it(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export:8"
    bundles.export(str(encoder), folder, [8], "open_clip")
    model = f"open_clip:local-dir:{folder}"
    expected, opened = mmrl.load(folder), mmrl.load(model)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    assert parse_model(folder) == OpenClipModel(str(folder), f"local-dir:{folder}")
    (tmp_path / "manifest.json").rename(folder / "manifest.json")
    np.testing.assert_allclose(opened.encode_texts(TEXTS), expected.encode_texts(TEXTS), atol=1e-6)
    np.testing.assert_allclose(opened.encode_images(IMAGES), expected.encode_images(IMAGES), atol=1e-6)
    assert open_encoder(model).dim == 8
    manifest = export_bundle(model, tmp_path / "again", 4)
    assert manifest["source"]["dim"] == 8


def test_a_local_dir_without_weights_is_refused(encoder: Path, tmp_path: Path) -> None:
    bundles.export(str(encoder), tmp_path / "out", [8], "open_clip")
    (tmp_path / "out" / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="could not be loaded"):
        bundle.open_model(f"open_clip:local-dir:{tmp_path / 'out'}")


@pytest.mark.parametrize("content", ["[]", "{", None])
def test_a_local_dir_without_a_config_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(InputError, match="local-dir"):
        bundle.open_model(f"open_clip:local-dir:{tmp_path}")


def test_a_weights_file_follows_the_name(tiny_model: Path, tmp_path: Path) -> None:
    built = towers.build(TowersConfig(name=str(tiny_model)))
    state = {f"visual.{name}": value for name, value in built.image.state_dict().items()}
    state |= {f"text.{name}": value for name, value in built.text.state_dict().items()}
    save_file({**state, "logit_scale": torch.tensor(3.0)}, tmp_path / "weights.safetensors")
    opened = bundle.open_model(f"open_clip:{tiny_model}:{tmp_path / 'weights.safetensors'}")
    assert opened.model.logit_scale.item() == pytest.approx(np.exp(3.0), rel=1e-5)


def test_parsing_imports_neither_torch_nor_open_clip(encoder: Path) -> None:
    code = (
        "import sys; from mmrl.model.source import parse_model; parse_model(sys.argv[1]); "
        "parse_model('open_clip:ViT-B-32:tag'); assert not {'torch', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(encoder)], check=True)
