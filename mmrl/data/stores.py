"""Local and remote shards: files, http(s), fsspec filesystems, pipes. A remote shard is read from a cached local copy.

A copy is downloaded whole with its index, resuming after a cut connection, into a cache folder of bounded size that all
processes of a host share. No command is run, except a `pipe:COMMAND` if data.allow_pipe is set.

    CACHE/shards/    copies of remote shards, unfinished ones (.partial, .mark) and locks
    CACHE/index/     indexes of remote shards, and of local ones without an index next to them
    CACHE/sets/      what is known of each set that was opened, see opening.py
    CACHE/slots/     locks, of which each background download of the host holds one
"""

import contextlib
import hashlib
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from mmrl.data.download import MAX_RETRY_DELAY, Prefetcher, download, locked, retry_delays, version_file
from mmrl.data.fetch import is_http
from mmrl.data.index_file import SUFFIX
from mmrl.data.transport import PIPE, RemoteFile, fsspec, open_remote
from mmrl.errors import InputError
from mmrl.output.files import write_atomic
from mmrl.output.owners import check_writers
from mmrl.settings import Settings, machine_field

_REMOTE = re.compile(r"^([a-z][a-z0-9+.]*)://\S", re.IGNORECASE)
# After a failed download, no process tries the shard again for the first value plus the time that the failure took, of
# which the second is the maximum. Otherwise each of 1,000 samples of the shard would wait for all retries.
_FAILURE_SECONDS, _MAX_FAILURE_SECONDS = 60.0, 600.0
# Unfinished downloads of this age are deleted.
_STALE_SECONDS = 86_400.0
_MOST_BYTES = 1 << 28
T = TypeVar("T")


