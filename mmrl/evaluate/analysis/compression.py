"""How few bytes will do? Every dim in every precision, in one search or in two stages.

- `fp32`, `fp16`: the unit prefix, rounded.
- `int8`: each number on 256 even steps between its least and its greatest value in the gallery.
- `binary`: the signs, one bit a number, of queries too; compared by Hamming distance.
- `pq2`, `pq4`, `pq8`: product quantisation by FAISS, a byte for each 2, 4 or 8 numbers, up to 64 bytes; above that, the
  int8 of a shorter prefix is at hand. Each half of the gallery is coded by the codebook of the other half, or 256
  codewords would remember a small gallery instead of describing it.

But for `binary`, queries stay float32 and are compared with the decoded vector by inner product, as indexes do. A tie
counts against the query, of which short binary codes have many.

Two stages: a short code of every vector, in memory, gives a list of candidates, which the full vector in fp16, from
memory or disk, puts in order. A right answer that is not in the list is a miss.

Shapes: Q queries that have an answer, G gallery rows, D the full width, d one dim, C candidates; q queries of a chunk.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrl.distributed import comm
from mmrl.evaluate.analysis.task import Task, in_half
from mmrl.nesting import cut

PRECISIONS = ("fp32", "fp16", "int8", "binary", "pq2", "pq4", "pq8")
CANDIDATES = (10, 20, 50, 100, 200)
# A list of more than this share of the gallery says nothing of larger galleries.
_LONGEST_LIST = 0.05
SHORTLIST_PRECISIONS = ("int8", "binary", "pq2", "pq4", "pq8")
_CODEWORDS, _LEAST_PER_CODEWORD = 256, 2
_MOST_PQ_BYTES = 64
_PQ_TRAINING_ROWS = 256 * 64  # what FAISS itself would take of more is not much more
_CHUNK_ELEMENTS = 1 << 24
_CHUNK_CANDIDATES = 1 << 22  # numbers of candidates' vectors in memory at once
_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "binary": 1, "pq2": 4, "pq4": 2, "pq8": 1}


@dataclass(frozen=True)
class Option:
    """One way to keep and to search the gallery."""

    dim: int
    precision: str
    rank_Q: Tensor
    """float64: the place of each query's best answer, from 1; infinite where no candidate is one."""
    candidates: int = 0
    """How many the first stage hands on; 0 where there is one stage."""
    rerank_dim: int = 0

    @property
    def bytes(self) -> int:
        """Of a vector's code that every search reads, so that has to be in memory."""
        return bytes_of(self.dim, self.precision)

    @property
    def rerank_bytes(self) -> int:
        """Of the vector that puts the candidates in order; it may lie on disk."""
        return bytes_of(self.rerank_dim, "fp16") if self.candidates else 0

    @property
    def name(self) -> str:
        """For tables: "64-d int8" or "64-d binary, 50 reranked"."""
        return f"{self.dim}-d {self.precision}" + (f", {self.candidates} reranked" if self.candidates else "")


