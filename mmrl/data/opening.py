"""Shards made ready to be read: the index of each found, or made on first sight and kept."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data import draws
from mmrl.data.index import (
    SUFFIX,
    NotATar,
    Problem,
    ShardIndex,
    TarMark,
    index_facts,
    index_shard,
    load_index,
    save_index,
    write_whole,
)
from mmrl.data.stores import Store, cache_name, is_remote
from mmrl.errors import InputError

_THREADS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A shard of which the index is at hand."""

    location: str
    samples: int
    extensions: list[str]
    problems: list[Problem]
    tar: TarMark
    stored: Path | None
    """The index's file."""
    index: ShardIndex | None = None
    """The index itself, where it could be written nowhere."""

    def load(self) -> ShardIndex:
        """The index.

        Raises:
            OSError: its file has gone, or is of another tar by now.
        """
        if self.index is not None:
            return self.index
        assert self.stored is not None
        try:
            index = load_index(self.stored)
        except ValueError as error:
            raise OSError(str(error)) from None
        if index.tar != self.tar:
            raise OSError(f"the index {self.stored} is of another shard than at the start; start again")
        return index

    def forget(self) -> None:
        """Removes an index from the cache folder that does not fit a remote shard any more. One of a local shard is
        held against the tar at each start anyway."""
        if self.stored is not None and is_remote(self.location):
            self.stored.unlink(missing_ok=True)


def open_shards(locations: Sequence[str], store: Store) -> list[Shard]:
    """Finds the index of each shard, or makes it. Several processes that do so at once divide the work.

    Raises:
        InputError: a shard is out of reach or no tar, or holds no sample.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(_shown("opening shards", pool.map(lambda x: _find(x, store), locations), len(locations)))
        # Each process begins elsewhere, and looks again whether another one has been there.
        missing = [i for i, shard in enumerate(found) if shard is None]
        start = int(draws.bits(os.getpid()) % np.uint64(len(missing))) if missing else 0
        missing = missing[start:] + missing[:start]
        # Fetching is waiting, scanning is not.
        over = pool.map if any(is_remote(locations[i]) for i in missing) else map
        made = over(lambda location: _find(location, store) or _make(location, store), [locations[i] for i in missing])
        for i, shard in zip(missing, _shown("indexing shards", made, len(missing)), strict=True):
            found[i] = shard
    shards = [shard for shard in found if shard is not None]
    for shard in shards:
        if not shard.samples:
            raise InputError(
                f"shards: {shard.location} holds no sample (KEY.jpg + KEY.txt …); remove it from the list."
            )
    return shards


def keep_index(index: ShardIndex, location: str, store: Store, beside: bool = False) -> None:
    """Stores the index of a shard where training looks for it: beside the shard, if it is to be there and the shard is
    a local one; else in the cache folder.

    Raises:
        OSError: it cannot be written there.
    """
    if is_remote(location):
        save_index(index, _kept(location, store))
    elif beside:
        save_index(index, Path(location + SUFFIX))
    else:
        save_index(index, _kept(location, store), Path(location).stat().st_mtime_ns)


def _shown(what: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Under a progress bar, where somebody looks: a million samples take a minute."""
    console = Console(stderr=True)
    is_seen = console.is_terminal and os.environ.get("RANK", "0") == "0"
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_seen) as progress:
        yield from progress.track(items, total=total)


def _find(location: str, store: Store) -> Shard | None:
    kept = _kept(location, store)
    if is_remote(location):
        return _opened(location, kept) or _from_beside(location, kept, store)
    return _of_local(location, Path(location + SUFFIX), beside=True) or _of_local(location, kept, beside=False)


def _kept(location: str, store: Store) -> Path:
    name = location if is_remote(location) else os.path.abspath(location)  # noqa: PTH100 (a string, for speed)
    return store.folder.parent / "index" / (cache_name(name) + SUFFIX)


def _from_beside(location: str, kept: Path, store: Store) -> Shard | None:
    """The index that lies beside a remote shard, kept from now on."""
    data = store.small(location + SUFFIX)
    if data is None:
        return None
    with contextlib.suppress(OSError):
        write_whole(kept, data)
        load_index_or_remove(kept)
    return _opened(location, kept)


def load_index_or_remove(path: Path) -> None:
    """Takes a file away that is no sound index, such as a server's page that says so with a status of 200."""
    try:
        load_index(path)
    except ValueError:
        path.unlink(missing_ok=True)


def _of_local(location: str, stored: Path, beside: bool) -> Shard | None:
    """The shard by an index file; None where that is absent, damaged, or may be of an older tar than this one."""
    try:
        index_time, tar_time = stored.stat().st_mtime_ns, Path(location).stat().st_mtime_ns
        if beside and index_time < tar_time:
            return None
        with index_facts(stored) as (facts, _):
            if not beside and facts["modified"] != tar_time:
                return None
            with Path(location).open("rb", buffering=0) as raw:
                if not TarMark(**facts["tar"]).fits(raw.fileno()):
                    return None
    except (OSError, ValueError):
        return None
    return _opened(location, stored)


def _opened(location: str, stored: Path) -> Shard | None:
    try:
        if not stored.exists():
            return None
        with index_facts(stored) as (facts, _):
            problems = [Problem(location, key, reason) for key, reason in facts["problems"]]
            return Shard(location, facts["samples"], facts["extensions"], problems, TarMark(**facts["tar"]), stored)
    except (OSError, ValueError):
        return None


def _make(location: str, store: Store) -> Shard:
    try:
        with os.fdopen(store.open(location), "rb") as raw:
            index = index_shard(Path(location), raw)
    except NotATar:
        store.discard(location)  # a page that says why there is no shard is no copy to keep
        raise
    except OSError as error:
        raise InputError(f"shards: {location} cannot be read ({error}).") from None
    problems = [Problem(location, key, reason) for key, reason in index.problems]
    stored: Path | None = _kept(location, store)
    try:
        keep_index(index, location, store)
    except OSError:  # a full or read-only disk: it stays in memory
        stored = None
    kept_here = index if stored is None else None
    return Shard(location, len(index), index.extensions, problems, index.tar, stored, kept_here)
