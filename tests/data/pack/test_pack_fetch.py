"""Images that a table names by URL, from a local test server."""

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import drawing, encoded
from helpers.pack_sources import bad_lines, files, members, put, write_csv

from mmrl.data import fetch
from mmrl.data.pack import prepare
from mmrl.data.pack.command import pack_shards


class Shop(BaseHTTPRequestHandler):
    """Serves images 0.png, 1.png, … and every kind of failure; `requests` counts the requests per path."""

    requests: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.requests[self.path] += 1
        name = self.path.partition("?")[0].strip("/").rpartition("/")[2].partition(".")[0]
        number = int(name) if name.isdigit() else 0
        data = encoded(drawing(number)[0])
        match name:
            case "gone":
                self.send_error(404)
            case "flaky" if self.requests[self.path] == 1:
                self.send_error(500)
            case "down":
                self.send_error(503)
            case "elsewhere":
                self.answer(b"", 302, Location="/real/7.png")
            case "circle":
                self.answer(b"", 302, Location=self.path)
            case "secret":
                self.answer(b"", 302, Location="file:///etc/hostname")
            case "mute" if self.requests[self.path] == 1:
                self.close_connection = True
            case "cut":
                self.answer(data[:-100], length=len(data))
            case "text":
                self.answer(b"<html>not an image</html>")
            case "large":
                self.answer(data, length=10**9)
            case "endless":
                self.answer(bytes(200_000), length=None)
            case _:
                self.answer(data)

    def answer(self, data: bytes, code: int = 200, length: int | None = -1, **headers: str) -> None:
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(len(data) if length == -1 else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server's URL; retries are made without a delay."""
    monkeypatch.setattr(fetch, "RETRY_DELAYS", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Shop.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def url_table(path: Path, urls: list[str]) -> Path:
    """A table of these URLs, each with a caption."""
    write_csv(path, [{"url": url, "caption": f"caption {number}"} for number, url in enumerate(urls)])
    return path


def test_urls_are_fetched_in_the_order_of_the_table(shop: str, tmp_path: Path) -> None:
    put(tmp_path / "9.png", encoded(drawing(9)[0]))
    urls = [f"{shop}/p/{number}.jpg?w=80" for number in range(8)]
    urls += ["9.png", f"{shop}/p/1.jpg", f" {shop}/", f"{shop}/a b/é.png", f"{shop}/..%2f5", shop.upper()]
    table = url_table(tmp_path / "t.csv", urls)
    result = pack_shards(table, tmp_path / "out", image_column="url", quiet=True)
    assert result["bad"] == {}
    found = members(tmp_path / "out")
    keys = [name.partition(".")[0] for name in found if name.endswith(".png")]
    assert keys == [*(f"p_{number}" for number in range(8)), "9", "p_1-2", "_", "a_b_é", "5", "_-2"]
    assert found["p_3.png"] == encoded(drawing(3)[0])  # the extension of its format, not of its URL
    assert found["9.txt"] == b"caption 8"
    assert found["5.png"] == encoded(drawing(0)[0])


def test_workers_fetch_the_same(shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = url_table(tmp_path / "t.csv", [f"{shop}/{n % 7}.png" if n % 5 else f"{shop}/gone/{n}" for n in range(20)])
    for workers in (1, 2):
        monkeypatch.setattr(prepare, "CHUNK", 3)
        pack_shards(
            table, tmp_path / str(workers), image_column="url", samples_per_shard=4, workers=workers, quiet=True
        )
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_temporary_failures_are_retried(shop: str, tmp_path: Path) -> None:
    table = url_table(tmp_path / "t.csv", [f"{shop}/flaky", f"{shop}/mute", f"{shop}/elsewhere"])
    result = pack_shards(table, tmp_path / "out", image_column="url", quiet=True)
    assert (result["samples"], result["bad"]) == (3, {})
    assert members(tmp_path / "out")["elsewhere.png"] == encoded(drawing(7)[0])
    assert Shop.requests["/flaky"] == Shop.requests["/mute"] == 2


def test_dead_urls_are_counted_and_listed(
    shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 150_000)
    bad = {
        f"{shop}/gone": "HTTP 404",
        f"{shop}/down": "HTTP 503",
        f"{shop}/circle": "HTTP 302, a redirect loop or a redirect to another scheme",
        f"{shop}/secret": "HTTP 302, a redirect loop or a redirect to another scheme",
        f"{shop}/large": "more than 0 MiB",
        f"{shop}/endless": "more than 0 MiB",
        "http://127.0.0.1:1/a.png": "Connection refused",
        "http://[::1/a.png": "invalid URL",
        "http://user:word@127.0.0.1:x/a.png": "invalid URL",
        "http://a..b/x.png": "invalid URL",
        "http:///x.png": "no host given",
    }
    table = url_table(tmp_path / "t.csv", [*bad, f"{shop}/cut", f"{shop}/text", f"{shop}/5.png"])
    result = pack_shards(table, tmp_path / "out", image_column="url")
    assert result["samples"] == 1
    assert result["bad"] == {"missing image": len(bad) + 1, "unreadable image": 1}
    reasons = [line["reason"] for line in bad_lines(tmp_path / "out")]
    for (url, why), reason in zip(bad.items(), reasons, strict=False):
        assert reason.startswith(f"missing image: {url} cannot be fetched (")
        assert why in reason
    size = len(encoded(drawing(0)[0]))
    assert f"(connection cut after {size - 100:,} of {size:,} bytes)" in reasons[len(bad)]
    assert reasons[-1].startswith(f"unreadable image: {shop}/text: ")
    assert [Shop.requests[path] for path in ("/gone", "/down", "/cut", "/large")] == [1, 3, 3, 1]
    assert f"e.g. gone: missing image: {shop}/gone cannot be fetched (HTTP 404)" in capsys.readouterr().out


def test_nothing_is_fetched_unless_the_column_is_named(shop: str, tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    write_csv(tmp_path / "t.csv", [{"image": "a.png", "text": "x"}, {"image": f"{shop}/1.png", "text": "y"}])
    assert pack_shards(tmp_path / "t.csv", tmp_path / "out", quiet=True)["bad"] == {"missing image": 1}
    assert not Shop.requests
    assert pack_shards(tmp_path / "t.csv", tmp_path / "named", image_column="image", quiet=True)["samples"] == 2


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_other_url_schemes_are_refused(scheme: str) -> None:
    with pytest.raises(fetch.FetchError, match="unknown url type"):
        fetch.fetch(f"{scheme}://localhost/etc/hostname")


def test_a_slow_server_times_out(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TOTAL_TIMEOUT", -1.0)
    with pytest.raises(fetch.FetchError, match="incomplete after"):
        fetch.fetch(f"{shop}/1.png")
