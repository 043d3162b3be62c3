"""Pictures to embeddings to an index to what is found: against brute force, by each tower alone."""

import builtins
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import drawing, encoded, sample_members, write_tar
from PIL import Image

import mmrl
from mmrl import sheet
from mmrl.data.samples import NO_GROUP, group_number
from mmrl.errors import InputError
from mmrl.export.bundles import export_bundle
from mmrl.model import bundle, towers, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig
from mmrl.search import embed
from mmrl.search import index as indexes
from mmrl.search.embed import embed_pictures
from mmrl.search.index import Index, open_index, write_index
from mmrl.search.query import search

COUNT = 24


def stored(name: Path, folder: Path, seed: int) -> Path:
    """A bundle of random weights, nested at 4, 8 and 16."""
    torch.manual_seed(seed)
    built = towers.build(TowersConfig(name=str(name)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one = bundle.of_towers(model, built, (4, 8, 16))
    bundle.save(one, folder, one.state(), {})
    return folder


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, other_model/, pictures.tar with three bad samples among them, embeddings/ and index/."""
    folder = tmp_path_factory.mktemp("search")
    stored(tiny_model, folder / "model", 1)
    stored(tiny_model, folder / "other_model", 2)
    members = [member for number in range(COUNT) for member in sample_members(number)]
    members += [("large.jpg", encoded(drawing(50, 300)[0], "JPEG")), ("large.txt", b"a [red] large one")]
    members += [("broken.png", b"no picture"), ("broken.txt", b"x")]
    members += [("silent.png", encoded(drawing(0)[0]))]
    members += [*sample_members(3)]  # a key that was there before
    write_tar(folder / "pictures.tar", members)
    embed_pictures(str(folder / "model"), str(folder / "pictures.tar"), folder / "embeddings", batch_size=7, quiet=True)
    write_index(folder / "embeddings", folder / "index", quiet=True)
    return folder


@pytest.fixture
def index(place: Path) -> Index:
    return open_index(place / "index")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(folder / embed.EMBEDDINGS).to_pylist()


def brute_force(query: np.ndarray, vectors: np.ndarray, dim: int) -> np.ndarray:
    """Cosines of the prefixes in float64, by numpy alone."""
    query, vectors = query[:dim].astype(np.float64), vectors[:, :dim].astype(np.float64)
    return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


# ------------------------------------------------------------------------------------------------ embeddings


def test_embeddings_hold_every_good_picture(place: Path) -> None:
    table = pyarrow.parquet.read_table(place / "embeddings" / embed.EMBEDDINGS)
    assert table.schema.names == ["key", "captions", "group", "embedding", "thumbnail"]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 16)
    assert json.loads(table.schema.metadata[b"mmrl"]) == {
        "model": str(place / "model"),
        "origin_sha256": bundle.read_manifest(place / "model")["weights_sha256"],
        "dim": 16,
        "nested_dims": [4, 8, 16],
        "mmrl_version": mmrl.__version__,
    }
    rows = rows_of(place / "embeddings")
    assert [row["key"] for row in rows] == [
        *(f"pictures.tar/{number:05}" for number in range(COUNT)),
        "pictures.tar/large",
    ]
    _, caption, group = drawing(5)
    assert rows[5]["captions"] == [caption, f"{caption}, again"]
    assert rows[5]["group"] == group_number(group)
    assert rows[COUNT]["group"] == NO_GROUP


def test_embeddings_are_what_the_encoder_gives(place: Path) -> None:
    pictures = [drawing(number)[0] for number in range(COUNT)]
    pictures.append(Image.open(io.BytesIO(encoded(drawing(50, 300)[0], "JPEG"))))
    expected = mmrl.load(place / "model", towers="image").encode_images(pictures)
    got = np.array([row["embedding"] for row in rows_of(place / "embeddings")], np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_thumbnails_are_small_pictures_of_the_sample(place: Path) -> None:
    thumbnails = [Image.open(io.BytesIO(row["thumbnail"])) for row in rows_of(place / "embeddings")]
    assert {image.format for image in thumbnails} == {"WEBP"}
    assert thumbnails[COUNT].size == (96, 96)
    assert thumbnails[0].size == (32, 32)
    difference = np.asarray(thumbnails[0], float) - np.asarray(drawing(0)[0], float)
    assert np.abs(difference).mean() < 20  # noise at WebP's quality 90


def test_a_dim_cuts_the_embeddings(place: Path, tmp_path: Path) -> None:
    result = embed_pictures(str(place / "model"), str(place / "pictures.tar"), tmp_path / "e", dim=8, quiet=True)
    assert (result["dim"], result["nested_dims"]) == (8, [4, 8])
    whole, cut = (
        np.array([row["embedding"] for row in rows_of(folder)]) for folder in (place / "embeddings", tmp_path / "e")
    )
    prefix = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, prefix, atol=1e-6)
    write_index(tmp_path / "e", tmp_path / "i", quiet=True)
    result = search(tmp_path / "i", "a red square", dim=4, k=3, quiet=True)
    expected = search(place / "index", "a red square", dim=4, k=3, quiet=True)
    assert [hit["key"] for hit in result["results"]] == [hit["key"] for hit in expected["results"]]


def test_row_groups_do_not_change_the_rows(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_ROWS_AT_A_TIME", 5)
    monkeypatch.setattr(indexes, "_ROWS_AT_A_TIME", 3)
    embed_pictures(str(place / "model"), str(place / "pictures.tar"), tmp_path / "e", batch_size=4, quiet=True)
    assert pyarrow.parquet.ParquetFile(tmp_path / "e" / embed.EMBEDDINGS).num_row_groups > 1
    write_index(tmp_path / "e", tmp_path / "i", quiet=True)
    small, whole = open_index(tmp_path / "i"), open_index(place / "index")
    np.testing.assert_allclose(small.vectors_ND, whole.vectors_ND, atol=1e-6)
    order = np.array([24, 0, 13, 4, 5])
    assert small.items(order) == whole.items(order)


def test_bad_samples_are_counted_listed_and_shown(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = embed_pictures(str(place / "model"), str(place / "pictures.tar"), tmp_path / "e")
    assert (result["count"], result["bad"]) == (COUNT + 1, 3)
    lines = [json.loads(line) for line in (tmp_path / "e" / embed.BAD_SAMPLES).read_text().splitlines()]
    assert {line["key"] for line in lines} == {"00003", "broken", "silent"}
    shown = capsys.readouterr().out
    assert f"{COUNT + 1} pictures, 16-d" in shown
    assert "Left out: 3 bad samples, listed in" in shown


def test_pictures_that_are_all_bad_leave_nothing_that_could_be_indexed(place: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [("a.png", b"no picture"), ("a.txt", b"x")])
    with pytest.raises(InputError, match=r"no picture in .* can be used, such as a: no picture in a known format"):
        embed_pictures(str(place / "model"), str(tmp_path / "bad.tar"), tmp_path / "e", quiet=True)
    assert [path.name for path in (tmp_path / "e").iterdir()] == [embed.BAD_SAMPLES]
    embed_pictures(str(place / "model"), str(place / "pictures.tar"), tmp_path / "e", quiet=True)


# ------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("dim", [16, 8, 5, 1])
@pytest.mark.parametrize("k", [1, 6, 100])
def test_scores_equal_brute_force(index: Index, dim: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "_CHUNK_ELEMENTS", 16 * 7)
    query = np.random.default_rng(dim).normal(size=16).astype(np.float32)
    expected = brute_force(query, np.load(index.folder / indexes.VECTORS), dim)
    rows, scores = index.nearest(query, dim, k)
    assert len(rows) == len(set(rows.tolist())) == min(k, COUNT + 1)
    np.testing.assert_allclose(scores, expected[rows], atol=1e-6)
    assert (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(scores, np.sort(expected)[::-1][:k], atol=1e-6)


def test_ties_go_to_the_first_rows(index: Index) -> None:
    vectors_ND = np.tile(np.eye(16, dtype=np.float32)[:2], (5, 1))
    tied = Index(index.folder, {**index.manifest, "count": 10}, vectors_ND)
    rows, scores = tied.nearest(vectors_ND[1], 16, 7)
    assert rows.tolist() == [1, 3, 5, 7, 9, 0, 2]
    assert scores.tolist() == [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("dim", [None, 4])
def test_a_picture_finds_itself_first(place: Path, tmp_path: Path, dim: int | None) -> None:
    for number in (0, 7, 20):
        drawing(number)[0].save(tmp_path / "query.png")
        result = search(place / "index", None, image=tmp_path / "query.png", dim=dim, k=2, quiet=True)
        first = result["results"][0]
        assert first["key"] == f"pictures.tar/{number:05}"
        assert first["score"] == pytest.approx(1, abs=1e-6)
        assert first["captions"][0] == drawing(number)[1]


def test_a_text_is_compared_with_every_picture(place: Path, index: Index) -> None:
    text = "a red square"
    query = mmrl.load(place / "model", towers="text").encode_texts([text])[0]
    expected = brute_force(query, np.asarray(index.vectors_ND), 8)
    results = search(place / "index", text, dim=8, k=COUNT + 1, quiet=True)["results"]
    assert [hit["rank"] for hit in results] == list(range(1, COUNT + 2))
    np.testing.assert_allclose([hit["score"] for hit in results], np.sort(expected)[::-1], atol=1e-6)


@pytest.mark.parametrize("side", ["text", "image"])
def test_only_the_tower_that_is_needed_is_loaded(
    place: Path, tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing(0)[0].save(tmp_path / "query.png")
    built = []
    real = towers.build_tower

    def spy(model_cfg: dict[str, Any], side: Any, embed_dim: int) -> Any:
        with torch.device("cpu"):
            tower = real(model_cfg, side, embed_dim)
        if not next(tower.parameters()).is_meta:  # the others only tell the shapes
            built.append(side)
        return tower

    monkeypatch.setattr(bundle.towers, "build_tower", spy)
    monkeypatch.setattr(two_tower, "projection_axes", lambda *_: {})
    if side == "text":
        search(place / "index", "a red square", quiet=True)
    else:
        search(place / "index", None, image=tmp_path / "query.png", quiet=True)
    assert built == [side]


def test_what_is_printed(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawing(50, 300)[0].save(tmp_path / "query.png")
    search(place / "index", None, image=tmp_path / "query.png", k=1)
    shown = capsys.readouterr().out
    assert "1 nearest of 25, 16-d" in shown
    assert "a [red] large one" in shown


def test_the_contact_sheet(place: Path, tmp_path: Path) -> None:
    for k, width in ((1, 3), (5, 5), (12, 5)):
        search(place / "index", "red " * 200, k=k, picture=tmp_path / f"{k}.png", quiet=True)
        with Image.open(tmp_path / f"{k}.png") as image:
            assert image.width == 2 * 24 + width * 184 + (width - 1) * 14
    drawing(50, 300)[0].save(tmp_path / "query.jpg")
    search(place / "index", None, image=tmp_path / "query.jpg", picture=tmp_path / "query.webp", quiet=True)
    with Image.open(tmp_path / "query.webp") as image:
        assert image.format == "WEBP"


@pytest.mark.parametrize("text", ["", "word", "many words " * 30, "w" * 400, "語" * 100])
def test_lines_keep_to_their_width(text: str) -> None:
    font = sheet._font(13)
    lines = sheet._wrapped(text, font, 160, 3)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(line) <= 160 for line in lines)
    assert lines[-1].endswith("…") == (len(text) > 20)


# ------------------------------------------------------------------------------------------------ mistakes


def test_an_index_of_the_whole_model_takes_queries_from_its_cut_export(place: Path, tmp_path: Path) -> None:
    export_bundle(str(place / "model"), tmp_path / "online", 8)
    cut = search(place / "index", "a red square", model=str(tmp_path / "online"), quiet=True)
    assert cut["dim"] == 8
    whole = search(place / "index", "a red square", dim=8, quiet=True)
    assert [hit["key"] for hit in cut["results"]] == [hit["key"] for hit in whole["results"]]
    with pytest.raises(InputError, match="dim: 16 is out of range; this embedding has dims 1 to 8"):
        search(place / "index", "a red square", model=str(tmp_path / "online"), dim=16, quiet=True)


def test_another_encoder_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"was built with another encoder .* name that one with --model"):
        search(place / "index", "x", model=str(place / "other_model"), quiet=True)
    moved = tmp_path / "moved"
    moved.symlink_to(place / "model")
    assert search(place / "index", "x", model=str(moved), quiet=True) == search(place / "index", "x", quiet=True)


def test_an_encoder_that_is_gone_is_named(place: Path, tmp_path: Path) -> None:
    for name in (indexes.VECTORS, indexes.ITEMS):
        (tmp_path / name).write_bytes((place / "index" / name).read_bytes())
    manifest = json.loads((place / "index" / indexes.MANIFEST).read_text())
    manifest["encoder"]["model"] = str(tmp_path / "gone")
    (tmp_path / indexes.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"gone does not exist.*Name its present place with --model"):
        search(tmp_path, "x", quiet=True)
    with pytest.raises(InputError, match=r"^model: .*nowhere does not exist"):
        search(tmp_path, "x", model="nowhere", quiet=True)


def test_models_of_open_clip_are_told_apart_by_their_weights(place: Path, tiny_model: Path) -> None:
    towers.read_model_cfg(str(tiny_model))  # makes the name known
    digests = set()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        name, where, digest = embed.identify(f"open_clip:{tiny_model.stem}")
        assert name == where == f"open_clip:{tiny_model.stem}"
        digests.add(digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "query: give a text, or a picture with --image"),
        ("  ", {}, "query: give a text"),
        ("x", {"dim": 17}, "dim: 17 is out of range"),
        ("x", {"dim": 0}, "dim: 0 is out of range"),
        ("x", {"k": 0}, "k: 0 is too small"),
        ("x", {"picture": Path("found.txt")}, "picture: found.txt has no ending of a picture"),
        ("x", {"picture": Path("/nowhere/found.png")}, "lies in one that does not exist"),
        (None, {"image": Path("gone.png")}, "gone.png"),
    ],
)
def test_a_wrong_query_is_named(place: Path, text: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search(place / "index", text, quiet=True, **options)


def test_what_is_no_index_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no index: it has no manifest\.json; make one with mmrl index"):
        open_index(tmp_path)
    with pytest.raises(InputError, match="is mmrl-bundle version 2; this mmrl reads mmrl-index version 1"):
        open_index(place / "model")
    for name in (indexes.MANIFEST, indexes.ITEMS):
        (tmp_path / name).write_bytes((place / "index" / name).read_bytes())
    with pytest.raises(InputError, match=r"vectors\.npy cannot be read .*; run mmrl index again"):
        open_index(tmp_path)
    np.save(tmp_path / indexes.VECTORS, np.zeros((3, 16), np.float32))
    with pytest.raises(InputError, match=r"damaged: vectors\.npy holds float32 \(3, 16\) where float32 \(25, 16\)"):
        open_index(tmp_path)
    (tmp_path / indexes.MANIFEST).write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        open_index(tmp_path)


def test_what_is_not_embeddings_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give the folder that mmrl embed wrote"):
        write_index(tmp_path, tmp_path / "i")
    (tmp_path / "a.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        write_index(tmp_path / "a.parquet", tmp_path / "i")
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="was not written by mmrl embed: it lacks column 'captions'"):
        write_index(tmp_path / "a.parquet", tmp_path / "i")
    with pytest.raises(InputError, match=r"already holds model\.safetensors; name a new or empty folder"):
        write_index(place / "embeddings", place / "model")
    with pytest.raises(InputError, match="cannot be made a folder"):
        write_index(place / "embeddings", tmp_path / "a.parquet")


def test_without_pyarrow_the_extra_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: embed_pictures(str(place / "model"), str(place / "pictures.tar"), tmp_path / "e"),
        lambda: write_index(place / "embeddings", tmp_path / "i"),
        lambda: search(place / "index", "x"),
    ):
        with pytest.raises(InputError, match=r"needs pyarrow.*pip install 'mmrl-clip\[search\]'"):
            call()


def test_the_commands(place: Path, tmp_path: Path) -> None:
    """All three in one process: each start costs seconds."""
    code = f"""
import sys
from mmrl.cli import app
for line in (
    ["embed", "model", "pictures.tar", "{tmp_path}/e", "--dim", "8", "--json"],
    ["index", "{tmp_path}/e", "{tmp_path}/i", "--json"],
    ["search", "{tmp_path}/i", "a red square", "-k", "2", "--dim", "4", "--json"],
):
    app(line, standalone_mode=False)
    print("----")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True)
    embedded, manifest, found = (json.loads(part) for part in done.stdout.split("----\n")[:3])
    assert embedded["count"] == manifest["count"] == found["count"] == COUNT + 1
    assert manifest["format"] == "mmrl-index"
    assert manifest["encoder"]["model"] == str(place / "model")
    assert (manifest["dim"], found["dim"]) == (8, 4)
    assert [hit["rank"] for hit in found["results"]] == [1, 2]
    assert set(found["results"][0]) == {"rank", "score", "key", "captions", "group"}
