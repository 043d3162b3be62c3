"""Atomic writes: a reader finds the old file or the new one, never a part of it."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrl.errors import InputError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file, or replaces it, in one step. Its folder is created.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    with atomic_path(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, for a file or a folder. At the end it is renamed to `path`; after an
    error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random: processes on several hosts, which may have the same id, can write to one shared folder.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def check_new_folder(out: Path) -> None:
    """Raises InputError unless `out` is a folder that does not exist yet or is empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out: {out} exists and is not an empty folder; choose another or delete it.")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
