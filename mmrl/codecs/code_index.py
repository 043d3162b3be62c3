"""Exhaustive search over the codes of a gallery, by faiss: the first stage of an index, also used by evaluation.

sq8 is faiss's scalar quantiser: 256 steps between the extremes of each dim. pq is its product quantiser with 4 bits per
two components, whose lookup tables fit into a processor's registers. The two components are the first and the last, the
second and the second last, and so on: nested embeddings have less variance the later the dim, and this spends most of
each 4 bits on the component that counts. At equal size and speed a shortlist of 1,000 then has 99.7 % of the nearest,
where neighbouring components give 97.7 % (tests/benchmarks/search.py).

Shapes: N vectors, d their length, S training vectors, Q queries, n rows found.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.codecs.table import Code, encode
from mmrl.errors import InputError

CODES_FILE = "codes.faiss"
_TRAINING_VECTORS = 20_000  # per modality
_KIND_OF: dict[Code, bytes] = {"binary": b"IBxF", "fp32": b"IxFI", "sq8": b"IxSQ", "pq": b"IPfs"}
"""The first bytes of faiss's file."""


def faiss_module(purpose: str) -> Any:
    """The module faiss. Raises InputError: it is not installed."""
    try:
        import faiss
    except ImportError:
        raise InputError(
            f"{purpose} needs faiss, which is not installed; run pip install 'mmrl-clip[search]'."
        ) from None
    return faiss


def training_rows(count: int) -> np.ndarray:
    """The rows that train the codes, of `count` vectors of a modality: up to 20,000, ascending, always the same."""
    return np.sort(np.random.default_rng(0).permutation(count)[:_TRAINING_VECTORS])


@dataclass(frozen=True)
class CodeIndex:
    """The codes of N vectors of d dims."""

    code: Code
    index: Any
    threshold_d: np.ndarray | None = None
    """Of binary codes of earlier versions: a bit is set above this, the mean of the vectors, instead of above 0."""

    def __post_init__(self) -> None:
        if self.code == "binary":
            self.index.use_heap = False  # counts distances, which is faster for long shortlists

    @classmethod
    def build(cls, code: Code, dim: int, chunks: Iterable[np.ndarray], sample_Sd: np.ndarray) -> "CodeIndex":
        """Encodes unit vectors, given in chunks. `sample_Sd` trains sq8 and pq: unit vectors of both modalities, or
        text queries would be compared with codes that never saw a text. Raises InputError: faiss is not installed."""
        faiss = faiss_module("a compressed index")
        if code == "binary":
            index = faiss.IndexBinaryFlat(dim)
        else:
            names = {"fp32": "Flat", "sq8": "SQ8", "pq": f"PQ{dim // 2}x4fs"}
            index = faiss.index_factory(dim, names[code], faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_faiss_rows(sample_Sd, code))
        for rows_nd in chunks:
            index.add(_faiss_rows(rows_nd, code))
        return cls(code, index)

    @classmethod
    def open(cls, path: Path, code: Code, shape: tuple[int, int], threshold: list[float] | None = None) -> "CodeIndex":
        """Reads what `save` wrote; `shape` is the expected (N, d). Raises InputError: the file is missing, damaged or
        of another shape; faiss is not installed."""
        faiss = faiss_module(f"the index {path.parent.parent}")
        read = faiss.read_index_binary if code == "binary" else faiss.read_index
        try:
            with path.open("rb") as file:  # faiss has kinds that name other files
                if file.read(4) != _KIND_OF[code]:
                    raise OSError(f"it holds no {code} codes")
            index = read(str(path))
        except (RuntimeError, MemoryError, OSError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise InputError(f"index: the codes {path} cannot be read ({reason}); run mmrl index again.") from None
        if (index.ntotal, index.d) != shape:
            raise InputError(
                f"index: {path} has {index.ntotal} codes of {index.d} dims, and the manifest says {shape[0]} of "
                f"{shape[1]}; run mmrl index again."
            )
        return cls(code, index, None if threshold is None else np.array(threshold, np.float32))

    def save(self, path: Path) -> None:
        faiss = faiss_module("a compressed index")
        write = faiss.write_index_binary if self.code == "binary" else faiss.write_index
        write(self.index, str(path))

    def search(self, query_Qd: np.ndarray, n: int) -> np.ndarray:
        """The rows of the n best codes for each unit query, best first: (Q, n), -1 where there are fewer than n."""
        if self.threshold_d is not None:
            query_Qd = query_Qd - self.threshold_d
        rows_Qd = _faiss_rows(query_Qd, self.code)
        if self.code == "pq":  # one by one, since faiss rounds otherwise for a batch
            return np.concatenate([self.index.search(row_d[None], n)[1] for row_d in rows_Qd])
        return self.index.search(rows_Qd, n)[1]

    @property
    def resident_bytes(self) -> int:
        return self.index.ntotal * self.index.code_size


def _faiss_rows(rows_nd: np.ndarray, code: Code) -> np.ndarray:
    """Vectors or queries as the faiss index of a code takes them."""
    if code == "binary":
        return encode(rows_nd, "binary")
    return _fold(rows_nd) if code == "pq" else np.ascontiguousarray(rows_nd)


def _fold(rows_nd: np.ndarray) -> np.ndarray:
    """The components in the order first, last, second, second last, …"""
    half = rows_nd.shape[1] // 2
    return np.stack([rows_nd[:, :half], rows_nd[:, : half - 1 : -1]], axis=2).reshape(len(rows_nd), -1)
