"""Open shards: find the index of each, or create it and store it in the cache folder."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console

from mmrl.data import draws
from mmrl.data.index import (
    SUFFIX,
    NotATar,
    Problem,
    ShardIndex,
    TarFingerprint,
    index_shard,
    load_index,
    open_index,
    save_index,
)
from mmrl.data.stores import ShardCache, cache_name, is_remote
from mmrl.errors import InputError
from mmrl.output.files import write_atomic
from mmrl.output.progress import progress_bar

_THREADS = 8
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A shard with an index: the index's header, and where to load the rest from."""

    location: str
    samples: int
    extensions: list[str]
    problems: list[Problem]
    tar: TarFingerprint
    index_path: Path | None
    index: ShardIndex | None = None
    """The index itself if it could not be written to `index_path`."""
    counts: list[int] | None = None
    """The number of samples that have each of `extensions`; None if the index was written by an older version."""

    def count_extensions(self) -> dict[str, int]:
        """Extension -> number of samples that have it."""
        return (
            self.load().count_extensions()
            if self.counts is None
            else dict(zip(self.extensions, self.counts, strict=True))
        )

    def load(self) -> ShardIndex:
        """Loads the index.

        Raises:
            OSError: its file is gone, or is now that of another tar.
        """
        if self.index is not None:
            return self.index
        assert self.index_path is not None
        try:
            index = load_index(self.index_path)
        except ValueError as error:
            raise OSError(str(error)) from None
        if index.tar != self.tar:
            raise OSError(f"the index {self.index_path} belongs to another version of the shard; restart the command")
        return index

    def discard_index(self) -> None:
        """Deletes the cached index of a remote shard that has changed. That of a local shard is checked at each start
        anyway."""
        if self.index_path is not None and is_remote(self.location):
            self.index_path.unlink(missing_ok=True)


def open_shards(locations: Sequence[str], cache: ShardCache) -> list[Shard]:
    """Finds the index of each shard, or creates it by scanning the shard. Processes that share the cache folder and do
    so at the same time divide the scanning.

    Raises:
        InputError: a shard is out of reach, not a tar or empty.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(_track("opening shards", pool.map(lambda x: _find(x, cache), locations), len(locations)))
        # Each process starts at a random shard, and looks again whether another process has indexed it meanwhile.
        missing = [i for i, shard in enumerate(found) if shard is None]
        start = int(draws.bits(os.getpid()) % np.uint64(len(missing))) if missing else 0
        missing = missing[start:] + missing[:start]
        # Threads help downloads, not scans.
        map_shards = pool.map if any(is_remote(locations[i]) for i in missing) else map
        made = map_shards(lambda x: _find(x, cache) or _create(x, cache), [locations[i] for i in missing])
        for i, shard in zip(missing, _track("indexing shards", made, len(missing)), strict=True):
            found[i] = shard
    shards = [shard for shard in found if shard is not None]
    for shard in shards:
        if not shard.samples:
            raise InputError(
                f"shards: {shard.location} holds no sample (KEY.jpg + KEY.txt …); remove it from the list."
            )
    return shards


def store_index(index: ShardIndex, location: str, cache: ShardCache, next_to_shard: bool = False) -> None:
    """Stores a shard's index where `open_shards` looks for it: in the cache folder, or next to a local shard.

    Raises:
        OSError: it cannot be written there.
    """
    if is_remote(location):
        save_index(index, _cached_index(location, cache))
    elif next_to_shard:
        save_index(index, Path(location + SUFFIX))
    else:
        save_index(index, _cached_index(location, cache), Path(location).stat().st_mtime_ns)


def _track(description: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yields the items under a progress bar, which only rank 0 shows."""
    is_rank_0 = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, force_terminal=None if is_rank_0 else False)
    with progress_bar(console) as progress:
        yield from progress.track(items, total=total, description=description)


def _find(location: str, cache: ShardCache) -> Shard | None:
    cached = _cached_index(location, cache)
    if is_remote(location):
        return _from_index(location, cached) or _download_index(location, cached, cache)
    neighbour = _from_valid_index(location, Path(location + SUFFIX), is_cached=False)
    return neighbour or _from_valid_index(location, cached, is_cached=True)


def _cached_index(location: str, cache: ShardCache) -> Path:
    name = location if is_remote(location) else os.path.abspath(location)  # noqa: PTH100 (a string, for speed)
    return cache.folder.parent / "index" / (cache_name(name) + SUFFIX)


def _download_index(location: str, cached: Path, cache: ShardCache) -> Shard | None:
    """The shard by the index next to it in its remote store, which is cached; None if there is no valid one."""
    data = cache.read_small(location + SUFFIX)
    if data is None:
        return None
    with contextlib.suppress(OSError):
        write_atomic(cached, data)
        try:
            load_index(cached)
        except ValueError:  # e.g. a server's error page with status 200
            cached.unlink(missing_ok=True)
    return _from_index(location, cached)


def _from_valid_index(location: str, path: Path, is_cached: bool) -> Shard | None:
    """The local shard by an index file; None if that is absent, damaged, or possibly of an older version of the tar."""
    try:
        index_time, tar_time = path.stat().st_mtime_ns, Path(location).stat().st_mtime_ns
        if not is_cached and index_time < tar_time:
            return None
        with open_index(path) as (header, _):
            if is_cached and header["modified"] != tar_time:
                return None
            with Path(location).open("rb", buffering=0) as raw:
                if not TarFingerprint(**header["tar"]).matches(raw.fileno()):
                    return None
    except (OSError, ValueError):
        return None
    return _from_index(location, path)


def _from_index(location: str, path: Path) -> Shard | None:
    try:
        if not path.exists():
            return None
        with open_index(path) as (header, _):
            problems = [Problem(location, key, reason) for key, reason in header["problems"]]
            tar = TarFingerprint(**header["tar"])
            counts = header.get("counts")
            return Shard(location, header["samples"], header["extensions"], problems, tar, path, counts=counts)
    except (OSError, ValueError):
        return None


def _create(location: str, cache: ShardCache) -> Shard:
    try:
        with os.fdopen(cache.open(location), "rb") as raw:
            index = index_shard(Path(location), raw)
    except NotATar:
        cache.discard(location)  # e.g. a server's error page
        raise
    except OSError as error:
        raise InputError(f"shards: {location} cannot be read ({error}).") from None
    problems = [Problem(location, key, reason) for key, reason in index.problems]
    counts = [*index.count_extensions().values()]
    shard = Shard(location, len(index), index.extensions, problems, index.tar, None, index, counts)
    try:
        store_index(index, location, cache)
    except OSError:  # a full or read-only disk: the index stays in memory
        return shard
    return replace(shard, index_path=_cached_index(location, cache), index=None)
