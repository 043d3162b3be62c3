"""Random access to the shards of a set: indexes, members, and the groups and keys of their samples."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mmrl.data.counts import Shard
from mmrl.data.fields import FieldsConfig
from mmrl.data.groups import GroupFile, parse_groups
from mmrl.data.index import BLOCK, NotATar, ShardIndex, header_size, printable
from mmrl.data.lru import LruCache
from mmrl.data.opening import CHANGED, forget, load_shard_index, stored_index
from mmrl.data.order import SourceShare
from mmrl.data.stores import ShardCache, is_remote
from mmrl.errors import InputError

# Limits per process: samples of all loaded indexes, and open files. The shuffle windows of all lanes rarely need more.
_SAMPLES_INDEXED, _OPEN_FILES = 2_000_000, 256


@dataclass(frozen=True)
class Source:
    """A set of shards with the same fields and the same number of passes per epoch."""

    shards: Sequence[Shard]
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    repeat: float = 1.0
    name: str = ""
    """Prefix of its samples' names if there are several sources."""

    @cached_property
    def share(self) -> SourceShare:
        """How many samples of each epoch come from it."""
        return SourceShare([shard.samples for shard in self.shards], self.repeat)

    @cached_property
    def root(self) -> str:
        """The longest folder path, or URL prefix, that all its shards have in common."""
        folders = [_absolute(shard.location).rpartition("/")[0] for shard in self.shards]
        # Not commonpath, which collapses the two slashes of a URL.
        return os.path.commonprefix([f"{folder}/" for folder in folders]).rpartition("/")[0] + "/"  # noqa: RUF071

    def name_of(self, shard: Shard) -> str:
        """A shard's location relative to `root`, which begins its samples' names."""
        return _absolute(shard.location)[len(self.root) :]


