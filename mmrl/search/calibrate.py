"""How long the shortlists of a funnel must be, and what it then finds of what exact search finds: measured on the index
itself, with queries of both modalities, half of them to choose by and half to report.

Shapes: Q queries, N pictures, D the width of the vectors, k the neighbours asked for.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmrl.search.funnel import Funnel

K = 10
"""Recall is counted among so many nearest."""
# Shortlists are chosen for a little more than the 0.99 that is wanted, since other queries may be harder.
_AIM = 0.993
_FIRST = (100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12_000, 16_000, 24_000, 32_000)
_SECOND = (20, 30, 50, 70, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200)
_ROWS_AT_A_TIME = 16_384


@dataclass(frozen=True)
class Queries:
    """What recall is measured with."""

    vectors_QD: np.ndarray
    own_row_Q: np.ndarray
    """The row of the index that a query was taken from, which does not count; -1 for a text."""


@dataclass(frozen=True)
class Shortlists:
    """How many pictures each stage hands on."""

    first: int
    second: int


def exact_neighbours(vectors_ND: np.ndarray, queries: Queries, k: int = K) -> np.ndarray:
    """The rows of the k highest cosines of each query, its own left out: (Q, k). Vectors have length 1."""
    count, places = len(queries.vectors_QD), np.arange(len(queries.vectors_QD))[:, None]
    best_Qk, row_Qk = np.full((count, k), -np.inf, np.float32), np.full((count, k), -1, np.int64)
    for start in range(0, len(vectors_ND), _ROWS_AT_A_TIME):
        scores_Qn = queries.vectors_QD @ np.asarray(vectors_ND[start : start + _ROWS_AT_A_TIME]).T
        own = (queries.own_row_Q >= start) & (queries.own_row_Q < start + scores_Qn.shape[1])
        scores_Qn[own, queries.own_row_Q[own] - start] = -np.inf
        kept = np.argpartition(-scores_Qn, min(k, scores_Qn.shape[1]) - 1, axis=1)[:, :k]
        scores = np.concatenate([best_Qk, scores_Qn[places, kept]], axis=1)
        rows = np.concatenate([row_Qk, kept + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_Qk, row_Qk = scores[places, order], rows[places, order]
    return row_Qk


def calibrate(funnel: Funnel, vectors_ND: np.ndarray, queries: Queries) -> tuple[Shortlists, dict[str, Any]]:
    """The shortest lists by which the queries of each modality find _AIM of the K nearest, or the longest that there
    are; and the measurement for the manifest, on queries that had no part in the choice."""
    truth_Qk = exact_neighbours(vectors_ND, queries)
    longest = min(_FIRST[-1], len(vectors_ND))
    first_Qk, second = np.full(truth_Qk.shape, longest, np.int64), {}
    for number, query_D in enumerate(queries.vectors_QD):
        # One by one, as searches come: faiss has other kernels for many at once.
        rows_n = funnel.first(query_D[None], longest)[0]
        first_Qk[number] = _places(rows_n[rows_n >= 0], truth_Qk[number], longest)
        second[number] = rows_n
    chosen, told = np.arange(len(truth_Qk)) % 2 == 0, np.arange(len(truth_Qk)) % 2 == 1
    texts = queries.own_row_Q < 0

    def recall(place_Qk: np.ndarray, length: int, some: np.ndarray) -> float:
        """Of the worse modality."""
        parts = [place_Qk[some & of] for of in (texts, ~texts) if (some & of).any()]
        return min(float((part < length).mean()) for part in parts)

    # Half of what may be lost is the first stage's where there is a second.
    aim = _AIM if funnel.prefix_Nd is None else 1 - (1 - _AIM) / 2
    first = next((n for n in _FIRST if n <= longest and recall(first_Qk, n, chosen) >= aim), longest)
    second_Qk = np.stack([
        _places(funnel.second(query_D, second[number][:first]), truth_Qk[number], longest)
        for number, query_D in enumerate(queries.vectors_QD)
    ])  # fmt: skip
    last = next((n for n in _SECOND if n < first and recall(second_Qk, n, chosen) >= _AIM), first)
    measured = {
        f"recall@{K}": {
            name: round(float((second_Qk[told & of] < last).mean()), 4)
            for name, of in (("image", ~texts), ("text", texts))
            if (told & of).any()
        },
        "queries": {"image": int((told & ~texts).sum()), "text": int((told & texts).sum())},
    }
    return Shortlists(first, last), {"shortlists": asdict(Shortlists(first, last)), **measured}


def _places(rows_n: np.ndarray, truth_k: np.ndarray, missing: int) -> np.ndarray:
    """Where in a shortlist each true neighbour stands; `missing` where it does not: (k,)."""
    order = np.argsort(rows_n, kind="stable")
    at = np.searchsorted(rows_n, truth_k, sorter=order).clip(max=max(len(rows_n) - 1, 0))
    place_k = order[at] if len(rows_n) else np.zeros(len(truth_k), np.int64)
    return np.where(rows_n[place_k] == truth_k, place_k, missing) if len(rows_n) else np.full(len(truth_k), missing)
