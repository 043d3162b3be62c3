"""Encoders with one tower in each format: their embeddings equal the prefix of the source's, or they are refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import drawing, encoded, write_tar
from helpers.encoders import IMAGES, TEXTS, OneTower, one_tower, prefix, save_random_encoder

import mmrl
from mmrl.errors import InputError
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.export import bundles, hard_inputs
from mmrl.model import bundle
from mmrl.model.manifest import read_manifest

__all__ = ["one_tower"]  # a fixture
INPUTS: dict[str, Any] = {"text": TEXTS, "image": IMAGES[:1]}  # of the tower's size: tools resize in their own way


def encode(encoder: Any, side: str) -> np.ndarray:
    return getattr(encoder, f"encode_{side}s")(INPUTS[side])


def assert_exported(one: OneTower, folder: Path, atol: float = 1e-5) -> dict[str, Any]:
    """Asserts that a folder of 8 dims holds this tower alone; returns its manifest."""
    manifest, loaded = read_manifest(folder), mmrl.load(folder)
    assert manifest["towers"] == [one.side]
    assert loaded.towers == (one.side,)
    np.testing.assert_allclose(encode(loaded, one.side), prefix(encode(mmrl.load(one.encoder), one.side), 8), atol=atol)
    with pytest.raises(InputError, match=f"^model: this encoder has no {one.absent} tower; it encodes {one.side}s"):
        encode(loaded, one.absent)
    with pytest.raises(InputError, match=rf"^model: \S+ has no {one.absent} tower; it encodes {one.side}s only\.$"):
        mmrl.load(folder, towers=one.absent)
    assert mmrl.load(folder, dim=4, towers=one.side).towers == (one.side,)
    card = (folder / "README.md").read_text()
    assert f"# {one.side.capitalize()} encoder, 8-d" in card
    assert f"It has no {one.absent} tower." in card
    assert not [word for word in (f"encode_{one.absent}s", f"for {one.absent}s", f"\n- {one.absent}") if word in card]
    return manifest


def test_a_bundle_keeps_the_tower(one_tower: OneTower, tmp_path: Path) -> None:
    lines: list[str] = []
    bundles.export(str(one_tower.encoder), tmp_path / "out", [8], check_shards=str(one_tower.shards), log=lines.append)
    contract = assert_exported(one_tower, tmp_path / "out", 1e-6)["contract"]
    assert contract["samples"]["count"] == 24
    assert set(contract["end_to_end_cosine_error"]) == {"allowed_mean", one_tower.side}
    assert f"{one_tower.absent}s:" not in "\n".join(lines)
    again = bundles.export(str(tmp_path / "out"), tmp_path / "again", [4])["4"]
    assert (again["towers"], again["full_dim"]) == ([one_tower.side], 16)


def test_graphs_of_the_tower_alone(one_tower: OneTower, tmp_path: Path) -> None:
    folder, shards, side = tmp_path / "out", str(one_tower.shards), one_tower.side
    bundles.export(str(one_tower.encoder), folder, [8], "onnx", measure_shards=shards)
    manifest = assert_exported(one_tower, folder)
    assert [path.name for path in folder.glob("*.onnx")] == [f"{side}.onnx"]
    assert (folder / "tokenizer.json").exists() == (side == "text")
    # The recall of the graphs is that of the source, as `mmrl eval` measures it.
    recall = manifest["variants"]["fp32"]["recall"]
    assert recall["source"] == recall["variant"]
    for model in (folder, one_tower.encoder):
        scores = evaluate_model(str(model), [shards], EvalOptions(dims=[8]), quiet=True)["dims"]["8"]
        assert scores[f"{side}_to_{side}"]["R@10"] == recall["source"][f"{side}_to_{side}"]["R@10"]
    spec = importlib.util.spec_from_file_location("encoder", folder / "encoder.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    with pytest.raises(ValueError, match=f"has no {one_tower.absent} tower"):
        encode(module.Encoder(folder), one_tower.absent)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"towers": ["text", "image"]}, r"graphs\."),
        ({"towers": []}, "towers"),
        ({"towers": "text"}, "towers"),
    )
    for change, says in changes:
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        for opens in (mmrl.load, module.Encoder):
            with pytest.raises(ValueError, match=f"{says}.* export the encoder again"):
                opens(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "variants"), [("onnx", ["fp16", "int8"]), ("openvino", ["fp16"])])
def test_variants_of_the_tower_alone(one_tower: OneTower, tmp_path: Path, format: str, variants: list[str]) -> None:
    pytest.importorskip(format, reason=f"{format} is not installed")
    bundles.export(str(one_tower.encoder), tmp_path / "out", [8], format, quantize=variants)
    assert set(assert_exported(one_tower, tmp_path / "out", 1e-2)["variants"]) == {"fp32", *variants}
    graphs = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".onnx", ".xml")]
    assert {path.name.split(".")[0] for path in graphs} == {one_tower.side}


def test_sentence_transformers_opens_the_tower_as_an_ordinary_model(one_tower: OneTower, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    bundles.export(str(one_tower.encoder), tmp_path / "out", [8], "sentence_transformers")
    assert_exported(one_tower, tmp_path / "out")
    model: Any = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Dense", "Normalize"]
    expected = encode(mmrl.load(one_tower.encoder, dim=8), one_tower.side)
    np.testing.assert_allclose(model.encode(INPUTS[one_tower.side]), expected, atol=1e-5)


def test_a_hugging_face_text_tower_alone_is_an_ordinary_sentence_transformer(hf_model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    source = save_random_encoder(str(hf_model), tmp_path / "source", towers="text")
    bundles.export(str(source), tmp_path / "out", [8], "sentence_transformers")
    assert_exported(OneTower("text", source, tmp_path), tmp_path / "out")
    model: Any = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]
    texts = hard_inputs.texts()[:-4]  # without mojibake, which tokenizer.json does not repair
    np.testing.assert_allclose(model.encode(texts), mmrl.load(source, dim=8).encode_texts(texts), atol=1e-5)


@pytest.mark.parametrize("format", ["open_clip", "transformers", "transformers.js"])
def test_formats_of_two_towers_refuse_one(
    one_tower: OneTower, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "open_model", lambda _: pytest.fail("the encoder was opened"))
    says = (
        rf"^format: {format} holds encoders with both towers only, and \S+ has no {one_tower.absent} tower; allowed: "
        r"bundle, onnx, openvino, sentence_transformers\.$"
    )
    with pytest.raises(InputError, match=says):
        bundles.export(str(one_tower.encoder), tmp_path / "out", [8], format)
    assert not (tmp_path / "out").exists()


def test_shards_without_second_members_are_refused_before_graphs_are_made(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_random_encoder(str(tiny_model), tmp_path / "source", towers="image")
    shards = write_tar(tmp_path / "one.tar", [(f"{n}.png", encoded(drawing(n)[0])) for n in range(4)])
    monkeypatch.setattr(bundles, "_export_dim", lambda *_: pytest.fail("the work began"))
    with pytest.raises(InputError, match="no positives in image_to_image"):
        bundles.export(str(source), tmp_path / "out", [8], "onnx", measure_shards=str(shards))
