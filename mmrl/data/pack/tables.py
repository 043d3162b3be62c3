"""Reads the rows of a CSV, TSV, JSON Lines or Parquet table, one at a time, as plain values.

No cell is evaluated, and no file that a cell names is opened here. A row that cannot be read is one broken row; the
rows around it are read.
"""

import csv
import glob
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmrl.data.arrow import arrow
from mmrl.data.index import printable
from mmrl.data.shards import files_below
from mmrl.data.texts import strip_blank
from mmrl.errors import InputError
from mmrl.images.decode import image_extensions
from mmrl.output.files import parse_json

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (*_SEPARATORS, ".jsonl", ".parquet")
_ROWS_AT_A_TIME, _IMAGES_AT_A_TIME = 1024, 32
_HEAD = 4096
# How names of files, or of their folders, begin that hold a split of a data set.
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev)[-_.]", re.IGNORECASE)
# First bytes of files that are no text -> what to do with them.
_NOT_TEXT = {
    b"PK\x03\x04": "a spreadsheet or a zip file; save it as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "an Excel file; save it as CSV (UTF-8)",
    b"\x1f\x8b": "compressed; decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed; decompress it first",
    b"BZh": "compressed; decompress it first",
    b"PAR1": "a Parquet file; name it .parquet",
}
csv.field_size_limit(2**31 - 1)  # cells of any size; the default limit is 128 KiB


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    number: int
    """From 1; the header is not counted."""
    values: dict[str, Any]
    """Column -> str, or the JSON or Parquet value; None if the cell is missing."""
    broken: str = ""
    """Why the row cannot be used: it is not a JSON object, or has more cells than there are columns. Else empty."""
    file: Path = Path()
    """The file that the row is in; paths in it are relative to its folder."""


class Table:
    """A table in one file or in several Parquet files, read through once when it is opened: a broken file is an error
    before any image is packed."""

    def __init__(self, path: Path, files: Sequence[Path] = ()) -> None:
        """Finds the columns and counts the rows.

        Args:
            files: the files of the table if they are several.

        Raises:
            InputError: the file does not exist, has none of the extensions KINDS, is malformed, or has no rows.
        """
        self.path, self.files = path, list(files) or [path]
        self._kind = self.files[0].suffix.lower()
        if self._kind not in KINDS:
            raise InputError(f"source: {path} is not a supported table; give {', '.join(KINDS)} or a folder.")
        self.columns: list[str] = []
        """Column names; a name that several columns have occurs several times."""
        self.count = 0
        if self._kind == ".parquet":
            for one in self.files:
                with _open_parquet(one) as file:
                    self.columns = self.columns or file.schema_arrow.names
                    if missing := set(self.columns) - set(file.schema_arrow.names):
                        raise InputError(f"source: {one} lacks the column {min(missing)!r} of {self.files[0]}.")
                    self.count += file.metadata.num_rows
        else:
            seen: dict[str, None] = {}
            for row in self.rows():
                seen.update(dict.fromkeys(row.values))
                self.count += 1
            self.columns = self.columns or list(seen)
        if not self.count:
            raise InputError(f"source: {path} has no rows.")

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed pack recognises its source."""
        status = [file.stat() for file in self.files]
        return {
            "size of the table": sum(one.st_size for one in status),
            "time of the table": max(one.st_mtime_ns for one in status),
        }

    def rows(self, columns: list[str] | None = None) -> Iterator[Row]:
        """All rows in order; from a Parquet file only these columns are read.

        Raises:
            InputError: the file cannot be read, or is malformed.
        """
        try:
            if self._kind == ".parquet":
                yield from self._parquet_rows(columns)
            elif self._kind == ".jsonl":
                yield from self._json_rows()
            else:
                yield from self._separated_rows()
        except UnicodeDecodeError:
            raise InputError(f"source: {self.path} is not UTF-8 text; save it as UTF-8.") from None
        except OSError as error:
            raise InputError(f"source: {self.path} cannot be read ({error.strerror or error}).") from None

    def _separated_rows(self) -> Iterator[Row]:
        default = _SEPARATORS[self._kind]
        with _open_text(self.path) as file:
            skipped, first = 0, file.readline()
            if stated := re.fullmatch(r'"?sep=(.)"?\s*', first):  # Excel's own line before the header
                skipped, default, first = 1, stated[1], file.readline()
            while first and not strip_blank(first):
                skipped, first = skipped + 1, file.readline()
            unquoted = re.sub(r'"[^"]*"', "", first)
            # Excel writes semicolons where the comma is the decimal mark.
            separator = max((default, *",;\t|"), key=unquoted.count)
            records = (
                (cells, broken) for cells, broken in _records(file, first, separator, skipped) if cells or broken
            )
            header, broken = next(records, ([], ""))
            if broken:
                raise InputError(f"source: the header of {self.path} cannot be read: {broken}.")
            self.columns = header = [printable(strip_blank(name)) for name in header]
            for number, (cells, broken) in enumerate(records, start=1):
                while len(cells) > len(header) and not cells[-1].strip():  # a spreadsheet fills up its rows
                    cells.pop()
                values = dict(zip(header, cells, strict=False))
                if not broken and len(cells) > len(header):
                    broken = f"{len(cells)} cells for {len(header)} columns"
                yield Row(number, values if broken else {**dict.fromkeys(header), **values}, broken, self.path)

    def _json_rows(self) -> Iterator[Row]:
        number = 0
        with _open_text(self.path) as file:
            for line in filter(strip_blank, file):
                try:
                    values = parse_json(strip_blank(line))
                except ValueError as error:
                    values = f"not JSON ({error})"
                # An array of objects is what pandas writes without lines=True.
                is_array = isinstance(values, list) and values and all(isinstance(one, dict) for one in values)
                for one in values if is_array else [values]:
                    number += 1
                    if isinstance(one, dict):
                        yield Row(number, one, "", self.path)
                    else:
                        yield Row(number, {}, one if isinstance(one, str) else "not a JSON object", self.path)

    def _parquet_rows(self, columns: list[str] | None) -> Iterator[Row]:
        number = 0
        for path in self.files:
            with _open_parquet(path) as file:
                wanted = [field for field in file.schema_arrow if columns is None or field.name in columns]
                is_text = not any("binary" in str(field.type) for field in wanted)
                size = _ROWS_AT_A_TIME if is_text else _IMAGES_AT_A_TIME
                for batch in _read_batches(path, file, size, columns):
                    for values in _plain_rows(batch):
                        number += 1
                        broken = values if isinstance(values, str) else ""
                        yield Row(number, {} if isinstance(values, str) else values, broken, path)


def parquet_files(source: Path) -> list[Path]:
    """The Parquet files of a pattern, or of a folder without images; empty if it is something else.

    Raises:
        InputError: their names are those of several splits of a data set.
    """
    if source.is_dir():
        files = [path for path in files_below(source) if path.suffix.lower() == ".parquet"]
        if files and any(path.suffix[1:].lower() in image_extensions() for path in files_below(source)):
            return []
    elif source.exists() or not glob.has_magic(str(source)):
        return []
    else:
        files = [Path(name) for name in sorted(glob.glob(str(source))) if name.lower().endswith(".parquet")]  # noqa: PTH207
    splits: dict[str, Path] = {}
    for path in files:
        if found := _SPLIT.match(path.name) or _SPLIT.match(f"{path.parent.name}-"):
            splits.setdefault(found[1].lower(), path)
    if len(splits) > 1:
        raise InputError(
            f"source: {source} holds the splits {', '.join(splits)}; give the files of one, e.g. "
            f"'{next(iter(splits.values())).parent}/{next(iter(splits))}*.parquet'."
        )
    return files


def _open_text(path: Path) -> IO[str]:
    """The open text file, its lines with their ends. A byte that is not UTF-8 becomes one of \\udc80 … \\udcff, so that
    it spoils its own row alone.

    Raises:
        InputError: the file is no text.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for magic, meaning in _NOT_TEXT.items():
        if head.startswith(magic):
            raise InputError(f"source: {path} is no text table but {meaning}.")
    encoding = "utf-8-sig"
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "utf-32"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in head[:2]:  # Latin letters of UTF-16 without a byte order mark
        encoding = "utf-16-be" if head[0] == 0 else "utf-16-le"
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    # Where lines end in a line feed, a carriage return alone is a part of a cell: pandas does not quote it.
    end = re.search(r"\r*\n|\r", head.decode(encoding, "replace"))
    return path.open(newline="\n" if end and end[0][-1] == "\n" else "", encoding=encoding, errors=errors)


