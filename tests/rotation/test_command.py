"""`mmrl rotate`: equal to uncentred PCA of numpy and scikit-learn, similarities unchanged, any number of processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, drawing, sample_members, write_tar
from helpers.encoders import export_bundle, save_random_encoder
from rich.console import Console
from sklearn.decomposition import TruncatedSVD

import mmrl
from mmrl.cli import main
from mmrl.config import load_config
from mmrl.data.sources import open_reader
from mmrl.errors import InputError, RunStopped
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.evaluate.report.study import Study
from mmrl.inference.base import LoadedEncoder
from mmrl.inference.evaluated import open_encoder
from mmrl.model import bundle
from mmrl.rotation import learned, moments
from mmrl.rotation.command import rotate_model
from mmrl.rotation.moments import SecondMoment
from mmrl.train.trainer import train

TEXTS = ["a red square", "green stripes", "x", "a blue corner number 7"]
IMAGES = [drawing(number, size)[0] for number, size in enumerate((32, 40, 64, 32))]


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, not nested, 16-d."""
    folder = save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("plain"))
    manifest = bundle.read_manifest(folder)
    bundle.write_manifest(folder, manifest | {"nested_dims": [16]})
    return folder


@pytest.fixture(scope="module")
def nested(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, nested at 4, 8 and 16, with a logit scale per dim."""
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("nested"), per_dim=True)


@pytest.fixture(scope="module")
def trained(shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on the drawings at the full dim only."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "run": str(folder / "run"),
                "model": {"name": str(tiny_model)},
                "nesting": {"dims": [16]},
                "data": {"train": str(shards), "captions": [1.0], "cache": True},
                "optim": {"lr": 3e-3, "warmup": "5 steps"},
                "train": {"batch_size": 24, "duration": "60 steps"},
            }
        )
    )
    return train(load_config(folder / "config.yaml"))


def scrambled(source: Path, folder: Path) -> Path:
    """The same encoder with a random rotation: full-dim similarities are unchanged, prefixes are arbitrary."""
    whole = bundle.open_model(source)
    noise = np.random.default_rng(3).normal(size=(whole.dim, whole.dim))
    rotation = torch.from_numpy(np.linalg.qr(noise)[0])
    bundle.save(whole, folder, bundle.rotated_state(whole, rotation), {})
    return folder


def embed_all(encoder: LoadedEncoder, shards: Path) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of all images and all captions of the shards, float64."""
    reader = open_reader(str(shards))
    samples = [reader.read_image(number) for number in range(len(reader))]
    images = torch.stack([encoder.image_spec.pixels(image) for _, image in samples])
    texts = [caption for sample, _ in samples for caption in sample.captions]
    return encoder.encode_pixels(images).astype(float), encoder.encode_texts(texts).astype(float)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------ the rotation


def test_without_steps_every_prefix_equals_uncentred_pca(plain: Path, shards: Path, tmp_path: Path) -> None:
    assert "learnt" not in rotate_model(str(plain), str(shards), tmp_path / "out", steps=0)["rotation"]
    before, after = mmrl.load(plain), mmrl.load(tmp_path / "out")
    image, text = embed_all(before, shards)
    assert len(text) == 2 * len(image)  # yet images and texts weigh the same
    both = np.concatenate([image / np.sqrt(2 * len(image)), text / np.sqrt(2 * len(text))])
    directions = np.linalg.svd(both)[2]
    rows = np.concatenate([before.encode_images(IMAGES), before.encode_texts(TEXTS)]).astype(float)
    rotated = np.concatenate([after.encode_images(IMAGES), after.encode_texts(TEXTS)]).astype(float)
    for dim in range(1, 17):
        ours, expected = unit(rotated[:, :dim]), unit(rows @ directions[:dim].T)
        np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=2e-6)
        np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=2e-6)
        if dim < 16:  # scikit-learn chooses signs in the same way
            peer = TruncatedSVD(dim, algorithm="arpack").fit(both)
            np.testing.assert_allclose(ours, unit(peer.transform(rows)), atol=2e-6)
    image, text = embed_all(after, shards)
    moment = image.T @ image / len(image) / 2 + text.T @ text / len(text) / 2
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-6)
    assert (np.diff(np.diag(moment)) < 1e-7).all()


