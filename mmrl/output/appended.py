"""The logs of a run: files of JSON objects with a step, one per line, that survive a full disk and damaged lines."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmrl.output.files import parse_json, write_atomic


class AppendedLines:
    """A file of JSON objects, one per line. Lines that cannot be written, because the disk is full, are kept in memory
    and written with the next ones. `report` prints a line."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        self._pending: list[bytes] = []
        self._failed = False

    def close(self) -> None:
        """Tries to write what could not be written before, and reports what is lost."""
        self.append()
        if self._pending:
            self._report(f"{len(self._pending):,} lines of {self._path} are lost: the disk is still full.")

    def append(self, *records: Mapping[str, Any]) -> None:
        """Writes these objects, and those that could not be written before."""
        self._pending += [json.dumps(record).encode() + b"\n" for record in records]
        if not self._pending:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                end, data = file.tell(), b"".join(self._pending)
                try:
                    if (written := file.write(data)) < len(data):
                        raise OSError(f"{written} of {len(data)} bytes written")
                except OSError:
                    file.truncate(end)  # no part of a line remains
                    raise
        except OSError as error:
            if not self._failed:
                self._report(f"{self._path} cannot be written ({error}); its lines are kept until it can.")
            self._failed = True
        else:
            if self._failed:
                self._report(f"{self._path} is written again, with all lines.")
            self._pending, self._failed = [], False


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a log, and the numbers of its damaged lines, from 1. No file: none."""
    records, damaged = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not an object with a step")
            records.append(record)
        except ValueError:
            damaged.append(number)
    return records, damaged


def drop_later_steps(path: Path, step: int, report: Callable[[str], None]) -> None:
    """Removes from a log what is later than a step (all, of step 0), and damaged lines, which it reports."""
    records, damaged = read_records(path)
    kept = [record for record in records if 0 < step >= record["step"]]
    if damaged:
        report(f"{path}: {_numbers(damaged)} damaged and left out.")
    if damaged or len(kept) < len(records):
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))


def _numbers(lines: Iterable[int]) -> str:
    first, *rest = lines
    return f"line {first} is" if not rest else f"line {first} and {len(rest):,} more lines are"
