"""Clients that send or read slowly, or send much at once, hold up neither other clients nor memory."""

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from helpers.server import serving_app

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from mmrl.search import connections, limits
from mmrl.search.app import create_app

OPENED: list[socket.socket] = []
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


class ZeroEncoder:
    """An encoder of large vectors, which takes no time."""

    towers, dim, nested_dims = ("image", "text"), 1024, (1024,)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.zeros((len(texts), self.dim), np.float32)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Any]]:
    """The port of a server of small limits, and the server."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connections, "CLIENT_TIMEOUT_S", 0.4)
    monkeypatch.setattr(limits, "MAX_UPLOAD_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "MAX_BODIES_BYTES", 2 << 20)
    monkeypatch.setattr(limits, "_PATIENCE_S", 0.1)
    with serving_app(create_app(ZeroEncoder(), ["*"])) as (url, server):  # pyright: ignore[reportArgumentType]
        yield int(url.rpartition(":")[2]), server
        while OPENED:
            OPENED.pop().close()


def connect(port: int, data: bytes = b"") -> socket.socket:
    OPENED.append(socket.create_connection(("127.0.0.1", port), timeout=10))
    OPENED[-1].sendall(data)
    return OPENED[-1]


def is_open(client: socket.socket) -> bool:
    """Whether the server has neither answered nor closed the connection."""
    client.setblocking(False)
    try:
        client.sendall(b"x")
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def embed(port: int, text: str = "red") -> int:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    client.request("POST", "/v1/embeddings", json.dumps({"input": text}), {"Content-Type": "application/json"})
    with closing(client), client.getresponse() as response:
        response.read()
        return response.status


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("data", [b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\n{"], ids=["idle", "header", "body"])
def test_waiting_connections_shut_out_nobody(server: tuple[int, Any], data: bytes) -> None:
    port, _ = server
    for _ in range(30):
        connect(port, data)
    began = time.monotonic()
    assert [embed(port) for _ in range(5)] == [200] * 5
    assert time.monotonic() - began < 5


def test_a_slow_header_is_not_awaited(server: tuple[int, Any]) -> None:
    port, running = server
    slow, began = connect(port, HEAD), time.monotonic()
    wait_until(lambda: not is_open(slow))  # a byte of the header at a time
    assert 0.2 < time.monotonic() - began < 3
    wait_until(lambda: not running.server_state.connections)


def test_a_response_that_is_not_read_is_given_up(server: tuple[int, Any]) -> None:
    port, running = server
    body = json.dumps({"input": ["red"] * 2000}).encode()
    connect(port, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    wait_until(lambda: running.server_state.total_requests == 1)
    wait_until(lambda: not running.server_state.connections)
    assert embed(port) == 200


def test_large_bodies_that_do_not_arrive_give_way(server: tuple[int, Any]) -> None:
    port, _ = server
    for _ in range(4):
        connect(port, HEAD + b"Content-Length: 1000000\r\n\r\n{")
    began = time.monotonic()
    assert embed(port, "x" * 900_000) == 400  # a text is shorter; but the body was read
    assert time.monotonic() - began < 5


def test_large_bodies_wait_for_memory() -> None:
    """60 at once: never more than MAX_BODIES_BYTES are held, and all are answered."""
    held, most = 0, 0

    async def run() -> None:
        memory = limits._Bodies()

        async def request() -> None:
            nonlocal held, most
            async with memory.reserved(limits.MAX_UPLOAD_BYTES):
                held += limits.MAX_UPLOAD_BYTES
                most = max(most, held)
                await asyncio.sleep(0.001)
                held -= limits.MAX_UPLOAD_BYTES

        await asyncio.gather(*(request() for _ in range(60)))

    asyncio.run(run())
    assert most == limits.MAX_BODIES_BYTES


def test_a_body_that_finds_no_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_READ_TIMEOUT_S", 0.05)

    async def run() -> None:
        memory = limits._Bodies()
        async with memory.reserved(limits.MAX_BODIES_BYTES):
            with pytest.raises(limits.HTTPException, match="Too many large requests at once"):
                async with memory.reserved(1):
                    pass
        async with memory.reserved(limits.MAX_BODIES_BYTES):
            pass

    asyncio.run(run())
