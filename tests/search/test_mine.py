"""`mmrl mine`: negatives equal those of brute force under every bound; files, settings, errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from conftest import drawing, encoded, write_tar
from helpers.encoders import save_random_encoder
from typer.testing import CliRunner

from mmrl.cli import app
from mmrl.data.captions import caption_id
from mmrl.data.groups import group_id, own_group
from mmrl.data.negatives import MINED
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stream import Stream
from mmrl.errors import InputError
from mmrl.search import mine, mining
from mmrl.search.mine import MineOptions, mine_negatives
from mmrl.search.mining import Bounds, Lists, MiningSet

CPU = torch.device("cpu")
CAPTIONS = ["a cup", "A  Cup", "a red hat", "shoes", "a cap", "an old map", "two keys", "a lamp"]


def random_set(seed: int, samples: int = 60, captions: int = 40, dim: int = 6) -> MiningSet:
    """With groups of several samples, samples without a group, and captions of several samples and groups."""
    rng = np.random.default_rng(seed)
    image, text = (rng.normal(size=(rows, dim)).astype(np.float32) for rows in (samples, captions))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    group = np.unique(np.where(rng.random(samples) < 0.5, rng.integers(0, 8, samples), 100 + np.arange(samples)),
                      return_inverse=True)[1]  # fmt: skip
    lists = [rng.choice(captions, rng.integers(1, 3), replace=False) for _ in range(samples)]
    used, caption = np.unique(np.concatenate(lists), return_inverse=True)
    return MiningSet(image, text[used], group, Lists(np.cumsum([0, *map(len, lists)]), caption))


def by_brute_force(
    items: MiningSet, bounds: Bounds, direction: str
) -> tuple[list[dict[int, tuple[float, set[int]]]], dict[str, int]]:
    """For each sample {wrong caption: its score and the samples that have it}, or {wrong sample: its score and first
    caption}, of all that the bounds admit; and the numbers of better candidates that each bound skipped."""
    count, score_NC = len(items.group_N), items.image_Nd @ items.text_Cd.T
    own = [items.captions_of.take(np.array([n]))[1].tolist() for n in range(count)]
    found, skipped = [], {"group": 0, "caption": 0, "margin": 0}
    for n in range(count):
        related = {c for m in range(count) if items.group_N[m] == items.group_N[n] for c in own[m]}
        queries = [own[n]] if direction == "image_to_text" else [[c] for c in own[n]]
        wrong: dict[int, tuple[float, set[int]]] = {}
        for query in queries:
            match = max(score_NC[n, c] for c in query)
            ceiling = min(match - bounds.margin, match - bounds.relative_margin * abs(match))
            if direction == "image_to_text":
                scores = {c: score_NC[n, c] for c in range(len(items.text_Cd))}
                right = related
                values = {c: {m for m in range(count) if c in own[m]} for c in scores}
            else:
                scores = {m: score_NC[m, query[0]] for m in range(count)}
                right = {m for m in range(count) if related & set(own[m])}
                values = {m: {own[m][0]} for m in scores}
            admitted = {c: float(s) for c, s in scores.items() if c not in right and s <= ceiling}
            wrong |= {c: (s, values[c]) for c, s in admitted.items() if s > wrong.get(c, (-2.0,))[0]}
            kth = sorted(admitted.values(), reverse=True)[bounds.num - 1] if len(admitted) >= bounds.num else -2.0
            skipped["margin"] += sum(s > ceiling for c, s in scores.items() if c not in right)
            better = [c for c, s in scores.items() if c in right and s >= kth]
            others = [m for c in better for m in (values[c] if direction == "image_to_text" else {c}) if m != n]
            same = sum(items.group_N[m] == items.group_N[n] for m in others)
            skipped["group"] += int(same)
            skipped["caption"] += len(others) - int(same)
        found.append(wrong)
    return found, skipped


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize(
    "bounds", [Bounds(5, 0.0, 0.0), Bounds(3, 0.3, 0.0), Bounds(4, 0.05, 0.6), Bounds(50, 0.0, 0.0)]
)
def test_negatives_are_those_of_brute_force(direction: str, bounds: Bounds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mining, "_CPU_TILE", 7)
    monkeypatch.setattr(mining, "_PAIRS", 150)
    search = MiningSet.nearest_captions if direction == "image_to_text" else MiningSet.nearest_images
    for seed in range(4):
        items = random_set(seed)
        expected, skipped = by_brute_force(items, bounds, direction)
        chunks = list(items.chunks(0, 60, CPU))
        assert len(chunks) > 3
        assert np.concatenate(chunks).tolist() == list(range(60))
        parts = [search(items, chunk, bounds, CPU) for chunk in chunks]
        found = mining.best(parts, bounds.num, by_caption=direction == "image_to_text")
        assert found.skipped == skipped
        for n, wanted in enumerate(expected):
            rows = np.flatnonzero(found.sample == n)
            scores = sorted((score for score, _ in wanted.values()), reverse=True)[: bounds.num]
            assert found.score[rows].tolist() == pytest.approx(scores, abs=1e-5)
            for negative, caption, score in zip(
                found.negative[rows].tolist(), found.caption[rows].tolist(), found.score[rows].tolist(), strict=True
            ):
                key, value = (caption, negative) if direction == "image_to_text" else (negative, caption)
                assert wanted[key][0] == pytest.approx(score, abs=1e-5)
                assert value in wanted[key][1]


def test_both_directions_together_name_no_wrong_sample_twice() -> None:
    items, bounds = random_set(9), Bounds(6, 0.1, 0.0)
    parts = [
        search(items, np.arange(60), bounds, CPU) for search in (MiningSet.nearest_captions, MiningSet.nearest_images)
    ]
    found = mining.best(parts, 6, by_caption=False)
    for n in range(60):
        rows = found.sample == n
        pairs = [(part.score[k], part.negative[k]) for part in parts for k in np.flatnonzero(part.sample == n)]
        scores = {negative: max(s for s, other in pairs if other == negative) for _, negative in pairs}
        assert found.score[rows].tolist() == sorted(scores.values(), reverse=True)[:6]
        assert len(set(found.negative[rows])) == rows.sum()


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 12 samples; two have no caption, some share a group or a caption."""
    folder = tmp_path_factory.mktemp("data")
    for shard in range(2):
        members = []
        for number in range(12):
            caption = CAPTIONS[(number + shard) % 8]
            metadata = {"captions": [caption, f"{caption} {number}"] if number % 6 else [], "group": f"g{number % 5}"}
            if number in (2, 3):
                del metadata["group"]
            members += [
                (f"sub/{number:02}.png", encoded(drawing(number + 12 * shard)[0])),
                (f"sub/{number:02}.json", json.dumps(metadata).encode()),
            ]
        write_tar(folder / f"train-{shard}.tar", members)
    return folder


