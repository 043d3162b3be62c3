"""Open the shards of a set: the number of samples of each, and its index once the shard is read.

One process of a host opens a set and stores what it found in the cache folder; others that ask meanwhile take it from
there. Numbers that no file declares are counted by scanning the shards, whose indexes are stored too.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from mmrl.data.counts import Shard, ShardList, declared_in_lists, declared_in_stats
from mmrl.data.download import locked
from mmrl.data.index import NotATar, ShardIndex, index_shard
from mmrl.data.index_file import SUFFIX, IndexHeader, load_index, read_header, save_index
from mmrl.data.stores import ShardCache, beside, is_remote
from mmrl.data.transport import RemoteFile
from mmrl.data.workers import usable_cores
from mmrl.errors import InputError, RunStopped
from mmrl.output.progress import progress_bar

CHANGED = "it has changed since it was indexed; restore it, or restart the command to index it again"
_THREADS = 16
# Up to this number of local shards, this process scans them alone.
_FEW_SHARDS = 32
T = TypeVar("T")


def open_shards(locations: Sequence[str], cache: ShardCache) -> list[Shard]:
    """The shards with their numbers of samples, in the same order.

    Raises:
        InputError: a shard is out of reach, not a tar or empty; a file that declares numbers is damaged; the cache
            folder is needed and cannot be written.
    """
    asked, folder = time.time(), "" if all(map(is_remote, locations)) else Path.cwd()
    name = hashlib.blake2b(repr([folder, *locations]).encode(), digest_size=16).hexdigest()
    stored = cache.sets / f"{name}.json"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(stored.with_suffix(".lock"), wait=True))
        except OSError as error:  # local shards with indexes next to them need no cache folder
            if remote := next(filter(is_remote, locations), None):
                raise _unwritable(cache, remote, error) from None
        try:
            shards = _open_set(locations, cache, stored, asked)
        except OSError as error:
            raise InputError(f"shards: {locations[0]} cannot be read ({error}).") from None
    for shard in shards:
        if not shard.samples:
            raise InputError(
                f"shards: {shard.location} holds no sample (KEY.jpg + KEY.txt …); remove it from the list."
            )
    return shards


def load_shard_index(shard: Shard, file: int, cache: ShardCache) -> ShardIndex:
    """The index of a shard, given its open tar: the stored one if that is sound and of this tar, else a new one, which
    is stored.

    Raises:
        InputError: the file is not a tar, a file declares another number of samples, or a new index cannot be stored.
        OSError: the shard has changed since its samples were counted.
    """
    cached, is_local = cache.index_path(shard.location), not is_remote(shard.location)
    index = _load_if_of(Path(shard.location + SUFFIX), file, by_age=True) if is_local else None
    index = index or _load_if_of(cached, file)
    if index is None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                stack.enter_context(locked(cached.with_suffix(".lock"), wait=True))
            index = _load_if_of(cached, file) or _scan(shard.location, file, cache)
        cache.evict()
    if len(index) != shard.samples:
        forget(shard.location, cache)
        shard.check_count(len(index))
        raise OSError(CHANGED)
    return index


def read_index(shard: Shard, cache: ShardCache) -> ShardIndex:
    """The index of a shard, which is opened for this alone. Raises as `load_shard_index` and `ShardCache.open`."""
    file = cache.open(shard.location)
    try:
        return load_shard_index(shard, file, cache)
    finally:
        os.close(file)


def stored_index(shard: Shard, cache: ShardCache) -> ShardIndex | None:
    """The index of the tar in which a shard's samples were counted, without that tar; None if none is stored."""
    for path in (Path(shard.location + SUFFIX), cache.index_path(shard.location)):
        with contextlib.suppress(OSError, ValueError):
            index = load_index(path)
            if index.tar == shard.tar:
                return index
    return None


def forget(location: str, cache: ShardCache) -> None:
    """Deletes what the cache folder knows of a shard that has changed, so that the next command looks again."""
    for path in (cache.index_path(location), *cache.sets.glob("*.json")):
        path.unlink(missing_ok=True)


def store_index(index: ShardIndex, location: str, cache: ShardCache, next_to_shard: bool = False) -> None:
    """Stores a shard's index in the cache folder, or next to a local shard.

    Raises:
        OSError: it cannot be written there.
    """
    is_next = next_to_shard and not is_remote(location)
    save_index(index, Path(location + SUFFIX) if is_next else cache.index_path(location), _modified(location))


def _open_set(locations: Sequence[str], cache: ShardCache, stored: Path, asked: float) -> list[Shard]:
    before = ShardList.load(stored)
    known = {shard.location: shard for shard in before.shardlist}
    if (before.verified or 0) >= asked and known.keys() >= {*locations}:  # by another process, since this one asked
        return [known[one] for one in locations]
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            shards = declared_in_lists(locations, cache.read_small, pool)
            rest = [one for one in locations if one not in shards]
            found = pool.map(partial(_find, known=known, cache=cache), rest)
            shards |= {one.location: one for one in _track("opening shards", found, len(rest)) if one is not None}
            missing = [one for one in rest if one not in shards]
            counted = _track("counting samples", _count_all(missing, cache, pool), len(missing))
            shards |= {one.location: one for one in counted}
        finally:
            pool.shutdown(cancel_futures=True)
    if missing:
        cache.evict()
    result = [shards[one] for one in locations]
    with contextlib.suppress(OSError):  # it only saves time
        ShardList(shardlist=result, verified=time.time()).save(stored)
    return result


