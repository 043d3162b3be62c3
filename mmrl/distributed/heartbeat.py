"""Heartbeat: detects a rank that died, hangs or lost its network, and stops all other ranks with its name.

Without it, a rank that waits in a collective for a dead one waits until the collective's timeout, if it has one, and
then reports only itself. Every rank runs a `_Peer` thread, which is connected over TCP to a `Coordinator` thread on
rank 0:

    coordinator → peer   16 random bytes once; then {} every second; {"lost": sentence} once, to all peers
    peer → coordinator   its rank and the HMAC-SHA256 of both, once; then {"step", "doing"} every second;
                         {"leave"} or {"stopped": reason} at the end

The coordinator counts a peer as lost if its connection closes without {"leave"} (the process died), if it sends
{"stopped"}, or if nothing arrives for `lost_after_s` seconds (its host died or is cut off); four times as long outside
of training steps. Peers detect the loss of rank 0 in the same ways.

A rank that learns of a loss prints it at once, because a launcher may end it at any moment, and gets GRACE_S seconds to
stop by itself. If it waits in a collective, which cannot be interrupted, the process then ends with exit code 1.

The key of the HMAC is broadcast over the process group. Nothing that a connection sends is parsed before it has proved
that it knows the key, and the coordinator listens only on the address that the ranks rendezvous at, if that is an
address of its host. Messages are JSON, each preceded by its length as two bytes.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.distributed.coordinator import (
    BEAT_S,
    GRACE_S,
    NONCE_BYTES,
    RECEIVED_BYTES,
    SOCKETS,
    Coordinator,
    Frames,
    frame,
    hello,
    timeout_s,
)
from mmrl.errors import InputError, RunStopped

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
        self._coordinator: Coordinator | None = None

    def report_progress(self, step: int, doing: str) -> None:
        """Sets the step and the phase that are reported if this rank is lost."""
        self._progress = {"step": step, "doing": doing}

    def __enter__(self) -> Self:
        if self._world.size == 1:
            return self
        hosts = comm.all_hosts()
        endpoint = None
        if self._world.is_rank_0:
            self._coordinator = Coordinator(hosts, self._lost_after_s, lambda: self._progress)
            self._coordinator.start()
            endpoint = (self._coordinator.port, self._coordinator.key)
        port, key = comm.broadcast_object(endpoint)
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self._coordinator:
            address = self._coordinator.address or "127.0.0.1"
        self._peer = _Peer(
            self._world, hosts, (address, port), key, self._lost_after_s, lambda: self._progress, self._on_loss
        )
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
            raise RunStopped(loss, shown=True) from None

    def _on_loss(self, sentence: str) -> None:
        """Prints the loss, and ends the process unless it leaves the context in time. Runs in a thread of its own."""
        if self._exiting.is_set():
            return
        print(f"mmrl: {sentence}", file=sys.stderr, flush=True)
        self._loss = sentence
        self._loss_known.set()
        if not self._exiting.wait(GRACE_S):
            os._exit(1)


class _Peer(threading.Thread):
    """A rank's connection to the coordinator: sends heartbeats, receives echoes and losses."""

    def __init__(
        self,
        world: World,
        hosts: list[str],
        address: tuple[str, int],
        key: bytes,
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
            nonce = self._socket.recv(NONCE_BYTES, socket.MSG_WAITALL)
            self._socket.sendall(hello(key, nonce, world.rank))
        except OSError as error:
            raise RunStopped(
                f"{self._rank_name} cannot reach {self._rank_0} at {address[0]}:{address[1]} ({error}); open all TCP "
                "ports between the hosts of a run."
            ) from error
        SOCKETS.add(self._socket)
        self._socket.settimeout(BEAT_S)

    def run(self) -> None:
        frames, last_heard = Frames(), time.monotonic()
        while self._last_message is None:
            try:
                self._send(self._progress())
                received = self._socket.recv(RECEIVED_BYTES)
                if not received:
                    raise ConnectionResetError
                for message in frames.feed(received):
                    if "lost" in message:
                        self._report_loss(f"{message['lost']} {self._rank_name} stops too. {_REMEDY}")
                        return
                last_heard = time.monotonic()
                self._wake.wait(BEAT_S)
            except TimeoutError:
                silence = time.monotonic() - last_heard
                # All ranks are in the same phase, so this rank's phase is also that of rank 0.
                if silence > timeout_s(self._lost_after_s, self._progress()["doing"]):
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
            self._socket.sendall(frame(message))


def _summary(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, InputError | RunStopped) else f"{type(error).__name__}: "
    return f"{name}{text}"[:500]
