"""Rank 0's side of the heartbeat: listens to all ranks and tells them of the first one that is lost.

The messages are described in heartbeat.py. Nothing that a connection sends is parsed before it has proved that it knows
the run's key.
"""

import contextlib
import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BEAT_S = 1.0
GRACE_S = 5.0
RECEIVED_BYTES, NONCE_BYTES = 4096, 16
# Importing libraries or writing a checkpoint can block the heartbeat thread for seconds, so that the timeout is longer
# in any phase other than these.
_STEP_PHASES, _OTHER_PHASES_FACTOR = ("loading data", "training"), 4
_HELLO = struct.Struct("!I32s")  # rank, HMAC
# Connections that have not proved yet that they belong to the run.
_MAX_STRANGERS, _STRANGER_S = 1024, 10.0
# Forked data workers inherit these sockets; open copies would keep a connection alive after its rank has died.
SOCKETS: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [one.close() for one in SOCKETS])


@dataclass(eq=False)
class _Stranger:
    """A connection that has not proved yet that it belongs to the run."""

    nonce: bytes
    received: bytes = b""
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _PeerState:
    """What the coordinator knows about one rank."""

    rank: int
    connection: socket.socket | None = None
    frames: "Frames" = field(default_factory=lambda: Frames())
    last_heard: float = field(default_factory=time.monotonic)
    progress: dict[str, Any] = field(default_factory=lambda: {"step": 0, "doing": "starting"})
    left: bool = False