def _find(location: str, known: Mapping[str, Shard], cache: ShardCache) -> Shard | None:
    """A shard whose number of samples is stored and still valid, or else indexed or declared; None if it is not."""
    before = known.get(location)
    if before is not None and (is_remote(location) or before.is_unchanged()):
        return before
    if is_remote(location):
        neighbour = _from_remote_index(location, cache)
    else:
        neighbour = _from_index(location, Path(location + SUFFIX), is_cached=False)
    declared = neighbour or declared_in_stats(location, cache.read_small)
    return declared or _from_index(location, cache.index_path(location))


def _from_remote_index(location: str, cache: ShardCache) -> Shard | None:
    def read(file: RemoteFile) -> IndexHeader | None:
        try:
            return read_header(file)
        except ValueError:  # e.g. a server's error page with status 200
            return None

    header = cache.read_remote(path := beside(location, SUFFIX), read)
    return None if header is None else Shard.of(location, header).model_copy(update={"declared_by": path})


def _from_index(location: str, path: Path, is_cached: bool = True) -> Shard | None:
    """The shard by an index; None if that is absent or damaged, or possibly of an older version of a local tar."""
    try:
        with path.open("rb") as file:
            header = read_header(file)
        if header.counts is None:
            header = IndexHeader.of(load_index(path), header.modified)
        if not is_remote(location):
            modified = Path(location).stat().st_mtime_ns
            if header.modified != modified if is_cached else path.stat().st_mtime_ns < modified:
                return None
            with Path(location).open("rb", buffering=0) as raw:
                if not header.tar.matches(raw.fileno()):
                    return None
            header = header.model_copy(update={"modified": modified})
        return Shard.of(location, header)
    except (OSError, ValueError):
        return None


def _load_if_of(path: Path, file: int, by_age: bool = False) -> ShardIndex | None:
    """A stored index if it is sound and of the tar behind a file descriptor: not older, or of the noted time."""
    try:
        index, modified = load_index(path), os.fstat(file).st_mtime_ns
        is_of_time = path.stat().st_mtime_ns >= modified if by_age else index.modified in (None, modified)
        if not by_age:
            os.utime(path)  # marks it as recently used
    except (OSError, ValueError):
        return None
    return index if is_of_time and index.tar.matches(file) else None


def _count_all(locations: Sequence[str], cache: ShardCache, pool: Executor) -> Iterator[Shard]:
    """Scans shards: remote ones in threads, which wait for downloads, many local ones in processes."""
    count = partial(_count, cache=cache)
    results: Iterable[Shard | InputError]
    with contextlib.ExitStack() as stack:
        if any(map(is_remote, locations)):
            results = pool.map(count, locations)
        elif len(locations) > _FEW_SHARDS and usable_cores() > 1:
            # Forked, as DataLoader's workers are: a new interpreter would run the user's script again.
            processes = ProcessPoolExecutor(usable_cores(), get_context("fork"))
            stack.callback(processes.shutdown, cancel_futures=True)
            results = processes.map(count, locations)
        else:
            results = map(count, locations)
        try:
            for result in results:
                if isinstance(result, InputError):
                    raise result
                yield result
        except BrokenProcessPool:
            raise RunStopped(
                "A process that counted the samples of shards was killed, most likely because memory ran out; run the "
                "same command again: what is counted is kept."
            ) from None


def _count(location: str, cache: ShardCache) -> Shard | InputError:
    """The shard by a new index, which is stored. An error is returned, since not all of them can be pickled."""
    try:
        file = cache.open(location)
        try:
            return Shard.of(location, IndexHeader.of(_scan(location, file, cache), _modified(location)))
        except NotATar:
            cache.discard(location, file)  # e.g. a server's error page
            raise
        finally:
            os.close(file)
    except InputError as error:
        return InputError(str(error))
    except OSError as error:
        return InputError(f"shards: {location} cannot be read ({error}).")


def _scan(location: str, file: int, cache: ShardCache) -> ShardIndex:
    """A new index of an open tar, stored in the cache folder."""
    with os.fdopen(os.dup(file), "rb") as raw:
        raw.seek(0)
        index = index_shard(location, raw)
    try:
        store_index(index, location, cache)
    except OSError as error:
        raise _unwritable(cache, location, error) from None
    return index


def _unwritable(cache: ShardCache, location: str, error: OSError) -> InputError:
    return InputError(
        f"data.remote.folder: {cache.folder.parent} cannot be written ({error.strerror or error}), but the index of "
        f"{location} is to be stored there; make room, or set data.remote.folder or MMRL_CACHE to another folder."
    )


def _modified(location: str) -> int | None:
    return None if is_remote(location) else Path(location).stat().st_mtime_ns


def _track(description: str, items: Iterable[T], total: int) -> Iterator[T]:
    """Yields the items under a progress bar, which only the first host shows."""
    is_first_host = int(os.environ.get("RANK", 0)) < int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    console = Console(stderr=True, force_terminal=None if is_first_host else False)
    with progress_bar(console) as progress:
        yield from progress.track(items, total=total, description=description)
