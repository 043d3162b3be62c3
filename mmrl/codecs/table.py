"""The codecs of stored embeddings: bytes, encoding, decoding, and the commands that build them.

    codec     bytes per vector    built by                             compared by
    fp32      4 d                 embed --precision, index --code      inner product
    fp16      2 d                 embed --precision                    cosine
    int8      d                   embed --precision                    cosine
    sq8       d                   index --code                         inner product with the decoded vector, by faiss
    binary    ⌈d / 8⌉             embed --precision, index --code      Hamming distance; the query is binary, too
    pq        d / 4               index --code                         inner product with the decoded vector, by faiss

All encode the renormalised prefix of length d; rounding changes its length, hence the cosine. int8 scales each vector
such that its largest component is ±127: one common factor would leave a 512-d unit vector about five levels per
component. binary sets a bit where a component is above 0, the first dim in the highest bit of a byte. sq8 and pq are
described in `code_index.py`; they are trained on the vectors, so single columns of embeddings cannot have them.

Shapes: N vectors, d their length.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Precision = Literal["fp32", "fp16", "int8", "binary"]
Code = Literal["fp32", "sq8", "binary", "pq"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""Codecs of `mmrl embed --precision`."""
CODES: tuple[Code, ...] = get_args(Code)
"""Codecs of `mmrl index --code`."""
OLD_CODES: dict[str, Code] = {"int8": "sq8"}
"""Earlier names of codes."""


@dataclass(frozen=True)
class Codec:
    """One way to store a vector."""

    name: str
    bits_per_dim: int
    dtype: type[np.generic] | None = None
    """Element type of what `encode` returns; None for sq8 and pq."""
    dim_multiple: int = 1
    """An index packs this many components together: its dim must be a multiple."""

    def bytes(self, dim: int) -> int:
        """Bytes per vector, without what all vectors share: ranges and codebooks."""
        return -(-dim * self.bits_per_dim // 8)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("fp32", 32, np.float32),
        Codec("fp16", 16, np.float16),
        Codec("int8", 8, np.int8),
        Codec("sq8", 8),
        Codec("binary", 1, np.uint8, dim_multiple=8),
        Codec("pq", 2, dim_multiple=2),
    )
}


def encode(vectors_Nd: np.ndarray, precision: Precision) -> np.ndarray:
    """Unit vectors, float32 (N, d) -> (N, d) of the codec's dtype; binary: uint8 (N, ⌈d/8⌉)."""
    if precision == "int8":
        largest_N1 = np.abs(vectors_Nd).max(axis=1, keepdims=True).clip(min=1e-30)
        return np.rint(vectors_Nd * (127 / largest_N1)).astype(np.int8)
    if precision == "binary":
        return np.packbits(vectors_Nd > 0, axis=1)
    return vectors_Nd.astype(CODECS[precision].dtype)


def decode(codes_Nd: np.ndarray, precision: Precision, dim: int) -> np.ndarray:
    """What `encode` returned -> float32 (N, dim), whose inner product with a query ranks as the codec does.

    fp16, int8: unit vectors. binary: ±1, also for the query; the inner product of two is d - 2 · Hamming distance.
    """
    if precision == "binary":
        return np.unpackbits(codes_Nd, axis=1, count=dim).astype(np.float32) * 2 - 1
    rows_Nd = codes_Nd.astype(np.float32)
    return rows_Nd if precision == "fp32" else rows_Nd / np.linalg.norm(rows_Nd, axis=1, keepdims=True).clip(min=1e-12)


def build_commands(full_dim: int, dim: int, codec: str, candidates: int = 0, option: str = "") -> list[str]:
    """The commands that store `dim`-d vectors by a codec.

    Args:
        candidates: build the index that ranks this many candidates by vectors of `full_dim`.
        option: of mmrl embed, where the vectors searched are not those of the images: --texts or --second.
    """
    option = f" {option}" if option else ""
    if candidates:
        return [
            f"mmrl embed MODEL SHARDS EMBEDDINGS --dim {full_dim}{option}",
            f"mmrl index EMBEDDINGS INDEX --code {codec} --dim {dim} --candidates {candidates}",
        ]
    return [f"mmrl embed MODEL SHARDS EMBEDDINGS --dim {dim} --precision {codec}{option}"]
