"""The rotation against uncentred PCA by numpy and scikit-learn; what it must not change; several processes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, drawing, sample_members, write_tar
from helpers.encoders import stored
from helpers.worlds import run_in_world
from rich.console import Console
from sklearn.decomposition import TruncatedSVD

import mmrl
from mmrl.cli import main
from mmrl.config import load as load_config
from mmrl.data.sources import open_reader
from mmrl.errors import InputError, RunStopped
from mmrl.evaluate.command import Asked, evaluate_model
from mmrl.export.bundles import export_bundle
from mmrl.inference.base import LoadedEncoder
from mmrl.model import bundle
from mmrl.rotation import learned, moments
from mmrl.rotation.command import rotate_model
from mmrl.rotation.moments import SecondMoment
from mmrl.train.trainer import train

TEXTS = ["a red square", "green stripes", "x", "a blue corner number 7"]
PICTURES = [drawing(number, size)[0] for number, size in enumerate((32, 40, 64, 32))]


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, not nested, 16-d."""
    folder = stored(str(tiny_model), tmp_path_factory.mktemp("plain"))
    manifest = bundle.read_manifest(folder)
    bundle.write_manifest(folder, manifest | {"nested_dims": [16]})
    return folder


@pytest.fixture(scope="module")
def nested(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, nested at 4, 8 and 16, a scale of each."""
    return stored(str(tiny_model), tmp_path_factory.mktemp("nested"), per_dim=True)


@pytest.fixture(scope="module")
def trained(shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt the drawings, at its full dim alone."""
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
    """The same encoder turned at random: whole vectors compare as before, prefixes are worth nothing special."""
    whole = bundle.open_model(source)
    noise = np.random.default_rng(3).normal(size=(whole.dim, whole.dim))
    turn = torch.from_numpy(np.linalg.qr(noise)[0])
    bundle.save(whole, folder, bundle.rotated_state(whole, turn), {})
    return folder


def everything(encoder: LoadedEncoder, shards: Path) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of all pictures and all captions of the shards, float64."""
    reader = open_reader(str(shards))
    samples = [reader.read_picture(number) for number in range(len(reader))]
    pictures = torch.stack([encoder.image_spec.pixels(picture) for _, picture in samples])
    texts = [caption for sample, _ in samples for caption in sample.captions]
    return encoder.encode_pixels(pictures).astype(float), encoder.encode_texts(texts).astype(float)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------ what it is


def test_without_steps_every_prefix_is_shared_uncentred_pca(plain: Path, shards: Path, tmp_path: Path) -> None:
    assert "learnt" not in rotate_model(str(plain), str(shards), tmp_path / "out", steps=0)["rotation"]
    before, after = mmrl.load(plain), mmrl.load(tmp_path / "out")
    image, text = everything(before, shards)
    assert len(text) == 2 * len(image)  # yet pictures and texts weigh the same
    both = np.concatenate([image / np.sqrt(2 * len(image)), text / np.sqrt(2 * len(text))])
    directions = np.linalg.svd(both)[2]
    rows = np.concatenate([before.encode_images(PICTURES), before.encode_texts(TEXTS)]).astype(float)
    turned = np.concatenate([after.encode_images(PICTURES), after.encode_texts(TEXTS)]).astype(float)
    for dim in range(1, 17):
        ours, expected = unit(turned[:, :dim]), unit(rows @ directions[:dim].T)
        np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=2e-6)
        np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=2e-6)
        if dim < 16:  # scikit-learn has our convention of signs, too
            peer = TruncatedSVD(dim, algorithm="arpack").fit(both)
            np.testing.assert_allclose(ours, unit(peer.transform(rows)), atol=2e-6)
    image, text = everything(after, shards)
    moment = image.T @ image / len(image) / 2 + text.T @ text / len(text) / 2
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-6)
    assert (np.diff(np.diag(moment)) < 1e-7).all()


def test_whole_vectors_compare_as_before_and_the_manifest_tells(plain: Path, shards: Path, tmp_path: Path) -> None:
    manifest = rotate_model(str(plain), str(shards), tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert 0 < manifest["contract"]["worst_absolute_difference"] <= 1e-6 == manifest["contract"]["allowed"]
    for old, new in zip(
        everything(mmrl.load(plain), shards), everything(mmrl.load(tmp_path / "out"), shards), strict=True
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
    assert bundle.origin(manifest) == manifest["weights_sha256"] != origin  # their vectors do not agree


def test_what_is_learnt_is_what_is_written(trained: Path, shards: Path, tmp_path: Path) -> None:
    about = rotate_model(str(trained), str(shards), tmp_path / "out", dims=[4, 16], steps=25)["rotation"]
    whole = bundle.open_model(trained)
    found = moments.of_set("", whole, open_reader(str(shards)), None, None, Console(quiet=True), with_pairs=True)
    scale = whole.model.logit_scale[-1].item()
    rotation_DD, learnt = learned.best(found.moment_DD, found.pairs, scale, [4], steps=25)
    assert learnt is not None
    assert about["learnt"] == learnt.as_json()
    assert (learnt.pictures, learnt.judged_by) == (44, 4)
    before, after = (mmrl.load(path).encode_images(PICTURES) for path in (trained, tmp_path / "out"))
    np.testing.assert_allclose(after, before @ rotation_DD.numpy().T, atol=1e-6)


def test_turning_twice_changes_nothing_more(plain: Path, shards: Path, tmp_path: Path) -> None:
    rotate_model(str(plain), str(shards), tmp_path / "once", steps=0)
    rotate_model(str(tmp_path / "once"), str(shards), tmp_path / "twice", steps=0)
    once, twice = (mmrl.load(tmp_path / name).encode_images(PICTURES) for name in ("once", "twice"))
    np.testing.assert_allclose(np.abs(once), np.abs(twice), atol=1e-4)


@pytest.mark.parametrize("steps", [0, 20])
def test_the_first_numbers_can_be_kept(nested: Path, shards: Path, tmp_path: Path, steps: int) -> None:
    manifest = rotate_model(str(nested), str(shards), tmp_path / "out", keep=4, steps=steps)
    assert manifest["nested_dims"] == [4, 8, 16]
    assert ("learnt" in manifest["rotation"]) == (steps > 0)
    before, after = (mmrl.load(path).encode_images(PICTURES) for path in (nested, tmp_path / "out"))
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=1e-6)
    assert np.abs(after - before)[:, 4:].max() > 0.1
    if steps:
        return
    image, text = everything(mmrl.load(tmp_path / "out"), shards)
    moment = (image.T @ image / len(image) + text.T @ text / len(text))[4:, 4:]
    np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-6)


def test_moments_are_those_of_the_plain_formula_in_any_order() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1000, 24)) * rng.lognormal(size=(1000, 1)) * 1e3
    expected = unit(rows).T @ unit(rows) / len(rows)

    def mean(order: Any) -> torch.Tensor:
        moment = SecondMoment(24, torch.device("cpu"))
        for part in order:
            moment.add(torch.from_numpy(rows[part * 50 : part * 50 + 50]))
        assert moment.count() == 1000
        return moment.mean()

    forwards = mean(range(20))
    np.testing.assert_allclose(forwards.numpy(), expected, rtol=0, atol=1e-13)
    assert torch.equal(forwards, mean(rng.permutation(20)))


# ------------------------------------------------------------------------------------------------ which encoders


@pytest.mark.parametrize("kind", ["none", "mlp", "linear with a bias"])
def test_towers_of_other_kinds(shards: Path, tmp_path: Path, kind: str) -> None:
    vision: dict[str, Any] = {"timm_model_name": "test_resnet", "timm_pool": "avg", "image_size": 64}
    if kind == "linear with a bias":
        vision |= {"timm_proj": "linear", "timm_proj_bias": True}
    else:
        vision |= {"timm_model_name": "test_vit", "timm_proj": kind, "timm_pool": "token", "image_size": 160}
    settings = {**TINY_MODEL, "embed_dim": 64 if kind == "none" else 32, "vision_cfg": vision}
    (tmp_path / "towers.json").write_text(json.dumps(settings))
    source = stored(str(tmp_path / "towers.json"), tmp_path / "source")
    many = write_tar(tmp_path / "many.tar", [m for number in range(70) for m in sample_members(number)])
    manifest = rotate_model(str(source), str(many), tmp_path / "out", dims=[8])
    assert manifest["contract"]["worst_absolute_difference"] <= 1e-6
    assert manifest["nested_dims"] == [8]


def test_a_hugging_face_text_tower(hf_model: Path, shards: Path, tmp_path: Path) -> None:
    source = stored(str(hf_model), tmp_path / "source")
    rotate_model(str(source), str(shards), tmp_path / "out")
    old, new = (mmrl.load(path).encode_texts(TEXTS) for path in (source, tmp_path / "out"))
    np.testing.assert_allclose(new @ new.T, old @ old.T, atol=1e-6)


def test_a_cut_encoder_and_one_scale_of_each_dim(nested: Path, shards: Path, tmp_path: Path) -> None:
    export_bundle(str(nested), tmp_path / "small", 8)
    manifest = rotate_model(str(tmp_path / "small"), str(shards), tmp_path / "out")
    assert (manifest["dim"], manifest["full_dim"], manifest["nested_dims"]) == (8, 16, [4, 8])
    scale = bundle.open_model(tmp_path / "small").model.logit_scale
    assert torch.equal(bundle.open_model(tmp_path / "out").model.logit_scale, scale[-1:])
    old, new = (mmrl.load(tmp_path / name).encode_texts(TEXTS) for name in ("small", "out"))
    np.testing.assert_allclose(new @ new.T, old @ old.T, atol=1e-6)


def test_an_open_clip_model(tiny_model: Path, shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    manifest = rotate_model(f"open_clip:{tiny_model}", str(shards), tmp_path / "out")
    assert manifest["source"] == {"model": tiny_model.name, "dim": 16}


def test_all_commands_take_what_is_written(trained: Path, shards: Path, tmp_path: Path) -> None:
    rotate_model(str(trained), str(shards), tmp_path / "out", dims=[16, 8, 4])
    scores = evaluate_model(str(tmp_path / "out"), [str(shards)], Asked(), quiet=True)
    assert list(scores["dims"]) == ["16", "8", "4"]
    manifest = export_bundle(str(tmp_path / "out"), tmp_path / "small", 4)
    assert bundle.origin(manifest) == bundle.read_manifest(tmp_path / "out")["weights_sha256"]
    small, cut = mmrl.load(tmp_path / "small"), mmrl.load(tmp_path / "out", dim=4)
    np.testing.assert_allclose(small.encode_images(PICTURES), cut.encode_images(PICTURES), atol=1e-6)
    from mmrl.search.embed import embed_pictures

    assert embed_pictures(str(tmp_path / "out"), str(shards), tmp_path / "embeddings", quiet=True)["count"] == 48


# ------------------------------------------------------------------------------------------------ validation


def test_it_is_kept_where_validation_improves(trained: Path, shards: Path, tmp_path: Path) -> None:
    source = scrambled(trained, tmp_path / "scrambled")
    manifest = rotate_model(str(source), str(shards), tmp_path / "out", dims=[4, 16], validate=str(shards))
    told = manifest["rotation"]["validation"]
    for which, model in (("before", source), ("after", tmp_path / "out")):
        measured = evaluate_model(str(model), [str(shards)], Asked(dims=[4, 16]), quiet=True)["dims"]
        for dim in ("4", "16"):
            for direction in ("image_to_text", "text_to_image"):
                assert told[which][dim][direction] == pytest.approx(measured[dim][direction], abs=0.03)
    gains = [told["after"][dim]["text_to_image"]["mAP"] - told["before"][dim]["text_to_image"]["mAP"] for dim in "4"]
    assert min(gains) > 0.05
    assert told["after"]["16"] == told["before"]["16"]


def test_nothing_is_written_where_it_does_not(
    trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rotate_model(str(trained), str(shards), tmp_path / "once", dims=[4, 16], steps=0)
    with pytest.raises(RunStopped, match=r"does not help on 48 validation pictures .* nothing was written"):
        rotate_model(str(tmp_path / "once"), str(shards), tmp_path / "twice", validate=str(shards), steps=0)
    assert not (tmp_path / "twice").exists()
    shown = capsys.readouterr().out
    assert "turning all but the first 4 numbers: mean mAP" in shown


def test_a_nested_model_is_not_turned_without_a_word(
    nested: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rotate_model(str(nested), str(shards), tmp_path / "out")
    shown = capsys.readouterr().out
    assert "trained to be cut at 4, 8, 16" in shown
    assert "--validate" in shown
    assert "48 samples for 16 directions" in shown


# ------------------------------------------------------------------------------------------------ processes


def test_any_number_of_processes_writes_the_same_bits(
    plain: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "PART", moments.PART)  # which is set to 7 below
    hashes = set()
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        folder.mkdir()

        run_in_world(size, partial(_rotate_by_sevens, plain, shards), folder, start_method="spawn")
        hashes.add(bundle.read_manifest(folder / "out")["weights_sha256"])
    _rotate_by_sevens(plain, shards, tmp_path)
    assert hashes == {bundle.read_manifest(tmp_path / "out")["weights_sha256"]}


def _rotate_by_sevens(plain: Path, shards: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    moments.PART = 7  # seven parts of the 48 samples
    assert "learnt" in rotate_model(str(plain), str(shards), folder / "out", steps=20, quiet=True)["rotation"]


def test_a_part_of_the_samples_is_spread_over_the_shards(
    plain: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "PART", 8)
    manifest = rotate_model(str(plain), str(shards), tmp_path / "out", samples=20)
    assert manifest["rotation"]["images"] == 24
    assert [part for part, _ in moments.own_parts(48, 20)] == [0, 2, 4]


def test_the_pairs_to_learn_from_are_spread_over_the_shards_too(
    plain: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "PART", 8)
    monkeypatch.setattr(moments, "PICTURES_PER_DIM", 1)  # 16 of the 48, from two of the six parts
    whole, reader = bundle.open_model(plain), open_reader(str(shards))
    found = moments.of_set("plain", whole, reader, None, None, Console(quiet=True), with_pairs=True)
    assert found.images == 48
    assert found.pairs is not None
    batches = list(moments.read(whole, reader, [(0, 6), (3, 6)]))
    vectors = [moments.embed(whole, batch) for batch in batches]
    torch.testing.assert_close(found.pairs.image_ND, torch.cat([image_ND for image_ND, _ in vectors]))
    torch.testing.assert_close(found.pairs.text_MD, torch.cat([text_MD for _, text_MD in vectors]))
    rows = [batch.row_of_text_M + 8 * number for number, batch in enumerate(batches)]
    assert torch.equal(found.pairs.image_of_text_M, torch.cat(rows))
    assert torch.equal(found.pairs.group_N, torch.cat([batch.group_B for batch in batches]))


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The plain encoder with a wrong number in it, or of a foreign format."""

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


def test_mistakes_are_told_in_one_sentence(
    plain: Path, shards: Path, tmp_path: Path, broken: Callable[[str], Path]
) -> None:
    few = write_tar(tmp_path / "few.tar", [m for number in range(15) for m in sample_members(number)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    bad = [("bad.png", b"no picture"), ("bad.txt", b"x")]
    spoilt = write_tar(tmp_path / "spoilt.tar", [m for n in range(14) for m in sample_members(n)] + bad * 1)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"shards": str(tmp_path / "none.tar")}, "none.tar"),
        ({"shards": str(few)}, "has 15 usable samples, too few to find 16 directions; give at least 16, better 160"),
        ({"shards": str(spoilt)}, "too few to find 16 directions"),
        ({"model": "nowhere"}, "nowhere does not exist"),
        ({"model": str(broken("nan"))}, "gives vectors that are not finite, near .*00000"),
        ({"model": str(broken("foreign"))}, "is foreign-encoder version 2; this mmrl reads mmrl-bundle"),
        ({"out": tmp_path / "full"}, "exists and is not empty"),
        ({"out": plain}, "exists and is not empty"),
        ({"dims": [17]}, "17 is out of range; this embedding has dims 1 to 16"),
        ({"keep": 15}, "keep: 15 of 16 numbers leaves nothing to turn; give 0 to 14"),
        ({"validate": str(tmp_path / "none.tar")}, "none.tar"),
    ]
    for changes, says in cases:
        with pytest.raises(InputError, match=says):
            rotate_model(**{"model": str(plain), "shards": str(shards), "out": tmp_path / "out"} | changes)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*partial"))


def test_a_tower_that_a_rotation_would_change_is_refused(
    plain: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrl.nesting.principal_rotation", lambda moment, keep=0: 2 * torch.eye(16).double().cumsum(0))
    with pytest.raises(RunStopped, match=r"differs from itself by .* nothing was written"):
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
    monkeypatch.setattr("sys.argv", ["mmrl", "rotate", str(plain), str(shards), str(tmp_path / "again")])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "turned by 48 pictures and 96 texts; similarities changed by" in shown
    assert "learnt from 44 pictures: mean reciprocal rank of the smaller dims among 4 others" in shown
    assert "effective rank" in shown
