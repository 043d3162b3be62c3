"""Codes and two-stage search against FAISS's own indexes and against brute force."""

import faiss
import numpy as np
import pytest
import torch

from mmrl.evaluate.analysis import compression
from mmrl.evaluate.analysis.compression import Option, coded, front, measure
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.nesting import cut


def make_task(queries: int = 120, gallery: int = 1100, dim: int = 32, seed: int = 0) -> Task:
    """Queries near their gallery rows, several of a group."""
    rng = torch.Generator().manual_seed(seed)
    gallery_GD = torch.randn(gallery, dim, generator=rng)
    row_q = torch.randperm(gallery, generator=rng)[:queries]
    group_G = torch.arange(gallery) // 2
    query_QD = gallery_GD[row_q] + 0.7 * torch.randn(queries, dim, generator=rng)
    return Task("text_to_image", query_QD, gallery_GD, group_G[row_q], group_G)


def brute_rank(score_QG: np.ndarray, task: Task) -> np.ndarray:
    """Straight from the definition, one query at a time."""
    ranks = []
    for q, score_G in enumerate(score_QG):
        right_G = (task.gallery_group_G == task.query_group_Q[q]).numpy()
        ranks.append(1 + (score_G[~right_G] >= score_G[right_G].max()).sum())
    return np.array(ranks, float)


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task()


@pytest.fixture(scope="module")
def options(task: Task) -> list[Option]:
    return measure(task, [32, 8, 16], k=10)


def of(options: list[Option], dim: int, precision: str, candidates: int = 0) -> Option:
    return next(o for o in options if (o.dim, o.precision, o.candidates) == (dim, precision, candidates))


def test_fp32_is_the_plain_ranking(task: Task, options: list[Option]) -> None:
    plain = rank_queries(task.query_QD, task.gallery_GD, task.query_group_Q, task.gallery_group_G, [32, 8])
    for dim in (32, 8):
        assert torch.equal(of(options, dim, "fp32").rank_Q, plain[dim].rank_Q)


@pytest.mark.parametrize("dim", [32, 8])
def test_binary_is_the_hamming_distance_of_faiss(task: Task, options: list[Option], dim: int) -> None:
    query, gallery = (np.packbits(x[:, :dim].numpy() >= 0, axis=1) for x in (task.query_QD, task.gallery_GD))
    index = faiss.IndexBinaryFlat(dim)
    index.add(gallery)  # pyright: ignore[reportCallIssue]
    distance, found = index.search(query, len(gallery))  # pyright: ignore[reportCallIssue]
    score_QG = np.empty(distance.shape)
    np.put_along_axis(score_QG, found, -distance.astype(float), axis=1)
    assert of(options, dim, "binary").rank_Q.tolist() == brute_rank(score_QG, task).tolist()


