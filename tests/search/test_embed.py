"""`mmrl embed`: its files hold the encoder's embeddings; precisions, texts, folders, workers, resuming, errors."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import drawing, encoded, sample_members, write_tar
from helpers.indexes import COUNT, indexed, metadata_of, rows_of
from PIL import Image

import mmrl
from mmrl.data.samples import NO_GROUP, group_id
from mmrl.errors import InputError
from mmrl.evaluate.command import EvalOptions, evaluate_model
from mmrl.model import bundle
from mmrl.search import embed, embeddings
from mmrl.search.build import write_index
from mmrl.search.embed import embed_images
from mmrl.search.index import open_index
from mmrl.search.query import search_index

__all__ = ["indexed"]


def test_embeddings_hold_every_usable_image(indexed: Path) -> None:
    table = pyarrow.parquet.read_table(indexed / "embeddings" / embed.EMBEDDINGS)
    assert table.schema.names == ["key", "captions", "group", "group_name", "embedding", "thumbnail"]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 16)
    assert metadata_of(indexed / "embeddings") == {
        "format": "mmrl-embeddings",
        "version": 2,
        "model": str(indexed / "model"),
        "origin_sha256": bundle.read_manifest(indexed / "model")["weights_sha256"],
        "dim": 16,
        "nested_dims": [4, 8, 16],
        "columns": [{"name": "embedding", "dim": 16, "precision": "fp32"}],
        "source_sha256": hashlib.sha256(f"{indexed / 'images.tar'}\ngroup".encode()).hexdigest(),
        "mmrl_version": mmrl.__version__,
    }
    rows = rows_of(indexed / "embeddings")
    assert [row["key"] for row in rows] == [
        *(f"images.tar/{number:05}" for number in range(COUNT)),
        "images.tar/large",
    ]
    _, caption, group = drawing(5)
    assert rows[5]["captions"] == [caption, f"{caption}, again"]
    assert rows[5]["group"] == group_id(group)
    assert rows[5]["group_name"] == group
    assert rows[COUNT]["group"] == NO_GROUP
    assert rows[COUNT]["group_name"] is None


def test_embeddings_equal_the_encoders_output(indexed: Path) -> None:
    pictures = [drawing(number)[0] for number in range(COUNT)]
    pictures.append(Image.open(io.BytesIO(encoded(drawing(50, 300)[0], "JPEG"))))
    expected = mmrl.load(indexed / "model", towers="image").encode_images(pictures)
    got = np.array([row["embedding"] for row in rows_of(indexed / "embeddings")], np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)


def test_thumbnails_show_the_image(indexed: Path) -> None:
    thumbnails = [Image.open(io.BytesIO(row["thumbnail"])) for row in rows_of(indexed / "embeddings")]
    assert {image.format for image in thumbnails} == {"WEBP"}
    assert thumbnails[COUNT].size == (160, 160)
    assert thumbnails[0].size == (32, 32)
    difference = np.asarray(thumbnails[0], float) - np.asarray(drawing(0)[0], float)
    assert np.abs(difference).mean() < 20  # noise at WebP's quality 88


def test_dim_truncates_the_embeddings(indexed: Path, tmp_path: Path) -> None:
    result = embed_images(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e", dims=[8], quiet=True)
    assert (result["dim"], result["nested_dims"]) == (8, [4, 8])
    whole, cut = (
        np.array([row["embedding"] for row in rows_of(folder)]) for folder in (indexed / "embeddings", tmp_path / "e")
    )
    prefix = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, prefix, atol=1e-6)
    write_index(tmp_path / "e", tmp_path / "i", quiet=True)
    result = search_index(tmp_path / "i", "a red square", dim=4, k=3, quiet=True)
    expected = search_index(indexed / "index", "a red square", dim=4, k=3, quiet=True)
    assert [hit["key"] for hit in result["results"]] == [hit["key"] for hit in expected["results"]]


def test_the_chunk_size_does_not_change_the_rows(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_MIN_CHUNK", 5)
    monkeypatch.setattr(embeddings, "_BATCH_ROWS", 3)
    embed_images(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e", batch_size=4, quiet=True)
    assert pyarrow.parquet.ParquetFile(tmp_path / "e" / embed.EMBEDDINGS).num_row_groups == 4
    assert [path.name for path in (tmp_path / "e").iterdir() if path.name.startswith(".")] == []
    write_index(tmp_path / "e", tmp_path / "i", quiet=True)
    small, whole = open_index(tmp_path / "i"), open_index(indexed / "index")
    np.testing.assert_allclose(small.vectors_ND, whole.vectors_ND, atol=1e-6)
    order = np.array([24, 0, 13, 4, 5])
    assert small.items.take(order) == whole.items.take(order)


def test_bad_samples_are_counted_listed_and_shown(
    indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = embed_images(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e")
    assert (result["count"], result["bad"]) == (COUNT + 1, 3)
    lines = [json.loads(line) for line in (tmp_path / "e" / embed.BAD_SAMPLES).read_text().splitlines()]
    assert {line["key"] for line in lines} == {"00003", "broken", "latin"}
    shown = capsys.readouterr().out
    assert f"{COUNT + 1} images, 16-d" in shown
    assert "Skipped 3 bad samples, listed in" in shown


def test_images_need_no_captions(indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [encoded(drawing(number)[0]) for number in range(6)]
    members = [(f"{number}.png", image) for number, image in enumerate(images)]
    captioned = [member for number in (0, 3) for member in (members[number], (f"{number}.txt", b"a caption"))]
    sets = {
        "bare": members,
        "labelled": [one for number in range(6) for one in (members[number], (f"{number}.cls", b"1"))],
        "half": [*captioned, *(members[number] for number in (1, 2, 4, 5))],
        "blank": [one for number in range(6) for one in (members[number], (f"{number}.txt", b" "))],
    }
    for name, content in sets.items():
        path, out = write_tar(tmp_path / f"{name}.tar", content), tmp_path / name
        result = embed_images(str(indexed / "model"), str(path), out, texts=True, npy=True)
        captions = 2 if name == "half" else 0
        assert (result["count"], result["texts"], result["bad"]) == (6, captions, 0)
        assert (
            sorted(map(bool, (row["captions"] for row in rows_of(out)))) == [False] * (6 - captions) + [True] * captions
        )
        write_index(out, tmp_path / f"{name}-index", quiet=True)
        index = open_index(tmp_path / f"{name}-index")
        found = search_index(tmp_path / f"{name}-index", "a red square", k=9, quiet=True)
        assert len(index) == len(found["results"]) == 6
    assert "6 members that no field uses: .cls 6." in capsys.readouterr().out


def test_names_that_are_not_utf8_are_escaped(indexed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sh\udce9"
    members = [
        (name.replace("0000", "caf\udce9"), data) for number in range(3) for name, data in sample_members(number)
    ]
    write_tar(folder / "sh\udce9.tar", [*members, ("bad\udce9.png", b"no picture")])
    embed_images(str(indexed / "model"), str(folder), tmp_path / "e", texts=True, quiet=True)
    assert [row["key"] for row in rows_of(tmp_path / "e")] == [f"sh\\xe9.tar/caf\\xe9{number}" for number in range(3)]
    write_index(tmp_path / "e", tmp_path / "index", quiet=True)
    assert open_index(tmp_path / "index").items.take(np.array([0]))[0].key == "sh\\xe9.tar/caf\\xe90"
    scored = evaluate_model(str(indexed / "model"), [str(folder)], EvalOptions(), tmp_path / "scored", quiet=True)
    assert scored["num_images"] == 3
    assert "sh\\xe9" in (tmp_path / "scored" / "report" / "index.html").read_text()


def test_without_usable_images_no_embeddings_are_written(indexed: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [("a.png", b"no picture"), ("a.txt", b"x")])
    with pytest.raises(
        InputError, match=r"source: no image in .* is usable; the first is a: no picture in a known format"
    ):
        embed_images(str(indexed / "model"), str(tmp_path / "bad.tar"), tmp_path / "e", quiet=True)
    assert [path.name for path in (tmp_path / "e").iterdir()] == [embed.BAD_SAMPLES]
    embed_images(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e", quiet=True)


# ------------------------------------------------------------------------------------------------ dims, precisions


def test_each_dim_at_each_precision_is_a_column(indexed: Path, tmp_path: Path) -> None:
    precisions = ["binary", "int8", "fp16", "fp32"]
    embed_images(
        str(indexed / "model"),
        str(indexed / "images.tar"),
        tmp_path / "e",
        dims=[4, 16],
        precisions=precisions,
        quiet=True,
    )
    rows = rows_of(tmp_path / "e")
    names = [column["name"] for column in metadata_of(tmp_path / "e")["columns"]]
    assert names == [
        *("embedding", "embedding_16_fp16", "embedding_16_int8", "embedding_16_binary"),
        *("embedding_4_fp32", "embedding_4_fp16", "embedding_4_int8", "embedding_4_binary"),
    ]
    whole = np.array([row["embedding"] for row in rows_of(indexed / "embeddings")])
    for dim in (16, 4):
        unit = whole[:, :dim] / np.linalg.norm(whole[:, :dim], axis=1, keepdims=True)
        of = {p: np.array([row[f"embedding_{dim}_{p}" if (dim, p) != (16, "fp32") else "embedding"] for row in rows])
              for p in precisions}  # fmt: skip
        np.testing.assert_allclose(of["fp32"], unit, atol=1e-6)
        np.testing.assert_allclose(of["fp16"], unit, atol=1e-3)
        assert of["int8"].dtype.kind == "i"
        assert (np.abs(of["int8"]).max(axis=1) == 127).all()
        cosine = (of["int8"] * unit).sum(axis=1) / np.linalg.norm(of["int8"], axis=1)
        assert cosine.min() > 0.9999
        bits = np.unpackbits(of["binary"].astype(np.uint8), axis=1)
        assert of["binary"].shape[1] == -(-dim // 8)
        np.testing.assert_array_equal(bits[:, :dim].astype(bool), unit > 0)
        assert not bits[:, dim:].any()


def test_texts_and_numpy_files(indexed: Path, tmp_path: Path) -> None:
    result = embed_images(
        *(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e"),
        dims=[16, 8], precisions=["fp16"], texts=True, npy=True, quiet=True,
    )  # fmt: skip
    texts = rows_of(tmp_path / "e", embed.TEXTS)
    assert result["texts"] == len(texts) == 2 * COUNT + 1
    assert texts[11]["caption"] == rows_of(tmp_path / "e")[5]["captions"][1]
    assert (texts[11]["key"], texts[11]["group_name"]) == ("images.tar/00005", drawing(5)[2])
    expected = mmrl.load(indexed / "model", towers="text").encode_texts([text["caption"] for text in texts])
    np.testing.assert_allclose(np.array([text["embedding"] for text in texts]), expected, atol=1e-3)
    images = np.load(tmp_path / "e" / "img_emb" / "img_emb_0.npy")
    assert images.dtype == np.float16
    np.testing.assert_array_equal(images, [row["embedding"] for row in rows_of(tmp_path / "e")])
    first = np.load(tmp_path / "e" / "text_emb_8_fp16" / "text_emb_8_fp16_0.npy")
    cut = expected[[*range(0, 2 * COUNT, 2), 2 * COUNT], :8]
    np.testing.assert_allclose(first, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-3)
    named = pyarrow.parquet.read_table(tmp_path / "e" / "metadata" / "metadata_0.parquet").to_pylist()
    assert named[COUNT] == {"image_path": "images.tar/large", "caption": "a [red] large one"}


def test_long_captions_are_truncated(indexed: Path, tmp_path: Path) -> None:
    long = "a red square " * 8000
    write_tar(tmp_path / "long.tar", [("a.png", encoded(drawing(0)[0])), ("a.txt", long.encode())])
    embed_images(str(indexed / "model"), str(tmp_path / "long.tar"), tmp_path / "e", texts=True, quiet=True)
    expected = mmrl.load(indexed / "model", towers="text").encode_texts([long[:300]])[0]
    np.testing.assert_allclose(rows_of(tmp_path / "e", embed.TEXTS)[0]["embedding"], expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ folders


def photos(folder: Path, count: int = 6) -> Path:
    """Images with and without captions, a damaged image, an empty file, a text without an image."""
    (folder / "more").mkdir(parents=True)
    for number in range(count):
        drawing(number)[0].save(folder / "more" / f"{number}.png")
    (folder / "more" / "0.txt").write_text("the first")
    (folder / "more" / "1.json").write_text(json.dumps({"caption": "the second", "kind": "odd"}))
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "alone.txt").write_text("no picture")
    return folder


def test_a_folder_of_images(indexed: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    result = embed_images(
        str(indexed / "model"), str(folder), tmp_path / "e", texts=True, npy=True, group_key="kind", quiet=True
    )
    rows = rows_of(tmp_path / "e")
    assert [row["key"] for row in rows] == [f"more/{number}.png" for number in range(6)]
    assert [row["captions"] for row in rows] == [["the first"], ["the second"], [], [], [], []]
    assert [row["group_name"] for row in rows] == [None, "odd", None, None, None, None]
    assert (result["texts"], result["bad"]) == (2, 3)
    listed = {line["key"]: line["reason"] for line in
              map(json.loads, (tmp_path / "e" / embed.BAD_SAMPLES).read_text().splitlines())}  # fmt: skip
    assert listed.keys() == {"bad.jpg", "empty.png", "alone"}
    assert "no picture in a known format" in listed["empty.png"]
    first = np.load(tmp_path / "e" / "text_emb" / "text_emb_0.npy")
    assert first[:2].any(axis=1).all()
    assert not first[2:].any()
    write_index(tmp_path / "e", tmp_path / "i", quiet=True)
    found = search_index(
        tmp_path / "i", None, image=folder / "more" / "3.png", picture=tmp_path / "found.png", quiet=True
    )
    assert (found["results"][0]["key"], found["results"][0]["captions"]) == ("more/3.png", [])


def test_a_decompression_bomb_is_a_bad_sample(indexed: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 1)
    Image.new("L", (10_000, 10_000)).save(folder / "bomb.png")
    embed_images(str(indexed / "model"), str(folder), tmp_path / "e", quiet=True)
    assert "too large a picture: 10000x10000 pixels" in (tmp_path / "e" / embed.BAD_SAMPLES).read_text()


# ------------------------------------------------------------------------------------------------ workers, resuming


def test_one_and_two_workers_write_the_same_files(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_MIN_CHUNK", 8)
    for workers in (1, 2):
        embed_images(
            *(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / str(workers)),
            batch_size=4, texts=True, workers=workers, quiet=True,
        )  # fmt: skip
    for name in (embed.EMBEDDINGS, embed.TEXTS, embed.BAD_SAMPLES):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_interrupted_run_resumes(indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_MIN_CHUNK", 8)
    model, pictures = str(indexed / "model"), str(indexed / "images.tar")
    embed_images(model, pictures, tmp_path / "whole", batch_size=4, texts=True, quiet=True)
    real, seen = embed._ChunkEmbedder.__call__, []

    def interrupted(embedder: embed._ChunkEmbedder, span: tuple[int, int]) -> embed._ChunkResult:
        seen.append(span)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(embedder, span)

    monkeypatch.setattr(embed._ChunkEmbedder, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_images(model, pictures, tmp_path / "e", batch_size=4, texts=True, quiet=True)
    assert not (tmp_path / "e" / embed.EMBEDDINGS).exists()
    with pytest.raises(InputError, match=r"holds an unfinished run whose texts was True, not False; choose another"):
        embed_images(model, pictures, tmp_path / "e", batch_size=4, quiet=True)
    with pytest.raises(InputError, match=r"an unfinished run whose source was another; choose another folder"):
        embed_images(model, f"{indexed}/./images.tar", tmp_path / "e", batch_size=4, texts=True, quiet=True)
    # A URL can hold a password.
    assert "images.tar" not in (tmp_path / "e" / embed.CHUNKS / "plan.json").read_text()
    with pytest.raises(InputError, match=r"whose model was .*model, not .*other_model"):
        embed_images(str(indexed / "other_model"), pictures, tmp_path / "e", batch_size=4, texts=True, quiet=True)
    result = embed_images(model, pictures, tmp_path / "e", batch_size=4, texts=True, quiet=True)
    assert seen[3] == seen[2]  # the first two chunks were not embedded again
    assert len(seen) == len(set(seen)) + 1
    assert result["count"] == COUNT + 1
    for name in (embed.EMBEDDINGS, embed.TEXTS, embed.BAD_SAMPLES):
        assert (tmp_path / "e" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_resumes(indexed: Path, tmp_path: Path) -> None:
    """Two worker processes, killed by SIGKILL."""
    write_tar(tmp_path / "many.tar", [member for number in range(6000) for member in sample_members(number)])
    command = [sys.executable, "-m", "mmrl.cli", "embed", "model", str(tmp_path / "many.tar"), str(tmp_path / "e"),
               "--workers", "2"]  # fmt: skip
    running = subprocess.Popen(command, cwd=indexed, start_new_session=True)
    chunks = tmp_path / "e" / embed.CHUNKS
    deadline = time.monotonic() + 240
    while len(list(chunks.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "e" / embed.EMBEDDINGS).exists()
    done = subprocess.run([*command], cwd=indexed, capture_output=True, text=True, check=True)
    assert "Resuming after" in done.stdout
    assert [row["key"] for row in rows_of(tmp_path / "e")] == [f"many.tar/{number:05}" for number in range(6000)]


# ------------------------------------------------------------------------------------------------ errors


def test_invalid_options_are_reported(indexed: Path, tmp_path: Path) -> None:
    def embed_with(**options: object) -> None:
        embed_images(str(indexed / "model"), str(indexed / "images.tar"), tmp_path / "e", quiet=True, **options)  # pyright: ignore[reportArgumentType]

    with pytest.raises(InputError, match=r"precision: 'int4' is unknown\. Did you mean 'int8'"):
        embed_with(precisions=["int4"])
    with pytest.raises(InputError, match="give one or more of fp32, fp16, int8, binary, each once"):
        embed_with(precisions=["int8", "int8"])
    with pytest.raises(InputError, match="dim: 8 is given twice"):
        embed_with(dims=[8, 8])
    with pytest.raises(InputError, match=r"fields\.group: none of .* samples .* has 'kind' in its JSON"):
        embed_with(group_key="kind")
    with pytest.raises(InputError, match="give at least 1 of each"):
        embed_with(workers=0)
    assert not (tmp_path / "e").exists()
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"source: the folder .*none holds no images"):
        embed_images(str(indexed / "model"), str(tmp_path / "none"), tmp_path / "e", quiet=True)