def test_full_dim_similarities_are_unchanged(plain: Path, shards: Path, tmp_path: Path) -> None:
    manifest = rotate_model(str(plain), str(shards), tmp_path / "out", steps=20)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert 0 < manifest["contract"]["worst_absolute_difference"] <= 1e-6 == manifest["contract"]["allowed"]
    for old, new in zip(
        embed_all(mmrl.load(plain), shards), embed_all(mmrl.load(tmp_path / "out"), shards), strict=True
    ):
        np.testing.assert_allclose(new @ new.T, old @ old.T, atol=1e-6)
        assert np.abs(new - old).max() > 0.1
    about = manifest["rotation"]
    assert (about["images"], about["texts"], about["kept_as_they_were"]) == (48, 96, 0)
    assert about["share_of_second_moment"]["16"] == pytest.approx(1)
    assert 1 <= about["effective_rank"] <= 16
    assert manifest["nested_dims"] == [8, 16]
    origin = bundle.read_manifest(plain)["weights_sha256"]
    assert manifest["source"]["rotated_from"]["weights_sha256"] == origin
    assert bundle.origin(manifest) == manifest["weights_sha256"] != origin  # their embeddings differ


def test_the_learned_rotation_is_folded_into_the_weights(trained: Path, shards: Path, tmp_path: Path) -> None:
    about = rotate_model(str(trained), str(shards), tmp_path / "out", dims=[4, 16], steps=25)["rotation"]
    whole = bundle.open_model(trained)
    found = moments.compute_moments(
        "", whole, open_reader(str(shards)), None, None, Console(quiet=True), with_pairs=True
    )
    scale = whole.model.logit_scale[-1].item()
    rotation_DD, learned_rotation = learned.find_rotation(found.moment_DD, found.pairs, scale, [4], steps=25)
    assert learned_rotation is not None
    assert about["learnt"] == learned_rotation.as_json()
    assert (about["learnt"]["pictures"], about["learnt"]["judged_by"]) == (44, 4)
    before, after = (mmrl.load(path).encode_images(IMAGES) for path in (trained, tmp_path / "out"))
    np.testing.assert_allclose(after, before @ rotation_DD.numpy().T, atol=1e-6)


def test_a_second_rotation_changes_nothing(plain: Path, shards: Path, tmp_path: Path) -> None:
    rotate_model(str(plain), str(shards), tmp_path / "once", steps=0)
    rotate_model(str(tmp_path / "once"), str(shards), tmp_path / "twice", steps=0)
    once, twice = (mmrl.load(tmp_path / name).encode_images(IMAGES) for name in ("once", "twice"))
    np.testing.assert_allclose(np.abs(once), np.abs(twice), atol=1e-4)


@pytest.mark.parametrize("steps", [0, 20])
def test_keep_leaves_the_first_dims_unchanged(nested: Path, shards: Path, tmp_path: Path, steps: int) -> None:
    manifest = rotate_model(str(nested), str(shards), tmp_path / "out", keep=4, steps=steps)
    assert manifest["nested_dims"] == [4, 8, 16]
    assert ("learnt" in manifest["rotation"]) == (steps > 0)
    before, after = (mmrl.load(path).encode_images(IMAGES) for path in (nested, tmp_path / "out"))
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=1e-6)
    assert np.abs(after - before)[:, 4:].max() > 0.1
    if steps:
        return
    image, text = embed_all(mmrl.load(tmp_path / "out"), shards)
    moment = (image.T @ image / len(image) + text.T @ text / len(text))[4:, 4:]
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-6)


def test_moments_equal_the_definition_in_any_order() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1000, 24)) * rng.lognormal(size=(1000, 1)) * 1e3
    expected = unit(rows).T @ unit(rows) / len(rows)

    def mean(order: Any) -> torch.Tensor:
        moment = SecondMoment(24, torch.device("cpu"))
        for chunk in order:
            moment.add(torch.from_numpy(rows[chunk * 50 : chunk * 50 + 50]))
        assert moment.count() == 1000
        return moment.mean()

    forwards = mean(range(20))
    np.testing.assert_allclose(forwards.numpy(), expected, rtol=0, atol=1e-11)
    assert torch.equal(forwards, mean(rng.permutation(20)))


# ------------------------------------------------------------------------------------------------ encoders


