"""Hostile and broken web servers: nothing endless, nothing that was not asked for, no part taken for the whole."""

import http.server
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import sample_members, write_tar

from mmrl.data import download, stores, transport
from mmrl.data.index import index_shard
from mmrl.data.index_file import SUFFIX, save_index
from mmrl.data.sources import open_reader
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.errors import InputError

GIGABYTES = 2e-3
Handler = http.server.BaseHTTPRequestHandler
Answer = Callable[[Handler, bytes, int], None]


def headers(handler: Handler, status: int, **fields: object) -> None:
    handler.send_response(status)
    for name, value in fields.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()


def sound(handler: Handler, data: bytes, start: int) -> None:
    more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
    headers(handler, 206 if start else 200, Content_Length=len(data) - start, ETag='"1"', **more)
    handler.wfile.write(data[start:])


def endless(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200)
    while True:
        handler.wfile.write(bytes(1 << 16))


def endless_and_announced(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, Content_Length=1 << 40)
    while True:
        handler.wfile.write(bytes(1 << 16))


def endless_chunks(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, Transfer_Encoding="chunked")
    while True:
        handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def drip(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, Content_Length=len(data), ETag='"1"')
    for byte in data:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def unasked_first_half(handler: Handler, data: bytes, start: int) -> None:
    half = len(data) // 2
    headers(handler, 206, Content_Length=half, Content_Range=f"bytes 0-{half - 1}/{len(data)}")
    handler.wfile.write(data[:half])


