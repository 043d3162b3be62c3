"""Reference scores: brute force by definition, one query at a time, and other libraries."""

import math

import numpy as np
import pytrec_eval
import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k


def unit(x: np.ndarray, dim: int) -> np.ndarray:
    return x[:, :dim] / np.linalg.norm(x[:, :dim], axis=1, keepdims=True)


def positive_ranks(score_G: np.ndarray, positive_G: np.ndarray) -> list[int]:
    """The rank of the n-th best positive: n + the number of non-positives that score at least as high."""
    mine, others = sorted(score_G[positive_G], reverse=True), score_G[~positive_G]
    return [n + 1 + int((others >= value).sum()) for n, value in enumerate(mine)]


def brute_force(query: np.ndarray, gallery: np.ndarray, positive: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """All scores, from unit vectors and the matrix of positives."""
    hits: dict[int, list[bool]] = {k: [] for k in ks}
    precision, r_precision, gain, best = [], [], [], []
    for q in range(len(query)):
        if not positive[q].any():
            continue
        ranks = positive_ranks((query[q] * gallery).sum(1), positive[q])
        best.append(ranks[0])
        for k in ks:
            hits[k].append(ranks[0] <= k)
        precision.append(np.mean([(n + 1) / rank for n, rank in enumerate(ranks)]))
        within = [(n + 1) / rank for n, rank in enumerate(ranks) if rank <= len(ranks)]
        r_precision.append(sum(within) / len(ranks))
        ideal = sum(1 / math.log2(n + 2) for n in range(min(len(ranks), 10)))
        gain.append(sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / ideal)
    scores = {f"R@{k}": float(np.mean(hits[k])) for k in ks}
    return {
        **scores,
        "mAP": float(np.mean(precision)),
        "mAP@R": float(np.mean(r_precision)),
        "nDCG@10": float(np.mean(gain)),
        "MRR": float(np.mean([1 / rank for rank in best])),
        "median_rank": float(np.median(best)),
        "mean_rank": float(np.mean(best)),
    }


def by_clip_benchmark(score_QG: np.ndarray, positive_QG: np.ndarray, k: int) -> float:
    """CLIP_benchmark's recall@k, as its evaluate() calls it."""
    scores, positive = torch.from_numpy(score_QG), torch.from_numpy(positive_QG)
    return (batchify(recall_at_k, scores, positive, 64, "cpu", k=k) > 0).float().mean().item()


def by_trec_eval(score_QG: np.ndarray, positive_QG: np.ndarray) -> dict[str, float]:
    """mAP, nDCG@10 and MRR of trec_eval."""
    relevant = {f"q{q}": {f"g{g}": int(hit) for g, hit in enumerate(row)} for q, row in enumerate(positive_QG)}
    run = {f"q{q}": {f"g{g}": float(score) for g, score in enumerate(row)} for q, row in enumerate(score_QG)}
    found = pytrec_eval.RelevanceEvaluator(relevant, {"map", "ndcg_cut.10", "recip_rank"}).evaluate(run).values()
    names = {"mAP": "map", "nDCG@10": "ndcg_cut_10", "MRR": "recip_rank"}
    return {ours: float(np.mean([one[theirs] for one in found])) for ours, theirs in names.items()}
