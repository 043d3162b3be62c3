"""The stages of a compressed search before the last: shortlists from small codes that stay in memory.

    codes.faiss   the first stage, over the first d numbers of each vector as `Code` says: a faiss index of N codes
    prefix.npy    the second, where the first is coarse: the same numbers at int8, (N, d)

A query passes all N codes, then the best of them, then (in index.py) its whole vector meets the last few, which alone
are read from the disk. How many each stage hands on is measured when the index is made: see `calibrate.py`.

Shapes: N pictures, D the width of the vectors, d the prefix, n a shortlist.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from mmrl.errors import InputError
from mmrl.nesting import cut
from mmrl.search.precision import quantised

Code = Literal["fp32", "int8", "binary", "pq"]
"""fp32: 4 d bytes; int8: d bytes; binary: a bit a number, d/8 bytes; pq: product quantiser, 4 bits for two numbers, d/4
bytes, by tables that fit into a processor's registers."""
CODES: tuple[Code, ...] = get_args(Code)
CODES_FILE, PREFIX_FILE = "codes.faiss", "prefix.npy"
_ROWS_AT_A_TIME = 65_536


def faiss_module(purpose: str) -> Any:
    """The module faiss.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise InputError(
            f"{purpose} needs faiss, which is not installed; run pip install 'mmrl-clip[search]'."
        ) from None
    return faiss


@dataclass(frozen=True)
class Funnel:
    """The first stages over an index's vectors."""

    code: Code
    dim: int
    codes: Any
    """A faiss index."""
    prefix_Nd: np.ndarray | None
    threshold_d: np.ndarray | None
    """Binary alone: a bit is set where a number is above this."""

    @classmethod
    def build(cls, folder: Path, vectors_ND: np.ndarray, code: Code, dim: int, sample_SD: np.ndarray) -> "Funnel":
        """Makes the codes of all vectors and leaves them in `folder`.

        Args:
            sample_SD: what the codes are fitted to: vectors of both modalities, or queries in words would meet codes
                that never saw their like.
        """
        faiss = faiss_module("a compressed index")
        sample_Sd = prefix(sample_SD, dim)
        threshold_d = sample_Sd.mean(0) if code == "binary" else None
        codes = _empty(faiss, code, dim)
        if not codes.is_trained:
            codes.train(_arranged(sample_Sd, code))
        prefix_Nd = None
        if code in ("binary", "pq"):
            shape = (len(vectors_ND), dim)
            prefix_Nd = np.lib.format.open_memmap(folder / PREFIX_FILE, mode="w+", dtype=np.int8, shape=shape)
        for start, rows_nd in _prefixes(vectors_ND, dim):
            codes.add(
                np.packbits(rows_nd > threshold_d, axis=1) if threshold_d is not None else _arranged(rows_nd, code)
            )
            if prefix_Nd is not None:
                prefix_Nd[start : start + len(rows_nd)] = quantised(rows_nd, "int8")
        if prefix_Nd is not None:
            prefix_Nd.flush()
        write = faiss.write_index_binary if code == "binary" else faiss.write_index
        write(codes, str(folder / CODES_FILE))
        del codes
        return cls.open(
            folder,
            {"code": code, "dim": dim, "threshold": None if threshold_d is None else threshold_d.tolist()},
            len(vectors_ND),
        )

    @classmethod
    def open(cls, folder: Path, facts: dict[str, Any], count: int) -> "Funnel":
        """What `build` left, of `count` rows; `facts` is its part of the manifest.

        Raises:
            InputError: a file is missing or is not of this index.
        """
        faiss = faiss_module(f"the index {folder.parent}")
        code, dim = facts["code"], facts["dim"]
        read = faiss.read_index_binary if code == "binary" else faiss.read_index
        prefix_Nd = None
        try:
            codes = read(str(folder / CODES_FILE))
            if code in ("binary", "pq"):
                prefix_Nd = np.asarray(np.load(folder / PREFIX_FILE, mmap_mode="r", allow_pickle=False))
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"index: the codes in {folder} cannot be read ({reason}); run mmrl index again.") from None
        if (codes.d, codes.ntotal) != (dim, count) or (prefix_Nd is not None and prefix_Nd.shape != (count, dim)):
            raise InputError(
                f"index: {folder / CODES_FILE} holds {codes.ntotal} codes of {codes.d} numbers where {count} of {dim} "
                "belong; run mmrl index again."
            )
        if code == "binary":
            codes.use_heap = False  # counting by distance, which long shortlists want
        threshold_d = None if facts["threshold"] is None else np.array(facts["threshold"], np.float32)
        return cls(code, dim, codes, prefix_Nd, threshold_d)

    def first(self, query_QD: np.ndarray, n: int) -> np.ndarray:
        """The rows of the n best codes for each query, the best first: (Q, n), -1 where there are fewer."""
        query_Qd = prefix(query_QD, self.dim)
        if self.threshold_d is not None:
            return self.codes.search(np.packbits(query_Qd > self.threshold_d, axis=1), n)[1]
        return self.codes.search(_arranged(query_Qd, self.code), n)[1]

    def second(self, query_D: np.ndarray, rows_n: np.ndarray) -> np.ndarray:
        """These rows, the best by their int8 prefix first."""
        if self.prefix_Nd is None:
            return rows_n
        codes_nd = self.prefix_Nd[rows_n].astype(np.float32)
        scores_n = codes_nd @ prefix(query_D[None], self.dim)[0]
        scores_n /= np.sqrt(np.einsum("nd,nd->n", codes_nd, codes_nd)).clip(min=1e-12)
        return rows_n[np.argsort(-scores_n, kind="stable")]

    @property
    def resident_bytes(self) -> int:
        """What a search touches of every row, and so stays in memory."""
        return self.codes.ntotal * (self.codes.code_size + (self.dim if self.prefix_Nd is not None else 0))


def prefix(vectors_nD: np.ndarray, dim: int) -> np.ndarray:
    """The renormalised prefixes, as faiss wants them: float32 (n, d), contiguous."""
    return np.ascontiguousarray(cut(torch.from_numpy(np.array(vectors_nD[:, :dim])), dim).numpy())


def _arranged(rows_nd: np.ndarray, code: Code) -> np.ndarray:
    """The numbers in the order that the codes want.

    The product quantiser spends 4 bits on each two neighbours. The numbers of a nested embedding weigh less the later
    they stand, so it gets the first beside the last, the second beside the last but one …, and spends most of each 4
    bits on the one that counts: at equal size and speed a shortlist of 1,000 then has 99.7 % of the nearest where it
    had 97.7 % (tests/benchmarks/search.py).
    """
    if code != "pq":
        return rows_nd
    half = rows_nd.shape[1] // 2
    return np.stack([rows_nd[:, :half], rows_nd[:, : half - 1 : -1]], axis=2).reshape(len(rows_nd), -1)


def _prefixes(vectors_ND: np.ndarray, dim: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(vectors_ND), _ROWS_AT_A_TIME):
        yield start, prefix(vectors_ND[start : start + _ROWS_AT_A_TIME], dim)


def _empty(faiss: Any, code: Code, dim: int) -> Any:
    if code == "binary":
        return faiss.IndexBinaryFlat(dim)
    names = {"fp32": "Flat", "int8": "SQ8", "pq": f"PQ{dim // 2}x4fs"}
    return faiss.index_factory(dim, names[code], faiss.METRIC_INNER_PRODUCT)