def unasked_first_half_of_the_size(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 206, Content_Length=len(data) // 2)
    handler.wfile.write(data[: len(data) // 2])


def unasked_second_half(handler: Handler, data: bytes, start: int) -> None:
    half = len(data) // 2
    headers(handler, 206, Content_Length=half, Content_Range=f"bytes {half}-{len(data) - 1}/{len(data)}")
    handler.wfile.write(data[half:])


def cut_then(handler: Handler, data: bytes, start: int, shift: int | None) -> None:
    """Half of the file at first, and another part of it than is asked for when the rest is."""
    times = vars(handler.server).setdefault("times", Counter())
    times[handler.path] += 1
    if times[handler.path] == 1:
        headers(handler, 200, Content_Length=len(data), ETag='"1"')
        handler.wfile.write(data[: len(data) // 2])
        return
    if not start:
        sound(handler, data, start)
        return
    first = start + (shift or 0)
    more = {} if shift is None else {"Content_Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
    headers(handler, 206, Content_Length=len(data) - first, ETag='"1"', **more)
    handler.wfile.write(data[first:])


def wrong_offset(handler: Handler, data: bytes, start: int) -> None:
    cut_then(handler, data, start, shift=512)


def no_offset(handler: Handler, data: bytes, start: int) -> None:
    cut_then(handler, data, start, shift=None)


def cut_without_length(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200)
    handler.wfile.write(data[: len(data) // 2])


def cut_chunks(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, Transfer_Encoding="chunked")
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data[: len(data) // 2])


def whole_without_length(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200)
    handler.wfile.write(data)


def error_page(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, Content_Length=12)
    handler.wfile.write(b"<html> sorry")


def to_itself(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 302, Location=handler.path, Content_Length=0)


def to_a_local_file(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 302, Location="file:///etc/passwd", Content_Length=0)


def no_http(handler: Handler, data: bytes, start: int) -> None:
    handler.wfile.write(b"\0\1\2 hello\r\n\r\n")


def many_headers(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, **{f"X{n}": n for n in range(200)})


def negative_length(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, Content_Length=-5)
    handler.wfile.write(data)


def length_no_number(handler: Handler, data: bytes, start: int) -> None:
    headers(handler, 200, Content_Length="many")
    handler.wfile.write(data)


def refused(handler: Handler, data: bytes, start: int) -> None:
    handler.send_error(451)


# What a server does with a shard, or with one of the small files next to it, and what comes of the shard.
REFUSED: dict[Answer, str] = {
    endless: r"is larger than 0\.002 GB, which data\.remote\.gigabytes allows",
    endless_and_announced: r"is larger than 0\.002 GB, which data\.remote\.gigabytes allows",
    endless_chunks: r"is larger than 0\.002 GB, which data\.remote\.gigabytes allows",
    drip: r"only \d+ bytes arrived in",
    unasked_first_half_of_the_size: r"HTTP 206",
    unasked_first_half: r"the connection ended after [\d,]+ of [\d,]+ bytes",
    unasked_second_half: r"HTTP 206",
    cut_without_length: r"announced no length, and the connection ended after [\d,]+ bytes, inside the tar",
    cut_chunks: r"IncompleteRead",
    error_page: r"is not a plain tar",
    to_itself: r"HTTP 302|redirect",
    to_a_local_file: r"HTTP 302|redirect|unknown url type|not allowed",
    no_http: r"BadStatusLine|cannot be fetched",
    many_headers: r"got more than 100 headers",
    refused: r"is refused \(HTTP 451\)",
}
RECOVERED: list[Answer] = [
    sound, wrong_offset, no_offset, whole_without_length, negative_length, length_no_number,
]  # fmt: skip


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "served" / "a.tar"
    return write_tar(path, [m for n in range(20) for m in sample_members(n)])


@pytest.fixture
def serve(shard: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    monkeypatch.setattr(download, "MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr(transport, "_RATE_SECONDS", 0.3)
    monkeypatch.setattr(stores, "_MOST_BYTES", 1 << 20)
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answers: dict[str, Answer]) -> str:
        class Hostile(Handler):
            def do_GET(self) -> None:
                path = shard.parent / self.path.lstrip("/")
                start = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0])[0])
                answer = next((answers[end] for end in answers if self.path.endswith(end)), sound)
                if answer is sound and not path.is_file():
                    self.send_error(404)
                    return
                try:
                    answer(self, path.read_bytes() if path.is_file() else b"", start)
                except OSError:  # the other end has had enough
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Logs nothing."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/a.tar"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def remote(tmp_path: Path) -> RemoteConfig:
    return RemoteConfig(folder=str(tmp_path / "cache"), gigabytes=GIGABYTES, retries=2, timeout=1)


def disk_use(tmp_path: Path) -> int:
    return sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())


@pytest.mark.parametrize("answer", REFUSED)
def test_a_shard_that_cannot_be_had_is_one_sentence(answer: Answer, serve: Callable[..., str], tmp_path: Path) -> None:
    url, began = serve({".tar": answer}), time.monotonic()
    with pytest.raises(InputError, match=rf"(?s)^shards: {url} .*({REFUSED[answer]})") as caught:
        open_reader(url, remote=remote(tmp_path))
    assert "\n" not in str(caught.value).strip()
    assert time.monotonic() - began < 20
    assert disk_use(tmp_path) <= GIGABYTES * 1e9 + (1 << 20)


@pytest.mark.parametrize("answer", RECOVERED)
def test_a_shard_that_can_be_had_is_whole(
    answer: Answer, shard: Path, serve: Callable[..., str], tmp_path: Path
) -> None:
    url = serve({".tar": answer})
    with os.fdopen(ShardCache(remote(tmp_path)).open(url), "rb") as file:
        assert file.read() == shard.read_bytes()
    assert len(open_reader(url, remote=remote(tmp_path))) == 20


@pytest.mark.parametrize("ending", [SUFFIX, "sizes.json", "_stats.json"])
@pytest.mark.parametrize("answer", [one for one in [*REFUSED, *RECOVERED] if one is not sound])
def test_small_files_next_to_a_shard_do_no_harm(
    answer: Answer, ending: str, shard: Path, serve: Callable[..., str], tmp_path: Path
) -> None:
    """They give the right number, or the shard is counted, or one sentence says what is wrong with them."""
    save_index(index_shard(shard), Path(f"{shard}{SUFFIX}"))
    (shard.parent / "sizes.json").write_text(json.dumps({"a.tar": 20}))
    (shard.parent / "a_stats.json").write_text(json.dumps({"successes": 20}))
    others = {one: refused for one in (SUFFIX, "sizes.json", "_stats.json") if one != ending}
    url, began = serve({ending: answer, **others}), time.monotonic()
    try:
        reader = open_reader(url, remote=remote(tmp_path))
    except InputError as error:
        assert re.search(r"^shards: http://\S+ (cannot be read \(.*\)|is not a list of|is not a file of)", str(error))  # noqa: PT017
    else:
        assert Counter(reader.read(row).name for row in range(20)) == {f"a.tar/{n:05}": 1 for n in range(20)}
    assert time.monotonic() - began < 20
    assert disk_use(tmp_path) <= GIGABYTES * 1e9