def _records(file: IO[str], first: str, separator: str, line_number: int) -> Iterator[tuple[list[str], str]]:
    """The cells of each record and "", or [] and what is wrong with it. A broken record ends with its first line: a
    stray quote costs one row, not those after it. `first` is the first line, read already, after `line_number` others.
    """
    unread, taken = deque([first]), list[str]()

    def lines() -> Iterator[str]:
        while line := unread.popleft() if unread else file.readline():
            taken.append(line)
            yield re.sub(r"\r(?=[^\r\n])", " ", line)

    while True:
        # Strict: the lenient reader would merge lines after a caption that starts with a stray quote.
        reader = csv.reader(lines(), delimiter=separator, strict=True)
        try:
            for cells in reader:
                yield cells, ""
                line_number += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            line_number += 1
            remedy = "enclose texts with a quote or the separator in quotes, and double each quote in them"
            yield [], f'line {line_number}: {error}; {remedy} ("")'
            unread.extendleft(reversed(taken[1:]))
            taken.clear()


def _plain_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a record batch; a sentence in place of one that has no Python value, e.g. a text not UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # ArrowInvalid is one of them
        pass
    for row in range(len(batch)):
        try:
            yield batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield "a text is not UTF-8"
        except (ValueError, OverflowError) as error:
            yield f"a cell cannot be read ({error})"


def _read_batches(path: Path, file: Any, size: int, columns: list[str] | None) -> Iterator[Any]:
    pyarrow, _ = arrow(f"reading {path}")
    try:
        yield from file.iter_batches(batch_size=size, columns=columns)
    except pyarrow.ArrowException as error:
        raise InputError(f"source: {path} is damaged ({error}); copy it again.") from None


def _open_parquet(path: Path) -> Any:
    pyarrow, parquet = arrow(f"reading {path}")
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"source: {path} is not a readable Parquet file ({error}).") from None
