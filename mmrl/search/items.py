"""The metadata of an index's images: a memory-mapped Arrow file, so that reading a row takes microseconds and no RAM.

Shapes: N rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.data.arrow import arrow
from mmrl.errors import InputError

COLUMNS = ["key", "captions", "group", "group_name", "thumbnail"]
_PURPOSE = "reading an index"


@dataclass(frozen=True)
class Item:
    """The metadata of one image."""

    key: str
    captions: list[str]
    group: int
    group_name: str | None
    thumbnail: bytes

    @property
    def caption(self) -> str:
        """The first caption, or an empty string."""
        return self.captions[0] if self.captions else ""


class Items:
    """The items of an index, by row."""

    def __init__(self, path: Path) -> None:
        """Raises InputError if the file is missing or damaged."""
        pyarrow, _ = arrow(_PURPOSE)
        from pyarrow import ipc

        try:
            self.table = ipc.open_file(pyarrow.memory_map(str(path))).read_all()  # views of the mapped file
            self.table.validate(full=True)
            if missing := [name for name in COLUMNS if name not in self.table.column_names]:
                raise OSError(f"it lacks {missing[0]}")
        except (OSError, pyarrow.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"index: {path} cannot be read ({reason}); run mmrl index again.") from None

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Item:
        return Item(**self.table.select(COLUMNS).slice(row, 1).to_pylist()[0])

    def take(self, rows: Iterable[int]) -> list[Item]:
        """The items of these rows, in the order given."""
        return [self[int(row)] for row in rows]

    @cached_property
    def groups_N(self) -> np.ndarray:
        """Group ids, int64 (N,); -1 for no group."""
        return self.table["group"].to_numpy()

    def rows_of(self, keys: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """The rows whose key is one of `keys`, and the keys that no row has."""
        pyarrow, _ = arrow(_PURPOSE)
        compute: Any = import_module("pyarrow.compute")  # as Any: its functions are generated at import time
        is_wanted = compute.is_in(self.table["key"], value_set=pyarrow.array(list(keys), pyarrow.string()))
        found = set(self.table["key"].filter(is_wanted).to_pylist())
        return np.flatnonzero(is_wanted.to_numpy()), [key for key in keys if key not in found]