@pytest.mark.parametrize("kind", ["none", "mlp", "linear with a bias"])
def test_towers_with_other_projections(shards: Path, tmp_path: Path, kind: str) -> None:
    vision: dict[str, Any] = {"timm_model_name": "test_resnet", "timm_pool": "avg", "image_size": 64}
    if kind == "linear with a bias":
        vision |= {"timm_proj": "linear", "timm_proj_bias": True}
    else:
        vision |= {"timm_model_name": "test_vit", "timm_proj": kind, "timm_pool": "token", "image_size": 160}
    settings = {**TINY_MODEL, "embed_dim": 64 if kind == "none" else 32, "vision_cfg": vision}
    (tmp_path / "towers.json").write_text(json.dumps(settings))
    source = save_random_encoder(str(tmp_path / "towers.json"), tmp_path / "source")
    many = write_tar(tmp_path / "many.tar", [m for number in range(70) for m in sample_members(number)])
    manifest = rotate_model(str(source), str(many), tmp_path / "out", dims=[8], steps=20)
    assert manifest["contract"]["worst_absolute_difference"] <= 1e-6
    assert manifest["nested_dims"] == [8]


def test_a_hugging_face_text_tower(hf_model: Path, shards: Path, tmp_path: Path) -> None:
    source = save_random_encoder(str(hf_model), tmp_path / "source")
    rotate_model(str(source), str(shards), tmp_path / "out", steps=20)
    old, new = (mmrl.load(path).encode_texts(TEXTS) for path in (source, tmp_path / "out"))
    np.testing.assert_allclose(new @ new.T, old @ old.T, atol=1e-6)


def test_a_truncated_encoder_with_a_logit_scale_per_dim(nested: Path, shards: Path, tmp_path: Path) -> None:
    export_bundle(str(nested), tmp_path / "small", 8)
    manifest = rotate_model(str(tmp_path / "small"), str(shards), tmp_path / "out", steps=20)
    assert (manifest["dim"], manifest["full_dim"], manifest["nested_dims"]) == (8, 16, [4, 8])
    scale = bundle.open_model(tmp_path / "small").model.logit_scale
    assert torch.equal(bundle.open_model(tmp_path / "out").model.logit_scale, scale[-1:])
    old, new = (mmrl.load(tmp_path / name).encode_texts(TEXTS) for name in ("small", "out"))
    np.testing.assert_allclose(new @ new.T, old @ old.T, atol=1e-6)


