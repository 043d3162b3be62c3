"""Pictures that a table names by their addresses, from a server of the test's own."""

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
from mmrl.data.pack.command import pack


class Shop(BaseHTTPRequestHandler):
    """Pictures 0.png, 1.png, …, and all that can go wrong with one; `asked` counts the requests of each path."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        name = self.path.partition("?")[0].strip("/").rpartition("/")[2].partition(".")[0]
        number = int(name) if name.isdigit() else 0
        data = encoded(drawing(number)[0])
        match name:
            case "gone":
                self.send_error(404)
            case "moody" if self.asked[self.path] == 1:
                self.send_error(500)
            case "down":
                self.send_error(503)
            case "elsewhere":
                self.answer(b"", 302, Location="/real/7.png")
            case "circle":
                self.answer(b"", 302, Location=self.path)
            case "secret":
                self.answer(b"", 302, Location="file:///etc/hostname")
            case "mute" if self.asked[self.path] == 1:
                self.close_connection = True
            case "cut":
                self.answer(data[:-100], length=len(data))
            case "text":
                self.answer(b"<html>no picture</html>")
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
    """The server's address; waits between tries are none."""
    monkeypatch.setattr(fetch, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Shop.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def listing(path: Path, addresses: list[str]) -> Path:
    """A table of these addresses with a caption each."""
    write_csv(path, [{"url": address, "caption": f"caption {number}"} for number, address in enumerate(addresses)])
    return path


def test_addresses_are_fetched_in_the_order_of_the_table(shop: str, tmp_path: Path) -> None:
    put(tmp_path / "9.png", encoded(drawing(9)[0]))
    addresses = [f"{shop}/p/{number}.jpg?w=80" for number in range(8)]
    addresses += ["9.png", f"{shop}/p/1.jpg", f" {shop}/", f"{shop}/a b/é.png", f"{shop}/..%2f5", shop.upper()]
    table = listing(tmp_path / "t.csv", addresses)
    result = pack(table, tmp_path / "out", image_column="url", quiet=True)
    assert result["bad"] == {}
    found = members(tmp_path / "out")
    keys = [name.partition(".")[0] for name in found if name.endswith(".png")]
    assert keys == [*(f"p_{number}" for number in range(8)), "9", "p_1-2", "_", "a_b_é", "5", "_-2"]
    assert found["p_3.png"] == encoded(drawing(3)[0])  # named by what it is, not by its address
    assert found["9.txt"] == b"caption 8"
    assert found["5.png"] == encoded(drawing(0)[0])


def test_workers_fetch_the_same(shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = listing(tmp_path / "t.csv", [f"{shop}/{n % 7}.png" if n % 5 else f"{shop}/gone/{n}" for n in range(20)])
    for workers in (1, 2):
        monkeypatch.setattr(prepare, "AT_ONCE", 3)
        pack(table, tmp_path / str(workers), image_column="url", samples_per_shard=4, workers=workers, quiet=True)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_what_may_pass_is_tried_again(shop: str, tmp_path: Path) -> None:
    table = listing(tmp_path / "t.csv", [f"{shop}/moody", f"{shop}/mute", f"{shop}/elsewhere"])
    result = pack(table, tmp_path / "out", image_column="url", quiet=True)
    assert (result["samples"], result["bad"]) == (3, {})
    assert members(tmp_path / "out")["elsewhere.png"] == encoded(drawing(7)[0])
    assert Shop.asked["/moody"] == Shop.asked["/mute"] == 2


def test_dead_addresses_are_counted_and_listed(
    shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "MAX_BYTES", 150_000)
    bad = {
        f"{shop}/gone": "HTTP 404",
        f"{shop}/down": "HTTP 503",
        f"{shop}/circle": "HTTP 302, redirected in a circle or to what is no http address",
        f"{shop}/secret": "HTTP 302, redirected in a circle or to what is no http address",
        f"{shop}/large": "more than 0 MB",
        f"{shop}/endless": "more than 0 MB",
        "http://127.0.0.1:1/a.png": "Connection refused",
        "http://[::1/a.png": "no valid address",
        "http://user:word@127.0.0.1:x/a.png": "no valid address",
        "http://a..b/x.png": "no valid address",
        "http:///x.png": "no host given",
    }
    table = listing(tmp_path / "t.csv", [*bad, f"{shop}/cut", f"{shop}/text", f"{shop}/5.png"])
    result = pack(table, tmp_path / "out", image_column="url")
    assert result["samples"] == 1
    assert result["bad"] == {"missing image": len(bad) + 1, "unreadable image": 1}
    reasons = [line["reason"] for line in bad_lines(tmp_path / "out")]
    for (address, why), reason in zip(bad.items(), reasons, strict=False):
        assert reason.startswith(f"missing image: {address} cannot be fetched (")
        assert why in reason
    size = len(encoded(drawing(0)[0]))
    assert f"(cut after {size - 100:,} of {size:,} bytes)" in reasons[len(bad)]
    assert reasons[-1].startswith(f"unreadable image: {shop}/text: no picture")
    assert (Shop.asked["/gone"], Shop.asked["/down"], Shop.asked["/cut"], Shop.asked["/large"]) == (1, 3, 3, 1)
    assert f"such as gone: missing image: {shop}/gone cannot be fetched (HTTP 404)" in capsys.readouterr().out


def test_nothing_is_fetched_for_a_column_that_nobody_named(shop: str, tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    write_csv(tmp_path / "t.csv", [{"image": "a.png", "text": "x"}, {"image": f"{shop}/1.png", "text": "y"}])
    assert pack(tmp_path / "t.csv", tmp_path / "out", quiet=True)["bad"] == {"missing image": 1}
    assert not Shop.asked
    assert pack(tmp_path / "t.csv", tmp_path / "named", image_column="image", quiet=True)["samples"] == 2


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_other_schemes_have_no_door(scheme: str) -> None:
    with pytest.raises(fetch.Unfetched, match="unknown url type"):
        fetch.fetch(f"{scheme}://localhost/etc/hostname")


def test_a_server_that_only_trickles_is_given_up(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LONGEST", -1.0)
    with pytest.raises(fetch.Unfetched, match="not all there after"):
        fetch.fetch(f"{shop}/1.png")
