"""`mmrl train --data`: presets, packing on the way, scaling to the data; runs that are continued."""

import csv
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import drawing
from helpers.encoders import save_random_encoder
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrl.config import Config, load_config
from mmrl.data.pack.command import pack_shards
from mmrl.data.sources import open_reader as read_samples
from mmrl.distributed.launchers import LaunchInfo
from mmrl.errors import InputError
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.model.footprint import Footprint
from mmrl.train import presets
from mmrl.train.own_data import DataOptions, find_shards
from mmrl.train.presets import PRESETS, TrainRequest, compose_config, preset_path
from mmrl.train.trainer import train

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)


FOOTPRINT = Footprint(
    parameters=10**7,
    trained=10**7,
    embed_dim=256,
    activations_fixed=0.0,
    activations_per_pair=1e6,
    forward_flops_per_pair=1e9,
    backward_flops_per_pair=2e9,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs in this process, since workers take a second to start, and does not measure the towers, which takes two."""
    monkeypatch.setattr("mmrl.train.own_data.usable_cores", lambda: 1)
    monkeypatch.setattr("mmrl.model.footprint.measure", lambda *_: FOOTPRINT)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 60 images with captions, and a table of them next to it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with (tmp_path / "photos.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "title"])
        for number in range(60):
            image, caption, _ = drawing(number)
            image.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(caption)
            table.writerow([f"photos/{number}.png", caption])
    return folder


def composed(data: Path | str | None, run: Path, *overrides: str, **options: Any) -> Config:
    of_data = {key: options.pop(key) for key in ("val", "shards", "holdout") if key in options}
    own = None if data is None else DataOptions(str(data), **of_data)
    return compose_config(TrainRequest(own, **options), [f"run={run}", *overrides], QUIET)


def test_packaged_presets_are_the_shipped_configs() -> None:
    packaged = {path.name for path in (ROOT / "mmrl" / "presets").iterdir()}
    assert packaged == {preset.file for preset in PRESETS.values()}
    for name in packaged:
        assert (ROOT / "configs" / name).resolve() == (ROOT / "mmrl" / "presets" / name)
    assert '"mmrl" = ["presets/*.yaml"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_folder_or_a_table_becomes_a_scaled_config(kind: str, photos: Path, tmp_path: Path) -> None:
    data = photos if kind == "folder" else photos.with_suffix(".csv")
    config = composed(data, tmp_path / "run", "optim.eps=1e-7")
    # A fifth of 60 pairs is held out, since a tenth is less than 100; a batch is at most an eighth of the others.
    assert config.data.train == str(tmp_path / "run/shards/train")
    assert config.evaluation.sets["val"].shards == str(tmp_path / "run/shards/val")
    assert len(list((tmp_path / "run/shards/val").glob("*.tar"))) == 1
    assert config.train.batch_size == 4
    assert config.train.duration == "90 epochs"
    assert config.optim.warmup == f"{round(0.06 * 90 * 12)} steps"
    small = load_config(preset_path("small"))
    assert config.optim.lr == pytest.approx(small.optim.lr * (4 / 128) ** 0.5, rel=0.01)
    assert config.optim.lr_rotation == small.optim.lr_rotation
    assert config.data.cache
    assert config.optim.eps == 1e-7
    text = (tmp_path / "run/config.yaml").read_text()
    assert load_config(tmp_path / "run/config.yaml") == config
    assert "  # Global batch size, over all processes. At most one in 8 of the 48 pairs." in text


def test_packed_shards_are_used_again_unless_the_source_has_changed(photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    first = composed(photos, tmp_path / "one", shards=shards)
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    second = composed(photos, tmp_path / "two", shards=shards)
    assert second.data.train == first.data.train == str(shards / "train")
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")} == before
    drawing(60)[0].save(photos / "60.png")
    with pytest.raises(InputError, match=r"packed from something else or with other options \(sources\); choose"):
        composed(photos, tmp_path / "three", shards=shards)
    (shards / "packed.json").write_text("[1]")
    with pytest.raises(InputError, match=r"packed\.json cannot be read .*; choose another folder with --shards"):
        composed(photos, tmp_path / "three", shards=shards)


def test_shards_are_used_as_they_are(photos: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    composed(photos, tmp_path / "one", shards=shards)
    for data in (shards, shards / "train"):  # what mmrl pack --holdout writes
        config = composed(data, tmp_path / "two")
        assert config.data.train == str(shards / "train")
        assert config.evaluation.sets["val"].shards == str(shards / "val")
    alone = composed(shards / "train" / "shard-000000.tar", tmp_path / "three")
    assert (alone.evaluation.sets, alone.evaluation.best) == ({}, None)
    given = composed(shards / "train", tmp_path / "four", val=str(photos))
    assert given.data.train == str(shards / "train")
    assert given.evaluation.sets["val"].shards == str(tmp_path / "four/shards/val")
    with pytest.raises(InputError, match=r"names shards already, so nothing is packed"):
        composed(shards, tmp_path / "five", holdout="5%")


def test_a_data_set_of_the_hub_is_packed_also_next_to_a_table(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = list[str]()
    monkeypatch.setattr("mmrl.train.own_data.pack_missing", packed.extend)
    options = DataOptions("hf:shop/photos:train", val=str(photos))
    assert find_shards(options, str(tmp_path / "run"), 64, QUIET) == (options.data, str(tmp_path / "run/shards/val"))
    assert "hf:shop/photos:train" in packed


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_preset_takes_packed_pairs_for_one_tower(side: str, photos: Path, tmp_path: Path) -> None:
    table, second = tmp_path / "pairs.csv", {"text": "passage {}", "image": "photos/{}.png"}[side]
    rows = [f"photos/{n}.png,question {n},{second.format(n)}" for n in range(60)]
    table.write_text("\n".join(["path,title,second", *rows]))
    columns = {f"second_{side}_column": "second"}
    pack_shards(table, tmp_path / "out", sides=[side], holdout="10", quiet=True, **columns)  # pyright: ignore
    towers = (f"model.towers={side}", "loss.image_text=0", f"loss.{side}_{side}=1")
    config = composed(tmp_path / "out", tmp_path / "run", *towers)
    assert config.evaluation.best is not None
    assert (config.evaluation.best.set, config.evaluation.best.direction) == ("val", f"{side}_to_{side}")
    assert config.train.batch_size == 4
    assert load_config(tmp_path / "run/config.yaml") == config
    with pytest.raises(InputError, match=rf"is packed for both towers.*; run mmrl pack .*\.csv shards --towers {side}"):
        composed(table, tmp_path / "other", *towers)
    if side == "image":
        reader = read_samples(str(tmp_path / "out" / "train"), required=["image"])
        assert presets._decoded_bytes(reader, second=True) == 2 * presets._decoded_bytes(reader, second=False)


def test_an_encoder_without_a_tower_is_refused_before_data_are_packed(
    photos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    encoder = save_random_encoder(str(tiny_model), tmp_path / "encoder", towers="text")
    with pytest.raises(InputError, match=r"model.towers: both, but .*encoder has no image tower; set model.towers"):
        composed(photos, tmp_path / "run", model=str(encoder))
    assert not (tmp_path / "run" / "shards").exists()


def test_several_processes_do_not_pack(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = LaunchInfo("torchrun", 0, 2, 0, "127.0.0.1", 29500)
    monkeypatch.setattr("mmrl.train.own_data.detect_launch", lambda: launch)
    with pytest.raises(InputError, match=r"run mmrl pack .*photos shards --holdout 10% first"):
        find_shards(DataOptions(str(photos)), str(tmp_path / "run"), 128, QUIET)


@pytest.mark.parametrize(
    ("dims", "expected"), [([64, 512], [64, 512]), ([256, 8], [256, 8]), (None, [256, 128, 64, 32, 16, 8])]
)
def test_new_towers_are_as_wide_as_the_largest_dim(
    dims: Sequence[int] | None, expected: list[int], photos: Path, tmp_path: Path
) -> None:
    config = composed(photos, tmp_path / "run", dims=dims)
    assert sorted(config.nesting.dims) == sorted(expected)
    assert config.evaluation.best is not None
    assert config.evaluation.best.dim in config.nesting.dims
    assert (config.model.name == "mmrl-starter") == (max(expected) == 256)
    assert load_config(tmp_path / "run/config.yaml").nesting.dims == config.nesting.dims


def test_the_micro_batch_fits_into_the_memory(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert composed(photos, tmp_path / "one", shards=tmp_path / "shards").train.micro_batch is None
    # Half of it is for the model: 0.27 GB for weights and optimizer, 1.5 GB reserved, and room for two pairs of 1 GB.
    monkeypatch.setattr("mmrl.train.presets.host_memory", lambda: 2 * 4.4e9)
    large = replace(FOOTPRINT, activations_per_pair=1e9)
    monkeypatch.setattr("mmrl.model.footprint.measure", lambda *_: large)
    config = composed(photos, tmp_path / "two", shards=tmp_path / "shards")
    assert (config.train.batch_size, config.train.micro_batch) == (4, 2)
    assert "What fits into 4 GB; 4 at once do not." in (tmp_path / "two/config.yaml").read_text()
    monkeypatch.setattr("mmrl.train.presets.host_memory", lambda: 1e5)
    assert not composed(photos, tmp_path / "three", shards=tmp_path / "shards").data.cache


def test_overrides_rule_over_what_is_scaled(photos: Path, tmp_path: Path) -> None:
    overrides = ["train={batch_size: 8, duration: 3 steps}", "optim.warmup=2 steps", "data.cache=false"]
    config = composed(photos, tmp_path / "run", *overrides)
    assert (config.train.batch_size, config.train.duration) == (8, "3 steps")
    assert (config.optim.lr, config.optim.warmup) == (1e-3, "2 steps")
    assert not config.data.cache
    assert config.evaluation.every == "1 steps"


def test_from_a_run_takes_its_recipe(shards: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    """Its dims, data and steps, a fifth of its learning rates, and the factor on the prefixes' gradient at its end."""
    best = {"set": "val", "dim": 8}
    sets = {"val": {"shards": str(shards), "captions": 1}}
    path = write_config(evaluation={"sets": sets, "best": best}, train={"batch_size": 6, "duration": "1 steps"})
    run = train(load_config(path), QUIET)
    before = load_config(run / "config.yaml")
    config = composed(None, tmp_path / "next", "tracking.tensorboard=true", model=str(run))
    written = (tmp_path / "next/config.yaml").read_text()
    assert (config.model.name, config.model.pretrained) == (str(run), None)
    assert config.nesting.dims == before.nesting.dims
    assert (config.data, config.evaluation.sets, config.train) == (before.data, before.evaluation.sets, before.train)
    assert config.optim.lr == pytest.approx(before.optim.lr / 5)
    assert (config.nesting.prefix_gradient.end, config.nesting.prefix_gradient.power) == (0.3, 0)
    assert (train(config, QUIET) / "checkpoints/best").exists()
    # A micro-batch that does not divide the new batch, or the share of more processes, is not taken.
    stored_config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored_config.replace("micro_batch: null", "micro_batch: 6"))
    assert composed(None, tmp_path / "small", "train.batch_size=3", model=str(run)).train.micro_batch is None
    (run / "config.yaml").write_text(stored_config)
    assert (tmp_path / "next/config.yaml").read_text() == written  # with its comments
    assert "# Length of the linear warmup. At most 6% of the 1 steps." in written
    events = EventAccumulator(str(tmp_path / "next/tensorboard"))
    assert [f"val/query-{number}" for number in (1, 2, 3)] == events.Reload().Tags()["images"]
    # Of a model whose prefixes are trained, the default preset for fine-tuning is the one that does not rotate it.
    stored = str(run / "checkpoints/last")
    tuned = composed(shards, tmp_path / "tuned", "optim.layer_decay=1", model=stored, val=str(shards))
    assert not tuned.nesting.rotate_at_start
    assert sorted(tuned.nesting.dims) == [16]  # those of the preset that it has, and the full dim
    assert tuned.evaluation.best is not None
    assert tuned.evaluation.best.dim == 16


