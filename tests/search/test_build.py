"""Building, compressing, adding to, deleting from and compacting an index; searches are compared with brute force."""

import json
import shutil
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pytest
from helpers.indexes import brute_force, clustered, generated_embeddings, rows_of

from mmrl.codecs.code_index import CODES_FILE
from mmrl.codecs.table import CODES
from mmrl.errors import InputError
from mmrl.search import build, calibrate, embed, funnel
from mmrl.search import index as index_module
from mmrl.search.build import add_to_index, compact_index, delete_from_index, write_index
from mmrl.search.calibrate import Queries, exact_neighbours
from mmrl.search.index import Index, open_index

COUNT, DIM = 3000, 64


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated embeddings of 3,000 images and 600 texts."""
    folder = tmp_path_factory.mktemp("generated") / "e"
    return generated_embeddings(folder, clustered(COUNT, DIM, 1), clustered(600, DIM, 2))


@pytest.fixture(autouse=True)
def no_exact_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search through the codes: these indexes are small enough for an exact scan."""
    monkeypatch.setattr(index_module, "_EXACT_SCAN_ROWS", 50)


@pytest.fixture(scope="module")
def compressed(embeddings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "i"
    write_index(embeddings, folder, code="pq", quiet=True)
    return folder


def recall(index: Index, queries: np.ndarray, k: int = 10, **options: object) -> float:
    """The share of the k nearest by brute force that the index returns."""
    shares = []
    for query in queries:
        truth = np.argsort(-brute_force(query, index.vectors_ND, index.dim))[:k]
        rows, _ = index.nearest(query, index.dim, k, **options)  # pyright: ignore[reportArgumentType]
        shares.append(len(set(rows.tolist()) & set(truth.tolist())) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize("code", CODES)
def test_a_compressed_index_reaches_its_recall(embeddings: Path, tmp_path: Path, code: str) -> None:
    manifest = write_index(embeddings, tmp_path / "i", code=code, quiet=True)
    measured = manifest["search"]["recall@10"]
    assert min(measured["image"], measured["text"]) >= 0.98
    assert manifest["codes"]["fitted_to"] == {"image": COUNT, "text": 600}
    index = open_index(tmp_path / "i")
    assert index.manifest == json.loads((tmp_path / "i" / index_module.MANIFEST).read_text()) == manifest
    assert recall(index, clustered(100, DIM, 3)) >= min(measured.values()) - 0.02
    a_row = {"fp32": 4 * 16, "sq8": 16, "binary": 2 + 16, "pq": 4 + 16}[code]
    assert manifest["codes"]["resident_bytes"] == a_row * COUNT
    assert recall(index, clustered(20, DIM, 4), exact=True) == 1


def test_scores_of_the_funnel_are_cosines_at_every_dim(compressed: Path) -> None:
    index = open_index(compressed)
    query = clustered(1, DIM, 5)[0]
    for dim in (DIM, 32, 7):
        rows, scores = index.nearest(query, dim, 12)
        np.testing.assert_allclose(scores, brute_force(query, index.vectors_ND, dim)[rows], atol=1e-6)
        assert (np.diff(scores) <= 0).all()


def test_queries_with_fewer_dims_than_the_codes_are_searched_exactly(compressed: Path) -> None:
    index = open_index(compressed)
    query = clustered(1, DIM, 16)[0, :8]
    rows, scores = index.nearest(query, 8, 5)
    expected = brute_force(query, index.vectors_ND, 8)
    assert rows.tolist() == np.argsort(-expected, kind="stable")[:5].tolist()
    np.testing.assert_allclose(scores, expected[rows], atol=1e-6)


def test_large_k(compressed: Path) -> None:
    index = open_index(compressed)
    queries = clustered(20, DIM, 6)
    assert recall(index, queries, k=100) >= 0.97
    assert len(index.nearest(queries[0], DIM, 2 * COUNT)[0]) == COUNT


def test_groups_are_searched_through_the_funnel(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(compressed)
    monkeypatch.setattr(Index, "_all_cosines", None)  # fails if the funnel is not used
    shares = []
    for query in clustered(40, DIM, 7):
        of_group = np.flatnonzero(np.arange(COUNT) % 3 == 1)
        truth = of_group[np.argsort(-brute_force(query, index.vectors_ND[of_group], DIM))[:10]]
        rows, _ = index.nearest(query, DIM, 10, group="group 1")
        assert (rows % 3 == 1).all()
        shares.append(len(set(rows.tolist()) & set(truth.tolist())) / 10)
    assert np.mean(shares) >= 0.97


def test_shortlists_are_as_short_as_possible(compressed: Path) -> None:
    """A quarter of the length lowers the recall; a perfect first stage gets the shortest length."""
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
    perfect = Perfect("fp32", DIM, index.funnel.codes, None)
    measured = calibrate.calibrate(perfect, index.vectors_ND, Queries(queries, np.full(len(queries), -1)))
    assert measured["shortlists"] == {"first": calibrate._FIRST[0], "second": calibrate._SECOND[0]}
    assert measured["recall@10"] == {"text": 1.0}


def test_exact_neighbours_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_CHUNK_ROWS", 37)
    vectors, texts = clustered(300, 16, 9), clustered(5, 16, 10)
    own = np.array([0, 36, 37, 299, -1, -1, -1, -1, -1])
    found = exact_neighbours(vectors, Queries(np.concatenate([vectors[own[:4]], texts]), own), 10)
    for number, row in enumerate(own):
        scores = vectors @ (vectors[row] if row >= 0 else texts[number - 4])
        if row >= 0:
            scores[row] = -1
        assert found[number].tolist() == np.argsort(-scores)[:10].tolist()


@pytest.mark.parametrize("code", CODES)
def test_a_fixed_number_of_candidates_has_no_second_stage(embeddings: Path, tmp_path: Path, code: str) -> None:
    manifest = write_index(embeddings, tmp_path / "i", code=code, dim=16, candidates=150, quiet=True)
    assert manifest["search"]["shortlists"] == {"first": 150, "second": 150}
    assert manifest["codes"]["resident_bytes"] == {"fp32": 64, "sq8": 16, "binary": 2, "pq": 4}[code] * COUNT
    index, queries = open_index(tmp_path / "i"), clustered(100, DIM, 3)
    assert index.funnel is not None
    for query in queries[:20]:
        candidates = index.funnel.first(query[None], 150)[0]
        exact = brute_force(query, index.vectors_ND, DIM)
        expected = sorted(candidates, key=lambda row: -exact[row])[:10]
        assert index.nearest(query, DIM, 10)[0].tolist() == expected
    measured = manifest["search"]["recall@10"]["text"]
    assert recall(index, queries) == pytest.approx(measured, abs=0.05)
    assert compact_index(tmp_path / "i", quiet=True)["search"] == manifest["search"]


def test_int8_is_an_earlier_name_of_sq8(embeddings: Path, tmp_path: Path) -> None:
    manifest = write_index(embeddings, tmp_path / "i", code="int8", quiet=True)
    assert manifest["codes"]["code"] == "sq8"


@pytest.mark.parametrize("code", ["int8", "binary"])
def test_an_index_of_an_earlier_version_is_searched_and_rewritten(embeddings: Path, tmp_path: Path, code: str) -> None:
    """sq8 was called int8; binary stored the signs around the mean; there was no fixed number of candidates."""
    manifest = write_index(embeddings, tmp_path / "i", code=code, dim=16, quiet=True)
    data = tmp_path / "i" / manifest["data"]
    old = {key: manifest["codes"][key] for key in ("dim", "threshold", "resident_bytes", "fitted_to")} | {"code": code}
    if code == "binary":
        vectors_Nd = funnel.unit_prefix(np.load(data / index_module.VECTORS), 16)
        mean_d = np.linspace(-0.1, 0.1, 16, dtype=np.float32)
        codes = faiss.IndexBinaryFlat(16)
        codes.add(np.packbits(vectors_Nd > mean_d, axis=1))  # pyright: ignore[reportCallIssue]
        faiss.write_index_binary(codes, str(data / CODES_FILE))
        old["threshold"] = mean_d.tolist()
    (tmp_path / "i" / index_module.MANIFEST).write_text(json.dumps({**manifest, "codes": old}))
    index = open_index(tmp_path / "i")
    assert index.funnel is not None
    assert (index.funnel.codes.threshold_d is not None) == (index.funnel.prefix_Nd is not None) == (code == "binary")
    assert recall(index, clustered(50, DIM, 3)) >= 0.95
    assert compact_index(tmp_path / "i", quiet=True)["codes"] == manifest["codes"]


# ------------------------------------------------------------------------------------------------ adding, deleting


@pytest.mark.parametrize("code", ["exact", "pq"])
def test_adding_replaces_equal_keys(embeddings: Path, tmp_path: Path, code: str) -> None:
    write_index(embeddings, tmp_path / "i", code=code, quiet=True)
    new = clustered(30, DIM, 12)
    keys = [f"shard/{number:05}" for number in range(2990, 3020)]
    more = generated_embeddings(tmp_path / "more", new, clustered(10, DIM, 13), keys)
    before = open_index(tmp_path / "i")
    delete_from_index(tmp_path / "i", ["shard/00000"], quiet=True)
    manifest = add_to_index(more, tmp_path / "i", quiet=True)
    assert manifest["count"] == COUNT - 1 - 10 + 30
    index = open_index(tmp_path / "i")
    found = [item.key for item in index.items.take(np.arange(len(index)))]
    assert found == [f"shard/{number:05}" for number in range(1, 3020)]
    np.testing.assert_allclose(index.vectors_ND[-30:], new, atol=1e-6)
    np.testing.assert_array_equal(index.vectors_ND[:2989], before.vectors_ND[1:2990])
    row = index.nearest(new[5], DIM, 1)[0][0]
    assert index.items.take(np.array([row]))[0].key == "shard/02995"
    assert {path.name for path in (tmp_path / "i").iterdir() if path.is_dir()} == {manifest["data"], "texts"}
    # An index opened before the change still reads the old files.
    assert before.items.take(np.array([0]))[0].key == "shard/00000"
    assert len(before.nearest(new[0], DIM, 5)[0]) == 5
    if code == "pq":
        assert manifest["search"]["recall@10"]["text"] >= 0.98
        assert recall(index, clustered(30, DIM, 14)) >= 0.97


def test_a_group_whose_images_are_all_deleted_is_gone(embeddings: Path, tmp_path: Path) -> None:
    write_index(embeddings, tmp_path / "i", quiet=True)
    index = open_index(tmp_path / "i")
    gone = [item.key for item in index.items.take(range(COUNT)) if item.group_name == "group 1"]
    delete_from_index(tmp_path / "i", gone, quiet=True)
    index = open_index(tmp_path / "i")
    assert [name for name, _ in index.named_groups] == ["group 0", "group 2"]
    assert sum(count for _, count in index.named_groups) == COUNT - len(gone)
    for search in (index.sample, partial(index.nearest, clustered(1, DIM, 15)[0], DIM)):
        with pytest.raises(InputError, match="no image has the group 'group 1'"):
            search(3, group="group 1")


def test_norms_are_kept_for_some_dims_only(embeddings: Path, tmp_path: Path) -> None:
    write_index(embeddings, tmp_path / "i", code="exact", quiet=True)
    index, query = open_index(tmp_path / "i"), clustered(1, DIM, 15)[0]
    first = index.nearest(query, 1, 5)[1]
    for dim in range(1, DIM + 1):
        index.nearest(query, dim, 5)
    assert len(index._norms) == index_module._CACHED_NORMS < DIM
    assert np.array_equal(index.nearest(query, 1, 5)[1], first)


def test_an_index_of_which_few_images_are_left_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """faiss cannot train pq on fewer vectors than codewords, and recall among fewer than ten is none."""
    vectors = clustered(1001, DIM, 1)
    source = generated_embeddings(tmp_path / "e", vectors, np.zeros((0, DIM), np.float32))
    (source / embed.TEXTS).unlink()
    write_index(source, tmp_path / "i", code="pq", quiet=True)
    delete_from_index(tmp_path / "i", ["shard/00000"], quiet=True)
    assert compact_index(tmp_path / "i", quiet=True)["codes"]["code"] == "pq"
    delete_from_index(tmp_path / "i", [f"shard/{number:05}" for number in range(1, 996)], quiet=True)
    manifest = compact_index(tmp_path / "i")
    assert (manifest["codes"], manifest["search"]["recall@10"]) == (None, "exact")
    assert "too few are left for pq codes, so the index is exact now" in " ".join(capsys.readouterr().out.split())
    rows, _ = open_index(tmp_path / "i").nearest(vectors[998], DIM, 10)
    assert rows.tolist() == np.argsort(-(vectors[996:] @ vectors[998])).tolist()


@pytest.mark.parametrize("code", ["exact", "pq"])
def test_deleted_images_are_not_found(embeddings: Path, tmp_path: Path, code: str) -> None:
    write_index(embeddings, tmp_path / "i", code=code, quiet=True)
    query = clustered(1, DIM, 15)[0]
    first = open_index(tmp_path / "i")
    nearest = np.argsort(-brute_force(query, first.vectors_ND, DIM))
    gone = [item.key for item in first.items.take(nearest[:7])]
    manifest = delete_from_index(tmp_path / "i", gone, quiet=True)
    assert manifest["count"] == len(open_index(tmp_path / "i")) == COUNT - 7
    rows, _ = open_index(tmp_path / "i").nearest(query, DIM, 10)
    assert set(rows.tolist()) == set(nearest[7:17].tolist())
    assert len(open_index(tmp_path / "i").nearest(query, DIM, COUNT)[0]) == COUNT - 7
    with pytest.raises(InputError, match=r"has no image 'nobody' \(nor 1 more of the keys\); nothing was deleted"):
        delete_from_index(tmp_path / "i", ["nobody", gone[0] + "x", "shard/00001"], quiet=True)
    held = sum(path.stat().st_size for path in (tmp_path / "i").rglob("*"))
    manifest = compact_index(tmp_path / "i", quiet=True)
    index = open_index(tmp_path / "i")
    assert (manifest["rows"], len(index.deleted)) == (COUNT - 7, 0)
    assert sum(path.stat().st_size for path in (tmp_path / "i").rglob("*")) < held
    assert not index.items.rows_of(gone)[0].size
    kept = [item.key for item in index.items.take(index.nearest(query, DIM, 10)[0])]
    assert set(kept) == {item.key for item in first.items.take(nearest[7:17])}


def test_a_crash_leaves_the_index_as_it_was(embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(embeddings, tmp_path / "i", quiet=True)
    monkeypatch.setattr(build, "_write_manifest", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        compact_index(tmp_path / "i", quiet=True)
    assert len(open_index(tmp_path / "i")) == COUNT
    assert len(list((tmp_path / "i").glob("data-*"))) == 1


# ------------------------------------------------------------------------------------------------ errors


def test_invalid_options_are_reported(embeddings: Path, compressed: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: object) -> None:
        with pytest.raises(InputError, match=message):
            write_index(embeddings, tmp_path / "i", quiet=True, **options)  # pyright: ignore[reportArgumentType]

    refused("code: 'hnsw' is unknown; allowed: auto, exact, fp32, sq8, binary, pq", code="hnsw")
    refused("dim: code pq needs a multiple of 2, and 7 is not one", code="pq", dim=7)
    refused("dim: code binary needs a multiple of 8, and 12 is not one", code="binary", dim=12)
    refused("dim: an exact index has no codes", code="exact", dim=32)
    refused("candidates: an exact index has none", code="exact", candidates=50)
    refused("candidates: 9 is out of range; allowed: 10 to 3,000, the number of images", code="int8", candidates=9)
    few = generated_embeddings(tmp_path / "few", clustered(10, DIM, 1), clustered(2, DIM, 2))
    with pytest.raises(InputError, match="code: a compressed index needs at least 1,000 images, and there are 10"):
        write_index(few, tmp_path / "i", code="pq", quiet=True)
    assert not (tmp_path / "i").exists()
    short = generated_embeddings(tmp_path / "short", clustered(10, 32, 1), clustered(2, 32, 2))
    with pytest.raises(InputError, match=r"has 32 dims and .* has 64; embed these images with --dim 64"):
        add_to_index(short, compressed, quiet=True)
    write_index(few, tmp_path / "j", quiet=True)
    with pytest.raises(InputError, match="no image would remain"):
        delete_from_index(tmp_path / "j", [row["key"] for row in rows_of(few)], quiet=True)


def test_embeddings_of_another_encoder_are_not_added(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = generated_embeddings(tmp_path / "other", clustered(10, DIM, 1), clustered(2, DIM, 2))
    real = build.open_embeddings
    monkeypatch.setattr(
        build, "open_embeddings", lambda *args: ({**real(*args)[0], "origin_sha256": "other"}, *real(*args)[1:])
    )
    with pytest.raises(InputError, match=r"are of another encoder \(weights other…\) than .* \(generated…\)"):
        add_to_index(other, compressed, quiet=True)


def test_foreign_codes_are_refused(embeddings: Path, tmp_path: Path) -> None:
    write_index(embeddings, tmp_path / "i", code="pq", quiet=True)
    codes = tmp_path / "i" / "data-1" / CODES_FILE
    whole = codes.read_bytes()
    codes.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"the codes .* cannot be read .*; run mmrl index again"):
        open_index(tmp_path / "i")
    write_index(embeddings, tmp_path / "j", code="pq", dim=32, quiet=True)
    codes.write_bytes((tmp_path / "j" / "data-1" / CODES_FILE).read_bytes())
    with pytest.raises(InputError, match="has 3000 codes of 32 dims, and the manifest says 3000 of 16"):
        open_index(tmp_path / "i")


@pytest.mark.parametrize("name", ["data-1", "data-1/vectors.npy", "data-1/codes.faiss"])
def test_an_index_stays_inside_its_folder(compressed: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "i"
    shutil.copytree(compressed, folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name} leads out of"):
        open_index(folder)
