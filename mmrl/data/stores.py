"""Local and remote shards: files, http(s), fsspec filesystems, pipes. A remote shard is read from a cached local copy.

A copy is downloaded whole, resuming after a cut connection, into a cache folder of bounded size that all processes of
a machine share. No command is run, except a `pipe:COMMAND` if data.allow_pipe is set.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from mmrl.data.transport import PIPE, fsspec, open_remote
from mmrl.errors import InputError
from mmrl.settings import Settings, machine_field

_REMOTE = re.compile(r"^([a-z][a-z0-9+.]*)://\S", re.IGNORECASE)
_MAX_RETRY_DELAY = 20.0
# After a failed download, no process tries the shard again for the first value plus the time that the failure took, of
# which the second is the maximum. Otherwise each of 1,000 samples of the shard would wait for all retries.
_FAILURE_SECONDS, _MAX_FAILURE_SECONDS = 60.0, 600.0
# Unfinished downloads of this age are deleted.
_STALE_SECONDS = 86_400.0
_PREFETCH_THREADS = 2
_MAX_SMALL_FILE = 1 << 30


class RemoteConfig(Settings):
    """How remote shards are downloaded and cached."""

    folder: str | None = machine_field(None)
    """Cache folder for copies of remote shards and for shard indexes (default: $MMRL_CACHE, else ~/.cache/mmrl)."""
    gigabytes: float = machine_field(100.0, gt=0)
    """Size limit of the cached shards in GB; the least recently used ones are deleted first."""
    retries: int = machine_field(8, ge=0)
    """Retries, without receiving a byte, before a download fails; the delay doubles each time."""
    timeout: float = machine_field(30.0, gt=0)
    """Seconds without a byte after which a connection is given up and retried."""
    read_ahead: int = machine_field(1, ge=0)
    """Number of shuffle windows ahead, and at least of shards ahead, that are downloaded for each lane in the
    background."""


def is_remote(location: str) -> bool:
    """Whether a shard has to be downloaded: a URL or a `pipe:`."""
    return location.startswith(PIPE) or _REMOTE.match(location) is not None


def check_location(location: str, allow_pipe: bool) -> None:
    """Raises InputError for a `pipe:` that is not allowed, an unknown URL scheme or a missing package."""
    if location.startswith(PIPE):
        if not allow_pipe:
            raise InputError(
                f"shards: {location!r} would run a command; set data.allow_pipe=true if you trust it, or give a URL."
            )
        return
    scheme = location.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return
    try:
        fsspec().get_filesystem_class(scheme)
    except ValueError:
        known = ", ".join(name for name in ("abfs", "gs", "hf", "s3") if name in fsspec().available_protocols())
        raise InputError(
            f"shards: {scheme}:// in {location!r} is not supported; use a path or one of http, https, {known}."
        ) from None
    except ImportError as error:
        raise InputError(
            f"shards: {location!r} needs a package: {error}; or run pip install 'mmrl-clip[remote]'."
        ) from None


def list_tars(folder: str) -> list[str]:
    """The URLs of all tars below a remote folder.

    Raises:
        InputError: the store cannot be listed (http) or reached, or there is no tar.
    """
    if folder.lower().startswith(("http://", "https://")):
        raise InputError(
            f"shards: {folder} is a folder on a web server and cannot be listed; give a pattern such as "
            f"{folder.rstrip('/')}/shard-{{000000..000127}}.tar, or @list.txt."
        )
    try:
        files, path = fsspec().core.url_to_fs(folder)
        found = sorted(files.unstrip_protocol(str(name)) for name in files.glob(f"{path.rstrip('/')}/**/*.tar"))
    except Exception as error:  # each store raises its own kinds
        raise InputError(f"shards: {folder} cannot be listed ({error}).") from None
    if not found:
        raise InputError(f"shards: {folder} holds no .tar file.")
    return found


def cache_folder(config: RemoteConfig) -> Path:
    """The folder of cached shards and indexes."""
    default = os.environ.get("MMRL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrl"
    return Path(config.folder or default)


def cache_name(location: str) -> str:
    """A unique and readable file name for the cached copy of a location."""
    digest = hashlib.blake2b(os.fsencode(location), digest_size=10).hexdigest()
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', location.rsplit('/', 1)[-1])[-80:]}"


class ShardCache:
    """Local copies of remote shards. Any number of processes may share one folder; a shard is downloaded by one."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self.folder = cache_folder(config) / "shards"
        # Process id and queue of the prefetch threads, and what is in the queue.
        self._prefetcher: tuple[int, queue.SimpleQueue[str]] | None = None
        self._queued: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """For spawned workers: without threads."""
        return {**self.__dict__, "_prefetcher": None, "_queued": set()}

    def open(self, location: str) -> int:
        """A file descriptor for reading the shard, which stays valid when its copy is evicted.

        Raises:
            OSError: the shard cannot be downloaded; FileNotFoundError if it does not exist.
        """
        if not is_remote(location):
            return os.open(location, os.O_RDONLY)
        target = self._cached_path(location)
        with contextlib.suppress(FileNotFoundError):
            return _open_copy(target)
        with self._locked(target) as lock:
            with contextlib.suppress(FileNotFoundError):  # another process has downloaded it meanwhile
                return _open_copy(target)
            return self._download_once(location, target, lock)

    def discard(self, location: str) -> None:
        """Deletes the copy of a remote shard, so that it is downloaded again."""
        if is_remote(location):
            target = self._cached_path(location)
            for path in (target, _partial(target), _version_file(target)):
                path.unlink(missing_ok=True)

    def prefetch(self, locations: Iterable[str]) -> None:
        """Starts to download shards in the background. Errors are raised later, when a shard is opened."""
        if self._prefetcher is None or self._prefetcher[0] != os.getpid():  # threads do not survive a fork
            self._prefetcher, self._queued = (os.getpid(), queue.SimpleQueue()), set()
            for _ in range(_PREFETCH_THREADS):
                # Daemons, so that the process can exit during a download.
                threading.Thread(target=self._prefetch_loop, args=(self._prefetcher[1],), daemon=True).start()
        for location in locations:
            if is_remote(location) and location not in self._queued:
                self._queued.add(location)
                self._prefetcher[1].put(location)

    def is_downloading(self) -> bool:
        """Whether any process is downloading a shard into the folder and has not waited for a byte for too long."""
        patience = self.config.retries * (self.config.timeout + _MAX_RETRY_DELAY)
        for path in self.folder.glob("*.lock"):
            try:
                with _locked(path, wait=False):
                    continue
            except BlockingIOError:
                files = [one for one in (path, path.with_suffix(".partial")) if one.exists()]
                if time.time() - max(one.stat().st_mtime for one in files) < patience:
                    return True
        return False

    def read_small(self, location: str) -> bytes | None:
        """The contents of a small remote file, without caching it; None if it is missing or cannot be downloaded."""
        if location.startswith(PIPE):
            return None
        delays = self._retry_delays()
        while True:
            try:
                with open_remote(location, 0, "", self.config.timeout) as (source, transfer):
                    data = source.read(_MAX_SMALL_FILE)
                if transfer.size in (None, len(data)):
                    return data
            except (FileNotFoundError, PermissionError):
                return None
            except OSError:
                pass
            delay = next(delays, None)
            if delay is None:
                return None
            time.sleep(delay)

    def _cached_path(self, location: str) -> Path:
        return self.folder / cache_name(location)

    def _locked(self, target: Path, wait: bool = True) -> contextlib.AbstractContextManager[IO[str]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return _locked(target.with_name(f"{target.name}.lock"), wait)

    def _prefetch_loop(self, locations: "queue.SimpleQueue[str]") -> None:
        while True:
            location = locations.get()
            target = self._cached_path(location)
            # Includes BlockingIOError: another process downloads it.
            with contextlib.suppress(OSError):
                if not target.exists():
                    with self._locked(target, wait=False) as lock:
                        if not target.exists():
                            os.close(self._download_once(location, target, lock))
            self._queued.discard(location)

    def _retry_delays(self) -> Iterator[float]:
        for attempt in range(self.config.retries):
            yield min(0.1 * 2**attempt, _MAX_RETRY_DELAY) * random.uniform(0.5, 1.0)

    def _download_once(self, location: str, target: Path, lock: IO[str]) -> int:
        """Downloads a shard, unless this or another process failed to shortly before, and returns a file descriptor.

        The lock file holds the last failure: "TIME MESSAGE".
        """
        lock.seek(0)
        failed_at, _, message = lock.read().partition(" ")
        if message and time.time() - float(failed_at) < _FAILURE_SECONDS:
            raise OSError(message)
        began = time.time()
        os.utime(lock.fileno())  # for `is_downloading`
        failure = ""
        try:
            return self._download(location, target)
        except OSError as error:
            # A slow failure is remembered for longer.
            failure = f"{time.time() + min(time.time() - began, _MAX_FAILURE_SECONDS)} {error}"
            raise
        finally:
            lock.seek(0)
            lock.truncate()
            lock.write(failure)

    def _download(self, location: str, target: Path) -> int:
        """Downloads a shard with retries, each of which resumes the partial file. Returns a file descriptor, opened
        before another process can evict the copy."""
        partial, delays = _partial(target), self._retry_delays()
        while True:
            size_before = partial.stat().st_size if partial.exists() else 0
            try:
                _append(location, target, self.config.timeout)
                break
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                if partial.exists() and partial.stat().st_size > size_before:
                    delays = self._retry_delays()
                delay = next(delays, None)
                if delay is None:
                    raise OSError(f"{location} cannot be fetched: {error}") from None
                time.sleep(delay)
        self._evict(partial.stat().st_size)
        file = os.open(partial, os.O_RDONLY)
        partial.replace(target)
        _version_file(target).unlink(missing_ok=True)
        return file

    def _evict(self, size: int) -> None:
        """Deletes the least recently used copies to make room for `size` bytes, and stale unfinished downloads.
        Processes that have a deleted copy open can still read it."""
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.name.endswith((".partial", ".mark")):
                    if time.time() - status.st_mtime > _STALE_SECONDS:
                        path.unlink()
                elif not path.name.endswith(".lock"):
                    copies.append((status.st_mtime, status.st_size, path))
        excess = size + sum(size for _, size, _ in copies) - self.config.gigabytes * 1e9
        for _, size_of_copy, path in sorted(copies):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size_of_copy


def _open_copy(target: Path) -> int:
    file = os.open(target, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.utime(target)  # marks it as recently used
    return file


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _version_file(target: Path) -> Path:
    """Holds the version of the remote file that the partial file is of."""
    return target.with_name(f"{target.name}.mark")


def _append(location: str, target: Path, timeout: float) -> None:
    """Downloads the rest of a partial file, or all of it if the remote file has changed since.

    Raises:
        OSError: the connection was cut before the end.
    """
    partial, version_file = _partial(target), _version_file(target)
    offset = partial.stat().st_size if partial.exists() and version_file.exists() else 0
    version = version_file.read_text() if offset else ""
    with open_remote(location, offset, version, timeout) as (source, transfer):
        version_file.write_text(transfer.version)
        with partial.open("r+b" if offset else "wb") as file:
            end = transfer.start
            file.seek(end)
            file.truncate()
            while chunk := source.read(transfer.chunk_size):
                file.write(chunk)
                end += len(chunk)
    if transfer.size is not None and end != transfer.size:
        if end > transfer.size:
            partial.unlink()
        raise OSError(f"the connection ended after {end:,} of {transfer.size:,} bytes")


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[IO[str]]:
    """Holds an exclusive lock, which the system releases if this process dies.

    Raises:
        BlockingIOError: another process holds it and `wait` is false.
    """
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield file
        finally:
            file.flush()
            # Not left to close(): a child forked meanwhile would keep the lock.
            fcntl.flock(file, fcntl.LOCK_UN)
