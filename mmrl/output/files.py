"""Atomic writes: a reader finds the old file or the new one, never a part of it."""

import secrets
import shutil
from collections.abc import Collection, Iterator
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
    """Yields a temporary path in the same folder, for a file or a folder. At the end it replaces `path`; after an error
    it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random: processes on several hosts, which may have the same id, can write to one shared folder.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if partial.is_dir() and path.is_dir():  # a folder that is not empty cannot be renamed over
            old = path.rename(partial.with_suffix(".old.partial"))
            partial.rename(path)
            _remove(old)
        else:
            partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def check_out_folder(
    out: Path, own: Collection[str] = (), difference: str | None = None, *, force: bool = False
) -> None:
    """Checks the output folder of a command, by one rule: it is new or empty, or holds only files that the command
    writes; work with other settings in it is replaced with --force only.

    Args:
        own: names of the files and folders that the command writes.
        difference: the work in `out` and how it differs, such as "an index whose dim was 8, not 16"; None if it is the
            same.

    Raises:
        InputError: it is a file, holds other files, or holds work with other settings and `force` is not given.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"out: the folder {out} cannot be created (a file has this name); choose another.")
    # A killed process may have left the temporary files of an atomic write.
    found = out.iterdir() if out.exists() else ()
    names = {path.name for path in found if not (path.name.startswith(".") and path.suffix == ".partial")}
    if others := sorted(names - {*own}):
        raise InputError(f"out: {out} already holds {others[0]}; choose a new or empty folder.")
    if names and difference and not force:
        raise InputError(f"out: {out} already holds {difference}; choose another folder, or add --force to replace it.")


def create_folder(out: Path) -> None:
    """Creates an output folder and its parents; raises InputError if that is not possible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: the folder {out} cannot be created ({error.strerror}); choose another.") from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
