"""Recall of every way to store the gallery: each dim by each codec, in one stage and in two.

One stage ranks the gallery by what `mmrl embed --precision` stores. Two stages rank it as an index of `mmrl index
--code --candidates` does: codes of all images, in memory, give a list of candidates, which is ranked by full vectors in
fp32, from disk; a positive that is not in the list is a miss. Both use the codecs of `mmrl.codecs`, so embeddings and
indexes have the recall measured here. Two stages are measured for text→image only, since an index holds images.

In one stage a tie counts against the query; short binary codes have many.

Shapes: Q queries that have a positive, G gallery rows, D the full dim, d one dim, C candidates; q queries of a chunk.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl.codecs.code_index import CodeIndex, training_rows
from mmrl.codecs.table import CODECS, PRECISIONS, Code, Precision, decode, encode
from mmrl.distributed import comm
from mmrl.evaluate.analysis.bootstrap import Interval
from mmrl.evaluate.analysis.task import Task
from mmrl.nesting import truncate

CANDIDATES = (10, 20, 50, 100, 200)
SHORTLIST_CODES: tuple[Code, ...] = ("sq8", "binary", "pq")
"""The codes of an index but fp32, which takes four times the memory of sq8 for the same shortlist."""
# A list of a larger share of the gallery does not predict larger galleries.
_MAX_LIST_SHARE = 0.05
# Smallest gallery for pq, so that its 16 codewords per two dims do not memorise it.
_MIN_PQ_GALLERY = 1000
_NEEDS_FAISS = "needs faiss: pip install 'mmrl-clip[search]'"
_CHUNK_ELEMENTS = 1 << 24
_CHUNK_CANDIDATES = 1 << 22  # vector components of candidates in memory at once


@dataclass(frozen=True)
class Option:
    """One way to store and search the gallery."""

    dim: int
    precision: str
    """A codec of `mmrl.codecs`."""
    rank_Q: Tensor
    """float64: the rank of each query's best positive, from 1; infinite where no candidate is one."""
    candidates: int = 0
    """Length of the first stage's list; 0 for one stage."""
    rerank_dim: int = 0

    @property
    def bytes(self) -> int:
        """Bytes per vector that every search reads, so they have to be in memory."""
        return CODECS[self.precision].bytes(self.dim)

    @property
    def rerank_bytes(self) -> int:
        """Bytes per full vector that ranks the candidates; may be on disk."""
        return CODECS["fp32"].bytes(self.rerank_dim) if self.candidates else 0

    def as_json(self, recall: Interval, lost: Interval) -> dict[str, Any]:
        """The form of retrieval.json, with its recall and its loss compared with the full vector."""
        return {
            "dim": self.dim,
            "precision": self.precision,
            "candidates": self.candidates,
            "bytes": self.bytes,
            "rerank_bytes": self.rerank_bytes,
            "recall": recall.as_json(),
            "lost": lost.as_json(),
        }


def not_measured(gallery: int) -> dict[str, str]:
    """{code: the reason} of shortlist codes that cannot be measured on a gallery of this size here."""
    if importlib.util.find_spec("faiss") is None:
        return dict.fromkeys(SHORTLIST_CODES, _NEEDS_FAISS)
    return {"pq": f"needs a gallery of {_MIN_PQ_GALLERY:,} vectors"} if gallery < _MIN_PQ_GALLERY else {}


def measure(task: Task, dims: Sequence[int], k: int = 10) -> list[Option]:
    """Every dim by every codec in one stage, and as the first of two stages where that saves memory.

    Args:
        task: queries that all have a positive.
        k: of recall@k; lists of fewer candidates are not measured.
    """
    task = task.to(comm.world().device)
    full, gallery = max(dims), len(task.gallery_GD)
    lengths = [c for c in CANDIDATES if k <= c <= gallery * _MAX_LIST_SHARE]
    skipped = not_measured(gallery)
    options = []
    for dim in sorted(dims, reverse=True):
        options += [Option(dim, precision, _ranks_as_stored(task, dim, precision)) for precision in PRECISIONS]
        for code in SHORTLIST_CODES if lengths and task.name != "image_to_text" else ():
            if code in skipped or dim % CODECS[code].dim_multiple or (code == "sq8" and dim == full):
                continue
            for length, candidate_QC in shortlists(task, dim, code, lengths).items():
                options.append(Option(dim, code, _reranked(task, candidate_QC, full), length, full))
    return options