class Coordinator(threading.Thread):
    """Rank 0's thread that listens to all peers and tells them of the first loss."""

    def __init__(self, hosts: list[str], lost_after_s: float, progress: Callable[[], dict[str, Any]]) -> None:
        super().__init__(name="heartbeat-coordinator", daemon=True)
        self._hosts, self._lost_after_s, self._progress = hosts, lost_after_s, progress
        self.key = secrets.token_bytes(32)
        self.address, self._server = _listen(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        self._server.setblocking(False)
        SOCKETS.add(self._server)
        self.port: int = self._server.getsockname()[1]
        self._peers = [_PeerState(rank) for rank in range(len(hosts))]
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._stopping = threading.Event()
        self._stopping_since = 0.0
        self._loss: str | None = None

    def run(self) -> None:
        next_echo = 0.0
        while not self._finished():
            self._handle_events()
            now = time.monotonic()
            if self._loss is None:
                self._check_timeouts(now)
            for connection in [one for one, stranger in self._strangers.items() if now - stranger.since > _STRANGER_S]:
                self._close(connection)
            if now >= next_echo:
                next_echo = now + BEAT_S
                for peer in self._peers:
                    self._send(peer, {})
        for connection in [*self._strangers, *(one.connection for one in self._peers if one.connection)]:
            connection.close()
        self._server.close()
        self._selector.close()

    def stop(self) -> None:
        """Waits up to a few seconds until all peers have left, then closes the connections."""
        self._stopping.set()
        self.join(GRACE_S + 2 * BEAT_S)

    def _finished(self) -> bool:
        if not self._stopping.is_set():
            self._stopping_since = time.monotonic()
            return False
        waited = time.monotonic() - self._stopping_since
        return all(peer.left for peer in self._peers) or waited > (BEAT_S if self._loss else GRACE_S)

    def _handle_events(self) -> None:
        for key, _ in self._selector.select(timeout=BEAT_S / 4):
            connection: Any = key.fileobj
            if connection is self._server:
                self._accept()
            elif connection.fileno() >= 0:  # else `_accept` has just closed it
                self._receive(connection, key.data)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            SOCKETS.add(connection)
            if len(self._strangers) >= _MAX_STRANGERS:
                self._close(next(iter(self._strangers)))
            connection.setblocking(False)
            stranger = _Stranger(secrets.token_bytes(NONCE_BYTES))
            self._strangers[connection] = stranger
            self._selector.register(connection, selectors.EVENT_READ, stranger)
            connection.send(stranger.nonce)

    def _receive(self, connection: socket.socket, sender: _Stranger | _PeerState) -> None:
        try:
            received = connection.recv(RECEIVED_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if isinstance(sender, _Stranger):
            sender.received += received
            if not received:
                self._close(connection)
                return
            if len(sender.received) < _HELLO.size:
                return
            peer = self._authenticate(sender)
            if peer is None:
                self._close(connection)
                return
            del self._strangers[connection]
            self._selector.modify(connection, selectors.EVENT_READ, peer)
            peer.connection, received = connection, sender.received[_HELLO.size :]
        else:
            peer = sender
            if not received:
                self._close(connection)
                if not peer.left:
                    peer.left = True
                    self._declare_lost(peer, "disconnected: it was killed, or its connection was cut")
                return
        for message in peer.frames.feed(received):
            self._process(peer, message)

    def _authenticate(self, stranger: _Stranger) -> _PeerState | None:
        """The rank that a connection has proved to be; None if it is not a process of this run."""
        answer = stranger.received[: _HELLO.size]
        rank, _ = _HELLO.unpack(answer)
        known = hmac.compare_digest(answer, hello(self.key, stranger.nonce, rank))
        return self._peers[rank] if known and self._peers[rank].connection is None else None

    def _close(self, connection: socket.socket) -> None:
        self._strangers.pop(connection, None)
        self._selector.unregister(connection)
        connection.close()

    def _process(self, peer: _PeerState, message: dict[str, Any]) -> None:
        peer.last_heard = time.monotonic()
        if "leave" in message:
            peer.left = True
        elif "stopped" in message:
            peer.left = True
            self._declare_lost(peer, f"stopped: {message['stopped']}")
        else:
            peer.progress = message

    def _check_timeouts(self, now: float) -> None:
        for peer in self._peers:
            silence = now - peer.last_heard
            if not peer.left and silence > timeout_s(self._lost_after_s, peer.progress["doing"]):
                peer.left = True
                self._declare_lost(
                    peer, f"has sent no heartbeat for {silence:.0f} s: it, its host or its network connection hangs"
                )

    def _declare_lost(self, peer: _PeerState, how: str) -> None:
        """Tells all peers of the first loss, which is the cause. Later losses are its consequences."""
        if self._loss is not None:
            return
        # All ranks make the same steps, and this process's own step is up to date, not up to a second old.
        progress = max(peer.progress, self._progress(), key=lambda one: one["step"])
        where = f"step {progress['step'] + 1:,}, {progress['doing']}"
        self._loss = f"rank {peer.rank} on host {self._hosts[peer.rank]} {how} ({where})."
        for one in self._peers:
            self._send(one, {"lost": self._loss})

    def _send(self, peer: _PeerState, message: dict[str, Any]) -> None:
        if peer.connection is not None:
            with contextlib.suppress(OSError):  # a lost peer is detected by its silence
                peer.connection.send(frame(message))


def _listen(name: str) -> tuple[str | None, socket.socket]:
    """A listening socket on the one address that `name` has, and that address; on all addresses of this host, and None,
    if there are several, if it belongs to no interface (as that of a load balancer), or if other hosts resolve `name`
    to another address (as they do where /etc/hosts has 127.0.1.1 for the host's own name)."""
    with contextlib.suppress(OSError, ValueError):
        found = {(one[0], str(one[4][0])) for one in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)}
        [(family, address)] = found
        if not ipaddress.ip_address(address).is_loopback or name in (address, "localhost"):
            return address, socket.create_server((address, 0), family=family, backlog=4096)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return None, socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)


def hello(key: bytes, nonce: bytes, rank: int) -> bytes:
    """What a peer answers to the coordinator's nonce."""
    return _HELLO.pack(rank, hmac.digest(key, nonce + struct.pack("!I", rank), "sha256"))


def timeout_s(lost_after_s: float, doing: str) -> float:
    """Seconds of silence after which a rank in this phase is lost."""
    return lost_after_s if doing in _STEP_PHASES else _OTHER_PHASES_FACTOR * lost_after_s


def frame(message: dict[str, Any]) -> bytes:
    """A message as it is sent: its length, then JSON."""
    encoded = json.dumps(message).encode()
    return struct.pack("!H", len(encoded)) + encoded


class Frames:
    """Splits the bytes of a connection into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """The messages that are complete now."""
        self._rest += received
        messages = []
        while len(self._rest) >= 2 and len(self._rest) >= (end := 2 + struct.unpack_from("!H", self._rest)[0]):
            messages.append(json.loads(self._rest[2:end]))
            self._rest = self._rest[end:]
        return messages
