"""A folder that another process is writing."""

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from mmrl.output.files import exclusive


def _hold(folder: Path, connection: Connection) -> None:
    with exclusive(folder, "another command"):
        connection.send("held")
        connection.recv()


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[None]:
    """Within, another process holds the folder's lock."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(folder, there))
    process.start()
    try:
        assert here.recv() == "held"
        yield
    finally:
        here.send("end")
        process.join()
