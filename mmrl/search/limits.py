"""Limits and error responses of the server: request bodies, Host headers, security headers, one-sentence errors."""

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrl.errors import InputError

MAX_UPLOAD_BYTES = 16 << 20
"""Limit of a request body."""
_READ_TIMEOUT_S = 20
_TOO_LARGE = f"The request is too large; an image may have {MAX_UPLOAD_BYTES >> 20} MB."
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def add_limits(app: FastAPI, hosts: list[str]) -> None:
    """Adds one-sentence JSON errors, security headers, and limits on request bodies and Host headers."""

    @app.exception_handler(InputError)
    async def on_input_error(_: Request, error: InputError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part != "body") or "body"
        return JSONResponse({"detail": f"{where}: {first['msg']}; see /docs for what is allowed."}, 422)

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(_HEADERS)
        response.headers.setdefault("Cache-Control", "no-cache")
        return response

    app.add_middleware(_BodyLimits)
    # Against DNS rebinding: a page elsewhere could reach this server through a host name that resolves to 127.0.0.1.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)


class _BodyLimits:
    """ASGI middleware that refuses request bodies that are too large or too slow, before they are parsed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        content_length = dict(scope["headers"]).get(b"content-length", b"0")
        body, ended = bytearray(), False
        try:
            if not content_length.isdigit() or int(content_length) > MAX_UPLOAD_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            async with asyncio.timeout(_READ_TIMEOUT_S):
                while not ended:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > MAX_UPLOAD_BYTES:
                        raise HTTPException(413, _TOO_LARGE)
                    ended = not message.get("more_body", False)
        except HTTPException as error:
            await JSONResponse({"detail": error.detail}, error.status_code, {"Connection": "close"})(
                scope, receive, send
            )
            return
        except TimeoutError:
            slow = {"detail": f"The request body did not arrive within {_READ_TIMEOUT_S} seconds."}
            await JSONResponse(slow, 408, {"Connection": "close"})(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)
