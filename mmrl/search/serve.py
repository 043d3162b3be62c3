"""`mmrl serve`: opens an index or an encoder and runs the HTTP server."""

import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Any

from rich.console import Console

from mmrl.errors import InputError
from mmrl.inference.base import LoadedEncoder
from mmrl.inference.load import load
from mmrl.nesting import untrained_note
from mmrl.output.console import print_line
from mmrl.search.index import is_index
from mmrl.search.query import Searcher

API_KEY = "MMRL_API_KEY"
"""The environment variable that holds the API key."""
_KEEP_ALIVE_S = 5


def serve(source: str, model: str | None = None, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves the search page and the API of an index, or the embeddings API of an encoder, until interrupted.

    Args:
        source: an index, or MODEL as `mmrl.load` takes it.
        model: path of the index's encoder (default: the path stored in the index).

    Raises:
        InputError: neither an index nor an encoder; the encoder cannot be opened or differs from the one that built the
            index; the address is unavailable, or not loopback without an API key; FastAPI or uvicorn is not installed.
    """
    try:
        import uvicorn  # noqa: F401

        from mmrl.search.app import create_app
    except ImportError as error:
        raise InputError(
            f"mmrl serve needs {error.name}, which is not installed; run pip install 'mmrl-clip[serve]'."
        ) from None
    api_key = _api_key(host)
    with open_listener(host, port) as listener:
        served = _open(source, model)
        searches = isinstance(served, Searcher)
        name = Path(served.index.manifest["encoder"]["model"] if searches and model is None else model or source).name
        # Host headers are checked on loopback addresses only; the check cannot parse IPv6 addresses.
        check_host = _is_loopback(host) and ":" not in host
        app = create_app(served, ["127.0.0.1", "localhost", host] if check_host else ["*"], name, api_key)
        name_of_host = f"[{host}]" if ":" in host else host
        console, address = Console(), f"http://{name_of_host}:{listener.getsockname()[1]}"
        what = f"{len(served.index):,} {served.index.kind}" if searches else f"embeddings of {name}"
        print_line(console, f"Serving {what} at {address} (API: {address}/docs). Press Ctrl-C to stop.")
        if searches:
            print_line(console, untrained_note([served.max_dim], served.nested_dims))
        make_server(app).run(sockets=[listener])


def make_server(app: Any) -> Any:
    """The uvicorn server of an application, with limits on what slow clients can hold."""
    import uvicorn

    from mmrl.search.connections import BoundedProtocol

    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_level="warning",
        log_config=None,  # uvicorn's default closes all log handlers of the process, and some then close stdout
        timeout_keep_alive=_KEEP_ALIVE_S,
        server_header=False,
    )
    return uvicorn.Server(config)


def _api_key(host: str) -> str | None:
    """The API key; None if the environment variable is not set or empty. Raises InputError: it is not set although
    other machines can reach `host`, or it cannot be sent in a header."""
    key = os.environ.get(API_KEY) or None
    if key is None and not _is_loopback(host):
        raise InputError(
            f"host: other machines can reach {host}; set the environment variable {API_KEY} to the key that clients "
            "must send, or serve on 127.0.0.1."
        )
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise InputError(f"{API_KEY}: the key must be printable ASCII characters without spaces or line ends.")
    return key


def _open(source: str, model: str | None) -> Searcher | LoadedEncoder:
    if is_index(Path(source)):
        return Searcher.open(Path(source), model)
    if model is not None:
        raise InputError(f"model: --model is the encoder of an index, and {source} is not an index.")
    try:
        return load(source)
    except InputError as error:
        raise InputError(f"serve: {source} is not an index, and not an encoder that can be served: {error}") from None


def open_listener(host: str, port: int) -> socket.socket:
    """A TCP socket bound to an address. Port 0 takes a free port. Raises InputError: the address is invalid or in
    use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by accepted connections. Without it Nagle's algorithm and delayed ACKs add 40 ms to each response.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"port: cannot listen on {host}:{port} ({error.strerror or error}); give another --port or --host."
        ) from None
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
