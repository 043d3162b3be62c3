"""Open a remote file for reading from a byte offset: http(s), any fsspec filesystem, and `pipe:` commands."""

import contextlib
import io
import os
import select
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmrl.data.fetch import http_opener

PIPE = "pipe:"


@dataclass(frozen=True)
class Transfer:
    """What an opened remote file will deliver."""

    start: int
    """Offset in the file of the first byte that is read."""
    size: int | None
    """Size of the whole file; None if unknown."""
    version: str = ""
    """ETag or the like, which changes with the file; '' if the server has none."""
    chunk_size: int = 1 << 20
    """Bytes to request per read."""


@contextlib.contextmanager
def open_remote(location: str, offset: int, version: str, timeout: float) -> Iterator[tuple[Any, Transfer]]:
    """Yields the file from `offset` on if it still has this version, else from its beginning.

    Raises:
        OSError: of any kind; FileNotFoundError or PermissionError if a retry is pointless.
    """
    try:
        if location.startswith(PIPE):
            with _open_pipe(location.removeprefix(PIPE), timeout) as source:
                yield source, Transfer(0, None)
        elif location.lower().startswith(("http://", "https://")):
            with _open_http(location, offset, version, timeout) as (source, transfer):
                yield source, transfer
        else:
            files, path = fsspec().core.url_to_fs(location)
            current_version = str(files.ukey(path))
            start = offset if current_version == version else 0
            # Each read is a separate request, so chunks are large.
            with files.open(path, "rb", cache_type="none") as source:
                source.seek(start)
                yield source, Transfer(start, source.size, current_version, chunk_size=1 << 24)
    except (OSError, GeneratorExit):
        raise
    except Exception as error:  # each store and each HTTP layer has its own kinds
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _open_http(location: str, offset: int, version: str, timeout: float) -> Iterator[tuple[Any, Transfer]]:
    # Without a version, the rest might be that of another file.
    headers = {"Range": f"bytes={offset}-", "If-Range": version} if offset and version else {}
    request = urllib.request.Request(location, headers=headers)  # noqa: S310
    try:
        with http_opener().open(request, timeout=timeout) as response:
            length, etag = response.headers.get("Content-Length"), response.headers.get("ETag", "")
            start = offset if response.status == 206 else 0
            is_weak = not etag or etag.startswith("W/")  # not valid in If-Range
            current_version = response.headers.get("Last-Modified", "") if is_weak else etag
            yield response, Transfer(start, None if length is None else start + int(length), current_version)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{offset}":
            yield io.BytesIO(), Transfer(offset, offset, version)  # nothing is missing
        elif error.code == 416:
            with _open_http(location, 0, "", timeout) as (source, transfer):
                yield source, transfer
        elif error.code in (404, 410):
            raise FileNotFoundError(f"{location} does not exist (HTTP {error.code})") from None
        elif error.code in (401, 403):
            raise PermissionError(f"no permission to read {location} (HTTP {error.code})") from None
        else:
            raise OSError(f"HTTP {error.code}") from None


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
