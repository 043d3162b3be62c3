"""Ranks of stored codes and of two-stage search against FAISS and brute force."""

from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch

from mmrl.codecs.table import PRECISIONS, Code
from mmrl.evaluate.analysis import compression
from mmrl.evaluate.analysis.compression import Option, front, measure, shortlists
from mmrl.evaluate.analysis.task import Task
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.nesting import truncate


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


def option_of(options: list[Option], dim: int, precision: str, candidates: int = 0) -> Option:
    return next(o for o in options if (o.dim, o.precision, o.candidates) == (dim, precision, candidates))


def test_fp32_is_the_plain_ranking(task: Task, options: list[Option]) -> None:
    plain = rank_queries(task.query_QD, task.gallery_GD, task.query_group_Q, task.gallery_group_G, [32, 8])
    for dim in (32, 8):
        assert torch.equal(option_of(options, dim, "fp32").rank_Q, plain[dim].rank_Q)


@pytest.mark.parametrize("dim", [32, 8])
def test_binary_is_the_hamming_distance_of_faiss(task: Task, options: list[Option], dim: int) -> None:
    query, gallery = (np.packbits(x[:, :dim].numpy() > 0, axis=1) for x in (task.query_QD, task.gallery_GD))
    index = faiss.IndexBinaryFlat(dim)
    index.add(gallery)  # pyright: ignore[reportCallIssue]
    distance, found = index.search(query, len(gallery))  # pyright: ignore[reportCallIssue]
    score_QG = np.empty(distance.shape)
    np.put_along_axis(score_QG, found, -distance.astype(float), axis=1)
    assert option_of(options, dim, "binary").rank_Q.tolist() == brute_rank(score_QG, task).tolist()


def test_int8_is_the_cosine_of_scaled_and_rounded_vectors(task: Task, options: list[Option]) -> None:
    gallery_Gd = task.gallery_GD[:, :16].double().numpy()
    code_Gd = np.round(gallery_Gd * 127 / np.abs(gallery_Gd).max(1, keepdims=True))
    score_QG = task.query_QD[:, :16].double().numpy() @ (code_Gd / np.linalg.norm(code_Gd, axis=1, keepdims=True)).T
    agree = option_of(options, 16, "int8").rank_Q.numpy() == brute_rank(score_QG, task)
    assert agree.mean() > 0.99  # float32 may order two nearly equal scores differently


@pytest.mark.parametrize("code", ["sq8", "binary", "pq"])
def test_two_stages_rank_the_shortlist_by_full_vectors(task: Task, options: list[Option], code: Code) -> None:
    query_QD, gallery_GD = truncate(task.query_QD, 32), truncate(task.gallery_GD, 32)
    for candidates in (10, 50):
        expected = []
        for q, rows in enumerate(shortlists(task, 16, code, [candidates])[candidates].tolist()):
            positives = [row for row in rows if task.gallery_group_G[row] == task.query_group_Q[q]]
            score = {row: float(query_QD[q] @ gallery_GD[row]) for row in rows}
            best = max((score[row] for row in positives), default=None)
            others = [score[row] for row in rows if row not in positives]
            expected.append(np.inf if best is None else 1 + sum(value >= best for value in others))
        got = option_of(options, 16, code, candidates)
        assert got.rank_Q.tolist() == expected
        assert (got.bytes, got.rerank_bytes) == ({"sq8": 16, "binary": 2, "pq": 4}[code], 128)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(gallery=400)
    options = measure(task, [32, 8])
    assert any(option.candidates for option in options)
    monkeypatch.setattr(compression, "_CHUNK_ELEMENTS", 5000)
    monkeypatch.setattr(compression, "_CHUNK_CANDIDATES", 5000)
    for mine, again in zip(options, measure(task, [32, 8]), strict=True):
        assert (mine.dim, mine.precision, mine.candidates) == (again.dim, again.precision, again.candidates)
        assert torch.equal(mine.rank_Q, again.rank_Q)


def test_which_options_are_measured(task: Task, options: list[Option]) -> None:
    assert {o.precision for o in options if not o.candidates} == {"fp32", "fp16", "int8", "binary"}
    assert {o.precision for o in options if o.candidates} == {"sq8", "binary", "pq"}
    assert not any(o.candidates for o in options if (o.dim, o.precision) == (32, "sq8"))
    odd = {(o.dim, o.precision) for o in measure(task, [32, 12, 7]) if o.candidates}
    assert odd == {(32, "binary"), (32, "pq"), (12, "sq8"), (12, "pq"), (7, "sq8")}
    assert compression.not_measured(999) == {"pq": "needs a gallery of 1,000 vectors"}
    few = measure(make_task(queries=3, gallery=6, dim=4), [4])
    assert not any(o.candidates for o in few)  # no list is shorter than a twentieth of six


def test_text_galleries_have_one_stage(task: Task) -> None:
    """An index holds images."""
    assert not any(o.candidates for o in measure(replace(task, name="image_to_text"), [32, 8]))


def test_without_faiss_the_rest_is_measured(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression.importlib.util, "find_spec", lambda _: None)
    reason = "needs faiss: pip install 'mmrl-clip[search]'"
    assert compression.not_measured(5000) == {"sq8": reason, "binary": reason, "pq": reason}
    assert {(o.precision, o.candidates) for o in measure(task, [32, 8])} == {(one, 0) for one in PRECISIONS}


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
