"""Connections of the server: those that wait for a slow client do not shut out the others.

uvicorn closes idle connections only after a response. Here a connection is also closed if the headers of its request
do not arrive in time, if its client does not read the response, or if there are too many connections and it has waited
longest for its client.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 256
CLIENT_TIMEOUT_S = 10.0
"""For the headers of a request, and for each part of a response that a slow client reads."""


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 on one connection."""

    waiting_since: float | None = None
    """When the connection began to wait for its client; None while a request that arrived is answered."""
    _timer: asyncio.TimerHandle | None = None
    _unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait_for_client()
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [one for one in self.connections if isinstance(one, BoundedProtocol) and one.waiting_since]
            slowest = min(waiting, key=lambda one: one.waiting_since or 0.0)
            if slowest is self:
                self.limit_concurrency = 0  # all others are being answered: uvicorn answers with status 503
            else:
                slowest.drop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.SEND_BODY:
            self._stop_timer()  # the application limits the time of the body
        elif self.conn.their_state is not h11.IDLE:
            self._stop_timer()
            self.waiting_since = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or self.conn.their_state is h11.IDLE:  # else the next request is here already
            self._wait_for_client()

    def drop(self) -> None:
        """Closes the connection, whatever is still to be sent."""
        self.waiting_since = None
        self._stop_timer()
        self.connections.discard(self)
        self.transport.abort()

    def _wait_for_client(self) -> None:
        self.waiting_since = self.loop.time()
        self._stop_timer()
        self._unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(CLIENT_TIMEOUT_S, self._on_timeout)

    def _on_timeout(self) -> None:
        if self.transport.get_write_buffer_size() < self._unsent:  # the client reads, slowly
            self._wait_for_client()
        else:
            self.drop()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
