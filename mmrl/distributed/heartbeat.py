"""Who is alive: every process sends the main one a beat each second, and all learn within a bounded time who is lost.

A process waiting in a collective for one that has died, or whose host is cut off, would wait for minutes or for ever,
and then name only itself. So a thread of each process keeps a connection of its own to a thread of the main process:

    member → main   {"rank", "host", "token"} once; then {"step", "doing"} each second; {"leave"} or {"stopped": why}
    main → member   {} each second; {"lost": sentence} once, to all

The main process finds a member lost when its connection ends without a word (it died), when it says why it stops, or
when nothing was heard of it for `lost_after` seconds (its host died or is cut off), four times as long outside of the
steps. A member finds the main process lost in the same ways. A process that has learnt of a loss stops by itself if it
can; where it waits in a collective, which cannot be interrupted, it is ended, with the sentence on stderr and exit
code 1.

The lines are JSON of at most a few hundred bytes from those who know the run's token, which torch's own rendezvous
has handed round.
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
# What a process that has learnt of a loss gets to stop by itself.
GRACE_S = 5.0
# Outside of the steps a process may be silent so many times longer: importing and loading libraries, or writing a
# checkpoint, can keep its other threads from running.
STEADY, _LENIENCE = ("loading data", "training"), 4
_LONGEST_LINE = 4096
# A data worker is forked with copies of our sockets, which would hold the connections open beyond this process's death.
_SOCKETS: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [one.close() for one in _SOCKETS])
_ADVICE = "Go on with the same command and resume=auto."


class Heartbeat:
    """This process's part of the watch; a context around all that the processes do together.

    An exception that leaves the context is told to the others; one that another's end has caused is replaced by the
    sentence that names that other.
    """

    def __init__(self, world: World, lost_after_s: float) -> None:
        self._world, self._lost_after_s = world, lost_after_s
        self._where = {"step": 0, "doing": "starting"}
        self._lost: str | None = None
        self._know, self._stopping = threading.Event(), threading.Event()
        self._member: _Member | None = None
        self._main: _Main | None = None

    def at(self, step: int, doing: str) -> None:
        """Where this process is, for the sentence should it be lost."""
        self._where = {"step": step, "doing": doing}

    def __enter__(self) -> Self:
        if self._world.size == 1:
            return self
        hosts = comm.hosts()
        offer = None
        if self._world.is_rank_0:
            self._main = _Main(hosts, self._lost_after_s)
            offer = (self._main.port, self._main.token)
        port, token = comm.broadcast_object(offer)
        address = "127.0.0.1" if self._world.is_rank_0 else os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._member = _Member(self._world, hosts, (address, port), token, self._lost_after_s, self._told)
        self._member.where = lambda: self._where
        if self._main:
            self._main.start()
        self._member.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._member is None:
            return
        # What torch raises when another has gone says nothing of the other; a moment later the watch does.
        if isinstance(error, RuntimeError) and not isinstance(error, RunStopped):
            self._know.wait(GRACE_S)
        self._stopping.set()
        lost = self._lost
        if lost is None and error is not None:
            self._member.stop({"stopped": _in_short(error)})
        else:
            self._member.stop({"leave": True})
        if self._main:
            self._main.stop()
        if lost is not None and isinstance(error, RuntimeError) and not isinstance(error, RunStopped):
            raise RunStopped(lost) from None

    def _told(self, sentence: str) -> None:
        """In the member's thread: the process stops, or is ended."""
        self._lost = sentence
        self._know.set()
        if self._stopping.wait(GRACE_S):
            return
        print(f"mmrl: {sentence}", file=sys.stderr, flush=True)
        os._exit(1)


