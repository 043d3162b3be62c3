"""The metadata of an index's images: a memory-mapped Arrow file, so that reading a row takes microseconds and no RAM.

Shapes: N rows.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.data.pack.tables import arrow
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
            reader = ipc.open_file(pyarrow.memory_map(str(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"index: {path} cannot be read ({error}); run mmrl index again.") from None
        self.schema = reader.schema
        self._batches = batches  # views of the mapped file
        self._ends = np.cumsum([len(batch) for batch in batches])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Item:
        i = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[i]
        return Item(**batch.slice(row - int(self._ends[i]) + len(batch), 1).to_pylist()[0])

    def take(self, rows: Iterable[int]) -> list[Item]:
        """The items of these rows, in the order given."""
        return [self[int(row)] for row in rows]

    def batches(self) -> Iterator[tuple[int, Any]]:
        """All record batches, each with the row at which it starts."""
        for end, batch in zip(self._ends, self._batches, strict=True):
            yield int(end) - len(batch), batch

    @cached_property
    def groups_N(self) -> np.ndarray:
        """Group ids, int64 (N,); -1 for no group."""
        return np.concatenate([batch.column("group").to_numpy() for batch in self._batches])

    @cached_property
    def named_groups(self) -> list[tuple[str, int]]:
        """The name and number of images of each group, largest first, then by name."""
        groups, rows, counts = np.unique(self.groups_N, return_index=True, return_counts=True)
        named = [
            (self[int(row)].group_name or "", int(count))
            for group, row, count in zip(groups, rows, counts, strict=True)
            if group >= 0
        ]
        return sorted(named, key=lambda group: (-group[1], group[0]))

    def rows_of(self, keys: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """The rows whose key is one of `keys`, and the keys that no row has."""
        pyarrow, _ = arrow(_PURPOSE)
        compute: Any = import_module("pyarrow.compute")  # as Any: its functions are generated at import time
        wanted, rows, seen = pyarrow.array(list(keys), pyarrow.string()), [], set()
        for start, batch in self.batches():
            matches = compute.is_in(batch.column("key"), value_set=wanted).to_numpy(zero_copy_only=False)
            rows.append(start + np.flatnonzero(matches))
            seen.update(batch.column("key").filter(pyarrow.array(matches)).to_pylist())
        return np.concatenate(rows), [key for key in keys if key not in seen]


@contextmanager
def item_writer(path: Path, schema: Any) -> Iterator[Any]:
    """A writer of record batches with the columns COLUMNS."""
    pyarrow, _ = arrow("mmrl index")
    from pyarrow import ipc

    with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_file(sink, schema) as writer:
        yield writer