class ShardReader:
    """The shards of all sources; their samples are numbered 0 … N-1 in the order of the sources and their shards."""

    def __init__(self, sources: Sequence[Source], cache: ShardCache) -> None:
        self.sources, self.cache = list(sources), cache
        self.shares = [source.share for source in sources]
        self._shards = [shard for source in sources for shard in source.shards]
        self._source_of_shard = np.repeat(np.arange(len(sources)), [len(source.shards) for source in sources])
        self._ends = np.cumsum([shard.samples for shard in self._shards])
        self._reset_caches()

    def _reset_caches(self) -> None:
        self._indexes = LruCache(_SAMPLES_INDEXED, self._load_index, size_of=len)
        self._groups = LruCache(_SAMPLES_INDEXED, self._load_groups, size_of=len)
        self._files = LruCache(_OPEN_FILES, self._open, close=os.close)
        self._tars = {n: shard.tar for n, shard in enumerate(self._shards) if shard.tar is not None}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        """For spawned workers: without open files."""
        left_out = ("_indexes", "_groups", "_files", "_tars")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_caches()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the sources' repeats, and of their shards' names, order, numbers of samples and, where known,
        headers."""
        return self._hash(lambda shard: [shard.header.tar.digest if shard.header else ""])

    @cached_property
    def layout(self) -> str:
        """As `fingerprint`, without the headers: equal however the samples were counted."""
        return self._hash(lambda _: [])

    @cached_property
    def plain_layout(self) -> str:
        """The `layout` of the same shards without names and repeats of sources."""
        return self._hash(lambda _: [], [replace(source, name="", repeat=1.0) for source in self.sources])

    def _hash(self, more: Callable[[Shard], list[str]], sources: Sequence[Source] | None = None) -> str:
        facts = [
            [
                source.name,
                source.repeat,
                [[source.name_of(shard), shard.samples, *more(shard)] for shard in source.shards],
            ]
            for source in sources or self.sources
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    @property
    def is_indexed(self) -> bool:
        """Whether the index headers of all shards are known, and so `fingerprint` depends on all tars."""
        return all(shard.header for shard in self._shards)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Starts to download the remote shards of these samples in the background."""
        self.cache.prefetch(self._shards[self.locate(index)[0]].location for index in indices)

    @cached_property
    def is_remote(self) -> bool:
        """Whether any shard has to be downloaded."""
        return any(is_remote(shard.location) for shard in self._shards)

    def shard_bytes(self) -> list[int]:
        """The size of each shard; that of the largest known one if it is unknown."""
        largest = max([shard.size or 0 for shard in self._shards] + [tar.size for tar in self._tars.values()])
        return [largest if shard.size is None else shard.size for shard in self._shards]

    @property
    def num_shards(self) -> int:
        """Shards of all sources."""
        return len(self._shards)

    def shard_name(self, shard: int) -> str:
        """The beginning of the names of a shard's samples."""
        source = self.sources[self._source_of_shard[shard]]
        name = printable(source.name_of(self._shards[shard]))
        return f"{source.name}/{name}" if len(self.sources) > 1 else name

    def start_of(self, shard: int) -> int:
        """The index of the first sample of a shard."""
        return int(self._ends[shard]) - self._shards[shard].samples

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples. Raises InputError if it cannot be read."""
        with self._readable(shard):
            index = self._indexes[shard]
        return [index.key(row) for row in range(len(index))]

    def groups_of_shard(self, index: int) -> tuple[int, np.ndarray]:
        """The first sample of the shard of sample `index`, and the groups of that shard's samples, int64.

        Raises:
            InputError: the shard cannot be read.
        """
        shard, row = self.locate(index)
        with self._readable(shard):
            return index - row, self._groups[shard]

    def all_groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The group of each sample, int64 (N,), and the number of its shard. Raises as `groups_of_shard`."""
        samples = [shard.samples for shard in self._shards]
        groups = [self.groups_of_shard(int(end) - 1)[1] for end in self._ends]
        return np.concatenate(groups), np.repeat(np.arange(len(samples)), samples)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, row in the shard) of a sample."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - self.start_of(shard)

    @contextlib.contextmanager
    def _readable(self, shard: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"shards: {self._shards[shard].location} cannot be read ({error}).") from None

    def _open(self, shard: int) -> int:
        """A file descriptor of the shard. Raises OSError if it cannot be opened or has changed since it was indexed."""
        location, fingerprint = self._shards[shard].location, self._tars.get(shard)
        file = self.cache.open(location)
        if fingerprint is not None and not fingerprint.matches(file):
            self.cache.discard(location, file)  # download again: the cached copy may be of another version
            os.close(file)
            file = self.cache.open(location)
            if not fingerprint.matches(file):
                os.close(file)
                forget(location, self.cache)
                raise OSError(CHANGED)
        return file

    def _load_index(self, shard: int) -> ShardIndex:
        one = self._shards[shard]
        try:
            file = self._files[shard]
        except OSError:
            if (index := stored_index(one, self.cache)) is None:
                raise
            return index  # for the keys of what is missing
        try:
            index = load_shard_index(one, file, self.cache)
        except NotATar:
            self.cache.discard(one.location, file)  # e.g. a server's error page
            raise
        self._tars[shard] = index.tar
        return index

    def _load_groups(self, shard: int) -> np.ndarray:
        one, fields = self._shards[shard], self.sources[self._source_of_shard[shard]].fields
        file = GroupFile(one.location, fields, self.cache)
        tar = self._tars.get(shard) or (one.header and one.header.tar)
        if tar is None and not is_remote(one.location):
            tar = self._indexes[shard].tar
        if (groups := file.load(one.samples, tar)) is not None:
            return groups
        index = self._indexes[shard]
        with file.lock():
            if (groups := file.load(len(index), index.tar)) is None:  # another process may have stored them meanwhile
                groups = parse_groups(fields, index, lambda offset, size: self._read_member(shard, offset, size))
                file.save(groups, index.tar)
        return groups

    def _read_member(self, shard: int, offset: int, size: int) -> bytes:
        """A member's bytes. Its header is read as well, to detect that the shard has changed."""
        data = os.pread(self._files[shard], BLOCK + size, offset - BLOCK)
        if len(data) != BLOCK + size:
            raise ValueError("truncated tar: the shard ends before this member does")
        if header_size(data) not in (size, None):
            raise OSError("it has changed since it was indexed")
        return data[BLOCK:]


def _absolute(location: str) -> str:
    return location if is_remote(location) else os.path.abspath(location)  # noqa: PTH100 (a string, for speed)
