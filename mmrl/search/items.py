"""What an index keeps of its pictures besides their vectors: an Arrow file, mapped into memory, so that a row costs
microseconds wherever it lies and nothing is held.

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
    """What an index keeps of a picture."""

    key: str
    captions: list[str]
    group: int
    group_name: str | None
    thumbnail: bytes

    @property
    def caption(self) -> str:
        """The first, or nothing."""
        return self.captions[0] if self.captions else ""


class Items:
    """The items of an index, by row."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where there is no such file."""
        pyarrow, _ = arrow(_PURPOSE)
        from pyarrow import ipc

        try:
            reader = ipc.open_file(pyarrow.memory_map(str(path)))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"index: {path} cannot be read ({error}); run mmrl index again.") from None
        self.schema = reader.schema
        self._batches = batches  # views of the mapped file
        self._ends = np.cumsum([len(batch) for batch in batches])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, row: int) -> Item:
        number = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[number]
        return Item(**batch.slice(row - int(self._ends[number]) + len(batch), 1).to_pylist()[0])

    def take(self, rows: Iterable[int]) -> list[Item]:
        """These rows, in their order."""
        return [self[int(row)] for row in rows]

    def batches(self) -> Iterator[tuple[int, Any]]:
        """All of them: the first row of each record batch, and the batch."""
        yield from zip((int(end) - len(batch) for end, batch in zip(self._ends, self._batches, strict=True)),
                       self._batches, strict=True)  # fmt: skip

    @cached_property
    def groups_N(self) -> np.ndarray:
        """int64 (N,); -1 is none."""
        return np.concatenate([batch.column("group").to_numpy() for batch in self._batches])

    @cached_property
    def named_groups(self) -> list[tuple[str, int]]:
        """Each group's name and how many pictures are of it, the largest first."""
        groups, rows, counts = np.unique(self.groups_N, return_index=True, return_counts=True)
        found = [(self[int(row)].group_name or "", int(count)) for group, row, count in
                 zip(groups, rows, counts, strict=True) if group >= 0]  # fmt: skip
        return sorted(found, key=lambda one: (-one[1], one[0]))

    def rows_of(self, keys: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """The rows of all pictures that have one of these keys, and the keys that none has."""
        pyarrow, _ = arrow(_PURPOSE)
        compute: Any = import_module("pyarrow.compute")  # its names are made at run time
        wanted, rows, seen = pyarrow.array(list(keys), pyarrow.string()), [], set()
        for start, batch in self.batches():
            found = compute.is_in(batch.column("key"), value_set=wanted).to_numpy(zero_copy_only=False)
            rows.append(start + np.flatnonzero(found))
            seen.update(batch.column("key").filter(pyarrow.array(found)).to_pylist())
        return np.concatenate(rows), [key for key in keys if key not in seen]


@contextmanager
def writing(path: Path, schema: Any) -> Iterator[Any]:
    """A writer of record batches of `schema`, the fields of COLUMNS."""
    pyarrow, _ = arrow("mmrl index")
    from pyarrow import ipc

    with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_file(sink, schema) as writer:
        yield writer
