"""The bytes of a remote file from any place on: http(s), whatever fsspec knows, commands where they are allowed."""

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

from mmrl.data.fetch import opener

PIPE = "pipe:"


@dataclass(frozen=True)
class Span:
    """What a source is about to give."""

    start: int
    """Its first byte's place in the file."""
    size: int | None
    """The whole file's, where that is known."""
    version: str = ""
    """Differs when the file does; '' where the store does not tell."""
    piece: int = 1 << 20
    """So many bytes are best asked for at once."""


@contextlib.contextmanager
def opened(location: str, have: int, version: str, timeout: float) -> Iterator[tuple[Any, Span]]:
    """The bytes of a location from `have` on if it still is of that version, else from its beginning.

    Raises:
        OSError: of any kind; FileNotFoundError or PermissionError where asking again is of no use.
    """
    try:
        if location.startswith(PIPE):
            with _piped(location.removeprefix(PIPE), timeout) as source:
                yield source, Span(0, None)
        elif location.lower().startswith(("http://", "https://")):
            with _http(location, have, version, timeout) as (source, span):
                yield source, span
        else:
            files, path = fsspec().core.url_to_fs(location)
            now = str(files.ukey(path))
            start = have if now == version else 0
            # Each read is a request of its own there, so pieces are large.
            with files.open(path, "rb", cache_type="none") as source:
                source.seek(start)
                yield source, Span(start, source.size, now, piece=1 << 24)
    except (OSError, GeneratorExit):
        raise
    except Exception as error:  # each store and each HTTP layer has its own kinds
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _http(location: str, have: int, version: str, timeout: float) -> Iterator[tuple[Any, Span]]:
    # Without a version, a rest could be that of another file.
    rest = {"Range": f"bytes={have}-", "If-Range": version} if have and version else {}
    request = urllib.request.Request(location, headers=rest)  # noqa: S310
    try:
        with opener().open(request, timeout=timeout) as answer:
            length, headers = answer.headers.get("Content-Length"), answer.headers
            start = have if answer.status == 206 else 0
            tag = headers.get("ETag", "")
            now = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
            yield answer, Span(start, None if length is None else start + int(length), now)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            yield io.BytesIO(), Span(have, have, version)  # it was all here
        elif error.code == 416:
            with _http(location, 0, "", timeout) as (source, span):
                yield source, span
        elif error.code in (404, 410):
            raise FileNotFoundError(f"{location} does not exist (HTTP {error.code})") from None
        elif error.code in (401, 403):
            raise PermissionError(f"{location} may not be read (HTTP {error.code})") from None
        else:
            raise OSError(f"HTTP {error.code}") from None


@contextlib.contextmanager
def _piped(command: str, timeout: float) -> Iterator["_Pipe"]:
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
    """What a command prints, so long as it goes on printing."""

    def __init__(self, file: int, timeout: float) -> None:
        self._file, self._timeout = file, timeout

    def read(self, size: int) -> bytes:
        if not select.select([self._file], [], [], self._timeout)[0]:
            raise OSError(f"the command printed nothing for {self._timeout:g} s")
        return os.read(self._file, size)


def fsspec() -> Any:
    """The module; local shards need none of it."""
    import fsspec

    return fsspec
