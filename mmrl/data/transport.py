"""Open a remote file for reading from a byte offset: http(s), any fsspec filesystem, and `pipe:` commands."""

import contextlib
import io
import os
import re
import select
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from mmrl.data.fetch import RETRIED_STATUS, http_opener, is_http

PIPE = "pipe:"
# A file that arrives more slowly than this many bytes per second, over this many seconds, is given up.
_LEAST_RATE, _RATE_SECONDS = 1000.0, 60.0


class TooSlow(OSError):
    """A file arrives at less than the least rate."""


class RemoteFile:
    """An opened remote file."""

    def __init__(
        self, source: Any, start: int = 0, size: int | None = None, version: str = "", chunk_size: int = 1 << 20
    ) -> None:
        """Args:
        start: offset in the file of the first byte that is read.
        size: size of the whole file; None if unknown.
        version: ETag or the like, which changes with the file; '' if the server has none.
        chunk_size: bytes to request per read.
        """
        self.start, self.size, self.version, self.chunk_size = start, size, version, chunk_size
        # What has arrived, if the source can do that: else a slow one would be waited for without end.
        self._read = getattr(source, "read1", source.read)
        self._since, self._bytes = time.monotonic(), 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end of the file.

        Raises:
            TooSlow: it arrives at less than the least rate.
        """
        parts, missing = [], size
        while missing and (part := self._read(missing)):
            parts.append(part)
            missing -= len(part)
            self._check_rate(len(part))
        return b"".join(parts)

    def _check_rate(self, count: int) -> None:
        self._bytes += count
        seconds = time.monotonic() - self._since
        if seconds >= _RATE_SECONDS:
            if self._bytes < _LEAST_RATE * seconds:
                raise TooSlow(f"only {self._bytes:,} bytes arrived in {seconds:.0f} s")
            self._since, self._bytes = time.monotonic(), 0


@contextlib.contextmanager
def open_remote(location: str, offset: int, version: str, timeout: float) -> Iterator[RemoteFile]:
    """Yields the file from `offset` on if it still has this version, else from its beginning.

    Raises:
        OSError: of any kind; FileNotFoundError or PermissionError if a retry is pointless.
    """
    try:
        if location.startswith(PIPE):
            with _open_pipe(location.removeprefix(PIPE), timeout) as source:
                yield RemoteFile(source)
        elif is_http(location):
            with _open_http(location, offset, version, timeout) as file:
                yield file
        else:
            files, path = fsspec().core.url_to_fs(location)
            current_version = str(files.ukey(path))
            start = offset if current_version == version else 0
            with files.open(path, "rb", cache_type="none") as source:
                source.seek(start)
                # Each read is a separate request, so chunks are large.
                yield RemoteFile(source, start, source.size, current_version, chunk_size=1 << 24)
    except (OSError, GeneratorExit):
        raise
    except Exception as error:  # each store and each HTTP layer has its own kinds
        reason = "".join(one if one.isprintable() else " " for one in f"{type(error).__name__}: {error}")
        raise OSError(reason.strip()) from error


@contextlib.contextmanager
def _open_http(location: str, offset: int, version: str, timeout: float) -> Iterator[RemoteFile]:
    # Without a version, the rest might be that of another file.
    headers = {"Range": f"bytes={offset}-", "If-Range": version} if offset and version else {}
    request = urllib.request.Request(location, headers=headers)  # noqa: S310
    try:
        with http_opener().open(request, timeout=timeout) as response:
            etag = response.headers.get("ETag", "")
            is_weak = not etag or etag.startswith("W/")  # not valid in If-Range
            current_version = response.headers.get("Last-Modified", "") if is_weak else etag
            yield RemoteFile(response, *_range_of(response, offset if headers else 0), current_version)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset and error.headers.get("Content-Range") == f"bytes */{offset}":
            yield RemoteFile(io.BytesIO(), offset, offset, version)  # nothing is missing
        elif error.code in (206, 416) and offset:
            with _open_http(location, 0, "", timeout) as file:
                yield file
        elif error.code in (404, 410):
            raise FileNotFoundError(f"{location} does not exist (HTTP {error.code})") from None
        elif error.code in (401, 403):
            raise PermissionError(f"no permission to read {location} (HTTP {error.code})") from None
        elif 400 <= error.code < 500 and error.code not in RETRIED_STATUS:
            raise PermissionError(f"{location} is refused (HTTP {error.code})") from None
        else:
            raise OSError(f"HTTP {error.code}") from None


def _range_of(response: Any, offset: int) -> tuple[int, int | None]:
    """(offset in the file of the response's first byte, size of the file); the size is None if unknown.

    Raises:
        HTTPError: the response is a part of the file that was not asked for.
    """
    if response.status != 206:
        return 0, response.length
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if not found or int(found[1]) != offset:
        raise urllib.error.HTTPError(response.url, 206, "a part that was not asked for", response.headers, None)
    return offset, int(found[2])


@contextlib.contextmanager
def _open_pipe(command: str, timeout: float) -> Iterator["_Pipe"]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:  # noqa: S602 (data.allow_pipe)
        assert process.stdout is not None
        try:
            yield _Pipe(process.stdout.fileno(), timeout)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise OSError(f"the command ended with status {process.returncode}: {command}")


class _Pipe:
    """A command's output; a read fails if nothing is printed for `timeout` seconds."""

    def __init__(self, file: int, timeout: float) -> None:
        self._file, self._timeout = file, timeout

    def read(self, size: int) -> bytes:
        if not select.select([self._file], [], [], self._timeout)[0]:
            raise OSError(f"the command printed nothing for {self._timeout:g} s")
        return os.read(self._file, size)


def fsspec() -> Any:
    """The fsspec module, imported only when a remote store is used."""
    import fsspec

    return fsspec
