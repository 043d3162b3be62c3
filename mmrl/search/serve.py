"""`mmrl serve`: opens an index and its encoder, and shows them at an address."""

import ipaddress
import socket
from pathlib import Path

from rich.console import Console

from mmrl.errors import InputError
from mmrl.search.query import Searcher

# Connections at once, and seconds that an idle one is kept.
_MOST_CONNECTIONS, _KEEP_ALIVE = 100, 5


def serve(folder: Path, model: str | None = None, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves the page and its API until it is interrupted.

    Raises:
        InputError: no index, not its encoder, an address that cannot be listened at, FastAPI or uvicorn not installed.
    """
    try:
        import uvicorn

        from mmrl.search.app import create_app
    except ImportError as error:
        raise InputError(
            f"mmrl serve needs {error.name}, which is not installed; run pip install 'mmrl-clip[serve]'."
        ) from None
    listening = _listen(host, port)
    with listening:
        searcher = Searcher.open(folder, model)
        # Names are checked where only this machine is meant; the check knows no IPv6 addresses.
        named = _is_loopback(host) and ":" not in host
        app = create_app(searcher, hosts=["127.0.0.1", "localhost", host] if named else ["*"])
        port = listening.getsockname()[1]
        console = Console()
        shown = f"{len(searcher.index):,} pictures at http://{host}:{port} and its API at http://{host}:{port}/docs"
        console.print(f"{shown}; Ctrl-C ends it", highlight=False, markup=False, soft_wrap=True)
        if not _is_loopback(host):
            console.print("Everyone who can reach this machine can search them.", highlight=False)
        config = uvicorn.Config(
            app, log_level="warning", limit_concurrency=_MOST_CONNECTIONS, timeout_keep_alive=_KEEP_ALIVE,
            server_header=False,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Those that are accepted inherit it; without, an answer's body waits 40 ms for its head to be acknowledged.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"port: {host}:{port} cannot be listened at ({error.strerror or error}); give another --port or --host."
        ) from None
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
