"""Where shards live: local files, http(s), any store that fsspec knows; a remote shard is read from a local copy.

A copy is fetched whole, in pieces that survive a cut connection, into a folder of bounded size that all processes of
a machine share. Nothing here starts a program, but for `pipe:COMMAND` where `data.allow_pipe` switches it on.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import random
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from mmrl.data.fetch import opener
from mmrl.errors import InputError
from mmrl.settings import Settings, machine

_REMOTE = re.compile(r"^([a-z][a-z0-9+.]*)://\S", re.IGNORECASE)
_PIPE = "pipe:"
_PIECE = 1 << 20
# A failed store is asked again for another sample only after this, so that 1,000 bad samples do not wait 1,000 times.
_SECONDS_GIVEN_UP = 60.0
_LONGEST_PAUSE = 20.0


class StoreConfig(Settings):
    """How remote shards are fetched and kept."""

    folder: str | None = machine(None)
    """Where copies of remote shards and the indexes of all shards are kept; $MMRL_CACHE or ~/.cache/mmrl when left
    out."""
    gigabytes: float = machine(100.0, gt=0)
    """The copies may take so much room; those unused for longest go first."""
    retries: int = machine(8, ge=0)
    """Attempts in a row that brought nothing before a shard counts as lost; the pauses between them double."""
    timeout: float = machine(30.0, gt=0)
    """Seconds without a byte after which a connection counts as cut."""
    read_ahead: int = machine(4, ge=0)
    """Remote shards that are fetched before they are needed."""


def is_remote(location: str) -> bool:
    """Whether a shard has to be fetched: an address or a `pipe:`."""
    return location.startswith(_PIPE) or _REMOTE.match(location) is not None


def check_location(location: str, allow_pipe: bool) -> None:
    """Raises InputError for a remote location that may not or cannot be read here."""
    if location.startswith(_PIPE):
        if not allow_pipe:
            raise InputError(
                f"shards: {location!r} would run a command; set data.allow_pipe=true if you trust it, or give a URL."
            )
        return
    scheme = location.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return
    fsspec = _fsspec()
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        known = ", ".join(sorted(name for name in fsspec.available_protocols() if name in ("gs", "s3", "abfs", "hf")))
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
    scheme, _, rest = folder.partition("://")
    if scheme.lower() in ("http", "https"):
        raise InputError(
            f"shards: {folder} is a folder on the web, which cannot be listed; give a pattern such as "
            f"{folder.rstrip('/')}/shard-{{000000..000127}}.tar, or @list.txt."
        )
    try:
        found = sorted(str(name) for name in _fsspec().filesystem(scheme).glob(f"{rest.rstrip('/')}/**/*.tar"))
    except Exception as error:  # each store has its own kinds
        raise InputError(f"shards: {folder} cannot be listed ({error}).") from None
    if not found:
        raise InputError(f"shards: {folder} holds no .tar file.")
    return [f"{scheme}://{name}" for name in found]


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
        self._given_up: dict[str, tuple[float, str]] = {}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._ahead: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Threads stay behind where a worker is spawned."""
        return {**self.__dict__, "_pool": None, "_ahead": set()}

    def local(self, location: str) -> Path:
        """A local file with the contents of `location`.

        Raises:
            OSError: it cannot be had; FileNotFoundError where the store says so.
        """
        if not is_remote(location):
            return Path(location)
        target = self.folder / cache_name(location)
        if target.exists():
            with contextlib.suppress(OSError):
                os.utime(target)  # what is used stays
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")):
            if not target.exists():
                self._refuse_if_given_up(location)
                try:
                    self._fetch(location, target)
                except OSError as error:
                    self._given_up[location] = time.monotonic(), str(error)
                    raise
        return target

    def fetch_ahead(self, locations: Iterable[str]) -> None:
        """Starts to fetch what will be needed soon, in the background. Failures show when it is needed."""
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not outlive a fork
            self._pool, self._ahead = (os.getpid(), ThreadPoolExecutor(2, "mmrl-fetch")), set()
        for location in locations:
            if is_remote(location) and location not in self._ahead:
                self._ahead.add(location)
                self._pool[1].submit(self._fetch_quietly, location)

    def small(self, location: str) -> bytes | None:
        """The contents of a small remote file, or None where there is none."""
        if location.startswith(_PIPE):
            return None
        pauses = self._pauses()
        while True:
            try:
                with _opened(location, 0, self.config.timeout) as (source, span):
                    data = source.read()
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

    def _fetch_quietly(self, location: str) -> None:
        with contextlib.suppress(OSError):
            self.local(location)
        self._ahead.discard(location)

    def _refuse_if_given_up(self, location: str) -> None:
        since, why = self._given_up.get(location, (float("-inf"), ""))
        if time.monotonic() - since < _SECONDS_GIVEN_UP:
            raise OSError(why)

    def _pauses(self) -> Iterator[float]:
        for attempt in range(self.config.retries + 1):
            yield min(0.1 * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)

    def _fetch(self, location: str, target: Path) -> None:
        """Piece by piece into a file beside; after a cut the rest alone is asked for."""
        partial = target.with_name(f"{target.name}.partial")
        pauses = self._pauses()
        while True:
            had = partial.stat().st_size if partial.exists() else 0
            try:
                _append(location, partial, self.config.timeout)
                break
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                if partial.exists() and partial.stat().st_size > had:
                    pauses = self._pauses()
                pause = next(pauses, None)
                if pause is None:
                    raise OSError(f"{location} cannot be fetched: {error}") from None
                time.sleep(pause)
        self._make_room(partial.stat().st_size)
        partial.replace(target)

    def _make_room(self, size: int) -> None:
        """Removes the copies that were unused for longest. Who has one open goes on reading it."""
        ages = []
        for path in self.folder.iterdir():
            if not path.name.endswith((".lock", ".partial")):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    ages.append((status.st_mtime, status.st_size, path))
        excess = size + sum(size for _, size, _ in ages) - self.config.gigabytes * 1e9
        for _, size_of_one, path in sorted(ages):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size_of_one