def test_from_weights_fine_tunes_them_with_the_full_dim(shards: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.touch()
    named = {"name": "ViT-B-32", "pretrained": str(weights)}
    for model in (str(weights), f"open_clip:ViT-B-32:{weights}"):
        config = composed(shards, tmp_path / "run", model=model, val=str(shards), dims=[256, 64])
        assert config.model.model_dump(include={"name", "pretrained"}) == named
        assert config.nesting.rotate_at_start
        assert config.nesting.dims == [512, 256, 64]
        assert config.evaluation.best is not None
        assert config.evaluation.best.dim in (64, 256)
    text = " ".join((tmp_path / "run/config.yaml").read_text().replace("#", "").split())
    assert "With the full dim, 512, which a rotation preserves." in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "open_clip:ViT-B-32"}, "from: open_clip:ViT-B-32 names no weights"),
        ({"preset": "large"}, "preset: there is no preset 'large'. Allowed: finetune, rotate-then-finetune, small"),
        ({"dims": [0, 8]}, "dims: 0 is out of range"),
    ],
)
def test_a_wrong_option_is_a_sentence(options: dict[str, Any], says: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        composed(photos, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "table"])
def test_700_photos_become_an_encoder_that_retrieves(kind: str, tmp_path: Path) -> None:
    """700 images of the starter set as a user has them: R@10 among 1,465 images of a held-out artist is more than ten
    times chance."""
    samples = read_samples("starter:train")
    photos = tmp_path / "photos"
    photos.mkdir()
    with (tmp_path / "photos.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "title"])
        for index in random.Random(0).sample(range(len(samples)), 700):
            sample = samples.read(index)
            (photos / f"{index}.webp").write_bytes(sample.image)
            table.writerow([f"photos/{index}.webp", sample.captions[0]])
            if kind == "folder":
                (photos / f"{index}.txt").write_text(sample.captions[0])
    start = time.monotonic()
    config = composed(photos if kind == "folder" else tmp_path / "photos.csv", tmp_path / "run")
    run = train(config, QUIET)
    assert time.monotonic() - start < 600
    result = evaluate_model(str(run), ["starter:test-artist"], EvalOptions(captions=1), None, quiet=True)
    scores = result["dims"]["256"]
    assert min(scores[one]["R@10"] for one in ("image_to_text", "text_to_image")) > 10 * 10 / 1465