def bytes_of(dim: int, precision: str) -> int:
    """Of one vector, without the ranges and codebooks that all vectors share."""
    return -(-dim * _BITS[precision] // 8)


def precisions_at(dim: int, gallery: int) -> list[str]:
    """Those that a gallery of this size can have at this dim."""
    no_codebooks = why_no_codebooks(gallery)
    result = []
    for precision in PRECISIONS:
        if precision.startswith("pq"):
            parts, rest = divmod(dim, int(precision[2:]))
            if rest or no_codebooks or not 1 < parts <= _MOST_PQ_BYTES:
                continue
        result.append(precision)
    return result


def why_no_codebooks(gallery: int) -> str:
    """Why product quantisation cannot be measured on a gallery of this size here; empty where it can."""
    least = 2 * _LEAST_PER_CODEWORD * _CODEWORDS
    if gallery < least:
        return f"needs a gallery of {least:,} vectors"
    return "" if importlib.util.find_spec("faiss") else "needs FAISS: pip install 'mmrl-clip[search]'"


def measure(task: Task, dims: Sequence[int], k: int = 10, on_option: Callable[[], None] | None = None) -> list[Option]:
    """Every dim and precision in one stage; below the greatest dim, or in binary, also as the first of two stages.

    Args:
        task: queries that all have an answer.
        k: of the recall at K that is of interest; fewer candidates are of no use.
        on_option: called after each dim and precision, for a progress bar.
    """
    task = task.to(comm.world().device)
    full = max(dims)
    long_QD, long_GD = cut(task.query_QD, full), cut(task.gallery_GD, full).half().float()
    lengths = [c for c in CANDIDATES if k <= c <= len(long_GD) * _LONGEST_LIST]
    options = []
    for dim in sorted(dims, reverse=True):
        for precision in precisions_at(dim, len(task.gallery_GD)):
            query_Qd, gallery_Gd = coded(task, dim, precision)
            as_shortlist = lengths and precision in SHORTLIST_PRECISIONS and (dim < full or precision != "int8")
            found = _search(task, query_Qd, gallery_Gd, max(lengths) if as_shortlist else 0)
            options.append(Option(dim, precision, found.rank_Q))
            if as_shortlist:
                rank_of = _reranked(task, found.candidate_QC, long_QD, long_GD, lengths)
                options += [Option(dim, precision, rank_Q, count, full) for count, rank_Q in rank_of.items()]
            if on_option:
                on_option()
    return options


def coded(task: Task, dim: int, precision: str) -> tuple[Tensor, Tensor]:
    """What a search compares by inner product: queries (Q, d) and decoded gallery (G, d), float32."""
    query_Qd, gallery_Gd = cut(task.query_QD, dim), cut(task.gallery_GD, dim)
    if precision == "fp16":
        return query_Qd, gallery_Gd.half().float()
    if precision == "int8":
        return query_Qd, _on_steps(gallery_Gd)
    if precision == "binary":
        return _signs(query_Qd), _signs(gallery_Gd)
    if precision.startswith("pq"):
        return query_Qd, _by_codebooks(gallery_Gd, task.gallery_group_G, dim // int(precision[2:]))
    return query_Qd, gallery_Gd


def _on_steps(gallery_Gd: Tensor) -> Tensor:
    low_d, high_d = gallery_Gd.amin(0), gallery_Gd.amax(0)
    step_d = ((high_d - low_d) / 255).clamp(min=1e-12)
    return ((gallery_Gd - low_d) / step_d).round() * step_d + low_d


def _signs(rows_Nd: Tensor) -> Tensor:
    """+1 and -1, whose inner product is d - 2 * Hamming distance. Zero counts as positive."""
    return torch.where(rows_Nd < 0, -1.0, 1.0)


def _by_codebooks(gallery_Gd: Tensor, group_G: Tensor, parts: int) -> Tensor:
    half_G = in_half(group_G)
    if min(int(half_G.sum()), int((~half_G).sum())) < _CODEWORDS:  # few, large items: rows are halved instead
        half_G = torch.arange(len(gallery_Gd), device=group_G.device) % 2 == 0
    decoded_Gd = torch.empty_like(gallery_Gd)
    for half in (True, False):
        decoded_Gd[half_G == half] = _by_codebook(gallery_Gd[half_G != half], gallery_Gd[half_G == half], parts)
    return decoded_Gd


def _by_codebook(learnt_nd: Tensor, rows_Nd: Tensor, parts: int) -> Tensor:
    import faiss

    quantiser: Any = faiss.ProductQuantizer(rows_Nd.shape[1], parts, 8)
    quantiser.cp.min_points_per_centroid = 1  # it would warn on standard error; the page tells how many there were
    chosen = np.random.default_rng(0).permutation(len(learnt_nd))[:_PQ_TRAINING_ROWS]
    quantiser.train(np.ascontiguousarray(learnt_nd.cpu().numpy()[np.sort(chosen)], dtype=np.float32))
    codes = quantiser.compute_codes(np.ascontiguousarray(rows_Nd.cpu().numpy(), dtype=np.float32))
    return torch.from_numpy(quantiser.decode(codes)).to(rows_Nd.device)


@dataclass(frozen=True)
class _Found:
    rank_Q: Tensor
    candidate_QC: Tensor
    """The rows that score highest, the best first; (Q, 0) where none were asked for."""


def _search(task: Task, query_Qd: Tensor, gallery_Gd: Tensor, candidates: int) -> _Found:
    ranks, lists = [], []
    for rows in _chunks(len(query_Qd), _CHUNK_ELEMENTS // len(gallery_Gd)):
        score_qG = query_Qd[rows] @ gallery_Gd.T
        ranks.append(_best_place(score_qG, task.query_group_Q[rows, None] == task.gallery_group_G))
        lists.append(score_qG.topk(candidates, dim=1).indices)
    return _Found(torch.cat(ranks).cpu(), torch.cat(lists))


def _reranked(
    task: Task, candidate_QC: Tensor, long_QD: Tensor, long_GD: Tensor, lengths: Sequence[int]
) -> dict[int, Tensor]:
    """{length of the list: rank_Q} when the first so many candidates are put in order by the long vectors."""
    ranks: dict[int, list[Tensor]] = {length: [] for length in lengths}
    for rows in _chunks(len(long_QD), _CHUNK_CANDIDATES // (candidate_QC.shape[1] * long_QD.shape[1])):
        candidate_qC = candidate_QC[rows]
        score_qC = torch.einsum("qd,qcd->qc", long_QD[rows], long_GD[candidate_qC])
        positive_qC = task.query_group_Q[rows, None] == task.gallery_group_G[candidate_qC]
        for length in lengths:
            ranks[length].append(_best_place(score_qC[:, :length], positive_qC[:, :length]))
    return {length: torch.cat(parts).cpu() for length, parts in ranks.items()}


def _best_place(score_qG: Tensor, positive_qG: Tensor) -> Tensor:
    """The place of the best positive, ties against it; infinite where there is none: float64 (q,)."""
    best_q = score_qG.masked_fill(~positive_qG, -torch.inf).amax(1)
    above_q = (score_qG.masked_fill(positive_qG, -torch.inf) >= best_q[:, None]).sum(1)
    return torch.where(positive_qG.any(1), 1.0 + above_q.double(), torch.inf)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, rows, size))


def front(points: Sequence[tuple[int, float]]) -> list[int]:
    """Of (bytes, recall), the places of those that no other beats: none has as much recall in as few bytes, and more of
    one. By bytes, ascending."""
    order = sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1]))
    best, result = -1.0, []
    for n in order:
        if points[n][1] > best:
            best = points[n][1]
            result.append(n)
    return result