def rows_of(out: Path) -> list[dict[str, Any]]:
    files = json.loads((out / MINED).read_text())["files"].values()
    return [row for file in files for row in pyarrow.parquet.read_table(out / file).to_pylist()]


def test_the_files_of_a_set(model: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "negatives"
    result = CliRunner().invoke(app, ["mine", model, str(data), str(out), "--direction", "both", "--num", "4",
                                      "--margin", "0", "--dim", "8"])  # fmt: skip
    assert result.exit_code == 0, result.exception
    for says in ("negatives of 20 samples", "of the same group", "Examples", f"data.negatives_from={out}"):
        assert says in result.output
    mined, reader = json.loads((out / MINED).read_text()), open_reader(str(data))
    assert mined["format"] == "mmrl-negatives-1"
    assert mined["layout"] == reader.layout
    assert mined["files"] == {f"train-{n}.tar": f"train-{n}.tar.parquet" for n in range(2)}
    samples = {sample.name: sample for n in range(len(reader)) if n % 6 for sample in [reader.read(n)]}
    rows, shards = rows_of(out), [pyarrow.parquet.read_table(out / file) for file in mined["files"].values()]
    assert [row["key"] for row in rows] == list(samples)
    assert [{key.split("/")[0] for key in shard["key"].to_pylist()} for shard in shards] == [
        {"train-0.tar"}, {"train-1.tar"}
    ]  # fmt: skip
    assert mined["negatives"] == sum(len(row["negatives"]) for row in rows) > 20
    assert mined["short"] == sum(len(row["negatives"]) < 4 for row in rows)
    for row in rows:
        own = samples[row["key"]]
        named = [samples[key] for key in row["negatives"]]
        assert row["groups"] == [one.group if one.group >= 0 else group_id(own_group(one.name)) for one in named]
        related = [one for one in samples.values() if one is own or (own.group >= 0 and one.group == own.group)]
        right = {caption_id(text) for one in related for text in one.captions}
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["captions"]) == len(row["scores"]) == len(set(row["negatives"])) <= 4
        for key, caption in zip(row["negatives"], row["captions"], strict=True):
            assert caption_id(caption) in {caption_id(text) for text in samples[key].captions}
            assert not right & {caption_id(text) for text in samples[key].captions} or caption_id(caption) not in right
            assert samples[key] not in related
    config = DataConfig(train=str(data), negatives=4, negatives_from=str(out), negatives_images=True)
    mined_of = {row["key"]: {*zip(row["negatives"], row["captions"], row["groups"], strict=True)} for row in rows}
    for batch in Stream(open_training_set(config), 10, config=config):
        some = batch.negatives
        assert some is not None
        assert some.valid_text is not None
        found = [*zip(some.keys, some.text, some.group.tolist(), strict=True)]
        for row, key in enumerate(batch.keys):
            valid = [found[n] for n in range(4 * row, 4 * row + 4) if some.valid_text[n]]
            assert {*valid} == mined_of[key]
            assert len(valid) == len(mined_of[key])


