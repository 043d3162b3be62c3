"""Indexes that are compressed, grow and shrink: every search against brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.search_places import brute_force, clustered, generated_embeddings, rows_of

from mmrl.errors import InputError
from mmrl.search import build, calibrate, funnel
from mmrl.search import index as indexes
from mmrl.search.build import add, compact, delete, write_index
from mmrl.search.calibrate import Queries, exact_neighbours
from mmrl.search.funnel import CODES
from mmrl.search.index import Index, open_index

COUNT, DIM = 3000, 64


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 generated pictures and 600 texts."""
    folder = tmp_path_factory.mktemp("generated") / "e"
    return generated_embeddings(folder, clustered(COUNT, DIM, 1), clustered(600, DIM, 2))


@pytest.fixture(autouse=True)
def no_small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or all of these would be compared outright."""
    monkeypatch.setattr(indexes, "_FEW", 50)


@pytest.fixture(scope="module")
def compressed(embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "i"
    write_index(embeddings, folder, code="pq", quiet=True)
    return folder


def recall(index: Index, queries: np.ndarray, k: int = 10, **options: object) -> float:
    """Of the k nearest by brute force, the share found."""
    shares = []
    for query in queries:
        truth = np.argsort(-brute_force(query, index.vectors_ND, index.dim))[:k]
        rows, _ = index.nearest(query, index.dim, k, **options)  # pyright: ignore[reportArgumentType]
        shares.append(len(set(rows.tolist()) & set(truth.tolist())) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize("code", CODES)
def test_a_compressed_index_finds_what_it_says(embeddings: Path, tmp_path: Path, code: str) -> None:
    manifest = write_index(embeddings, tmp_path / "i", code=code, quiet=True)
    told = manifest["search"]["recall@10"]
    assert min(told["image"], told["text"]) >= 0.98
    assert manifest["codes"]["fitted_to"] == {"image": COUNT, "text": 600}
    index = open_index(tmp_path / "i")
    assert index.manifest == json.loads((tmp_path / "i" / indexes.MANIFEST).read_text()) == manifest
    assert recall(index, clustered(100, DIM, 3)) >= min(told.values()) - 0.02
    a_row = {"fp32": 4 * 16, "int8": 16, "binary": 2 + 16, "pq": 4 + 16}[code]
    assert manifest["codes"]["resident_bytes"] == a_row * COUNT
    assert recall(index, clustered(20, DIM, 4), exact=True) == 1


def test_scores_of_the_funnel_are_cosines_at_every_dim(compressed: Path) -> None:
    index = open_index(compressed)
    query = clustered(1, DIM, 5)[0]
    for dim in (DIM, 32, 7):
        rows, scores = index.nearest(query, dim, 12)
        np.testing.assert_allclose(scores, brute_force(query, index.vectors_ND, dim)[rows], atol=1e-6)
        assert (np.diff(scores) <= 0).all()


def test_an_encoder_shorter_than_the_codes_searches_exactly(compressed: Path) -> None:
    index = open_index(compressed)
    query = clustered(1, DIM, 16)[0, :8]
    rows, scores = index.nearest(query, 8, 5)
    expected = brute_force(query, index.vectors_ND, 8)
    assert rows.tolist() == np.argsort(-expected, kind="stable")[:5].tolist()
    np.testing.assert_allclose(scores, expected[rows], atol=1e-6)


def test_more_than_usual_are_found_as_well(compressed: Path) -> None:
    index = open_index(compressed)
    queries = clustered(20, DIM, 6)
    assert recall(index, queries, k=100) >= 0.97
    assert len(index.nearest(queries[0], DIM, 2 * COUNT)[0]) == COUNT


def test_a_group_is_searched_through_the_funnel(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(compressed)
    monkeypatch.setattr(Index, "_all_cosines", None)  # the funnel must do
    shares = []
    for query in clustered(40, DIM, 7):
        of_group = np.flatnonzero(np.arange(COUNT) % 3 == 1)
        truth = of_group[np.argsort(-brute_force(query, index.vectors_ND[of_group], DIM))[:10]]
        rows, _ = index.nearest(query, DIM, 10, group="group 1")
        assert (rows % 3 == 1).all()
        shares.append(len(set(rows.tolist()) & set(truth.tolist())) / 10)
    assert np.mean(shares) >= 0.97


def test_shortlists_are_no_longer_than_needed_and_no_shorter(compressed: Path) -> None:
    """With lists of half the length, fewer are found; with a perfect first stage, the shortest will do."""
    index = open_index(compressed)
    lists, queries = index.manifest["search"]["shortlists"], clustered(100, DIM, 8)
    shorter = {"first": lists["first"] // 4, "second": lists["second"] // 4}
    less = Index(
        index.folder, {**index.manifest, "search": {"shortlists": shorter}}, index.vectors_ND, index.items, index.funnel
    )
    assert recall(less, queries) < recall(index, queries)

    class Perfect(funnel.Funnel):
        def first(self, query_QD: np.ndarray, n: int) -> np.ndarray:
            return np.argsort(-(query_QD @ index.vectors_ND.T), axis=1)[:, :n]

    assert index.funnel is not None
    perfect = Perfect("fp32", DIM, index.funnel.codes, None, None)
    found, measured = calibrate.calibrate(perfect, index.vectors_ND, Queries(queries, np.full(len(queries), -1)))
    assert (found.first, found.second) == (calibrate._FIRST[0], calibrate._SECOND[0])
    assert measured["recall@10"] == {"text": 1.0}


def test_exact_neighbours_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_ROWS_AT_A_TIME", 37)
    vectors, texts = clustered(300, 16, 9), clustered(5, 16, 10)
    own = np.array([0, 36, 37, 299, -1, -1, -1, -1, -1])
    found = exact_neighbours(vectors, Queries(np.concatenate([vectors[own[:4]], texts]), own), 10)
    for number, row in enumerate(own):
        scores = vectors @ (vectors[row] if row >= 0 else texts[number - 4])
        if row >= 0:
            scores[row] = -1
        assert found[number].tolist() == np.argsort(-scores)[:10].tolist()


def test_folding_keeps_every_number_and_serves_the_shortlist() -> None:
    rows = clustered(2000, 32, 11)
    folded = funnel._arranged(rows, "pq")
    assert sorted(folded[0].tolist()) == sorted(rows[0].tolist())
    np.testing.assert_array_equal(folded[:, :4], rows[:, [0, 31, 1, 30]])
    np.testing.assert_allclose(folded @ folded[:9].T, rows @ rows[:9].T, atol=1e-5)


# ------------------------------------------------------------------------------------------------ growing, shrinking


@pytest.mark.parametrize("code", ["exact", "pq"])
def test_adding_replaces_equal_keys(embeddings: Path, tmp_path: Path, code: str) -> None:
    write_index(embeddings, tmp_path / "i", code=code, quiet=True)
    new = clustered(30, DIM, 12)
    keys = [f"shard/{number:05}" for number in range(2990, 3020)]
    more = generated_embeddings(tmp_path / "more", new, clustered(10, DIM, 13), keys)
    before = open_index(tmp_path / "i")
    delete(tmp_path / "i", ["shard/00000"], quiet=True)
    manifest = add(more, tmp_path / "i", quiet=True)
    assert manifest["count"] == COUNT - 1 - 10 + 30
    index = open_index(tmp_path / "i")
    found = [item.key for item in index.take(np.arange(len(index)))]
    assert found == [f"shard/{number:05}" for number in range(1, 3020)]
    np.testing.assert_allclose(index.vectors_ND[-30:], new, atol=1e-6)
    np.testing.assert_array_equal(index.vectors_ND[:2989], before.vectors_ND[1:2990])
    row = index.nearest(new[5], DIM, 1)[0][0]
    assert index.take(np.array([row]))[0].key == "shard/02995"
    assert [path.name for path in (tmp_path / "i").iterdir() if path.is_dir()] == [manifest["data"]]
    # An index that was open keeps what it had.
    assert before.take(np.array([0]))[0].key == "shard/00000"
    assert len(before.nearest(new[0], DIM, 5)[0]) == 5
    if code == "pq":
        assert manifest["search"]["recall@10"]["text"] >= 0.98
        assert recall(index, clustered(30, DIM, 14)) >= 0.97


@pytest.mark.parametrize("code", ["exact", "pq"])
def test_what_is_deleted_is_found_no_more(embeddings: Path, tmp_path: Path, code: str) -> None:
    write_index(embeddings, tmp_path / "i", code=code, quiet=True)
    query = clustered(1, DIM, 15)[0]
    first = open_index(tmp_path / "i")
    nearest = np.argsort(-brute_force(query, first.vectors_ND, DIM))
    gone = [item.key for item in first.take(nearest[:7])]
    manifest = delete(tmp_path / "i", gone, quiet=True)
    assert manifest["count"] == len(open_index(tmp_path / "i")) == COUNT - 7
    rows, _ = open_index(tmp_path / "i").nearest(query, DIM, 10)
    assert set(rows.tolist()) == set(nearest[7:17].tolist())
    assert len(open_index(tmp_path / "i").nearest(query, DIM, COUNT)[0]) == COUNT - 7
    with pytest.raises(InputError, match=r"has no picture 'nobody' \(nor 1 others\); nothing was taken out"):
        delete(tmp_path / "i", ["nobody", gone[0] + "x", "shard/00001"], quiet=True)
    held = sum(path.stat().st_size for path in (tmp_path / "i").rglob("*"))
    manifest = compact(tmp_path / "i", quiet=True)
    index = open_index(tmp_path / "i")
    assert (manifest["rows"], len(index.deleted)) == (COUNT - 7, 0)
    assert sum(path.stat().st_size for path in (tmp_path / "i").rglob("*")) < held
    assert not index.items.rows_of(gone)[0].size
    kept = [item.key for item in index.take(index.nearest(query, DIM, 10)[0])]
    assert set(kept) == {item.key for item in first.take(nearest[7:17])}


def test_a_crash_leaves_the_index_as_it_was(embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(embeddings, tmp_path / "i", quiet=True)
    monkeypatch.setattr(build, "_put_in_force", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        compact(tmp_path / "i", quiet=True)
    assert len(open_index(tmp_path / "i")) == COUNT
    assert len(list((tmp_path / "i").glob("data-*"))) == 1


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_of_index_are_named(embeddings: Path, compressed: Path, tmp_path: Path) -> None:
    def refused(says: str, **options: object) -> None:
        with pytest.raises(InputError, match=says):
            write_index(embeddings, tmp_path / "i", quiet=True, **options)  # pyright: ignore[reportArgumentType]

    refused("code: 'hnsw' is unknown; allowed: auto, exact, fp32, int8, binary, pq", code="hnsw")
    refused("dim: code pq packs 2 numbers and 7 is no multiple", code="pq", dim=7)
    refused("dim: code binary packs 8 numbers and 12 is no multiple", code="binary", dim=12)
    refused("dim: 65 is out of range", code="int8", dim=65)
    few = generated_embeddings(tmp_path / "few", clustered(10, DIM, 1), clustered(2, DIM, 2))
    with pytest.raises(InputError, match="code: 10 pictures are too few to be compressed, at least 1,000"):
        write_index(few, tmp_path / "i", code="pq", quiet=True)
    assert not (tmp_path / "i").exists()
    short = generated_embeddings(tmp_path / "short", clustered(10, 32, 1), clustered(2, 32, 2))
    with pytest.raises(InputError, match=r"has 32 numbers a vector and .* 64; embed these pictures with --dim 64"):
        add(short, compressed, quiet=True)
    write_index(few, tmp_path / "j", quiet=True)
    with pytest.raises(InputError, match="no picture would be left"):
        delete(tmp_path / "j", [row["key"] for row in rows_of(few)], quiet=True)


def test_another_encoders_embeddings_are_not_added(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = generated_embeddings(tmp_path / "other", clustered(10, DIM, 1), clustered(2, DIM, 2))
    real = build._open_embeddings
    monkeypatch.setattr(
        build, "_open_embeddings", lambda path: ({**real(path)[0], "origin_sha256": "other"}, *real(path)[1:])
    )
    with pytest.raises(InputError, match=r"are of another encoder \(weights other…\) than .* \(generated…\)"):
        add(other, compressed, quiet=True)


def test_codes_that_are_not_the_index_s_are_refused(embeddings: Path, tmp_path: Path) -> None:
    write_index(embeddings, tmp_path / "i", code="pq", quiet=True)
    codes = tmp_path / "i" / "data-1" / funnel.CODES_FILE
    whole = codes.read_bytes()
    codes.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"the codes in .* cannot be read .*; run mmrl index again"):
        open_index(tmp_path / "i")
    write_index(embeddings, tmp_path / "j", code="pq", dim=32, quiet=True)
    codes.write_bytes((tmp_path / "j" / "data-1" / funnel.CODES_FILE).read_bytes())
    with pytest.raises(InputError, match="holds 3000 codes of 32 numbers where 3000 of 16 belong"):
        open_index(tmp_path / "i")
