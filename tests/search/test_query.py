"""`mmrl search`: results equal brute force, only the needed tower is loaded, and invalid input is reported."""

import builtins
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import drawing
from helpers.encoders import export_bundle
from helpers.indexes import COUNT, brute_force, indexed
from PIL import Image

import mmrl
from mmrl.errors import InputError
from mmrl.images import contact_sheet
from mmrl.model import bundle, towers, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.search import index as index_module
from mmrl.search.build import write_index
from mmrl.search.embed import embed_images
from mmrl.search.encoder_identity import identify_encoder
from mmrl.search.index import Index, open_index
from mmrl.search.query import search_index

__all__ = ["indexed"]


def copied(index: Path, folder: Path) -> Path:
    shutil.copytree(index, folder)
    return folder


@pytest.fixture
def index(indexed: Path) -> Index:
    return open_index(indexed / "index")


# ------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("dim", [16, 8, 5, 1])
@pytest.mark.parametrize("k", [1, 6, 100])
def test_scores_equal_brute_force(index: Index, dim: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_CHUNK_ELEMENTS", 16 * 7)
    query = np.random.default_rng(dim).normal(size=16).astype(np.float32)
    expected = brute_force(query, np.load(index.data_folder / index_module.VECTORS), dim)
    rows, scores = index.nearest(query, dim, k)
    assert len(rows) == len(set(rows.tolist())) == min(k, COUNT + 1)
    np.testing.assert_allclose(scores, expected[rows], atol=1e-6)
    assert (np.diff(scores) <= 0).all()
    np.testing.assert_allclose(scores, np.sort(expected)[::-1][:k], atol=1e-6)


def test_ties_are_ordered_by_row(index: Index) -> None:
    vectors_ND = np.tile(np.eye(16, dtype=np.float32)[:2], (5, 1))
    tied = Index(index.folder, index.manifest, vectors_ND, index.items)
    rows, scores = tied.nearest(vectors_ND[1], 16, 7)
    assert rows.tolist() == [1, 3, 5, 7, 9, 0, 2]
    assert scores.tolist() == [1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("dim", [None, 4])
def test_an_image_ranks_first_for_itself(indexed: Path, tmp_path: Path, dim: int | None) -> None:
    for number in (0, 7, 20):
        drawing(number)[0].save(tmp_path / "query.png")
        result = search_index(indexed / "index", None, image=tmp_path / "query.png", dim=dim, k=2, quiet=True)
        first = result["results"][0]
        assert first["key"] == f"images.tar/{number:05}"
        assert first["score"] == pytest.approx(1, abs=1e-6)
        assert first["captions"][0] == drawing(number)[1]


def test_text_scores_equal_brute_force(indexed: Path, index: Index) -> None:
    text = "a red square"
    query = mmrl.load(indexed / "model", towers="text").encode_texts([text])[0]
    expected = brute_force(query, np.asarray(index.vectors_ND), 8)
    results = search_index(indexed / "index", text, dim=8, k=COUNT + 1, quiet=True)["results"]
    assert [hit["rank"] for hit in results] == list(range(1, COUNT + 2))
    np.testing.assert_allclose([hit["score"] for hit in results], np.sort(expected)[::-1], atol=1e-6)


@pytest.mark.parametrize("side", ["text", "image"])
def test_only_the_needed_tower_is_loaded(
    indexed: Path, tmp_path: Path, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing(0)[0].save(tmp_path / "query.png")
    built = []
    real = towers.build_tower

    def spy(model_cfg: dict[str, Any], side: Any, embed_dim: int) -> Any:
        with torch.device("cpu"):
            tower = real(model_cfg, side, embed_dim)
        if not next(tower.parameters()).is_meta:  # meta towers are built for their shapes only
            built.append(side)
        return tower

    monkeypatch.setattr(bundle.towers, "build_tower", spy)
    monkeypatch.setattr(two_tower, "projection_axes", lambda *_: {})
    if side == "text":
        search_index(indexed / "index", "a red square", quiet=True)
    else:
        search_index(indexed / "index", None, image=tmp_path / "query.png", quiet=True)
    assert built == [side]


def test_the_printed_table(indexed: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawing(50, 300)[0].save(tmp_path / "query.png")
    search_index(indexed / "index", None, image=tmp_path / "query.png", k=1)
    shown = capsys.readouterr().out
    assert "1 nearest of 25, 16-d" in shown
    assert "a [red] large one" in shown


def test_the_contact_sheet(indexed: Path, tmp_path: Path) -> None:
    for k, width in ((1, 3), (5, 5), (12, 5)):
        search_index(indexed / "index", "red " * 200, k=k, picture=tmp_path / f"{k}.png", quiet=True)
        with Image.open(tmp_path / f"{k}.png") as image:
            assert image.width == 2 * 24 + width * 184 + (width - 1) * 14
    drawing(50, 300)[0].save(tmp_path / "query.jpg")
    search_index(indexed / "index", None, image=tmp_path / "query.jpg", picture=tmp_path / "query.webp", quiet=True)
    with Image.open(tmp_path / "query.webp") as image:
        assert image.format == "WEBP"


@pytest.mark.parametrize("text", ["", "word", "many words " * 30, "w" * 400, "語" * 100])
def test_contact_sheet_lines_fit_their_width(text: str) -> None:
    font = contact_sheet._font(13)
    lines = contact_sheet._wrapped(text, font, 160, 3)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(line) <= 160 for line in lines)
    assert lines[-1].endswith("…") == (len(text) > 20)


# ------------------------------------------------------------------------------------------------ errors


def test_an_index_takes_queries_from_a_truncated_export(indexed: Path, tmp_path: Path) -> None:
    export_bundle(str(indexed / "model"), tmp_path / "online", 8)
    cut = search_index(indexed / "index", "a red square", model=str(tmp_path / "online"), quiet=True)
    assert cut["dim"] == 8
    whole = search_index(indexed / "index", "a red square", dim=8, quiet=True)
    assert [hit["key"] for hit in cut["results"]] == [hit["key"] for hit in whole["results"]]
    with pytest.raises(InputError, match="dim: 16 is out of range; this embedding has dims 1 to 8"):
        search_index(indexed / "index", "a red square", model=str(tmp_path / "online"), dim=16, quiet=True)


def test_a_different_encoder_is_refused(indexed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"was built with another encoder .* give the encoder of the index with --model"
    ):
        search_index(indexed / "index", "x", model=str(indexed / "other_model"), quiet=True)
    moved = tmp_path / "moved"
    moved.symlink_to(indexed / "model")
    assert search_index(indexed / "index", "x", model=str(moved), quiet=True) == search_index(
        indexed / "index", "x", quiet=True
    )


def test_a_missing_encoder_is_reported(indexed: Path, tmp_path: Path) -> None:
    folder = copied(indexed / "index", tmp_path / "i")
    manifest = json.loads((folder / index_module.MANIFEST).read_text())
    manifest["encoder"]["model"] = str(tmp_path / "gone")
    (folder / index_module.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"gone does not exist.*Give its current path with --model"):
        search_index(folder, "x", quiet=True)
    with pytest.raises(InputError, match=r"^model: .*nowhere does not exist"):
        search_index(folder, "x", model="nowhere", quiet=True)


def test_open_clip_models_are_identified_by_their_weights(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    built = towers.build(TowersConfig(name=str(tiny_model)))
    state = {f"visual.{name}": value for name, value in built.image.state_dict().items()}
    state |= {f"text.{name}": value for name, value in built.text.state_dict().items()}
    torch.save({**state, "logit_scale": torch.tensor(3.0)}, tmp_path / "weights.pt")
    digests = []
    for weights in ("random", "random", tmp_path / "weights.pt"):
        model = f"open_clip:{tiny_model}:{weights}"
        name, where, digest = identify_encoder(model)
        assert name == where == model
        digests.append(digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "query: give a text, or an image with --image"),
        ("  ", {}, "query: give a text"),
        ("x", {"k": 0}, "k: 0 is too small"),
        ("x", {"picture": Path("found.txt")}, "picture: found.txt has no extension of an image format"),
        ("x", {"picture": Path("/nowhere/found.png")}, "or its folder does not exist"),
        (None, {"image": Path("gone.png")}, "gone.png"),
        ("x " * 50_000, {}, "query: the text has 100,000 characters, more than the 10,000 allowed"),
        ("half \ud800", {}, "query: the text is not valid Unicode"),
        ("x", {"group": "gren square"}, r"no image has the group 'gren square'\. Did you mean 'green square'"),
    ],
)
def test_invalid_queries_are_reported(indexed: Path, text: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        search_index(indexed / "index", text, quiet=True, **options)


def test_files_that_are_not_images_are_refused(indexed: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (10_000, 10_000)).save(tmp_path / "bomb.png")
    for name, says in (
        ("text.png", "no picture in a known format"),
        ("empty.png", "no picture in a known format"),
        ("bomb.png", "too large a picture: 10000x10000 pixels"),
        (".", "Is a directory"),
    ):
        with pytest.raises(InputError, match=f"image .*{name}: .*{says}"):
            search_index(indexed / "index", None, image=tmp_path / name, quiet=True)


def test_search_within_a_group(indexed: Path, index: Index) -> None:
    query = mmrl.load(indexed / "model", towers="text").encode_texts(["anything"])[0]
    found = search_index(indexed / "index", "anything", group="green square", k=100, quiet=True)["results"]
    rows = [row for row in range(COUNT) if drawing(row)[2] == "green square"]
    scores = brute_force(query, np.asarray(index.vectors_ND), 16)
    assert [hit["key"] for hit in found] == [
        f"images.tar/{row:05}" for row in sorted(rows, key=lambda row: -scores[row])
    ]
    assert {hit["group_name"] for hit in found} == {"green square"}
    assert index.named_groups[0] == ("blue corner", 2)


def test_damaged_and_foreign_indexes_are_refused(indexed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not an index: it has no manifest\.json; make one with mmrl index"):
        open_index(tmp_path)
    with pytest.raises(InputError, match="is mmrl-bundle version 2; this mmrl reads mmrl-index version 2"):
        open_index(indexed / "model")
    folder = copied(indexed / "index", tmp_path / "i")
    data, manifest = folder / "data-1", json.loads((folder / index_module.MANIFEST).read_text())
    whole = (data / index_module.VECTORS).read_bytes()
    (data / index_module.VECTORS).unlink()
    with pytest.raises(InputError, match=r"vectors\.npy cannot be read .*; run mmrl index again"):
        open_index(folder)
    np.save(data / index_module.VECTORS, np.array([object()]), allow_pickle=True)  # would run code if it were unpickled
    with pytest.raises(InputError, match=r"vectors\.npy cannot be read .*Python objects"):
        open_index(folder)
    np.save(data / index_module.VECTORS, np.zeros((3, 16), np.float32))
    with pytest.raises(InputError, match=r"damaged: vectors\.npy holds float32 \(3, 16\), not float32 \(25, 16\)"):
        open_index(folder)
    (data / index_module.VECTORS).write_bytes(whole)
    (data / index_module.ITEMS).write_bytes((data / index_module.ITEMS).read_bytes()[:100])
    with pytest.raises(InputError, match=r"items\.arrow cannot be read"):
        open_index(folder)
    for text, says in (
        ("{", "is not JSON"),
        ("[]", "is None version None"),
        (json.dumps({**manifest, "version": 1}), "is mmrl-index version 1; .* Run mmrl embed and mmrl index again"),
        (json.dumps({**manifest, "data": "../../elsewhere"}), "names no data folder inside the index"),
    ):
        (folder / index_module.MANIFEST).write_text(text)
        with pytest.raises(InputError, match=says):
            open_index(folder)


def test_invalid_embeddings_are_refused(indexed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give the output folder of mmrl embed"):
        write_index(tmp_path, tmp_path / "i")
    (tmp_path / "a.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        write_index(tmp_path / "a.parquet", tmp_path / "i")
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"was not written by this version's mmrl embed .*: it lacks column 'captions'"
    ):
        write_index(tmp_path / "a.parquet", tmp_path / "i")
    table = pyarrow.parquet.read_table(indexed / "embeddings" / "embeddings.parquet")
    metadata = json.loads(table.schema.metadata[b"mmrl"])
    for changed in ("{", "[1]", json.dumps({**metadata, "columns": []}), json.dumps({**metadata, "dim": "16"})):
        damaged = table.replace_schema_metadata({"mmrl": changed})
        pyarrow.parquet.write_table(damaged, tmp_path / "a.parquet")
        with pytest.raises(InputError, match="lacks mmrl's metadata of that version"):
            write_index(tmp_path / "a.parquet", tmp_path / "i")
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"mmrl": json.dumps({**metadata, "dim": 32})}), tmp_path / "a.parquet"
    )
    with pytest.raises(
        InputError, match=r"its column embedding is a fixed_size_list.*\[16\], not a list of 32 numbers"
    ):
        write_index(tmp_path / "a.parquet", tmp_path / "i")
    embed_images(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e", precisions=["int8"], quiet=True)
    with pytest.raises(InputError, match="has no fp32 or fp16 vectors, which an index needs for its final ranking"):
        write_index(tmp_path / "e", tmp_path / "i")
    with pytest.raises(InputError, match=r"already holds model\.safetensors; choose a new or empty folder"):
        write_index(indexed / "embeddings", indexed / "model")
    with pytest.raises(InputError, match="cannot be created"):
        write_index(indexed / "embeddings", tmp_path / "a.parquet")


def test_without_pyarrow_the_error_names_the_extra(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: embed_images(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e"),
        lambda: write_index(indexed / "embeddings", tmp_path / "i"),
        lambda: search_index(indexed / "index", "x"),
    ):
        with pytest.raises(InputError, match=r"needs pyarrow.*pip install 'mmrl-clip\[search\]'"):
            call()


@pytest.mark.slow
def test_the_commands_with_json(indexed: Path, tmp_path: Path) -> None:
    """All commands run in one process: each start takes seconds."""
    code = f"""
import sys
from mmrl.cli import app
for line in (
    ["embed", "model", "images.tar", "{tmp_path}/e", "--dim", "8", "--json"],
    ["index", "{tmp_path}/e", "{tmp_path}/i", "--json"],
    ["search", "{tmp_path}/i", "a red square", "-k", "2", "--dim", "4", "--json"],
    ["index", "{tmp_path}/i", "--delete", "images.tar/large", "--json"],
    ["index", "{tmp_path}/e", "{tmp_path}/i", "--add", "--json"],
    ["index", "{tmp_path}/i", "--compact", "--json"],
):
    app(line, standalone_mode=False)
    print("----")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=indexed, capture_output=True, text=True, check=True)
    embedded, manifest, found, *changed = (json.loads(part) for part in done.stdout.split("----\n")[:6])
    assert embedded["count"] == manifest["count"] == found["count"] == COUNT + 1
    assert manifest["format"] == "mmrl-index"
    assert manifest["encoder"]["model"] == str(indexed / "model")
    assert (manifest["dim"], found["dim"]) == (8, 4)
    assert [hit["rank"] for hit in found["results"]] == [1, 2]
    assert set(found["results"][0]) == {"rank", "score", "key", "captions", "group", "group_name"}
    assert [one["count"] for one in changed] == [COUNT, COUNT + 1, COUNT + 1]
