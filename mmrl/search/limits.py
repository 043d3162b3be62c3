"""What the server checks of every request before its handler runs, and its error responses.

The API key, the size of the body and the Host header are checked, security headers are set, requests are counted.
Errors are one sentence: {"detail": …}, or on /v1 the body that OpenAI's clients read.
"""

import asyncio
import ctypes
import hmac
import re
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, nullcontext, suppress

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrl.errors import InputError
from mmrl.search.metrics import Metrics

MAX_UPLOAD_BYTES = 16 << 20
"""Limit of a request body."""
MAX_TEXTS, MAX_IMAGES = 2048, 32
"""Limits of one request to /v1/embeddings: those of OpenAI's API and of Infinity."""
MAX_WAITING = {"text": 2 * MAX_TEXTS, "image": 8 * MAX_IMAGES}
"""Inputs of /v1/embeddings that are accepted before they are encoded; a request beyond them gets status 503."""
MAX_BODIES_BYTES = 4 * MAX_UPLOAD_BYTES
"""Limit of the bodies of all requests that are read or answered at a time; further ones wait. Small bodies, which the
number of connections limits, are not counted."""
_SMALL_BODY, _LARGE_BODY = 64 << 10, 4 << 20
_READ_TIMEOUT_S = 20
# Others wait for the memory of a body at least as long as this before it is given up.
_PATIENCE_S = 1.0
_TOO_LARGE = f"The request is too large; an image may have {MAX_UPLOAD_BYTES >> 20} MB."
_NO_KEY = "This server needs its API key: send the header Authorization: Bearer KEY."
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_limits(app: FastAPI, hosts: list[str], metrics: Metrics, api_key: str | None, public: Collection[str]) -> None:
    """Adds the checks and the error responses to an application.

    Args:
        hosts: allowed Host headers, ["*"] for any.
        api_key: the key that requests must carry; None: no key is needed.
        public: paths that need no key.
    """

    @app.exception_handler(InputError)
    async def on_input_error(request: Request, error: InputError) -> JSONResponse:
        return error_response(request.url.path, str(error), 422)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part != "body") or "body"
        message = f"{where}: {first['msg']}; see /docs for what is allowed."
        return error_response(request.url.path, message, 422)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(request.url.path, str(error.detail), error.status_code)

    @app.exception_handler(Exception)
    async def on_failure(request: Request, _: Exception) -> JSONResponse:
        return error_response(request.url.path, "The server failed; its log has the error.", 500)

    app.add_middleware(_Checks, metrics=metrics, api_key=api_key, public=frozenset(public))
    # Against DNS rebinding: a page elsewhere could reach this server through a host name that resolves to 127.0.0.1.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)


def error_response(path: str, message: str, status: int) -> JSONResponse:
    """The response of an error: on /v1 as OpenAI's API, which answers invalid requests with 400, else {"detail": …}."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status, {})
    if not path.startswith("/v1/"):
        return JSONResponse({"detail": message}, status, headers)
    status = 400 if status == 422 else status
    named = re.match(r"(?!body:)[a-z_]+(?=[:.\[])", message) if status == 400 else None
    error = {
        "message": message,
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": named[0] if named else None,
        "code": "invalid_api_key" if status == 401 else None,
    }
    return JSONResponse({"error": error}, status, headers)


class _Bodies:
    """Reads request bodies, for which it reserves memory of MAX_BODIES_BYTES in all."""

    def __init__(self) -> None:
        self._free, self._changed = MAX_BODIES_BYTES, asyncio.Event()
        self._arriving: dict[asyncio.Timeout, tuple[float, int, bytearray]] = {}
        self._trim: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def reserved(self, size: int) -> AsyncIterator[None]:
        """Waits until `size` bytes are free, and reserves them; raises HTTPException 503 after _READ_TIMEOUT_S."""
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                while self._free < size:
                    self._changed.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), _PATIENCE_S)
                    self._give_up_slow_ones()
        except TimeoutError:
            raise HTTPException(503, "Too many large requests at once; try again in a moment.") from None
        self._free -= size
        try:
            yield
        finally:
            self._free += size
            self._changed.set()
            if size > _LARGE_BODY:  # the request itself is freed a moment later
                if self._trim is not None:
                    self._trim.cancel()
                self._trim = asyncio.get_running_loop().call_later(1.0, _trim_memory)

    async def read(self, receive: Receive, size: int) -> bytearray | None:
        """The body of a request, of at most `size` or _SMALL_BODY bytes; None if the client has gone. Raises
        HTTPException: 413 if it is larger, 408 if it takes too long."""
        body, limit = bytearray(), asyncio.timeout(_READ_TIMEOUT_S)
        self._arriving[limit] = time.monotonic(), size, body
        try:
            async with limit:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > max(size, _SMALL_BODY):
                        raise HTTPException(413, _TOO_LARGE)
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            problem = f"The request body did not arrive within {_READ_TIMEOUT_S} seconds, or too slowly to wait for it."
            raise HTTPException(408, problem) from None
        finally:
            del self._arriving[limit]

    def _give_up_slow_ones(self) -> None:
        """Ends the reading of large bodies that at their speed will not arrive in time: a few slow clients must not
        keep the memory that others wait for."""
        for limit, (began, size, body) in self._arriving.items():
            seconds = time.monotonic() - began
            is_slow = seconds > _PATIENCE_S and len(body) / max(size, 1) < seconds / _READ_TIMEOUT_S
            if is_slow and size > _SMALL_BODY and not limit.expired():
                limit.reschedule(0)


def _trim_memory() -> None:
    """Gives freed memory back to the system where the C library can: it keeps that of large bodies else."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Checks:
    """ASGI middleware: refuses requests without the API key, and bodies that are too large or too slow, before they are
    parsed; sets the security headers; counts the request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, public: frozenset[str]) -> None:
        self._app, self._metrics, self._public = app, metrics, public
        self._api_key = None if api_key is None else api_key.encode()
        self._bodies = _Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        try:
            self._check_key(scope)
            size = _body_size(scope)
            async with self._bodies.reserved(size) if size > _SMALL_BODY else nullcontext():
                body = await self._bodies.read(receive, size)
                if body is not None:
                    await self._app(scope, _replay(body, receive), send_with_headers)
        except HTTPException as error:
            response = error_response(scope["path"], error.detail, error.status_code)
            response.headers["Connection"] = "close"
            await response(scope, receive, send_with_headers)
        finally:
            # The path of the route, not of the request: a client must not be able to create counters.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.add_request(path, status, time.perf_counter() - began)

    def _check_key(self, scope: Scope) -> None:
        """Raises HTTPException 401 unless the request carries the API key or needs none."""
        if self._api_key is None or scope["path"] in self._public:
            return
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # In constant time: the time of a plain comparison tells how many leading characters are right.
        if not hmac.compare_digest(key.strip(), self._api_key) or scheme.lower() != b"bearer":
            raise HTTPException(401, _NO_KEY)


def _replay(body: bytearray, receive: Receive) -> Receive:
    """Returns the body as one message, then what `receive` returns."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _body_size(scope: Scope) -> int:
    """The size of the request body; MAX_UPLOAD_BYTES if the client does not say it. Raises HTTPException: 413 if it is
    larger."""
    headers = dict(scope["headers"])
    size = headers.get(b"content-length", b"0")
    if not size.isdigit() or len(size) > 15 or int(size) > MAX_UPLOAD_BYTES:
        raise HTTPException(413, _TOO_LARGE)
    return MAX_UPLOAD_BYTES if b"transfer-encoding" in headers else int(size)
