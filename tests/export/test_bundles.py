"""Exported bundles: embeddings equal the source's prefixes, for every kind of source, without the training code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_MODEL
from helpers.encoders import IMAGES, TEXTS, export_bundle, prefix, save_random_encoder

import mmrl
from mmrl.errors import InputError
from mmrl.model import bundle, layouts


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("source"), per_dim=True)


@pytest.mark.parametrize("dim", [16, 8, 5])
def test_vectors_equal_the_renormalised_prefix(source: Path, tmp_path: Path, dim: int) -> None:
    manifest = export_bundle(str(source), tmp_path / "out", dim)
    assert manifest["contract"]["worst_absolute_difference"] <= 1e-6
    full, small, truncated = mmrl.load(source), mmrl.load(tmp_path / "out"), mmrl.load(source, dim=dim)
    assert small.dim == dim
    assert small.nested_dims == tuple(d for d in (4, 8, 16) if d <= dim)
    for encode, inputs in (("encode_images", IMAGES), ("encode_texts", TEXTS)):
        at_full, exported, at_load = (getattr(one, encode)(inputs, batch_size=2) for one in (full, small, truncated))
        assert exported.dtype == np.float32
        assert exported.shape == (3, dim)
        np.testing.assert_allclose(exported, prefix(at_full, dim), atol=1e-6)
        np.testing.assert_allclose(at_load, prefix(at_full, dim), atol=1e-6)


def test_projections_are_truncated(source: Path, tmp_path: Path) -> None:
    export_bundle(str(source), tmp_path / "out", 8)
    state = bundle.read_weights(tmp_path / "out", bundle.read_manifest(tmp_path / "out"))
    assert state["image.tower.proj"].shape == (32, 8)
    assert state["text.tower.text_projection"].shape == (32, 8)
    assert state["log_logit_scale"].shape == (2,)
    again = export_bundle(str(tmp_path / "out"), tmp_path / "smaller", 4)
    assert again["full_dim"] == 16
    np.testing.assert_allclose(
        mmrl.load(tmp_path / "smaller").encode_texts(TEXTS), mmrl.load(source, dim=4).encode_texts(TEXTS), atol=1e-6
    )


@pytest.mark.parametrize(("dim", "of_dim"), [(16, 16), (15, 8), (8, 8), (7, 4), (4, 4), (3, 4)])
@pytest.mark.parametrize("layout", ["bundle", "open_clip", "transformers", "sentence_transformers"])
def test_the_logit_scale_is_that_of_the_largest_trained_dim_up_to_the_exported_one(
    source: Path, layout: str, dim: int, of_dim: int
) -> None:
    full = bundle.load(source)
    scale = dict(zip(full.nested_dims, full.model.log_logit_scale.tolist(), strict=True))
    state = layouts.LAYOUTS[layout].export_state(bundle.truncated_state(full, dim))
    stored = state["log_logit_scale"][-1] if layout == "bundle" else state["logit_scale"]
    assert stored.item() == scale[of_dim]


def test_an_export_of_an_export_has_the_same_logit_scale(source: Path, tmp_path: Path) -> None:
    export_bundle(str(source), tmp_path / "12", 12)
    export_bundle(str(tmp_path / "12"), tmp_path / "5", 5)
    scale = bundle.load(source).model.log_logit_scale.tolist()
    assert bundle.load(tmp_path / "12").model.log_logit_scale.tolist() == scale[:2]
    assert bundle.load(tmp_path / "5").model.log_logit_scale.tolist() == scale[:1]


@pytest.mark.parametrize("image", ["none", "mlp"])
def test_towers_without_a_projection_that_can_be_truncated_get_one(tmp_path: Path, image: str) -> None:
    vision = {"timm_model_name": "test_vit", "timm_proj": image, "timm_pool": "token", "image_size": 160}
    settings = {**TINY_MODEL, "embed_dim": 64, "vision_cfg": vision}
    (tmp_path / f"no-projection-{image}.json").write_text(json.dumps(settings))
    source = save_random_encoder(str(tmp_path / f"no-projection-{image}.json"), tmp_path / "source")
    export_bundle(str(source), tmp_path / "out", 8)
    np.testing.assert_allclose(
        mmrl.load(tmp_path / "out").encode_images(IMAGES), mmrl.load(source, dim=8).encode_images(IMAGES), atol=1e-6
    )


def test_a_hugging_face_text_tower_is_stored_in_the_bundle(hf_model: Path, tmp_path: Path) -> None:
    source = save_random_encoder(str(hf_model), tmp_path / "source")
    export_bundle(str(source), tmp_path / "out", 8)
    expected = mmrl.load(source, dim=8).encode_texts(TEXTS)
    manifest = bundle.read_manifest(tmp_path / "out")
    # The folders that the tower and tokenizer were first read from are not needed.
    text_cfg = manifest["model_cfg"]["text_cfg"]
    manifest["model_cfg"]["text_cfg"] = text_cfg | {"hf_model_name": "gone", "hf_tokenizer_name": "gone"}
    bundle.write_manifest(tmp_path / "out", manifest)
    np.testing.assert_allclose(mmrl.load(tmp_path / "out").encode_texts(TEXTS), expected, atol=1e-6)


def test_an_open_clip_model_is_exported(tmp_path: Path) -> None:
    manifest = export_bundle("open_clip:mmrl-starter:random", tmp_path / "out", 32)
    assert manifest["source"] == {"model": "open_clip:mmrl-starter:random", "dim": 256}
    assert mmrl.load(tmp_path / "out").encode_texts(["a"]).shape == (1, 32)


def test_towers_with_batch_norm_are_opened_in_evaluation_mode(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_resnet", "image_size": 64}
    (tmp_path / "with-batch-norm.json").write_text(json.dumps({**TINY_MODEL, "vision_cfg": vision}))
    export_bundle(f"open_clip:{tmp_path / 'with-batch-norm.json'}:random", tmp_path / "out", 8)


def test_one_tower_can_be_loaded(source: Path) -> None:
    online = mmrl.load(source, dim=4, towers="text")
    assert online.encode_texts(TEXTS).shape == (3, 4)
    with pytest.raises(InputError, match="towers='both' or 'image'"):
        online.encode_images(IMAGES)
    with pytest.raises(InputError, match="towers='both' or 'text'"):
        mmrl.load(source, towers="image").encode_texts(TEXTS)


_WITHOUT_TRAINING_CODE = """
import sys
for name in ("deepspeed", "webdataset", "mmrl.data", "mmrl.train.trainer", "mmrl.engine.engine"):
    sys.modules[name] = None
