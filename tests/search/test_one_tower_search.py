"""Encoders with one tower: embedding of first and second members, index, search and server."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawing, encoded, write_tar
from fastapi.testclient import TestClient
from helpers.encoders import OneTower, one_tower, pair_members, save_random_encoder
from helpers.indexes import brute_force, rows_of
from pyarrow import csv, table

import mmrl
from mmrl.errors import InputError
from mmrl.inference.teacher import LiveTeacher, TeacherConfig
from mmrl.rotation.command import rotate_model
from mmrl.search.app import create_app
from mmrl.search.build import write_index
from mmrl.search.embed import EMBEDDINGS, TEXTS, embed_images
from mmrl.search.mine import mine_negatives
from mmrl.search.query import search_index
from mmrl.search.serve import _open

__all__ = ["one_tower"]  # a fixture


def members(one: OneTower, second: bool) -> list[Any]:
    """The questions or the passages, or the image files of either kind."""
    files = [pair_members(one.side, number) for number in range(24)]
    if one.side == "image":
        return [file[second][1] for file in files]
    values = [json.loads(file[0][1]) for file in files]
    return [value["second_text"] if second else value["captions"][0] for value in values]


def encode(one: OneTower, inputs: list[Any]) -> np.ndarray:
    encoder = mmrl.load(one.encoder)
    return encoder.encode_texts(inputs) if one.side == "text" else encoder.encode_images(inputs)


@pytest.mark.parametrize("second", [False, True])
def test_first_or_second_members_are_embedded(one_tower: OneTower, tmp_path: Path, second: bool) -> None:
    result = embed_images(
        str(one_tower.encoder), str(one_tower.shards), tmp_path / "e", batch_size=7, second=second, quiet=True
    )
    is_text = one_tower.side == "text"
    assert (result["count"], result["texts"], result["bad"]) == ((0, 24, 0) if is_text else (24, None, 0))
    assert [path.name for path in (tmp_path / "e").iterdir()] == [TEXTS if is_text else EMBEDDINGS]
    rows, inputs = rows_of(tmp_path / "e", TEXTS if is_text else EMBEDDINGS), members(one_tower, second)
    assert [row["key"] for row in rows] == [f"pairs.tar/{number:05}" for number in range(24)]
    if is_text:
        assert [row["caption"] for row in rows] == inputs
    np.testing.assert_allclose([row["embedding"] for row in rows], encode(one_tower, inputs), atol=1e-6)
    with pytest.raises(InputError, match="already holds embeddings of another source"):
        embed_images(str(one_tower.encoder), str(one_tower.shards), tmp_path / "e", second=not second, quiet=True)


def test_second_members_are_indexed_searched_and_served(one_tower: OneTower, tmp_path: Path) -> None:
    is_text, index = one_tower.side == "text", tmp_path / "index"
    embed_images(str(one_tower.encoder), str(one_tower.shards), tmp_path / "e", second=True, quiet=True)
    assert write_index(tmp_path / "e", index, quiet=True)["items"] == f"{one_tower.side}s"
    query, picture = members(one_tower, False)[5], tmp_path / "query.png"
    scores = brute_force(encode(one_tower, [query])[0], encode(one_tower, members(one_tower, True)), 8)
    if is_text:
        found = search_index(index, query, dim=8, k=3, quiet=True)["results"]
    else:
        picture.write_bytes(query)
        found = search_index(index, None, image=picture, dim=8, k=3, quiet=True)["results"]
    assert [one["key"] for one in found] == [f"pairs.tar/{row:05}" for row in np.argsort(-scores)[:3]]
    assert [one["score"] for one in found] == pytest.approx(np.sort(scores)[::-1][:3], abs=1e-6)
    picture.write_bytes(encoded(drawing(0)[0]))
    with pytest.raises(InputError, match=f"has no {one_tower.absent} tower; it encodes {one_tower.side}s only"):
        search_index(index, None if is_text else "x", image=picture if is_text else None, quiet=True)

    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    requests = {"text": {"input": "a red square"}, "image": {"input": [url], "modality": "image"}}
    expected = encode(one_tower, ["a red square"] if is_text else [picture.read_bytes()])[0]
    for source in (index, one_tower.encoder):
        client = TestClient(create_app(_open(str(source), None), ["*"]))
        answer = client.post("/v1/embeddings", json=requests[one_tower.side]).json()
        np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-6)
        refused = client.post("/v1/embeddings", json=requests[one_tower.absent])
        assert refused.status_code == 400
        message = f"model: this encoder has no {one_tower.absent} tower; it encodes {one_tower.side}s only."
        assert refused.json()["error"]["message"] == message
    page = TestClient(create_app(_open(str(index), None), ["*"]))
    info = page.get("/api/index").json()
    assert (info["items"], info["queries"]) == (f"{one_tower.side}s", [one_tower.side])
    by_text = page.post("/api/search/text", json={"text": "a red square", "k": 1})
    by_image = page.post("/api/search/image", files={"picture": picture.read_bytes()}, data={"k": "1"})
    assert [by_text.status_code, by_image.status_code] == ([200, 422] if is_text else [422, 200])


def test_what_needs_the_other_tower_is_refused(one_tower: OneTower, tmp_path: Path) -> None:
    model, shards, absent = str(one_tower.encoder), str(one_tower.shards), one_tower.absent
    config, cpu = TeacherConfig(model=model), torch.device("cpu")
    for needs, call in {
        "mmrl rotate": lambda: rotate_model(model, shards, tmp_path / "out", quiet=True),
        "mmrl mine": lambda: mine_negatives(model, shards, tmp_path / "out", quiet=True),
        "teacher.model": lambda: LiveTeacher(config, cpu, "fp32"),
    }.items():
        with pytest.raises(InputError, match=rf"^{needs}: needs both towers, and \S+ has no {absent} tower; give ano"):
            call()
    (tmp_path / "lines.txt").write_text("a red square\n")
    if one_tower.side == "image":
        with pytest.raises(InputError, match=r"^texts: \S+ has no text tower; leave out --texts"):
            embed_images(model, shards, tmp_path / "out", texts=True, quiet=True)
        with pytest.raises(InputError, match=r"holds texts without images, and .* has no text tower; give images"):
            embed_images(model, str(tmp_path / "lines.txt"), tmp_path / "out", quiet=True)
    else:
        with pytest.raises(InputError, match=r"npy: .* there are texts only"):
            embed_images(model, shards, tmp_path / "out", npy=True, quiet=True)
    assert not (tmp_path / "out").exists()


def test_samples_without_second_members(one_tower: OneTower, tmp_path: Path) -> None:
    model, side = str(one_tower.encoder), one_tower.side
    without = [("x.png", encoded(drawing(0)[0])), ("x.json", b'{"captions": ["a red square"]}')]
    shards = write_tar(tmp_path / "a.tar", without)
    with pytest.raises(InputError, match=f"second: none of 1 samples of .* has a second {side}"):
        embed_images(model, str(shards), tmp_path / "out", second=True, quiet=True)
    shards = write_tar(tmp_path / "a.tar", [*without, *pair_members(side, 1)])
    result = embed_images(model, str(shards), tmp_path / "out", second=True, quiet=True)
    assert (result["texts" if side == "text" else "count"], result["bad"]) == (1, 1)
    assert f"no second {side} (fields.second_{side})" in (tmp_path / "out" / "bad_samples.jsonl").read_text()
    (tmp_path / "lines.txt").write_text("a red square\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").write_bytes(without[0][1])
    for source in ("lines.txt", "images"):
        with pytest.raises(InputError, match=r"^second: \S+ (has no second texts|is a folder without shards)"):
            embed_images(model, str(tmp_path / source), tmp_path / "new", second=True, quiet=True)


def test_second_members_for_an_encoder_with_both_towers(one_tower: OneTower, tiny_model: Path, tmp_path: Path) -> None:
    model, is_text = str(save_random_encoder(str(tiny_model), tmp_path / "both")), one_tower.side == "text"
    result = embed_images(model, str(one_tower.shards), tmp_path / "e", second=True, texts=is_text, quiet=True)
    assert (result["count"], result["texts"], result["bad"]) == ((0, 24, 0) if is_text else (24, None, 0))
    assert (tmp_path / "e" / (TEXTS if is_text else EMBEDDINGS)).is_file()


def test_tables_and_folders_for_a_text_encoder(tiny_model: Path, tmp_path: Path) -> None:
    encoder = save_random_encoder(str(tiny_model), tmp_path / "encoder", towers="text")
    rows = {"key": ["a", "b"], "text": ["what is red?", "what is green?"], "second_text": ["a square", "a circle"]}
    csv.write_csv(table(rows), tmp_path / "pairs.csv")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(drawing(0)[0]))
    (folder / "a.json").write_text('{"caption": "a square"}')
    for source, second, texts in (
        ("pairs.csv", False, rows["text"]),
        ("pairs.csv", True, rows["second_text"]),
        ("folder", False, ["a square"]),  # the captions of the images
    ):
        out = tmp_path / f"{source}-{second}"
        embed_images(str(encoder), str(tmp_path / source), out, second=second, quiet=True)
        assert [row["caption"] for row in rows_of(out, TEXTS)] == texts
