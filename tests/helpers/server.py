"""A local web server of a folder that simulates network failures, and the server of `mmrl serve` in a thread."""

import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class _FlakyHandler(http.server.BaseHTTPRequestHandler):
    """Serves a folder; a random fraction of the responses is an error, is cut, or stalls."""

    folder: Path
    requests: Counter[str]
    sent: Counter[str]
    rng: np.random.Generator
    failure_rate: float
    with_ranges: bool
    failures: Counter[str]
    gate: Callable[[str], None]
    link: "Link | None"

    def do_GET(self) -> None:
        self.requests[self.path] += 1
        self.gate(self.path)
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        fails = self.rng.random() < self.failure_rate
        kind = self.rng.integers(3) if fails else -1
        self.failures["failed"] += fails
        if kind == 0 or self.failures["always"]:
            self.send_error(500)
            return
        data = path.read_bytes()
        version = f'"{path.stat().st_mtime_ns}"'
        is_same = self.headers.get("If-Range", version) == version
        offset = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        start = int(offset) if self.with_ranges and is_same else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", version)
        self.end_headers()
        rest = data[start:]
        if kind == 1:
            rest = rest[: len(rest) // 2]
        if kind == 2:
            self.wfile.write(rest[:1000])
            self.wfile.flush()
            time.sleep(0.7)
            return
        for piece in self.link.pieces(rest) if self.link else [rest]:
            self.wfile.write(piece)
        self.sent[self.path] += len(rest)

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""


class Link:
    """A network of a limited rate, which all connections share, with a lower limit for each of them."""

    def __init__(self, rate: float, rate_of_connection: float, latency: float) -> None:
        """Rates in bytes per second; each answer begins `latency` seconds late."""
        self.rate, self.rate_of_connection, self.latency = rate, rate_of_connection, latency
        self._lock, self._free_at = threading.Lock(), 0.0

    def pieces(self, data: bytes, size: int = 1 << 16) -> Iterator[bytes]:
        """The data in pieces, each when the link has room for it."""
        time.sleep(self.latency)
        sent_at = time.monotonic()
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            with self._lock:
                self._free_at = max(self._free_at, time.monotonic()) + len(piece) / self.rate
                link_at = self._free_at
            sent_at = max(sent_at + len(piece) / self.rate_of_connection, link_at)
            time.sleep(max(0.0, sent_at - time.monotonic()))
            yield piece


class Server:
    """A running flaky server; `requests` counts requests per path, and `sent` the bytes of their answers."""

    def __init__(
        self,
        folder: Path,
        failure_rate: float = 0.0,
        with_ranges: bool = True,
        gate: Callable[[str], None] = lambda _: None,
        link: Link | None = None,
    ) -> None:
        """`gate` is called with the path of each request before it is answered."""
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        attributes = {
            "folder": folder,
            "requests": self.requests,
            "sent": self.sent,
            "failures": self.failures,
            "rng": np.random.default_rng(0),
            "failure_rate": failure_rate,
            "with_ranges": with_ranges,
            "gate": staticmethod(gate),
            "link": link,
        }
        handler = type("Handler", (_FlakyHandler,), attributes)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fail_always(self) -> None:
        self.failures["always"] = 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving_app(app: Any) -> Iterator[tuple[str, Any]]:
    """The address of `mmrl serve`'s server of an application, and the server."""
    from mmrl.search.serve import make_server, open_listener

    with open_listener("127.0.0.1", 0) as listener:
        server = make_server(app)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join()
