"""A user's table -> its rows as plain values, one at a time: CSV, TSV, JSON Lines, Parquet.

The only door to pyarrow. A table is only read: no cell is run, evaluated or opened here.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrl.errors import InputError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (*_SEPARATORS, ".jsonl", ".parquet")
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    number: int
    """From 1, without the header."""
    values: dict[str, Any]
    """Column -> str, or what JSON or Parquet hold there; None where the cell is missing."""
    broken: str = ""
    """Why the row cannot be used, where it cannot: it is no JSON object, it has more cells than there are columns."""


class Table:
    """A table that was read through once, so that a broken file is known before long work starts."""

    def __init__(self, path: Path) -> None:
        """Finds the columns and counts the rows.

        Raises:
            InputError: no such file, not one of KINDS, not readable as what its name says, no header, no rows.
        """
        if path.suffix.lower() not in KINDS:
            raise InputError(f"source: {path} is no table that can be read; give {', '.join(KINDS)} or a folder.")
        self.path = path
        self.columns: list[str] = []
        self.count = 0
        if path.suffix.lower() == ".parquet":
            with _opened_parquet(path) as file:
                self.columns, self.count = file.schema_arrow.names, file.metadata.num_rows
        else:
            seen: dict[str, None] = {}
            for row in self.rows():
                seen.update(dict.fromkeys(row.values))
                self.count += 1
            self.columns = list(seen)
        if not self.count:
            raise InputError(f"source: {path} has no rows.")

    def rows(self, columns: list[str] | None = None) -> Iterator[Row]:
        """All rows in order; of a Parquet file these columns alone.

        Raises:
            InputError: the file is not readable as what its name says.
        """
        kind = self.path.suffix.lower()
        try:
            if kind == ".parquet":
                yield from self._parquet_rows(columns)
            elif kind == ".jsonl":
                yield from self._json_rows()
            else:
                yield from self._separated_rows(_SEPARATORS[kind])
        except UnicodeDecodeError:
            raise InputError(f"source: {self.path} is not UTF-8 text; save it as UTF-8.") from None
        except OSError as error:
            raise InputError(f"source: {self.path} cannot be read ({error.strerror or error}).") from None

    def _separated_rows(self, separator: str) -> Iterator[Row]:
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            # Strict, since the lenient reader takes a caption that opens with a stray quote for many lines of text.
            reader = csv.reader(file, delimiter=separator, strict=True)
            try:
                header = next(reader, [])
                for number, cells in enumerate((cells for cells in reader if cells), start=1):
                    values = dict(zip(header, cells, strict=False))
                    if len(cells) > len(header):
                        yield Row(number, values, f"{len(cells)} cells for {len(header)} columns")
                    else:
                        yield Row(number, {**dict.fromkeys(header), **values})
            except csv.Error as error:
                raise InputError(
                    f"source: {self.path} line {reader.line_num}: {error}; put texts that hold a quote or the "
                    'separator in quotes, and write each quote in them as "".'
                ) from None

    def _json_rows(self) -> Iterator[Row]:
        with self.path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate((line for line in file if line.strip()), start=1):
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Row(number, {}, f"not JSON ({error})")
                    continue
                yield Row(number, values) if isinstance(values, dict) else Row(number, {}, "no JSON object")

    def _parquet_rows(self, columns: list[str] | None) -> Iterator[Row]:
        number = 0
        with _opened_parquet(self.path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)


def _opened_parquet(path: Path) -> Any:
    pyarrow, parquet = arrow(f"reading {path}")
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"source: {path} is not a readable Parquet file ({error}).") from None


def arrow(purpose: str) -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        InputError: they are not installed; it says what for (`purpose`, such as "reading a.parquet") and the remedy.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{purpose} needs pyarrow, which is not installed; run pip install 'mmrl-clip[search]'."
        ) from None
    return pyarrow, pyarrow.parquet
