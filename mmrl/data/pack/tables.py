"""Reads the rows of a CSV, TSV, JSON Lines or Parquet table, one at a time, as plain values.

No cell is evaluated, and no file that a cell names is opened here.
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
    """From 1; the header is not counted."""
    values: dict[str, Any]
    """Column -> str, or the JSON or Parquet value; None if the cell is missing."""
    broken: str = ""
    """Why the row cannot be used: it is not a JSON object, or has more cells than there are columns. Else empty."""


class Table:
    """A table, read through once when it is opened: a broken file is an error before any image is packed."""

    def __init__(self, path: Path) -> None:
        """Finds the columns and counts the rows.

        Raises:
            InputError: the file does not exist, has none of the extensions KINDS, is malformed, or has no rows.
        """
        if path.suffix.lower() not in KINDS:
            raise InputError(f"source: {path} is not a supported table; give {', '.join(KINDS)} or a folder.")
        self.path = path
        self.columns: list[str] = []
        self.count = 0
        if path.suffix.lower() == ".parquet":
            with _open_parquet(path) as file:
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
        """All rows in order; from a Parquet file only these columns are read.

        Raises:
            InputError: the file cannot be read, or is malformed.
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
            # Strict: the lenient reader would merge lines after a caption that starts with a stray quote.
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
                    f"source: {self.path} line {reader.line_num}: {error}; enclose texts with a quote or the "
                    'separator in quotes, and double each quote in them ("").'
                ) from None

    def _json_rows(self) -> Iterator[Row]:
        with self.path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate((line for line in file if line.strip()), start=1):
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield Row(number, {}, f"not JSON ({error})")
                    continue
                yield Row(number, values) if isinstance(values, dict) else Row(number, {}, "not a JSON object")

    def _parquet_rows(self, columns: list[str] | None) -> Iterator[Row]:
        number = 0
        with _open_parquet(self.path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)


def _open_parquet(path: Path) -> Any:
    pyarrow, parquet = arrow(f"reading {path}")
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"source: {path} is not a readable Parquet file ({error}).") from None


def arrow(purpose: str) -> tuple[Any, Any]:
    """Imports pyarrow and pyarrow.parquet.

    Args:
        purpose: starts the error message, e.g. "reading a.parquet".

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{purpose} needs pyarrow, which is not installed; run pip install 'mmrl-clip[search]'."
        ) from None
    return pyarrow, pyarrow.parquet
