"""Download a remote shard to a file: in several attempts that resume, within limits on size and time, and in the
background."""

import contextlib
import errno
import fcntl
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from mmrl.data.fetch import is_http
from mmrl.data.transport import TooSlow, open_remote

MAX_RETRY_DELAY = 20.0
# Background downloads of a process begin one after another: else those of equal shards would end at the same time, and
# the network would idle until the next ones begin.
_STAGGER_S = 0.05
_TAR_END = 1024
"""A tar ends with at least this number of zero bytes."""


def partial_file(target: Path) -> Path:
    """The unfinished download of a file."""
    return target.with_name(f"{target.name}.partial")


def version_file(target: Path) -> Path:
    """Holds the version of the remote file that the unfinished download is of."""
    return target.with_name(f"{target.name}.mark")


def retry_delays(retries: int) -> Iterator[float]:
    """The seconds before each retry."""
    for attempt in range(retries):
        yield min(0.1 * 2**attempt, MAX_RETRY_DELAY) * random.uniform(0.5, 1.0)


def download(location: str, target: Path, retries: int, timeout: float, most_bytes: float) -> Path:
    """Downloads a file beside `target`, to the path that is returned; each attempt resumes the one before.

    Raises:
        OSError: `retries` attempts in a row brought nothing, the file is larger than `most_bytes`, or the disk is full;
            FileNotFoundError or PermissionError if a retry is pointless.
    """
    partial, delays = partial_file(target), retry_delays(retries)
    for path in (partial, version_file(target)):
        if path.is_symlink():  # not made by this program
            path.unlink()
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _append(location, target, timeout, most_bytes)
            return partial
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG):
                raise
            if partial.exists() and partial.stat().st_size > before and not isinstance(error, TooSlow):
                delays = retry_delays(retries)
            delay = next(delays, None)
            if delay is None:
                raise OSError(f"{location} cannot be fetched: {error}") from None
            time.sleep(delay)


def _append(location: str, target: Path, timeout: float, most_bytes: float) -> None:
    """Downloads the rest of a partial file, or all of it if the remote file has changed since.

    Raises:
        OSError: the connection was cut before the end, or the file is too large.
    """
    partial, version = partial_file(target), version_file(target)
    offset = partial.stat().st_size if partial.exists() and version.exists() else 0
    known = version.read_bytes().decode("ascii", "ignore") if offset else ""
    with open_remote(location, offset, known if known.isprintable() else "", timeout) as source:
        _check_size(location, source.size or 0, most_bytes)
        version.unlink(missing_ok=True)
        with version.open("x") as file:
            file.write(source.version)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666), "wb") as file:
            end = source.start
            file.seek(end)
            file.truncate()
            while chunk := source.read(source.chunk_size):
                end += len(chunk)
                if end > most_bytes:
                    partial.unlink()
                _check_size(location, end, most_bytes)
                file.write(chunk)
    if source.size is not None and end != source.size:
        if end > source.size:
            partial.unlink()
        raise OSError(f"the connection ended after {end:,} of {source.size:,} bytes")
    if source.size is None and is_http(location) and not _ends_as_tar(partial):
        raise OSError(f"the server announced no length, and the connection ended after {end:,} bytes, inside the tar")


def _check_size(location: str, size: int, most_bytes: float) -> None:
    if size > most_bytes:
        limit = f"{most_bytes / 1e9:g} GB, which data.remote.gigabytes allows"
        raise OSError(errno.EFBIG, f"{location} is larger than {limit}")


def _ends_as_tar(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAR_END))
        return file.read() == bytes(_TAR_END)


class Prefetcher:
    """Threads of this process that fetch locations in the order in which they are added, each once at a time."""

    def __init__(self, fetch: Callable[[str], None], most_threads: int) -> None:
        self.pid = os.getpid()
        self._fetch, self._most_threads, self._threads = fetch, most_threads, 0
        self._lock, self._waiting, self._known = threading.Lock(), deque[str](), set[str]()
        self._begins = 0.0

    def add(self, locations: Iterable[str]) -> None:
        """Adds locations that are not waiting or being fetched already."""
        with self._lock:
            for location in locations:
                if location not in self._known:
                    self._known.add(location)
                    self._waiting.append(location)
            while self._threads < min(self._most_threads, len(self._known)):
                self._threads += 1
                self._begins = max(time.monotonic(), self._begins + _STAGGER_S)
                # Daemons, so that the process can exit during a download.
                threading.Thread(target=self._run, args=(self._begins,), daemon=True).start()

    def _run(self, begins: float) -> None:
        time.sleep(max(0.0, begins - time.monotonic()))
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                location = self._waiting.popleft()
            self._fetch(location)
            with self._lock:
                self._known.discard(location)


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[IO[str]]:
    """Holds an exclusive lock, which the system releases if this process dies. The file and its folder are created.

    Raises:
        BlockingIOError: another process holds it and `wait` is false.
        OSError: the file cannot be created, or is a link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "a+", errors="replace") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield file
        finally:
            file.flush()
            # Not left to close(): a child forked meanwhile would keep the lock.
            fcntl.flock(file, fcntl.LOCK_UN)
