"""A web server of a folder that fails in the ways that real ones do."""

import http.server
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Serves a folder; a share of the answers is an error, ends early, or stalls."""

    folder: Path
    seen: Counter[str]
    rng: np.random.Generator
    troubles: float
    with_ranges: bool
    made: Counter[str]

    def do_GET(self) -> None:
        self.seen[self.path] += 1
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        trouble = self.rng.random() < self.troubles
        kind = self.rng.integers(3) if trouble else -1
        self.made["trouble"] += trouble
        if kind == 0 or self.made["nothing"]:
            self.send_error(500)
            return
        data = path.read_bytes()
        version = f'"{path.stat().st_mtime_ns}"'
        is_same = self.headers.get("If-Range", version) == version
        asked = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        start = int(asked) if self.with_ranges and is_same else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
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
        self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class Server:
    """An unreliable server of a folder, and what was asked of it."""

    def __init__(self, folder: Path, troubles: float = 0.0, with_ranges: bool = True) -> None:
        self.seen: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        facts = {"folder": folder, "seen": self.seen, "made": self.made, "rng": np.random.default_rng(0)}
        handler = type("Handler", (Unreliable,), {**facts, "troubles": troubles, "with_ranges": with_ranges})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answers_nothing(self) -> None:
        self.made["nothing"] = 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