import mmrl, numpy
encoder = mmrl.load(sys.argv[1])
numpy.save(sys.argv[2], encoder.encode_texts(["a red square", "green stripes", "x"]))
"""


def test_a_bundle_loads_without_the_training_code(source: Path, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.npy"
    subprocess.run([sys.executable, "-c", _WITHOUT_TRAINING_CODE, str(source), str(vectors)], check=True)
    np.testing.assert_allclose(np.load(vectors), mmrl.load(source).encode_texts(TEXTS), atol=1e-6)


def test_missing_and_damaged_encoders_are_reported(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        mmrl.load("nowhere")
    with pytest.raises(InputError, match="is neither a run folder, a checkpoint nor an exported encoder"):
        mmrl.load(tmp_path)
    export_bundle(str(source), tmp_path / "out", 8)
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"model.safetensors is not the file that manifest.json was written for"):
        mmrl.load(tmp_path / "out")
    weights.unlink()
    with pytest.raises(InputError, match=r"model.safetensors is missing"):
        mmrl.load(tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=r"already holds mine.txt; choose a new or empty folder"):
        export_bundle(str(source), tmp_path / "other", 8)
    with pytest.raises(InputError, match=r"already holds manifest.json; choose a new or empty folder"):
        export_bundle(str(source), source, 8)
    with pytest.raises(InputError, match="'txt'; want 'both', 'image' or 'text'"):
        mmrl.load(source, towers="txt")  # pyright: ignore[reportArgumentType]


def test_unreadable_images_and_single_strings_are_reported(source: Path, tmp_path: Path) -> None:
    encoder = mmrl.load(source)
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad.jpg: no picture in a known format"):
        encoder.encode_images([tmp_path / "bad.jpg"])
    with pytest.raises(InputError, match="want a list of texts"):
        encoder.encode_texts("a red square")
    assert encoder.encode_texts([]).shape == (0, 16)
