"""Write the codes of an index, choose the shortlist lengths of its funnel and measure its recall against exact search.

Queries are of both modalities; half of them choose the lengths, the other half measure recall.

Shapes: Q queries, N images, D full dim, k neighbours, n a shortlist.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.codecs.code_index import training_rows
from mmrl.codecs.table import Code
from mmrl.evaluate.ranking.ranks import top_k
from mmrl.search.funnel import Funnel

K = 10
"""Recall is measured among the K nearest neighbours."""
QUERIES = 256
"""Per modality, that choose the shortlists, and as many that measure them."""
# Shortlists are chosen for slightly more than the required 0.99, since other queries may be harder.
_TARGET_RECALL = 0.993
_FIRST = (100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12_000, 16_000, 24_000, 32_000)
_SECOND = (20, 30, 50, 70, 100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 3200)
_CHUNK_ROWS = 16_384


@dataclass(frozen=True)
class Codes:
    """The codes of a compressed index."""

    code: Code
    dim: int
    candidates: int | None = None
    """Fixed length of the shortlist; None: chosen by `calibrate`, with a second stage after binary and pq."""


@dataclass(frozen=True)
class Queries:
    """Queries to measure recall with."""

    vectors_QD: np.ndarray
    own_row_Q: np.ndarray
    """The index row that a query was taken from, which is no neighbour of itself; -1 for a text."""


def write_codes(data: Path, vectors_ND: np.ndarray, captions_MD: np.ndarray, codes: Codes) -> dict[str, Any]:
    """Writes the codes and measures their recall; returns the manifest's sections `codes` and `search`."""
    rows = training_rows(len(vectors_ND))
    sample = np.concatenate([vectors_ND[rows], captions_MD])
    funnel = Funnel.build(data, vectors_ND, codes.code, codes.dim, sample, codes.candidates)
    rng = np.random.default_rng(1)
    image_rows = np.sort(rng.permutation(len(vectors_ND))[: 2 * QUERIES])
    caption_rows = rng.permutation(len(captions_MD))[: 2 * QUERIES]
    queries = Queries(
        np.concatenate([vectors_ND[image_rows], captions_MD[caption_rows]]),
        np.concatenate([image_rows, np.full(len(caption_rows), -1)]),
    )
    measured = calibrate(funnel, vectors_ND, queries, codes.candidates)
    section = {
        "code": codes.code,
        "dim": codes.dim,
        "threshold": None,
        "candidates": codes.candidates,
        "second_stage": funnel.prefix_Nd is not None,
        "resident_bytes": funnel.resident_bytes,
        "fitted_to": {"image": len(rows), "text": len(captions_MD)},
    }
    return {"codes": section, "search": measured}


def exact_neighbours(vectors_ND: np.ndarray, queries: Queries, k: int = K) -> np.ndarray:
    """The rows of the k highest cosines of each query, without its own row, ties by row: (Q, k). Takes unit vectors."""
    count, index_Q1 = len(queries.vectors_QD), np.arange(len(queries.vectors_QD))[:, None]
    best_Qk, row_Qk = np.full((count, k), -np.inf, np.float32), np.full((count, k), -1, np.int64)
    for start in range(0, len(vectors_ND), _CHUNK_ROWS):
        scores_Qn = queries.vectors_QD @ np.asarray(vectors_ND[start : start + _CHUNK_ROWS]).T
        own = (queries.own_row_Q >= start) & (queries.own_row_Q < start + scores_Qn.shape[1])
        scores_Qn[own, queries.own_row_Q[own] - start] = -np.inf
        column_Qk, score_Qk = top_k(scores_Qn, k)
        order_Qk, best_Qk = top_k(np.concatenate([best_Qk, score_Qk], axis=1), k)
        row_Qk = np.concatenate([row_Qk, column_Qk + start], axis=1)[index_Q1, order_Qk]
    return row_Qk


def calibrate(
    funnel: Funnel, vectors_ND: np.ndarray, queries: Queries, candidates: int | None = None
) -> dict[str, Any]:
    """The shortest shortlists that reach the target recall for both modalities, or the longest available.

    Args:
        candidates: use this length instead of choosing one.

    Returns: the manifest's section `search`: "shortlists", how many images each stage passes on; "recall@10" and the
        number of "queries" of each modality, measured on the other half.
    """
    truth_Qk = exact_neighbours(vectors_ND, queries)
    longest = min(_FIRST[-1] if candidates is None else candidates, len(vectors_ND))
    # One query at a time, as in a search: faiss has other kernels for batches.
    rows_Qn = [funnel.first(query_D[None], longest)[0] for query_D in queries.vectors_QD]
    position_Qk = np.stack([
        _positions(rows_n[rows_n >= 0], truth_k, longest) for rows_n, truth_k in zip(rows_Qn, truth_Qk, strict=True)
    ])  # fmt: skip
    choosing = np.arange(len(truth_Qk)) % 2 == 0
    is_text = queries.own_row_Q < 0

    def recall(position_Qk: np.ndarray, length: int) -> float:
        """Of the worse modality."""
        halves = [position_Qk[choosing & modality] for modality in (is_text, ~is_text) if (choosing & modality).any()]
        return min(float((half < length).mean()) for half in halves)

    if candidates is not None:
        first = second = longest
    else:
        # A second stage shares the permitted loss equally with the first.
        target = _TARGET_RECALL if funnel.prefix_Nd is None else 1 - (1 - _TARGET_RECALL) / 2
        first = next((n for n in _FIRST if n <= longest and recall(position_Qk, n) >= target), longest)
        position_Qk = np.stack([
            _positions(funnel.second(query_D, rows_n[:first]), truth_k, longest)
            for query_D, rows_n, truth_k in zip(queries.vectors_QD, rows_Qn, truth_Qk, strict=True)
        ])  # fmt: skip
        second = next((n for n in _SECOND if n < first and recall(position_Qk, n) >= _TARGET_RECALL), first)
    return {
        "shortlists": {"first": first, "second": second},
        f"recall@{K}": {
            name: round(float((position_Qk[~choosing & modality] < second).mean()), 4)
            for name, modality in (("image", ~is_text), ("text", is_text))
            if (~choosing & modality).any()
        },
        "queries": {"image": int((~choosing & ~is_text).sum()), "text": int((~choosing & is_text).sum())},
    }


def _positions(rows_n: np.ndarray, truth_k: np.ndarray, missing: int) -> np.ndarray:
    """The index of each true neighbour in a shortlist, `missing` where it is absent: (k,)."""
    if not len(rows_n):
        return np.full(len(truth_k), missing)
    order = np.argsort(rows_n, kind="stable")
    position_k = order[np.searchsorted(rows_n, truth_k, sorter=order).clip(max=len(rows_n) - 1)]
    return np.where(rows_n[position_k] == truth_k, position_k, missing)
