"""Every codec against its definition, written out; searches against brute force over the decoded codes."""

import sys
from pathlib import Path

import faiss
import numpy as np
import pytest
from helpers.indexes import clustered

from mmrl.codecs.code_index import CODES_FILE, CodeIndex, _fold, training_rows
from mmrl.codecs.table import CODECS, CODES, PRECISIONS, Code, Precision, build_commands, decode, encode
from mmrl.errors import InputError

COUNT, DIM, QUERIES, N = 3000, 32, 50, 40


def written_out(rows_Nd: np.ndarray, precision: Precision) -> np.ndarray:
    """The codec's definition, one vector at a time, decoded as `decode` does."""
    if precision == "fp32":
        return rows_Nd
    if precision == "fp16":
        rounded = rows_Nd.astype(np.float16).astype(np.float64)
        return rounded / np.linalg.norm(rounded, axis=1, keepdims=True)
    if precision == "binary":
        return np.where(rows_Nd > 0, 1.0, -1.0)
    decoded = []
    for row in rows_Nd.astype(np.float64):
        code = np.round(row * 127 / max(np.abs(row).max(), 1e-30))
        decoded.append(code / max(np.linalg.norm(code), 1e-30))
    return np.array(decoded)


@pytest.mark.parametrize("dim", [32, 12, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_decoded_vectors_follow_the_definition(precision: Precision, dim: int) -> None:
    rows_Nd = clustered(200, dim, 1)
    codes_Nd = encode(rows_Nd, precision)
    assert codes_Nd.dtype == CODECS[precision].dtype
    assert codes_Nd.nbytes == len(rows_Nd) * CODECS[precision].bytes(dim)
    np.testing.assert_allclose(decode(codes_Nd, precision, dim), written_out(rows_Nd, precision), atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_zero_vector_stays_finite(precision: Precision) -> None:
    codes_Nd = encode(np.zeros((1, 8), np.float32), precision)
    assert not codes_Nd.any()
    assert np.isfinite(decode(codes_Nd, precision, 8)).all()


def test_bytes_per_vector() -> None:
    assert {name: codec.bytes(20) for name, codec in CODECS.items()} == {
        "fp32": 80, "fp16": 40, "int8": 20, "sq8": 20, "binary": 3, "pq": 5,
    }  # fmt: skip
    for code in CODES:
        built = CodeIndex.build(code, DIM, [clustered(COUNT, DIM, 1)], clustered(500, DIM, 1))
        assert built.resident_bytes == COUNT * CODECS[code].bytes(DIM)


def reference_scores(query_Qd: np.ndarray, rows_Nd: np.ndarray, built: CodeIndex) -> np.ndarray:
    """Inner products with what the codes decode to: (Q, N)."""
    if built.code == "pq":
        quantiser = built.index.pq
        codes = quantiser.compute_codes(_fold(rows_Nd))
        return _fold(query_Qd) @ quantiser.decode(codes).T
    if built.code == "sq8":  # the middle of one of 256 steps between the extremes of each dim
        low_d, high_d = rows_Nd.min(0).astype(np.float64), rows_Nd.max(0).astype(np.float64)
        step_Nd = np.floor((rows_Nd - low_d) / (high_d - low_d) * 255)
        return query_Qd @ (low_d + (step_Nd + 0.5) / 255 * (high_d - low_d)).T
    query_Qd = written_out(query_Qd, "binary") if built.code == "binary" else query_Qd
    return query_Qd @ written_out(rows_Nd, built.code).T


@pytest.mark.parametrize("code", CODES)
def test_searches_find_the_best_codes(code: Code) -> None:
    rows_Nd, query_Qd = clustered(COUNT, DIM, 1), clustered(QUERIES, DIM, 2)
    built = CodeIndex.build(code, DIM, [rows_Nd[:1000], rows_Nd[1000:1001], rows_Nd[1001:]], rows_Nd)
    found_Qn = built.search(query_Qd, N)
    score_QN = reference_scores(query_Qd, rows_Nd, built)
    best_Qn = np.argsort(-score_QN, axis=1, kind="stable")[:, :N]
    if code in ("fp32", "binary"):  # ties of binary go to the lower row
        assert found_Qn.tolist() == best_Qn.tolist()
    found_score_Qn, best_score_Qn = (np.take_along_axis(score_QN, rows, axis=1) for rows in (found_Qn, best_Qn))
    tolerance = {"sq8": 1e-4, "pq": 0.005}.get(code, 1e-6)  # faiss rounds the lookup tables of pq to 8 bits
    assert np.abs(found_score_Qn.mean(1) - best_score_Qn.mean(1)).max() < tolerance
    one_by_one_Qn = np.concatenate([built.search(query_d[None], N) for query_d in query_Qd])
    np.testing.assert_array_equal(one_by_one_Qn, found_Qn)


def test_pq_pairs_the_first_dim_with_the_last() -> None:
    rows = clustered(2000, DIM, 11)
    folded = _fold(rows)
    assert sorted(folded[0].tolist()) == sorted(rows[0].tolist())
    np.testing.assert_array_equal(folded[:, :4], rows[:, [0, 31, 1, 30]])
    np.testing.assert_allclose(folded @ folded[:9].T, rows @ rows[:9].T, atol=1e-5)


@pytest.mark.parametrize("code", CODES)
def test_stored_codes_are_opened_again(code: Code, tmp_path: Path) -> None:
    rows_Nd, query_Qd = clustered(COUNT, DIM, 1), clustered(QUERIES, DIM, 2)
    built, path = CodeIndex.build(code, DIM, [rows_Nd], rows_Nd), tmp_path / CODES_FILE
    built.save(path)
    opened = CodeIndex.open(path, code, (COUNT, DIM))
    np.testing.assert_array_equal(opened.search(query_Qd, N), built.search(query_Qd, N))
    with pytest.raises(InputError, match="has 3000 codes of 32 dims, and the manifest says 2999 of 32"):
        CodeIndex.open(path, code, (COUNT - 1, DIM))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"the codes .* cannot be read .*; run mmrl index again"):
        CodeIndex.open(path, code, (COUNT, DIM))


def test_binary_codes_with_a_threshold_keep_their_meaning(tmp_path: Path) -> None:
    """Earlier versions stored the signs around the mean."""
    rows_Nd, query_Qd = clustered(COUNT, DIM, 1), clustered(QUERIES, DIM, 2)
    mean_d = rows_Nd.mean(0)
    binary = faiss.IndexBinaryFlat(DIM)
    binary.add(np.packbits(rows_Nd > mean_d, axis=1))  # pyright: ignore[reportCallIssue]
    faiss.write_index_binary(binary, str(tmp_path / CODES_FILE))
    opened = CodeIndex.open(tmp_path / CODES_FILE, "binary", (COUNT, DIM), mean_d.tolist())
    hamming_QN = ((query_Qd > mean_d)[:, None] != (rows_Nd > mean_d)[None]).sum(-1)
    expected = np.argsort(hamming_QN, axis=1, kind="stable")[:, :N]
    np.testing.assert_array_equal(opened.search(query_Qd, N), expected)


def test_training_rows_are_the_same_each_time() -> None:
    assert training_rows(5).tolist() == [0, 1, 2, 3, 4]
    many = training_rows(50_000)
    assert len(set(many.tolist())) == 20_000
    np.testing.assert_array_equal(many, training_rows(50_000))


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"needs faiss, .* pip install 'mmrl-clip\[search\]'"):
        CodeIndex.build("fp32", DIM, [], clustered(20, DIM, 1))


def test_the_commands_name_dim_and_codec() -> None:
    assert build_commands(256, 64, "int8") == ["mmrl embed MODEL SHARDS EMBEDDINGS --dim 64 --precision int8"]
    assert build_commands(256, 64, "int8", option="--texts")[0].endswith("--precision int8 --texts")
    assert build_commands(256, 64, "pq", 50) == [
        "mmrl embed MODEL SHARDS EMBEDDINGS --dim 256",
        "mmrl index EMBEDDINGS INDEX --code pq --dim 64 --candidates 50",
    ]
