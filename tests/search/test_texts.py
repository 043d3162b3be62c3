"""Texts indexed and searched as images are: captions beside images, and tables and files of texts alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing
from helpers.indexes import COUNT, brute_force, indexed, rows_of

import mmrl
from mmrl.errors import InputError
from mmrl.search.build import add_to_index, compact_index, delete_from_index, write_index
from mmrl.search.embed import BAD_SAMPLES, EMBEDDINGS, TEXTS, embed_images
from mmrl.search.index import open_index
from mmrl.search.query import search_index

__all__ = ["indexed"]


@pytest.fixture(scope="module")
def embeddings(indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and their captions."""
    out = tmp_path_factory.mktemp("texts") / "e"
    embed_images(str(indexed / "model"), str(indexed / "images.tar"), out, texts=True, quiet=True)
    return out


@pytest.fixture
def index(embeddings: Path, tmp_path: Path) -> Path:
    write_index(embeddings, tmp_path / "i", quiet=True)
    return tmp_path / "i"


def test_captions_are_searched_by_text_and_by_image(
    indexed: Path, embeddings: Path, index: Path, tmp_path: Path
) -> None:
    encoder, texts = mmrl.load(indexed / "model"), rows_of(embeddings, TEXTS)
    vectors = np.array([row["embedding"] for row in texts])
    drawing(7)[0].save(tmp_path / "query.png")
    for dim in (16, 5):
        for text, image, query in (
            ("a red square", None, encoder.encode_texts(["a red square"])[0]),
            (None, tmp_path / "query.png", encoder.encode_images([tmp_path / "query.png"])[0]),
        ):
            found = search_index(index, text, image=image, dim=dim, k=9, kind="texts", quiet=True)
            scores = brute_force(query, vectors, dim)
            np.testing.assert_allclose([hit["score"] for hit in found["results"]], np.sort(scores)[::-1][:9], atol=1e-6)
            best = texts[int(np.argmax(scores))]
            assert (found["in"], found["count"]) == ("texts", 2 * COUNT + 1)
            assert found["results"][0]["score"] == pytest.approx(scores.max(), abs=1e-6)
            assert best["caption"] in [hit["captions"][0] for hit in found["results"][:2]]
            assert best["key"] in [hit["key"] for hit in found["results"][:2]]
    only = search_index(index, "x", group="green square", k=99, kind="texts", quiet=True)["results"]
    assert {hit["group_name"] for hit in only} == {"green square"}
    assert len(only) == 4
    # Without --in, and in an index of images alone, images are searched as before.
    for folder in (index, indexed / "index"):
        expected = search_index(indexed / "index", "a red square", quiet=True)
        assert search_index(folder, "a red square", quiet=True) == expected
    with pytest.raises(InputError, match=r"in: .* holds no index of texts; run mmrl embed with --texts and mmrl index"):
        search_index(indexed / "index", "x", kind="texts", quiet=True)
    with pytest.raises(InputError, match=r"picture: texts have no thumbnails"):
        search_index(index, "x", kind="texts", picture=tmp_path / "a.png", quiet=True)


def test_images_and_their_texts_are_deleted_and_replaced_together(
    indexed: Path, embeddings: Path, index: Path, tmp_path: Path
) -> None:
    delete_from_index(index, ["images.tar/00000", "images.tar/large"], quiet=True)
    assert [len(open_index(folder)) for folder in (index, index / "texts")] == [COUNT - 1, 2 * COUNT - 2]
    keys = {hit["key"] for hit in search_index(index, "x", k=99, kind="texts", quiet=True)["results"]}
    assert not keys & {"images.tar/00000", "images.tar/large"}
    compact_index(index, quiet=True)
    assert [len(open_index(folder).deleted) for folder in (index, index / "texts")] == [0, 0]
    for _ in range(2):  # the second time, all are replaced
        manifest = add_to_index(embeddings, index, quiet=True)
        assert (manifest["items"], manifest["count"]) == ("images", COUNT + 1)
        assert len(open_index(index / "texts")) == 2 * COUNT + 1
    with pytest.raises(InputError, match=r"holds no texts, and .* does; run mmrl embed again with --texts"):
        add_to_index(indexed / "embeddings", index, quiet=True)
    with pytest.raises(InputError, match=r"an index whose texts was True, not False; .*--force"):
        write_index(indexed / "embeddings", index, quiet=True)
    write_index(indexed / "embeddings", index, force=True, quiet=True)
    assert not (index / "texts").exists()


