"""`mmrl serve`: opens an index and its encoder and runs the HTTP server."""

import ipaddress
import socket
from pathlib import Path

from rich.console import Console

from mmrl.errors import InputError
from mmrl.nesting import untrained_note
from mmrl.output.console import print_line
from mmrl.search.query import Searcher

_MAX_CONNECTIONS, _KEEP_ALIVE_S = 100, 5


def serve_index(folder: Path, model: str | None = None, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves the search page and its API until interrupted.

    Raises:
        InputError: not an index; the encoder cannot be opened or differs from the one that built the index; the address
            is unavailable; FastAPI or uvicorn is not installed.
    """
    try:
        import uvicorn

        from mmrl.search.app import create_app
    except ImportError as error:
        raise InputError(
            f"mmrl serve needs {error.name}, which is not installed; run pip install 'mmrl-clip[serve]'."
        ) from None
    listener = open_listener(host, port)
    with listener:
        searcher = Searcher.open(folder, model)
        # Host headers are checked on loopback addresses only; the check cannot parse IPv6 addresses.
        check_host = _is_loopback(host) and ":" not in host
        app = create_app(searcher, hosts=["127.0.0.1", "localhost", host] if check_host else ["*"])
        port = listener.getsockname()[1]
        console = Console()
        line = f"Serving {len(searcher.index):,} images at http://{host}:{port} (API: http://{host}:{port}/docs)"
        print_line(console, f"{line}. Press Ctrl-C to stop.")
        print_line(console, untrained_note([searcher.max_dim], searcher.nested_dims))
        if not _is_loopback(host):
            print_line(console, "Anyone who can reach this machine can search the index.")
        config = uvicorn.Config(
            app, log_level="warning", limit_concurrency=_MAX_CONNECTIONS, timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listener])


def open_listener(host: str, port: int) -> socket.socket:
    """A TCP socket bound to an address. Port 0 takes a free port.

    Raises:
        InputError: the address is invalid or in use.
    """
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