def _ranks_as_stored(task: Task, dim: int, precision: Precision) -> Tensor:
    """rank_Q of a search of stored vectors. Decoded, they all have one length, so the order is that of the cosines."""
    query_Qd, gallery_Gd = truncate(task.query_QD, dim), _coded(truncate(task.gallery_GD, dim), precision)
    query_Qd = _coded(query_Qd, precision) if precision == "binary" else query_Qd
    return task.with_vectors(query_Qd, gallery_Gd).ranks([dim])[dim]


def _coded(rows_Nd: Tensor, precision: Precision) -> Tensor:
    decoded = decode(encode(rows_Nd.cpu().numpy(), precision), precision, rows_Nd.shape[1])
    return torch.from_numpy(decoded).to(rows_Nd.device)


def shortlists(task: Task, dim: int, code: Code, lengths: Sequence[int]) -> dict[int, Tensor]:
    """The gallery rows that the first stage of an index passes on, best first: {length: int64 (Q, C)}.

    The gallery and the queries train the codes, as the images and captions of an index do."""
    query_Qd, gallery_Gd = truncate(task.query_QD, dim).cpu(), truncate(task.gallery_GD, dim).cpu()
    sample_Sd = torch.cat([rows[training_rows(len(rows))] for rows in (gallery_Gd, query_Qd)])
    codes = CodeIndex.build(code, dim, [gallery_Gd.numpy()], sample_Sd.numpy())
    chunk = max(1, _CHUNK_ELEMENTS // len(gallery_Gd))

    def search(length: int) -> Tensor:
        found = [torch.from_numpy(codes.search(rows.numpy(), length)) for rows in query_Qd.split(chunk)]
        return torch.cat(found).to(task.gallery_GD.device)

    if code == "pq":  # its rounded scores have many ties, which faiss orders by the length of the list
        return {length: search(length) for length in lengths}
    longest_QC = search(max(lengths))
    return {length: longest_QC[:, :length] for length in lengths}


def _reranked(task: Task, candidate_QC: Tensor, full: int) -> Tensor:
    """rank_Q when the candidates are ranked by their full vectors, ties against it; infinite where none is positive."""
    query_QD, gallery_GD = truncate(task.query_QD, full), truncate(task.gallery_GD, full)
    ranks, chunk = [], max(1, _CHUNK_CANDIDATES // (candidate_QC.shape[1] * full))
    for chunks in zip(candidate_QC.split(chunk), query_QD.split(chunk), task.query_group_Q.split(chunk), strict=True):
        candidate_qC, query_qD, group_q = chunks
        score_qC = torch.einsum("qd,qcd->qc", query_qD, gallery_GD[candidate_qC])
        positive_qC = group_q[:, None] == task.gallery_group_G[candidate_qC]
        best_q = score_qC.masked_fill(~positive_qC, -torch.inf).amax(1)
        above_q = (score_qC.masked_fill(positive_qC, -torch.inf) >= best_q[:, None]).sum(1)
        ranks.append(torch.where(positive_qC.any(1), 1.0 + above_q.double(), torch.inf))
    return torch.cat(ranks).cpu()


def front(points: Sequence[tuple[int, float]]) -> list[int]:
    """The Pareto front of (bytes, recall): indices of the points that no other dominates, by ascending bytes."""
    order = sorted(range(len(points)), key=lambda n: (points[n][0], -points[n][1]))
    best, result = -1.0, []
    for n in order:
        if points[n][1] > best:
            best = points[n][1]
            result.append(n)
    return result