def test_documents_of_a_table_and_of_text_files(indexed: Path, tmp_path: Path) -> None:
    texts = ["a red square", "green stripes\nand more", "women’s shoes"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": f"doc-{i}", "title": f"no {i}", "text": text, "group": "g"}) + "\n"
                for i, text in enumerate(texts))
        + '{"id": "empty", "text": " "}\nno json\n'
    )  # fmt: skip
    (tmp_path / "lines.txt").write_text("\n".join(["a red square", "", "two"]))
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "folder" / "sub" / f"{i}.txt").write_text(text)
    (tmp_path / "folder" / "bad.txt").write_bytes(b"\xff\xfe\xff")
    encoder = mmrl.load(indexed / "model", towers="text")
    for source, keys, captions, bad in (
        (
            "a.jsonl",
            [f"doc-{i}" for i in (0, 0, 1, 1, 2, 2)],
            [t for i, s in enumerate(texts) for t in (s, f"no {i}")],
            2,
        ),
        ("lines.txt", ["lines.txt/1", "lines.txt/3"], ["a red square", "two"], 0),
        ("folder", [f"sub/{i}.txt" for i in range(3)], texts, 1),
    ):
        out, path = tmp_path / f"e-{source}", str(tmp_path / source)
        result = embed_images(str(indexed / "model"), path, out, texts=True, quiet=True)
        assert (result["count"], result["texts"], result["bad"]) == (0, len(keys), bad)
        assert sorted(one.name for one in out.iterdir()) == [*([BAD_SAMPLES] if bad else []), TEXTS]
        rows = rows_of(out, TEXTS)
        assert [(row["key"], row["caption"]) for row in rows] == list(zip(keys, captions, strict=True))
        expected = encoder.encode_texts(captions)
        np.testing.assert_allclose(np.array([row["embedding"] for row in rows]), expected, atol=1e-6)
        manifest = write_index(out, tmp_path / f"i-{source}", quiet=True)
        assert (manifest["items"], manifest["count"]) == ("texts", len(keys))
        for kind in ("texts", None):
            found = search_index(tmp_path / f"i-{source}", captions[0], k=1, kind=kind, quiet=True)["results"][0]
            assert (found["key"], found["captions"], found["score"]) == (
                keys[0],
                [captions[0]],
                pytest.approx(1, abs=1e-6),
            )
        with pytest.raises(InputError, match="holds no index of images; allowed: texts"):
            search_index(tmp_path / f"i-{source}", "x", kind="images", quiet=True)
        with pytest.raises(InputError, match="holds texts without images; add --texts"):
            embed_images(str(indexed / "model"), path, out, quiet=True)
    assert rows_of(tmp_path / "e-a.jsonl", TEXTS)[0]["group_name"] == "g"
    with pytest.raises(InputError, match=r"already holds embeddings .*--force"):
        embed_images(str(indexed / "model"), str(tmp_path / "folder"), tmp_path / "e-lines.txt", texts=True, quiet=True)


def test_sources_without_texts_are_refused(indexed: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("number\n1\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "nothing").mkdir()
    for source, says in (
        ("a.csv", "has none of the columns captions, caption, text, title; rename one"),
        ("empty.txt", "holds no texts"),
        ("nothing", "holds no images"),
    ):
        with pytest.raises(InputError, match=says):
            embed_images(str(indexed / "model"), str(tmp_path / source), tmp_path / "e", texts=True, quiet=True)
    assert not (tmp_path / "e" / EMBEDDINGS).exists()