class _Member(threading.Thread):
    """The connection to the main process: beats out, echoes and losses in."""

    def __init__(
        self,
        world: World,
        hosts: list[str],
        address: tuple[str, int],
        token: str,
        lost_after_s: float,
        told: Callable[[str], None],
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.where: Callable[[], dict[str, Any]] = dict
        self._lost_after_s, self._told, self._main_host = lost_after_s, told, hosts[0]
        self._me = f"rank {world.rank} on host {hosts[world.rank]}"
        self._last_word: dict[str, Any] | None = None
        self._wake = threading.Event()
        self._sending = threading.Lock()
        try:
            self._socket = socket.create_connection(address, timeout=lost_after_s)
        except OSError as error:
            raise RunStopped(
                f"{self._me} cannot reach rank 0 on host {hosts[0]} at {address[0]}, port {address[1]} ({error}); the "
                "processes of a run talk over TCP ports of any number, so open them between the hosts."
            ) from error
        _SOCKETS.add(self._socket)
        self._socket.settimeout(BEAT_S)
        self._send({"rank": world.rank, "host": hosts[world.rank], "token": token})

    def run(self) -> None:
        lines, heard = _Lines(), time.monotonic()
        while self._last_word is None:
            try:
                self._send(self.where())
                received = self._socket.recv(_LONGEST_LINE)
                if not received:
                    raise ConnectionResetError
                for line in lines.feed(received):
                    if "lost" in line:
                        self._tell(f"{line['lost']} {self._me} stops with it. {_ADVICE}")
                        return
                heard = time.monotonic()
                self._wake.wait(BEAT_S)
            except TimeoutError:
                silent = time.monotonic() - heard
                # The main process is where we are: what it does between steps, all do together.
                if silent > _patience(self._lost_after_s, self.where()["doing"]):
                    self._tell(self._main_lost(f"has not answered for {silent:.0f} s"))
                    return
            except OSError:
                # A main process that has finished well says so by closing while we say so too.
                if self._last_word is None and not self._wake.wait(BEAT_S):
                    self._tell(self._main_lost("is gone"))
                return

    def _main_lost(self, how: str) -> str:
        return (
            f"rank 0 on host {self._main_host} {how}, so it, its host or the network between has failed; "
            f"{self._me} stops. {_ADVICE}"
        )

    def _tell(self, sentence: str) -> None:
        threading.Thread(target=self._told, args=(sentence,), daemon=True).start()

    def stop(self, word: dict[str, Any]) -> None:
        """Says the last word and closes."""
        self._last_word = word
        self._wake.set()
        with contextlib.suppress(OSError):
            self._send(word)
            self._socket.shutdown(socket.SHUT_WR)
        if self.is_alive():
            self.join(2 * BEAT_S)
        self._socket.close()

    def _send(self, word: dict[str, Any]) -> None:
        with self._sending:
            self._socket.sendall(json.dumps(word).encode() + b"\n")


@dataclass(eq=False)
class _Seen:
    """What the main process knows of one member."""

    connection: socket.socket | None = None
    lines: "_Lines" = field(default_factory=lambda: _Lines())
    heard: float = field(default_factory=time.monotonic)
    step: int = 0
    doing: str = "starting"
    left: bool = False


class _Main(threading.Thread):
    """The main process's side of all connections."""

    def __init__(self, hosts: list[str], lost_after_s: float) -> None:
        super().__init__(name="heartbeats", daemon=True)
        self._hosts, self._lost_after_s = hosts, lost_after_s
        self.token = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
        self._server.setblocking(False)
        _SOCKETS.add(self._server)
        self.port: int = self._server.getsockname()[1]
        self._seen = [_Seen() for _ in hosts]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._over = threading.Event()
        self._over_since = 0.0
        self._verdict: str | None = None

    def run(self) -> None:
        echo_due = 0.0
        while not self._finished():
            for key, _ in self._selector.select(timeout=BEAT_S / 4):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._hear(key.fileobj, key.data)  # pyright: ignore[reportArgumentType]
            now = time.monotonic()
            if self._verdict is None:
                self._look_for_silence(now)
            if now >= echo_due:
                echo_due = now + BEAT_S
                for seen in self._seen:
                    self._say(seen, {})
        for seen in self._seen:
            if seen.connection is not None:
                seen.connection.close()
        self._server.close()
        self._selector.close()

    def stop(self) -> None:
        """Waits a moment for the others to take leave, then closes."""
        self._over.set()
        self.join(GRACE_S + 2 * BEAT_S)

    def _finished(self) -> bool:
        if not self._over.is_set():
            self._over_since = time.monotonic()
            return False
        waited = time.monotonic() - self._over_since
        return all(seen.left for seen in self._seen) or waited > (BEAT_S if self._verdict else GRACE_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            _SOCKETS.add(connection)
            self._selector.register(connection, selectors.EVENT_READ, _Seen())

    def _hear(self, connection: socket.socket, seen: _Seen) -> None:
        try:
            received = connection.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(connection)
            connection.close()
            if seen.connection is not None and not seen.left:
                seen.left = True
                self._find(seen, "is gone: it was killed, or its connection was cut")
            return
        try:
            for line in seen.lines.feed(received):
                seen = self._heed(connection, seen, line)
        except (ValueError, KeyError, TypeError, IndexError):  # nobody of ours
            self._selector.unregister(connection)
            connection.close()

    def _heed(self, connection: socket.socket, seen: _Seen, line: dict[str, Any]) -> _Seen:
        if seen.connection is None:
            if not secrets.compare_digest(str(line["token"]), self.token):
                raise ValueError
            lines, seen = seen.lines, self._seen[line["rank"]]
            seen.connection, seen.lines = connection, lines
            self._selector.modify(connection, selectors.EVENT_READ, seen)
        seen.heard = time.monotonic()
        if "leave" in line:
            seen.left = True
        elif "stopped" in line:
            seen.left = True
            self._find(seen, f"stopped: {line['stopped']}")
        elif "step" in line:
            seen.step, seen.doing = line["step"], line["doing"]
        return seen

    def _look_for_silence(self, now: float) -> None:
        for seen in self._seen:
            silent = now - seen.heard
            if not seen.left and silent > _patience(self._lost_after_s, seen.doing):
                seen.left = True
                self._find(seen, f"has not been heard of for {silent:.0f} s, so it, its host or its link hangs")

    def _find(self, seen: _Seen, how: str) -> None:
        """The first loss is the cause; those that follow are its consequences."""
        if self._verdict is not None:
            return
        rank = next(rank for rank, one in enumerate(self._seen) if one is seen)
        self._verdict = f"rank {rank} on host {self._hosts[rank]} {how} (step {seen.step + 1:,}, {seen.doing})."
        for one in self._seen:
            self._say(one, {"lost": self._verdict})

    def _say(self, seen: _Seen, word: dict[str, Any]) -> None:
        if seen.connection is not None:
            with contextlib.suppress(OSError):  # it will be found lost, if it is
                seen.connection.send(json.dumps(word).encode() + b"\n")


def _patience(lost_after_s: float, doing: str) -> float:
    return lost_after_s if doing in STEADY else _LENIENCE * lost_after_s


class _Lines:
    """Pieces of a connection -> JSON objects, one a line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """The lines that are whole now.

        Raises:
            ValueError: no JSON, or a line too long to be ours.
        """
        *whole, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise ValueError("a line without an end")
        return [json.loads(line) for line in whole]


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, InputError | RunStopped) else f"{type(error).__name__}: "
    return f"{name}{text}"[:500]