class RemoteConfig(Settings):
    """How remote shards are downloaded and cached."""

    folder: str | None = machine_field(None)
    """Cache folder for copies of remote shards and for shard indexes (default: $MMRL_CACHE, else ~/.cache/mmrl)."""
    gigabytes: float = machine_field(100.0, gt=0)
    """Size limit of the cached shards and indexes in GB; the least recently used ones are deleted first."""
    retries: int = machine_field(8, ge=0)
    """Retries, without receiving a byte, before a download fails; the delay doubles each time."""
    timeout: float = machine_field(30.0, gt=0)
    """Seconds without a byte after which a connection is given up and retried."""
    read_ahead: int = machine_field(16, ge=0, le=1024)
    """Shards that a host downloads at the same time in the background, each by a connection of its own, ahead of the
    batches that need them; at least one is fetched ahead for each lane. 0 downloads a shard when a batch needs it."""

    def shards_ahead(self, lanes: int) -> int:
        """The shards that are fetched ahead of the current ones for each of a number of lanes."""
        return math.ceil(self.read_ahead / lanes)


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
    if is_http(location):
        return
    scheme = location.partition("://")[0].lower()
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
    if is_http(folder):
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
    """The folder of cached shards and indexes.

    Raises:
        InputError: strangers can write to it, see `check_writers`; none is named, and this user has no home folder.
    """
    named, caches = config.folder or os.environ.get("MMRL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(named or Path(caches or Path.home() / ".cache") / "mmrl")
    except RuntimeError:
        raise InputError("data.remote.folder: this user has no home folder; set it or MMRL_CACHE.") from None
    remedy = "take that right away (chmod, chown), or set data.remote.folder or MMRL_CACHE to a folder of your own"
    check_writers(folder, "data.remote.folder", remedy)
    return folder


def cache_name(location: str) -> str:
    """A unique and readable file name for the cached copy of a location."""
    digest = hashlib.blake2b(os.fsencode(location), digest_size=10).hexdigest()
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', location.rsplit('/', 1)[-1])[-80:]}"


def beside(location: str, ending: str) -> str:
    """The location of a shard's file whose name has another ending; a URL keeps its query."""
    path, mark, query = location.partition("?") if is_remote(location) else (location, "", "")
    return f"{path}{ending}{mark}{query}"


def sibling(location: str, name: str) -> str:
    """The location of another file in a shard's folder; a URL keeps its query."""
    path, mark, query = location.partition("?") if is_remote(location) else (location, "", "")
    folder, slash, _ = path.rpartition("/")
    return f"{folder}{slash}{name}{mark}{query}"


class ShardCache:
    """Local copies of remote shards. Any number of processes may share one folder; a shard is downloaded by one."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        root = cache_folder(config)
        self.folder, self.sets, self._index_folder, self._slots = (
            root / name for name in ("shards", "sets", "index", "slots")
        )
        self._prefetcher: Prefetcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For spawned workers: without threads."""
        return {**self.__dict__, "_prefetcher": None}

    def index_path(self, location: str) -> Path:
        """The index of a shard in the cache folder."""
        name = location if is_remote(location) else os.path.abspath(location)  # noqa: PTH100 (a string, for speed)
        return self._index_folder / (cache_name(name) + SUFFIX)

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
        with locked(_lock_of(target), wait=True) as lock:
            with contextlib.suppress(FileNotFoundError):  # another process has downloaded it meanwhile
                return _open_copy(target)
            return self._download_once(location, target, lock)

    def discard(self, location: str, file: int) -> None:
        """Deletes the copy of a remote shard that this file descriptor is of, so that it is downloaded again."""
        if is_remote(location):
            target = self._cached_path(location)
            with locked(_lock_of(target), wait=True), contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), target.stat()):  # else another process has replaced it
                    target.unlink()

    def prefetch(self, locations: Iterable[str]) -> None:
        """Starts to download shards in the background, in this order. Errors are raised later, when a shard is
        opened."""
        if not self.config.read_ahead:
            return
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():  # threads do not survive a fork
            self._prefetcher = Prefetcher(self._fetch_ahead, self.config.read_ahead)
        self._prefetcher.add(one for one in locations if is_remote(one) and not self._cached_path(one).exists())

    def is_downloading(self) -> bool:
        """Whether any process is downloading a shard into the folder and has not waited for a byte for too long."""
        since = time.time() - self.config.retries * (self.config.timeout + MAX_RETRY_DELAY)
        names = set[str]()
        for path in self.folder.glob("*.*"):
            with contextlib.suppress(FileNotFoundError):
                if path.suffix in (".lock", ".partial") and path.stat().st_mtime > since:
                    names.add(path.stem)
        for name in names:
            try:
                with locked(self.folder / f"{name}.lock", wait=False):
                    continue
            except BlockingIOError:
                return True
            except OSError:  # e.g. of another user, of which nothing is known
                continue
        return False

    def read_small(self, location: str, most_bytes: int | None = None) -> bytes | None:
        """The contents of a small local or remote file, without caching it; None if there is none, or only one that is
        larger than `most_bytes` or 256 MiB.

        Raises:
            OSError: the store cannot be reached.
        """
        most = _MOST_BYTES if most_bytes is None else min(most_bytes, _MOST_BYTES)

        def read(file: RemoteFile) -> bytes | None:
            data = file.read(most + 1)
            if len(data) > most:
                return None
            if file.size not in (None, len(data)):
                raise OSError(f"the connection ended after {len(data):,} of {file.size:,} bytes")
            return data

        if is_remote(location):
            return self.read_remote(location, read)
        try:
            with Path(location).open("rb") as file:
                return file.read()
        except OSError:
            return None

    def read_remote(self, location: str, read: Callable[[RemoteFile], T]) -> T | None:
        """What `read` makes of an opened remote file; None if there is none, or no permission to read it.

        Raises:
            OSError: the store cannot be reached.
        """
        if location.startswith(PIPE):
            return None
        delays = retry_delays(self.config.retries)
        while True:
            try:
                with open_remote(location, 0, "", self.config.timeout) as source:
                    return read(source)
            except (FileNotFoundError, PermissionError):
                return None
            except OSError as error:
                if (delay := next(delays, None)) is None:
                    raise OSError(f"{location}: {error}") from None
            time.sleep(delay)

    def _cached_path(self, location: str) -> Path:
        return self.folder / cache_name(location)

    def _fetch_ahead(self, location: str) -> None:
        """Downloads a shard in one of the host's slots, unless it is there or another process downloads it."""
        target = self._cached_path(location)
        with contextlib.suppress(Exception), self._slot():  # whoever needs the shard sees the error
            if not target.exists():
                with locked(_lock_of(target), wait=False) as lock:
                    if not target.exists():
                        os.close(self._download_once(location, target, lock))

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        slots = [self._slots / str(number) for number in range(self.config.read_ahead)]
        random.shuffle(slots)
        with contextlib.ExitStack() as stack:
            for slot in slots:
                with contextlib.suppress(BlockingIOError):
                    stack.enter_context(locked(slot, wait=False))
                    break
            else:
                stack.enter_context(locked(slots[0], wait=True))
            yield

    def _download_once(self, location: str, target: Path, lock: IO[str]) -> int:
        """Downloads a shard, unless this or another process failed to shortly before, and returns a file descriptor.

        The lock file holds the last failure: "TIME MESSAGE".
        """
        lock.seek(0)
        failure = re.match(r"(\d+\.?\d*) (.*)", lock.read(), re.DOTALL)
        if failure and time.time() - float(failure[1]) < _FAILURE_SECONDS:
            raise OSError(failure[2])
        began = time.time()
        os.utime(lock.fileno())  # for `is_downloading`
        note = ""
        try:
            return self._download(location, target)
        except OSError as error:
            # A slow failure is remembered for longer.
            note = f"{time.time() + min(time.time() - began, _MAX_FAILURE_SECONDS)} {error}"
            raise
        finally:
            lock.seek(0)
            lock.truncate()
            lock.write(note)

    def _download(self, location: str, target: Path) -> int:
        """Downloads a shard and its index. Returns a file descriptor, opened before another process can evict the
        copy."""
        config = self.config
        partial = download(location, target, config.retries, config.timeout, config.gigabytes * 1e9)
        size = partial.stat().st_size
        self._download_index(location, size)
        self.evict(size)
        file = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
        partial.replace(target)
        version_file(target).unlink(missing_ok=True)
        return file

    def _download_index(self, location: str, size: int) -> None:
        """Fetches the index next to a shard of this size, if there is one. Without it, the copy is scanned."""
        with contextlib.suppress(OSError):
            # Each member has a header in the tar, which is longer than its entry in the index.
            index = self.read_small(beside(location, SUFFIX), most_bytes=size)
            if index is not None:
                write_atomic(self.index_path(location), index)

    def evict(self, size: int = 0) -> None:
        """Deletes the least recently used copies and indexes to make room for `size` bytes, and stale unfinished
        downloads. Processes that have a deleted copy open can still read it."""
        copies = []
        for folder in (self.folder, self._index_folder):
            for path in folder.iterdir() if folder.is_dir() else ():
                if path.suffix == ".lock":
                    continue
                with contextlib.suppress(OSError):
                    status = path.stat()
                    if path.suffix not in (".partial", ".mark"):
                        copies.append((status.st_mtime, status.st_size, path))
                    elif time.time() - status.st_mtime > _STALE_SECONDS:
                        path.unlink()
        excess = size + sum(size for _, size, _ in copies) - self.config.gigabytes * 1e9
        for _, size_of_copy, path in sorted(copies):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size_of_copy


def _open_copy(target: Path) -> int:
    if target.is_symlink():  # not made by this program
        target.unlink()
    file = os.open(target, os.O_RDONLY | os.O_NOFOLLOW)
    with contextlib.suppress(OSError):
        os.utime(file)  # marks it as recently used
    return file


def _lock_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.lock")