def test_an_open_clip_model(tiny_model: Path, shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    manifest = rotate_model(f"open_clip:{tiny_model}:random", str(shards), tmp_path / "out", steps=20)
    assert manifest["source"] == {"model": f"{tiny_model.name}:random", "dim": 16}


def test_eval_export_and_embed_open_a_rotated_encoder(trained: Path, shards: Path, tmp_path: Path) -> None:
    rotate_model(str(trained), str(shards), tmp_path / "out", dims=[16, 8, 4], steps=20)
    scores = evaluate_model(str(tmp_path / "out"), [str(shards)], EvalOptions(), quiet=True)
    assert list(scores["dims"]) == ["16", "8", "4"]
    manifest = export_bundle(str(tmp_path / "out"), tmp_path / "small", 4)
    for model, how in ((trained, "trained at"), (tmp_path / "out", "rotated for"), (tmp_path / "small", "rotated for")):
        assert f"; {how} " in Study(str(model), open_encoder(str(model)), [4])._about()["Embedding"]
    assert bundle.origin(manifest) == bundle.read_manifest(tmp_path / "out")["weights_sha256"]
    small, cut = mmrl.load(tmp_path / "small"), mmrl.load(tmp_path / "out", dim=4)
    np.testing.assert_allclose(small.encode_images(IMAGES), cut.encode_images(IMAGES), atol=1e-6)
    from mmrl.search.embed import embed_images

    assert embed_images(str(tmp_path / "out"), str(shards), tmp_path / "embeddings", quiet=True)["count"] == 48


# ------------------------------------------------------------------------------------------------ validation


def test_the_rotation_is_written_if_it_improves_validation(trained: Path, shards: Path, tmp_path: Path) -> None:
    source = scrambled(trained, tmp_path / "scrambled")
    manifest = rotate_model(str(source), str(shards), tmp_path / "out", dims=[4, 16], validate=str(shards))
    scores = manifest["rotation"]["validation"]
    for which, model in (("before", source), ("after", tmp_path / "out")):
        measured = evaluate_model(str(model), [str(shards)], EvalOptions(dims=[4, 16]), quiet=True)["dims"]
        for dim in ("4", "16"):
            for direction in ("image_to_text", "text_to_image"):
                assert scores[which][dim][direction] == pytest.approx(measured[dim][direction], abs=0.03)
    gains = [
        scores["after"][dim]["text_to_image"]["mAP"] - scores["before"][dim]["text_to_image"]["mAP"] for dim in "4"
    ]
    assert min(gains) > 0.05
    assert scores["after"]["16"] == scores["before"]["16"]


def test_nothing_is_written_if_validation_does_not_improve(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rotate_model(str(trained), str(shards), tmp_path / "once", dims=[4, 16], steps=0)
    with pytest.raises(RunStopped, match=r"does not help on 48 validation images .* nothing was written"):
        rotate_model(str(tmp_path / "once"), str(shards), tmp_path / "twice", validate=str(shards), steps=0)
    assert not (tmp_path / "twice").exists()
    shown = capsys.readouterr().out
    assert "rotating all but the first 4 dims: mean mAP" in shown


def test_notes_on_trained_dims_and_few_samples(
    nested: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rotate_model(str(nested), str(shards), tmp_path / "out", steps=20)
    shown = capsys.readouterr().out
    assert "trained at the dims 4, 8, 16" in shown
    assert "--validate" in shown
    assert "48 samples are few for 16 dims" in shown


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The plain encoder with a NaN in its weights, or of a foreign format."""

    def make(how: str) -> Path:
        whole = bundle.open_model(plain)
        state = whole.state()
        if how == "nan":
            state["image.tower.proj"][0, 0] = float("nan")
        bundle.save(whole, tmp_path / how, state, {})
        if how == "foreign":
            foreign = bundle.read_manifest(plain) | {"format": "foreign-encoder"}
            (tmp_path / how / "manifest.json").write_text(json.dumps(foreign))
        return tmp_path / how

    return make


def test_mistakes_are_reported_in_one_sentence(
    plain: Path, shards: Path, tmp_path: Path, broken: Callable[[str], Path]
) -> None:
    few = write_tar(tmp_path / "few.tar", [m for number in range(15) for m in sample_members(number)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    bad = [("bad.png", b"not an image"), ("bad.txt", b"x")]
    spoilt = write_tar(tmp_path / "spoilt.tar", [m for n in range(14) for m in sample_members(n)] + bad)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shards": str(tmp_path / "none.tar")}, "none.tar"),
        ({"shards": str(few)}, "has 15 usable samples, too few for 16 dims; give at least 16, better 160"),
        ({"shards": str(spoilt)}, "too few for 16 dims"),
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"model": str(broken("nan"))}, "gives embeddings that are not finite, in the chunk of samples from .*00000"),
        ({"model": str(broken("foreign"))}, "is foreign-encoder version 2; this version of mmrl reads mmrl-bundle"),
        ({"out": tmp_path / "full"}, "already holds mine.txt; choose a new or empty folder"),
        ({"out": plain}, "already holds manifest.json; choose a new or empty folder"),
        ({"dims": [17]}, "17 is out of range; this embedding has dims 1 to 16"),
        ({"keep": 15}, "keep: 15 of 16 dims leaves nothing to rotate; give 0 to 14"),
        ({"validate": str(tmp_path / "none.tar")}, "none.tar"),
    ]
    for changes, says in cases:
        with pytest.raises(InputError, match=says):
            rotate_model(**{"model": str(plain), "shards": str(shards), "out": tmp_path / "out"} | changes)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*partial"))


def test_a_rotation_that_changes_similarities_is_refused(
    plain: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrl.nesting.principal_rotation", lambda moment, keep=0: 2 * torch.eye(16).double().cumsum(0))
    with pytest.raises(RunStopped, match=r"changes similarities of .* nothing was written"):
        rotate_model(str(plain), str(shards), tmp_path / "out", steps=0)
    assert not (tmp_path / "out").exists()


def test_the_command(
    plain: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["mmrl", "rotate", str(plain), str(shards), str(tmp_path / "out"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["nested_dims"] == [8, 16]
    monkeypatch.setattr("sys.argv", ["mmrl", "rotate", str(plain), str(shards), str(tmp_path / "again"), "--steps=20"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "rotated with 48 images and 96 texts; full-dim similarities changed by at most" in shown
    assert "rotation learned from 44 images; on 4 held-out images the mean reciprocal rank" in shown
    assert "effective rank" in shown
