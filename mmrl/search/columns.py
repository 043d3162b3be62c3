"""The columns of vectors that `mmrl embed` writes: one per dim and precision."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmrl.codecs.table import CODECS, Precision


@dataclass(frozen=True)
class Column:
    """One column of vectors."""

    name: str
    dim: int
    precision: Precision

    @property
    def width(self) -> int:
        """Elements per row: dims, or bytes for binary."""
        return CODECS["binary"].bytes(self.dim) if self.precision == "binary" else self.dim

    @property
    def dtype(self) -> type[np.generic]:
        """Element type."""
        dtype = CODECS[self.precision].dtype
        assert dtype is not None
        return dtype

    def to_json(self) -> dict[str, Any]:
        """Its entry in the file's metadata."""
        return asdict(self)


def columns_of(dims: list[int], precisions: list[Precision]) -> list[Column]:
    """A column for each dim at each precision, widest first: `embedding`, then e.g. `embedding_64_int8`."""
    pairs: list[tuple[int, Precision]] = [
        (dim, precision) for dim in sorted(dims, reverse=True) for precision in precisions
    ]
    return [
        Column(f"embedding_{dim}_{precision}" if position else "embedding", dim, precision)
        for position, (dim, precision) in enumerate(pairs)
    ]
