"""Where shards live: local files, http(s), any store that fsspec knows; a remote shard is read from a local copy.

A copy is fetched whole, in pieces that survive a cut connection, into a folder of bounded size that all processes of
a machine share. Nothing here starts a program, but for `pipe:COMMAND` where `data.allow_pipe` switches it on.
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

from mmrl.data.transport import PIPE, fsspec, opened
from mmrl.errors import InputError
from mmrl.settings import Settings, machine

_REMOTE = re.compile(r"^([a-z][a-z0-9+.]*)://\S", re.IGNORECASE)
_LONGEST_PAUSE = 20.0
# A shard that could not be had is tried again only after this, by all processes: 1,000 bad samples do not wait 1,000
# times.
_SECONDS_GIVEN_UP, _LONGEST_GIVEN_UP = 60.0, 600.0
_SECONDS_UNTIL_DEAD = 86_400.0
_FETCHERS = 2
_LARGEST_SMALL = 1 << 30


class StoreConfig(Settings):
    """How remote shards are fetched and kept."""

    folder: str | None = machine(None)
    """Where copies of remote shards and the indexes of all shards are kept; $MMRL_CACHE or ~/.cache/mmrl when left
    out."""
    gigabytes: float = machine(100.0, gt=0)
    """The copies may take so much room; those unused for longest go first."""
    retries: int = machine(8, ge=0)
    """A connection that brought nothing is tried so many times more before a shard counts as lost; the pauses between
    double."""
    timeout: float = machine(30.0, gt=0)
    """Seconds without a byte after which a connection counts as cut."""
    read_ahead: int = machine(1, ge=0)
    """Windows of the shuffle whose shards are fetched before they are needed."""


def is_remote(location: str) -> bool:
    """Whether a shard has to be fetched: an address or a `pipe:`."""
    return location.startswith(PIPE) or _REMOTE.match(location) is not None


def check_location(location: str, allow_pipe: bool) -> None:
    """Raises InputError for a remote location that may not or cannot be read here."""
    if location.startswith(PIPE):
        if not allow_pipe:
            raise InputError(
                f"shards: {location!r} would run a command; set data.allow_pipe=true if you trust it, or give a URL."
            )
        return
    scheme = location.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return
    known_stores = fsspec()
    try:
        known_stores.get_filesystem_class(scheme)
    except ValueError:
        known = ", ".join(name for name in ("abfs", "gs", "hf", "s3") if name in known_stores.available_protocols())
        raise InputError(
            f"shards: {scheme}:// in {location!r} is no store that is known here; http, https, {known} are."
        ) from None
    except ImportError as error:
        raise InputError(
            f"shards: {location!r} needs a package: {error}. Or pip install 'mmrl-clip[remote]'."
        ) from None


def listed(folder: str) -> list[str]:
    """The tars below a remote folder.

    Raises:
        InputError: the store has no listing (http), is out of reach, or there is none.
    """
    if folder.lower().startswith(("http://", "https://")):
        raise InputError(
            f"shards: {folder} is a folder on the web, which cannot be listed; give a pattern such as "
            f"{folder.rstrip('/')}/shard-{{000000..000127}}.tar, or @list.txt."
        )
    try:
        files, path = fsspec().core.url_to_fs(folder)
        found = sorted(files.unstrip_protocol(str(name)) for name in files.glob(f"{path.rstrip('/')}/**/*.tar"))
    except Exception as error:  # each store has its own kinds
        raise InputError(f"shards: {folder} cannot be listed ({error}).") from None
    if not found:
        raise InputError(f"shards: {folder} holds no .tar file.")
    return found


def cache_folder(config: StoreConfig) -> Path:
    """The folder of copies and indexes."""
    usual = os.environ.get("MMRL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrl"
    return Path(config.folder or usual)


def cache_name(location: str) -> str:
    """A file name for what belongs to a location: readable, and never that of another one."""
    digest = hashlib.blake2b(location.encode(), digest_size=10).hexdigest()
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', location.rsplit('/', 1)[-1])[-80:]}"


class Store:
    """Local copies of remote files. Any number of processes may use one folder; a file is fetched by one of them."""

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.folder = cache_folder(config) / "shards"
        self._ahead: tuple[int, queue.SimpleQueue[str]] | None = None
        self._asked: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Threads stay behind where a worker is spawned."""
        return {**self.__dict__, "_ahead": None, "_asked": set()}

    def local(self, location: str) -> Path:
        """A local file with the contents of `location`. Another process may push a copy out of the folder at any time:
        to read one, `open` it.

        Raises:
            OSError: it cannot be had; FileNotFoundError where the store says so.
        """
        if not is_remote(location):
            return Path(location)
        os.close(self.open(location))
        return self._target(location)

    def open(self, location: str) -> int:
        """A file descriptor to read it by, which stays good whatever becomes of the copy.

        Raises:
            OSError: as `local`.
        """
        if not is_remote(location):
            return os.open(location, os.O_RDONLY)
        target = self._target(location)
        with contextlib.suppress(FileNotFoundError):
            return _open_copy(target)
        with self._locked(target) as lock:
            with contextlib.suppress(FileNotFoundError):  # another process has fetched it meanwhile
                return _open_copy(target)
            return self._fetch_noted(location, target, lock)

    def discard(self, location: str) -> None:
        """Throws a copy away that turned out to be wrong; the next who wants it fetches it again."""
        if is_remote(location):
            target = self._target(location)
            for path in (target, _partial(target), _mark(target)):
                path.unlink(missing_ok=True)

    def fetch_ahead(self, locations: Iterable[str]) -> None:
        """Starts to fetch what will be needed soon, in the background. Failures show when it is needed."""
        if self._ahead is None or self._ahead[0] != os.getpid():  # threads do not outlive a fork
            self._ahead, self._asked = (os.getpid(), queue.SimpleQueue()), set()
            for _ in range(_FETCHERS):
                # A daemon: a run that ends does not wait for what it asked for ahead.
                threading.Thread(target=self._fetch_all, args=(self._ahead[1],), daemon=True).start()
        for location in locations:
            if is_remote(location) and location not in self._asked:
                self._asked.add(location)
                self._ahead[1].put(location)

    def small(self, location: str) -> bytes | None:
        """The contents of a small remote file, or None where there is none that can be had."""
        if location.startswith(PIPE):
            return None
        pauses = self._pauses()
        while True:
            try:
                with opened(location, 0, "", self.config.timeout) as (source, span):
                    data = source.read(_LARGEST_SMALL)
                if span.size in (None, len(data)):
                    return data
            except (FileNotFoundError, PermissionError):
                return None
            except OSError:
                pass
            pause = next(pauses, None)
            if pause is None:
                return None
            time.sleep(pause)

    def _target(self, location: str) -> Path:
        return self.folder / cache_name(location)

    def _locked(self, target: Path, wait: bool = True) -> contextlib.AbstractContextManager[IO[str]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return _locked(target.with_name(f"{target.name}.lock"), wait)

    def _fetch_all(self, locations: "queue.SimpleQueue[str]") -> None:
        while True:
            location = locations.get()
            target = self._target(location)
            # BlockingIOError, an OSError, where another process fetches it already.
            with contextlib.suppress(OSError):
                if not target.exists():
                    with self._locked(target, wait=False) as lock:
                        if not target.exists():
                            os.close(self._fetch_noted(location, target, lock))
            self._asked.discard(location)

    def _pauses(self) -> Iterator[float]:
        for attempt in range(self.config.retries):
            yield min(0.1 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)

    def _fetch_noted(self, location: str, target: Path, lock: IO[str]) -> int:
        """Fetches, unless it failed shortly before, here or in another process: the lock's file tells. Returns a
        descriptor."""
        lock.seek(0)
        since, _, why = lock.read().partition(" ")
        if why and time.time() - float(since) < _SECONDS_GIVEN_UP:
            raise OSError(why)
        began = time.time()
        note = ""
        try:
            return self._fetch(location, target)
        except OSError as error:
            # What took long to fail is not tried again sooner than that.
            note = f"{time.time() + min(time.time() - began, _LONGEST_GIVEN_UP)} {error}"
            raise
        finally:
            lock.seek(0)
            lock.truncate()
            lock.write(note)

    def _fetch(self, location: str, target: Path) -> int:
        """Piece by piece into a file beside; after a cut the rest alone is asked for. Returns a descriptor, opened
        before others can push the copy out again."""
        partial, pauses = _partial(target), self._pauses()
        while True:
            had = partial.stat().st_size if partial.exists() else 0
            try:
                _append(location, target, self.config.timeout)
                break
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                if partial.exists() and partial.stat().st_size > had:
                    pauses = self._pauses()
                pause = next(pauses, None)
                if pause is None:
                    raise OSError(f"{location} cannot be fetched: {error}") from None
                time.sleep(pause)
        self._make_room(partial.stat().st_size)
        file = os.open(partial, os.O_RDONLY)
        partial.replace(target)
        _mark(target).unlink(missing_ok=True)
        return file

    def _make_room(self, size: int) -> None:
        """Removes the copies that were unused for longest, and what dead downloads left. Who has one open goes on
        reading it."""
        ages = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.name.endswith((".partial", ".mark")):
                    if time.time() - status.st_mtime > _SECONDS_UNTIL_DEAD:
                        path.unlink()
                elif not path.name.endswith(".lock"):
                    ages.append((status.st_mtime, status.st_size, path))
        excess = size + sum(size for _, size, _ in ages) - self.config.gigabytes * 1e9
        for _, size_of_one, path in sorted(ages):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size_of_one


def _open_copy(target: Path) -> int:
    file = os.open(target, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.utime(target)  # what is used stays
    return file


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _mark(target: Path) -> Path:
    """Holds which version of the file the partial one is of."""
    return target.with_name(f"{target.name}.mark")


def _append(location: str, target: Path, timeout: float) -> None:
    """Adds what is missing to a partial file; all of it where the file has changed since.

    Raises:
        OSError: the connection was cut before the end.
    """
    partial, mark = _partial(target), _mark(target)
    have = partial.stat().st_size if partial.exists() and mark.exists() else 0
    with opened(location, have, mark.read_text() if have else "", timeout) as (source, span):
        mark.write_text(span.version)
        with partial.open("r+b" if have else "wb") as file:
            at = span.start
            file.seek(at)
            file.truncate()
            while piece := source.read(span.piece):
                file.write(piece)
                at += len(piece)
    if span.size is not None and at != span.size:
        if at > span.size:
            partial.unlink()
        raise OSError(f"the connection ended after {at:,} of {span.size:,} bytes")


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[IO[str]]:
    """One process at a time; a lock dies with who holds it. Raises BlockingIOError where it is held and `wait` is not
    asked for."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield file
        finally:
            file.flush()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a child that was forked meanwhile