def test_other_settings_need_force_and_no_second_embedding(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mine_negatives(model, str(data), tmp_path, MineOptions(num=2, margin=0.0), quiet=True)
    with pytest.raises(InputError, match="whose num was 2, not 3; choose another folder, or add --force"):
        mine_negatives(model, str(data), tmp_path, MineOptions(num=3), quiet=True)
    monkeypatch.setattr(mine, "embed_images", None)
    captions = MineOptions(num=2, margin=0.0, captions=True)
    second = mine_negatives(model, str(data), tmp_path, captions, force=True, quiet=True)
    assert second["samples"] == first["samples"]
    for row in rows_of(tmp_path):
        assert row["negatives"] == []
        assert len({caption_id(text) for text in row["captions"]}) == len(row["captions"]) == len(row["scores"])
        assert len(row["groups"]) == len(row["scores"])
    with pytest.raises(TypeError):  # another dim needs other embeddings
        mine_negatives(model, str(data), tmp_path, MineOptions(dim=4), force=True, quiet=True)


def test_bad_input_is_refused_before_any_work(model: str, data: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out", str(data)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"direction": "up"}, "direction: 'up' is unknown; allowed: image_to_text, text_to_image, both"),
        ({"num": 0}, "num must be at least 1"),
        ({"margin": float("nan")}, "margin at least 0"),
        ({"relative_margin": 1.0}, "relative-margin at least 0 and below 1"),
        ({"dim": 17}, "dim: 17"),
        ({"group_key": "sku"}, "fields.group: none of"),
    ]
    for options, says in cases:
        with pytest.raises(InputError, match=says):
            mine_negatives(model, source, out, MineOptions(**options), quiet=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encoded(drawing(0)[0]))
    with pytest.raises(InputError, match="is a folder of images, which no training reads; pack it with mmrl pack"):
        mine_negatives(model, str(tmp_path / "photos"), out, quiet=True)
    with pytest.raises(InputError, match="already holds out; choose a new or empty folder"):
        mine_negatives(model, source, tmp_path, quiet=True)
    write_tar(tmp_path / "bare.tar", [("a.png", encoded(drawing(0)[0]))])
    with pytest.raises(InputError, match=r"no sample of .*bare.tar has a caption"):
        mine_negatives(model, str(tmp_path / "bare.tar"), out, quiet=True)
