"""Atomic writes: a reader finds the old file or the new one, never a part of it."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrl.errors import InputError
from mmrl.output.console import visible

LOCK = ".lock"
"""The file in a folder that the process which writes the folder holds a lock on."""


@contextmanager
def exclusive(folder: Path, command: str) -> Iterator[None]:
    """Creates a folder and holds its lock, so that no second process writes into it. The system releases the lock when
    this process ends, however it ends; on file systems without locks there is none. A folder that was created here and
    is still empty at the end is removed.

    Raises:
        InputError: another process holds it, which the sentence names with its host; the lock of another user cannot
            be opened.
    """
    lock, is_new = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if os.path.lexists(lock):
            raise InputError(
                f"{lock} cannot be opened ({error.strerror}): another user writes to the folder, or has left it "
                "behind; delete it, or choose another folder."
            ) from None
        yield  # the command says why the folder cannot be written
        return
    try:
        # Not flock, whose locks forked data workers would share, and which NFS knows on one host only.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise BlockingIOError  # its owner has just ended
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{command}, process {os.getpid()} on {socket.gethostname()}".encode())
    except (BlockingIOError, PermissionError):
        owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise InputError(
            f"{folder}: {visible(owner)} is writing to this folder; wait for it, or choose another folder."
        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text from a file. Raises ValueError: it is no JSON, not UTF-8, or nested too deeply to be
    read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a file, or replaces it, in one step. Its folder is created. Raises OSError: the disk is full, or the
    folder cannot be written."""
    with atomic_path(path) as partial, partial.open("xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, for a file or a folder. At the end it replaces `path`; after an error
    it is removed. Files have the permissions that the umask gives, also those of libraries that write private ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random: processes on several hosts, which may have the same id, can write to one shared folder.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        _unhide(partial)
        if partial.is_dir() and path.is_dir():  # a folder that is not empty cannot be renamed over
            old = path.rename(partial.with_suffix(".old.partial"))
            partial.rename(path)
            remove(old)
        else:
            partial.replace(path)
    except BaseException:
        remove(partial)
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
    names = {path.name for path in found if path.name != LOCK and not path.match(".*.partial")}
    if others := sorted(names - {*own}):
        raise InputError(f"out: {out} already holds {others[0]}; choose a new or empty folder.")
    if names and difference and not force:
        raise InputError(f"out: {out} already holds {difference}; choose another folder, or add --force to replace it.")


def check_report_folder(
    out: Path, file: str, own: Collection[str], settings: Mapping[str, Any], *, force: bool = False
) -> None:
    """`check_out_folder` for a report whose settings are stored as "settings" in OUT/FILE, and which may write further
    files and folders, `own`. In the folder of a run, the report is written beside the run's files."""
    found = None
    if (out / file).is_file():
        try:
            stored = parse_json((out / file).read_text())["settings"]
            found = describe_difference("a report", stored, settings)
        except (ValueError, KeyError, TypeError):
            found = f"a {file} whose settings are unknown"
    is_run = (out / "config.yaml").is_file()
    check_out_folder(out, [path.name for path in out.iterdir()] if is_run else [file, *own], found, force=force)


def describe_difference(what: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How stored work differs from what is to be written, for `check_out_folder`; None if it does not."""
    key = next((key for key in now if key in stored and stored[key] != now[key]), None)
    return key and f"{what} whose {key} was {stored[key]}, not {now[key]}"


_LONGEST_NAME = 255


def path_inside(folder: Path, name: str) -> Path:
    """FOLDER/NAME, where the name was read from a file: a folder that a stranger made must not reach others.

    Raises:
        InputError: it is outside of the folder once links are followed, or longer than names of files can be. Links
            into the cache of a hub that the folder is in are allowed.
    """
    if len(name.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise InputError(
            f"{folder} names a file of {len(name):,} characters, {name[:40]!r}…; export or build it again."
        )
    path, root = folder / name, Path(os.path.realpath(folder))
    roots = [root, *(one.parent / "blobs" for one in root.parents if one.name == "snapshots")]
    if not any(Path(os.path.realpath(path)).is_relative_to(one) for one in roots):  # resolve() may raise RuntimeError
        raise InputError(f"{path} leads out of {folder}; copy the file that it stands for into the folder.")
    return path


def create_folder(out: Path) -> None:
    """Creates an output folder and its parents; raises InputError if that is not possible, or it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: the folder {out} cannot be created ({error.strerror}); choose another.") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"out: this user cannot write to the folder {out}; choose another.")


def _unhide(partial: Path) -> None:
    """Gives files that only their owner can read, as safetensors writes them, the permissions of new files."""
    files = [path for path in (partial, *partial.rglob("*")) if path.is_file() and not path.is_symlink()]
    private = [path for path in files if path.stat().st_mode & 0o777 == 0o600]
    if private:
        new = partial.with_name(f"{partial.stem}.new.partial")
        new.touch()  # shows the umask, which can be read only by setting it
        mode = new.stat().st_mode & 0o777
        new.unlink()
        for path in private:
            path.chmod(mode)


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
