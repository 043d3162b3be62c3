"""Heartbeat: detects a rank that died, hangs or lost its network, and stops all other ranks with its name.

Without it, a rank that waits in a collective for a dead one waits until the collective's timeout, if it has one, and
then reports only itself. Every rank runs a `_Peer` thread, which is connected over TCP to a `_Coordinator` thread on
rank 0:

    peer → coordinator   {"rank", "host", "token"} once; {"step", "doing"} every second;
                         {"leave"} or {"stopped": reason} at the end
    coordinator → peer   {} every second; {"lost": sentence} once, to all peers

The coordinator counts a peer as lost if its connection closes without {"leave"} (the process died), if it sends
{"stopped"}, or if nothing arrives for `lost_after_s` seconds (its host died or is cut off); four times as long outside
of training steps. Peers detect the loss of rank 0 in the same ways.

A rank that learns of a loss gets GRACE_S seconds to stop by itself. If it waits in a collective, which cannot be
interrupted, the process then ends with the sentence on stderr and exit code 1.

Messages are JSON lines of at most _MAX_LINE bytes. Only processes that know the run's token, which is broadcast over
the process group, are accepted.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.errors import InputError, RunStopped

BEAT_S = 1.0
GRACE_S = 5.0
# Importing libraries or writing a checkpoint can block the heartbeat thread for seconds, so that the timeout is longer
# in any phase other than these.
_STEP_PHASES, _OTHER_PHASES_FACTOR = ("loading data", "training"), 4
_MAX_LINE = 4096
# Forked data workers inherit these sockets; open copies would keep a connection alive after its rank has died.
_SOCKETS: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [one.close() for one in _SOCKETS])
_REMEDY = "Resume with the same command and resume=auto."


class Heartbeat:
    """Watches all ranks for as long as this context is open.

    An exception that leaves the context on one rank is reported to the others. A RuntimeError that is only the
    consequence of another rank's end (such as a broken collective) is replaced by a RunStopped that names that rank.
    """

    def __init__(self, world: World, lost_after_s: float) -> None:
        self._world, self._lost_after_s = world, lost_after_s
        self._progress = {"step": 0, "doing": "starting"}
        self._loss: str | None = None
        self._loss_known, self._exiting = threading.Event(), threading.Event()
        self._peer: _Peer | None = None
        self._coordinator: _Coordinator | None = None

    def report_progress(self, step: int, doing: str) -> None:
        """Sets the step and the phase that are reported if this rank is lost."""
        self._progress = {"step": step, "doing": doing}

    def __enter__(self) -> Self:
        if self._world.size == 1:
            return self
        hosts = comm.all_hosts()
        endpoint = None
        if self._world.is_rank_0:
            self._coordinator = _Coordinator(hosts, self._lost_after_s)
            endpoint = (self._coordinator.port, self._coordinator.token)
        port, token = comm.broadcast_object(endpoint)
        address = "127.0.0.1" if self._world.is_rank_0 else os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._peer = _Peer(
            self._world, hosts, (address, port), token, self._lost_after_s, lambda: self._progress, self._on_loss
        )
        if self._coordinator:
            self._coordinator.start()
        self._peer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peer is None:
            return
        may_be_consequence = isinstance(error, RuntimeError) and not isinstance(error, RunStopped)
        if may_be_consequence:
            self._loss_known.wait(GRACE_S)  # torch's error comes a moment before the news of the lost rank
        self._exiting.set()
        loss = self._loss
        if loss is None and error is not None:
            self._peer.stop({"stopped": _summary(error)})
        else:
            self._peer.stop({"leave": True})
        if self._coordinator:
            self._coordinator.stop()
        if loss is not None and may_be_consequence:
            raise RunStopped(loss) from None

    def _on_loss(self, sentence: str) -> None:
        """Ends the process unless it leaves the context in time. Runs in a thread of its own."""
        self._loss = sentence
        self._loss_known.set()
        if self._exiting.wait(GRACE_S):
            return
        print(f"mmrl: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)


class _Peer(threading.Thread):
    """A rank's connection to the coordinator: sends heartbeats, receives echoes and losses."""

    def __init__(
        self,
        world: World,
        hosts: list[str],
        address: tuple[str, int],
        token: str,
        lost_after_s: float,
        progress: Callable[[], dict[str, Any]],
        on_loss: Callable[[str], None],
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._lost_after_s, self._progress, self._on_loss = lost_after_s, progress, on_loss
        self._rank_name, self._rank_0 = f"rank {world.rank} on host {hosts[world.rank]}", f"rank 0 on host {hosts[0]}"
        self._last_message: dict[str, Any] | None = None
        self._wake = threading.Event()
        self._send_lock = threading.Lock()
        try:
            self._socket = socket.create_connection(address, timeout=lost_after_s)
        except OSError as error:
            raise RunStopped(
                f"{self._rank_name} cannot reach {self._rank_0} at {address[0]}:{address[1]} ({error}); open all TCP "
                "ports between the hosts of a run."
            ) from error
        _SOCKETS.add(self._socket)
        self._socket.settimeout(BEAT_S)
        self._send({"rank": world.rank, "host": hosts[world.rank], "token": token})

    def run(self) -> None:
        lines, last_heard = _LineBuffer(), time.monotonic()
        while self._last_message is None:
            try:
                self._send(self._progress())
                received = self._socket.recv(_MAX_LINE)
                if not received:
                    raise ConnectionResetError
                for line in lines.feed(received):
                    if "lost" in line:
                        self._report_loss(f"{line['lost']} {self._rank_name} stops too. {_REMEDY}")
                        return
                last_heard = time.monotonic()
                self._wake.wait(BEAT_S)
            except TimeoutError:
                silence = time.monotonic() - last_heard
                # All ranks are in the same phase, so this rank's phase is also that of rank 0.
                if silence > _timeout_s(self._lost_after_s, self._progress()["doing"]):
                    self._report_rank_0_lost(f"has not answered for {silence:.0f} s")
                    return
            except OSError:
                # A coordinator that has finished normally closes the connection while this rank is leaving too.
                if self._last_message is None and not self._wake.wait(BEAT_S):
                    self._report_rank_0_lost("disconnected")
                return

    def _report_rank_0_lost(self, how: str) -> None:
        self._report_loss(
            f"{self._rank_0} {how}: it, its host or the network has failed. {self._rank_name} stops too. {_REMEDY}"
        )

    def _report_loss(self, sentence: str) -> None:
        threading.Thread(target=self._on_loss, args=(sentence,), daemon=True).start()

    def stop(self, message: dict[str, Any]) -> None:
        """Sends the last message and closes the connection."""
        self._last_message = message
        self._wake.set()
        with contextlib.suppress(OSError):
            self._send(message)
            self._socket.shutdown(socket.SHUT_WR)
        if self.is_alive():
            self.join(2 * BEAT_S)
        self._socket.close()

    def _send(self, message: dict[str, Any]) -> None:
        with self._send_lock:
            self._socket.sendall(json.dumps(message).encode() + b"\n")


@dataclass(eq=False)
class _PeerState:
    """What the coordinator knows about one peer."""

    connection: socket.socket | None = None
    lines: "_LineBuffer" = field(default_factory=lambda: _LineBuffer())
    last_heard: float = field(default_factory=time.monotonic)
    step: int = 0
    doing: str = "starting"
    left: bool = False


class _Coordinator(threading.Thread):
    """Rank 0's thread that listens to all peers and tells them of the first loss."""

    def __init__(self, hosts: list[str], lost_after_s: float) -> None:
        super().__init__(name="heartbeat-coordinator", daemon=True)
        self._hosts, self._lost_after_s = hosts, lost_after_s
        self.token = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
        self._server.setblocking(False)
        _SOCKETS.add(self._server)
        self.port: int = self._server.getsockname()[1]
        self._peers = [_PeerState() for _ in hosts]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._stopping = threading.Event()
        self._stopping_since = 0.0
        self._loss: str | None = None

    def run(self) -> None:
        next_echo = 0.0
        while not self._finished():
            for key, _ in self._selector.select(timeout=BEAT_S / 4):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._receive(key.fileobj, key.data)  # pyright: ignore[reportArgumentType]
            now = time.monotonic()
            if self._loss is None:
                self._check_timeouts(now)
            if now >= next_echo:
                next_echo = now + BEAT_S
                for peer in self._peers:
                    self._send(peer, {})
        for peer in self._peers:
            if peer.connection is not None:
                peer.connection.close()
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

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            _SOCKETS.add(connection)
            self._selector.register(connection, selectors.EVENT_READ, _PeerState())

    def _receive(self, connection: socket.socket, peer: _PeerState) -> None:
        try:
            received = connection.recv(_MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(connection)
            connection.close()
            if peer.connection is not None and not peer.left:
                peer.left = True
                self._declare_lost(peer, "disconnected: it was killed, or its connection was cut")
            return
        try:
            for line in peer.lines.feed(received):
                peer = self._process(connection, peer, line)
        except (ValueError, KeyError, TypeError, IndexError):  # not a process of this run
            self._selector.unregister(connection)
            connection.close()

    def _process(self, connection: socket.socket, peer: _PeerState, line: dict[str, Any]) -> _PeerState:
        """Processes one message; the first one on a connection says which rank it is from."""
        if peer.connection is None:
            if not secrets.compare_digest(str(line["token"]), self.token):
                raise ValueError
            lines, peer = peer.lines, self._peers[line["rank"]]
            peer.connection, peer.lines = connection, lines
            self._selector.modify(connection, selectors.EVENT_READ, peer)
        peer.last_heard = time.monotonic()
        if "leave" in line:
            peer.left = True
        elif "stopped" in line:
            peer.left = True
            self._declare_lost(peer, f"stopped: {line['stopped']}")
        elif "step" in line:
            peer.step, peer.doing = line["step"], line["doing"]
        return peer

    def _check_timeouts(self, now: float) -> None:
        for peer in self._peers:
            silence = now - peer.last_heard
            if not peer.left and silence > _timeout_s(self._lost_after_s, peer.doing):
                peer.left = True
                self._declare_lost(
                    peer, f"has sent no heartbeat for {silence:.0f} s: it, its host or its network connection hangs"
                )

    def _declare_lost(self, peer: _PeerState, how: str) -> None:
        """Tells all peers of the first loss, which is the cause. Later losses are its consequences."""
        if self._loss is not None:
            return
        rank = next(rank for rank, one in enumerate(self._peers) if one is peer)
        self._loss = f"rank {rank} on host {self._hosts[rank]} {how} (step {peer.step + 1:,}, {peer.doing})."
        for one in self._peers:
            self._send(one, {"lost": self._loss})

    def _send(self, peer: _PeerState, message: dict[str, Any]) -> None:
        if peer.connection is not None:
            with contextlib.suppress(OSError):  # a lost peer is detected by its silence
                peer.connection.send(json.dumps(message).encode() + b"\n")


def _timeout_s(lost_after_s: float, doing: str) -> float:
    return lost_after_s if doing in _STEP_PHASES else _OTHER_PHASES_FACTOR * lost_after_s


class _LineBuffer:
    """Splits the bytes of a connection into JSON objects, one per line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, received: bytes) -> list[dict[str, Any]]:
        """The objects of all lines that are complete now.

        Raises:
            ValueError: invalid JSON, or a line that is too long.
        """
        *complete, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            raise ValueError("line too long")
        return [json.loads(line) for line in complete]


def _summary(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, InputError | RunStopped) else f"{type(error).__name__}: "
    return f"{name}{text}"[:500]
