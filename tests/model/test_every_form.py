"""Each form of MODEL passes in eval, rotate and export: tiny models, written by the libraries that have the form."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from helpers.encoders import IMAGES, TEXTS, export_bundle, prefix, save_random_encoder
from helpers.hugging_face import save_chinese_clip, save_clip, save_siglip
from safetensors.torch import save_file

import mmrl
from mmrl.errors import InputError
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.export.bundles import export
from mmrl.model.manifest import GRAPH_LAYOUTS
from mmrl.rotation.command import rotate_model


def run(folder: Path, config: Path) -> str:
    save_random_encoder(str(config), folder / "checkpoints" / "step-5")
    (folder / "checkpoints" / "last").symlink_to("step-5")
    return str(folder)


def checkpoint(folder: Path, config: Path) -> str:
    return f"{run(folder, config)}/checkpoints/last"


def rotated(folder: Path, config: Path) -> str:
    save_random_encoder(str(config), folder / "source")
    rotate_model(str(folder / "source"), "starter:val-pictures", folder / "rotated", steps=0, samples=200, quiet=True)
    return str(folder / "rotated")


def random_weights(folder: Path, config: Path) -> str:
    return f"open_clip:{config}:random"


def safetensors(folder: Path, config: Path) -> str:
    save_file(saved_by_open_clip(config), folder / "weights.safetensors")
    return f"open_clip:{config}:{folder / 'weights.safetensors'}"


def trainer_checkpoint(folder: Path, config: Path) -> str:
    torch.save({"epoch": 1, "state_dict": saved_by_open_clip(config)}, folder / "epoch_1.pt")
    return f"open_clip:{config}:{folder / 'epoch_1.pt'}"


def local_dir(folder: Path, config: Path) -> str:
    export(random_weights(folder, config), folder / "out", [16], "open_clip")
    (folder / "out" / "manifest.json").unlink()  # as open_clip itself writes it
    return f"open_clip:local-dir:{folder / 'out'}"


def saved_by_open_clip(config: Path) -> dict[str, torch.Tensor]:
    open_clip.add_model_config(config)
    model: Any = open_clip.create_model(config.stem)
    return model.state_dict()


def transformers_clip(folder: Path, config: Path) -> str:
    save_clip(folder / "clip")
    return str(folder / "clip")


def transformers_chinese_clip(folder: Path, config: Path) -> str:
    save_chinese_clip(folder / "clip")
    return str(folder / "clip")


def transformers_siglip(folder: Path, config: Path) -> str:
    save_siglip(folder / "siglip")
    return str(folder / "siglip")


def sentence_transformers_clip(folder: Path, config: Path) -> str:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    save_clip(folder / "clip")
    library.SentenceTransformer(str(folder / "clip"), device="cpu").save(str(folder / "saved"))
    return str(folder / "saved")


def exported(layout: str) -> Callable[[Path, Path], str]:
    def write(folder: Path, config: Path) -> str:
        save_random_encoder(str(config), folder / "source")
        export(str(folder / "source"), folder / layout, [16], layout)
        return str(folder / layout)

    write.__name__ = layout
    return write


QUICK = [run, safetensors, trainer_checkpoint, local_dir, transformers_clip]
SLOW = [checkpoint, rotated, random_weights, transformers_chinese_clip, transformers_siglip, sentence_transformers_clip]
SLOW += [exported(name) for name in ("bundle", "open_clip", "transformers", "sentence_transformers", *GRAPH_LAYOUTS)]


@pytest.mark.parametrize(
    "form", [*QUICK, *(pytest.param(form, marks=pytest.mark.slow) for form in SLOW)], ids=lambda form: form.__name__
)
def test_a_form_passes_in_eval_rotate_and_export(
    form: Callable[[Path, Path], str], tiny_model: Path, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "written").mkdir()
    config = tmp_path / f"tiny-{form.__name__}.json"  # open_clip registers it by its name
    shutil.copy(tiny_model, config)
    model = form(tmp_path / "written", config)
    whole = mmrl.load(model)
    texts, images = whole.encode_texts(TEXTS), whole.encode_images(IMAGES)
    scores = evaluate_model(model, [str(shards)], EvalOptions(), quiet=True)["dims"]
    assert scores[str(whole.dim)]["text_to_image"]["R@1"] > 0
    if form.__name__ in GRAPH_LAYOUTS:
        for call in (rotate_model, export_bundle):
            with pytest.raises(InputError, match="holds ONNX graphs, which have no weights"):
                call(model, str(shards) if call is rotate_model else tmp_path / "no", tmp_path / "no")  # pyright: ignore[reportArgumentType]
        return
    many = "starter:train" if whole.dim > 48 else str(shards)  # a rotation needs a sample per dim
    rotate_model(model, many, tmp_path / "rotated", samples=800, steps=0, quiet=True)
    again = mmrl.load(tmp_path / "rotated")
    similarities = again.encode_texts(TEXTS) @ again.encode_images(IMAGES).T
    np.testing.assert_allclose(similarities, texts @ images.T, atol=1e-5)
    assert export_bundle(model, tmp_path / "exported", 8)["dim"] == 8
    small = mmrl.load(tmp_path / "exported")
    np.testing.assert_allclose(small.encode_texts(TEXTS), prefix(texts, 8), atol=1e-5)
    np.testing.assert_allclose(small.encode_images(IMAGES), prefix(images, 8), atol=1e-5)