def _append(location: str, partial: Path, timeout: float) -> None:
    """Adds what is missing to a partial file.

    Raises:
        OSError: the connection was cut before the end.
    """
    have = partial.stat().st_size if partial.exists() else 0
    with _opened(location, have, timeout) as (source, end), partial.open("r+b" if have else "wb") as file:
        at = end.start
        file.seek(at)
        file.truncate()
        while piece := source.read(_PIECE):
            file.write(piece)
            at += len(piece)
    if end.size is not None and at != end.size:
        raise OSError(f"the connection ended after {at:,} of {end.size:,} bytes")


class _Span:
    """From where a source gives bytes, and how many the whole has, where that is known."""

    def __init__(self, start: int, size: int | None) -> None:
        self.start, self.size = start, size


@contextlib.contextmanager
def _opened(location: str, have: int, timeout: float) -> Iterator[tuple[IO[bytes], _Span]]:
    """The bytes of a location from `have` on, or from its beginning where it can do no better.

    Raises:
        OSError: of any kind; FileNotFoundError or PermissionError where asking again is of no use.
    """
    try:
        if location.startswith(_PIPE):
            with _piped(location.removeprefix(_PIPE)) as source:
                yield source, _Span(0, None)
        elif location.lower().startswith(("http://", "https://")):
            with _http(location, have, timeout) as (source, span):
                yield source, span
        else:
            scheme, _, rest = location.partition("://")
            with _fsspec().filesystem(scheme).open(rest, "rb", cache_type="none") as source:
                source.seek(have)
                yield source, _Span(have, source.size)
    except OSError:
        raise
    except Exception as error:  # each store and each HTTP layer has its own kinds
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _http(location: str, have: int, timeout: float) -> Iterator[tuple[IO[bytes], _Span]]:
    request = urllib.request.Request(location, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310
    try:
        with opener().open(request, timeout=timeout) as answer:
            length = answer.headers.get("Content-Length")
            start = have if answer.status == 206 else 0
            yield answer, _Span(start, None if length is None else start + int(length))
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the file is no longer than what is here already
            yield io.BytesIO(), _Span(have, have)
        elif error.code in (404, 410):
            raise FileNotFoundError(f"{location} does not exist (HTTP {error.code})") from None
        elif error.code in (401, 403):
            raise PermissionError(f"{location} may not be read (HTTP {error.code})") from None
        else:
            raise OSError(f"HTTP {error.code}") from None


@contextlib.contextmanager
def _piped(command: str) -> Iterator[IO[bytes]]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:  # noqa: S602 (data.allow_pipe)
        assert process.stdout is not None
        yield process.stdout
    if process.returncode:
        raise OSError(f"the command ended with status {process.returncode}: {command}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a lock dies with who holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fsspec() -> Any:
    # Local shards need none of it.
    import fsspec

    return fsspec
