"""Unit vectors at smaller precisions, as embeddings.parquet and the codes of an index hold them.

Only the direction is kept: compare int8 vectors by cosine, never by bare products, and binary ones by Hamming distance.

Shapes: N vectors, d their length.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

Precision = Literal["fp32", "fp16", "int8", "binary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "binary": 1}
_TYPES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "binary": np.uint8}


def quantised(vectors_Nd: np.ndarray, precision: Precision) -> np.ndarray:
    """float32 (N, d) -> the same at `precision`: (N, d), or (N, ⌈d/8⌉) bytes for binary.

    int8: each vector times what makes its largest number ±127, rounded. A common factor would leave a 512-d unit vector
    some five levels a number. binary: one bit a number, set where it is above 0, the first in the highest bit.
    """
    if precision == "int8":
        largest_N1 = np.abs(vectors_Nd).max(axis=1, keepdims=True).clip(min=1e-30)
        return np.rint(vectors_Nd * (127 / largest_N1)).astype(np.int8)
    if precision == "binary":
        return np.packbits(vectors_Nd > 0, axis=1)
    return vectors_Nd.astype(_TYPES[precision])


def bytes_of(dim: int, precision: Precision) -> int:
    """What one vector takes."""
    return -(-dim * _BITS[precision] // 8)


@dataclass(frozen=True)
class Column:
    """One column of vectors."""

    name: str
    dim: int
    precision: Precision

    @property
    def width(self) -> int:
        """Its numbers a row; bytes for binary."""
        return -(-self.dim // 8) if self.precision == "binary" else self.dim

    @property
    def dtype(self) -> type[np.generic]:
        """Of its numbers."""
        return _TYPES[self.precision]

    def to_json(self) -> dict[str, Any]:
        """For the file's metadata."""
        return asdict(self)


def columns_of(dims: list[int], precisions: list[Precision]) -> list[Column]:
    """A column for each dim at each precision, the widest first: `embedding`, then such as `embedding_64_int8`."""
    pairs: list[tuple[int, Precision]] = [
        (dim, precision) for dim in sorted(dims, reverse=True) for precision in precisions
    ]
    return [
        Column(f"embedding_{dim}_{precision}" if place else "embedding", dim, precision)
        for place, (dim, precision) in enumerate(pairs)
    ]
