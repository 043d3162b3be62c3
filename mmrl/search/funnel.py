"""The stages of a compressed search before the final ranking: shortlists from codes that stay in memory.

    codes.faiss    first stage: codes of the first d dims of each vector (mmrl/codecs/code_index.py)
    prefix.npy     second stage, after binary and pq codes: the same dims as int8, (N, d)

The first stage scans all N codes, the second reranks its shortlist, and the final stage (index.py) ranks what is left
by full vectors, the only ones read from disk. When the index is built, `calibrate.py` measures how long the shortlists
must be; with a fixed number of candidates there is no second stage.

Shapes: N images, D full dim, d the prefix, n a shortlist.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrl.codecs.code_index import CODES_FILE, CodeIndex
from mmrl.codecs.table import OLD_CODES, Code, encode
from mmrl.errors import InputError
from mmrl.nesting import truncate

PREFIX_FILE = "prefix.npy"
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Funnel:
    """The first two stages over the vectors of an index."""

    code: Code
    dim: int
    codes: CodeIndex
    prefix_Nd: np.ndarray | None
    """int8 codes of the second stage; None without one."""

    @classmethod
    def build(
        cls,
        folder: Path,
        vectors_ND: np.ndarray,
        code: Code,
        dim: int,
        sample_SD: np.ndarray,
        candidates: int | None = None,
    ) -> "Funnel":
        """Encodes all vectors and writes the files to `folder`.

        Args:
            sample_SD: vectors of both modalities that train the codes (see `CodeIndex.build`).
            candidates: a fixed length of the shortlist, which needs no second stage.
        """
        second = candidates is None and code in ("binary", "pq")
        prefix_Nd = None
        if second:
            shape = (len(vectors_ND), dim)
            prefix_Nd = np.lib.format.open_memmap(folder / PREFIX_FILE, mode="w+", dtype=np.int8, shape=shape)

        def chunks() -> Iterator[np.ndarray]:
            for start in range(0, len(vectors_ND), _CHUNK_ROWS):
                rows_nd = unit_prefix(vectors_ND[start : start + _CHUNK_ROWS], dim)
                if prefix_Nd is not None:
                    prefix_Nd[start : start + len(rows_nd)] = encode(rows_nd, "int8")
                yield rows_nd

        CodeIndex.build(code, dim, chunks(), unit_prefix(sample_SD, dim)).save(folder / CODES_FILE)
        if prefix_Nd is not None:
            prefix_Nd.flush()
        return cls.open(folder, {"code": code, "dim": dim, "second_stage": second}, len(vectors_ND))

    @classmethod
    def open(cls, folder: Path, facts: dict[str, Any], count: int) -> "Funnel":
        """Opens what `build` wrote; `facts` is `codes` of the manifest, `count` the rows of the index. Raises
        InputError: a file is missing, damaged or of another index."""
        name: Code = facts["code"]
        code, dim = OLD_CODES.get(name, name), facts["dim"]
        codes = CodeIndex.open(folder / CODES_FILE, code, (count, dim), facts.get("threshold"))
        if not facts.get("second_stage", code in ("binary", "pq")):
            return cls(code, dim, codes, None)
        prefix_Nd = memory_map(folder / PREFIX_FILE)
        if prefix_Nd.shape != (count, dim):
            raise InputError(
                f"index: {folder / PREFIX_FILE} has shape {prefix_Nd.shape} instead of {(count, dim)}; run mmrl index "
                "again."
            )
        return cls(code, dim, codes, prefix_Nd)

    def first(self, query_QD: np.ndarray, n: int) -> np.ndarray:
        """The rows of the n best codes for each query, best first: (Q, n), -1 where there are fewer."""
        return self.codes.search(unit_prefix(query_QD, self.dim), n)

    def second(self, query_D: np.ndarray, rows_n: np.ndarray) -> np.ndarray:
        """These rows ordered by the cosine of their int8 prefix, best first; unchanged without a second stage."""
        if self.prefix_Nd is None:
            return rows_n
        codes_nd = self.prefix_Nd[rows_n].astype(np.float32)
        scores_n = codes_nd @ unit_prefix(query_D[None], self.dim)[0]
        scores_n /= np.sqrt(np.einsum("nd,nd->n", codes_nd, codes_nd)).clip(min=1e-12)
        return rows_n[np.argsort(-scores_n, kind="stable")]

    @property
    def resident_bytes(self) -> int:
        """Memory of what a search touches of every row."""
        return self.codes.resident_bytes + (0 if self.prefix_Nd is None else self.prefix_Nd.nbytes)


def memory_map(path: Path) -> np.ndarray:
    """A .npy file of an index, memory-mapped. Raises InputError: it is missing or damaged."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))  # indexing an np.memmap is slow
    except Exception as error:  # of a damaged header, numpy raises many kinds
        reason = " ".join(str(error).split())
        raise InputError(f"index: {path} cannot be read ({reason}); run mmrl index again.") from None


def unit_prefix(vectors_nD: np.ndarray, dim: int) -> np.ndarray:
    """The renormalised prefixes as faiss takes them: float32 (n, d), contiguous."""
    return np.ascontiguousarray(truncate(torch.from_numpy(np.array(vectors_nD[:, :dim])), dim).numpy())