def test_int8_decodes_to_the_middle_of_its_step(task: Task) -> None:
    plain_Gd, (_, decoded_Gd) = cut(task.gallery_GD, 16), coded(task, 16, "int8")
    step_d = (plain_Gd.amax(0) - plain_Gd.amin(0)) / 255
    assert ((decoded_Gd - plain_Gd).abs() <= step_d / 2 * 1.001).all()
    assert max(len(decoded_Gd[:, d].unique()) for d in range(16)) <= 256
    scalar = faiss.IndexScalarQuantizer(16, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    scalar.train(plain_Gd.numpy())  # pyright: ignore[reportCallIssue]
    codes = scalar.sa_encode(plain_Gd.numpy())  # pyright: ignore[reportCallIssue]
    theirs = torch.from_numpy(scalar.sa_decode(codes))  # pyright: ignore[reportCallIssue]
    assert ((decoded_Gd - theirs).abs() <= step_d * 1.01).all()


def test_each_half_of_the_gallery_is_coded_by_the_other_halfs_codebook(task: Task) -> None:
    """A codebook that had seen its rows would describe 550 of them by 256 words a part far too well."""
    _, decoded_Gd = coded(task, 16, "pq4")
    plain_Gd = cut(task.gallery_GD, 16)
    seen: faiss.ProductQuantizer = faiss.ProductQuantizer(16, 4, 8)
    seen.cp.min_points_per_centroid = 1
    seen.train(plain_Gd.numpy()[:550])  # pyright: ignore[reportCallIssue]
    remembered = seen.decode(seen.compute_codes(plain_Gd.numpy()[:550]))  # pyright: ignore[reportCallIssue]
    honest = float((decoded_Gd - plain_Gd).square().sum(1).mean())
    flattering = float(np.square(remembered - plain_Gd.numpy()[:550]).sum(1).mean())
    assert honest > 1.5 * flattering
    assert honest < float(plain_Gd.square().sum(1).mean()) / 3


def test_two_stages_are_what_faiss_finds_and_the_long_vectors_order(task: Task, options: list[Option]) -> None:
    query_Qd, gallery_Gd = coded(task, 16, "int8")
    index = faiss.IndexFlatIP(16)
    index.add(gallery_Gd.numpy())  # pyright: ignore[reportCallIssue]
    long_QD, long_GD = cut(task.query_QD, 32), cut(task.gallery_GD, 32).half().float()
    for candidates in (10, 50):
        _, found = index.search(query_Qd.numpy(), candidates)  # pyright: ignore[reportCallIssue]
        expected = []
        for q, rows in enumerate(found):
            right = [row for row in rows if task.gallery_group_G[row] == task.query_group_Q[q]]
            score = {row: float(long_QD[q] @ long_GD[row]) for row in rows}
            best = max((score[row] for row in right), default=None)
            wrong = [score[row] for row in rows if row not in right]
            expected.append(np.inf if best is None else 1 + sum(value >= best for value in wrong))
        got = of(options, 16, "int8", candidates)
        assert got.rank_Q.tolist() == expected
        assert (got.bytes, got.rerank_bytes) == (16, 64)
    assert of(options, 8, "binary", 20).name == "8-d binary, 20 reranked"


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(gallery=400)
    options = measure(task, [32, 8])
    assert any(option.candidates for option in options)
    monkeypatch.setattr(compression, "_CHUNK_ELEMENTS", 5000)
    monkeypatch.setattr(compression, "_CHUNK_CANDIDATES", 5000)
    for mine, again in zip(options, measure(task, [32, 8]), strict=True):
        assert mine.name == again.name
        assert torch.equal(mine.rank_Q, again.rank_Q)


def test_what_a_vector_takes() -> None:
    got = {precision: compression.bytes_of(20, precision) for precision in compression.PRECISIONS}
    assert got == {"fp32": 80, "fp16": 40, "int8": 20, "binary": 3, "pq2": 10, "pq4": 5, "pq8": 3}


def test_small_galleries_and_odd_dims_have_no_codebooks() -> None:
    assert compression.precisions_at(32, 900) == ["fp32", "fp16", "int8", "binary"]
    assert "1,024 vectors" in compression.why_no_codebooks(900)
    assert compression.precisions_at(12, 2000) == ["fp32", "fp16", "int8", "binary", "pq2", "pq4"]
    assert compression.precisions_at(512, 2000) == ["fp32", "fp16", "int8", "binary", "pq8"]
    few = measure(make_task(queries=3, gallery=6, dim=4), [4])
    assert {o.precision for o in few} == {"fp32", "fp16", "int8", "binary"}
    assert not any(o.candidates for o in few)  # no list is shorter than a twentieth of six


def test_without_faiss_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'mmrl-clip[search]'" in compression.why_no_codebooks(5000)
    assert compression.precisions_at(32, 5000) == ["fp32", "fp16", "int8", "binary"]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(4, 0.5), (2, 0.4), (8, 0.5), (4, 0.6), (1, 0.1), (2, 0.4), (16, 0.55)]
    got = front(points)
    beaten = {
        n
        for n, (size, recall) in enumerate(points)
        if any(s <= size and r >= recall and (s, r) != (size, recall) for s, r in points)
    }
    assert got == [4, 1, 3]
    assert not beaten & set(got)
