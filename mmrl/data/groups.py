"""The group of each sample of a shard as one array, so that samples of a group are found without reading all of them.

The ids are in the samples' JSON. Whoever needs those of a shard first reads them all and stores them in the cache
folder; `mmrl pack` and `mmrl check --index` store them next to the shard:

    shard-000000.tar.KEY.groups     safetensors: group (N,) int64; hashes of the group and of the tar. KEY stands for
                                    the names of the fields that the ids are read from
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mmrl.data.download import locked
from mmrl.data.fields import FieldsConfig
from mmrl.data.index import ShardIndex, TarFingerprint
from mmrl.data.parsing import metadata_object
from mmrl.data.stores import ShardCache, beside, is_remote
from mmrl.data.texts import group_name
from mmrl.output.files import write_atomic

NO_GROUP = -1
GROUPS = ".groups"
"""How the name of a file of groups ends."""


def group_id(name: str) -> int:
    """A stable 63-bit hash of a group's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def own_group(sample: str) -> str:
    """The group of a sample by its name, where it has no other but must have one."""
    return f"the sample {sample}"


def parse_groups(fields: FieldsConfig, index: ShardIndex, read: Callable[[int, int], bytes]) -> np.ndarray:
    """The group of each sample of a shard, (N,) int64; NO_GROUP if it has none, or unusable JSON.

    Args:
        read: the bytes of a member, by its offset and size.
    """
    groups = np.full(len(index), NO_GROUP, np.int64)
    if fields.metadata in index.extensions:
        members = np.flatnonzero(index.kind == index.extensions.index(fields.metadata))
        rows = np.searchsorted(index.first, members, side="right") - 1
        for row, offset, size in np.stack([rows, index.offset[members], index.size[members]], 1).tolist():
            with contextlib.suppress(ValueError):  # a bad sample
                name = group_name(metadata_object(read(offset, size), fields.metadata).get(fields.group))
                groups[row] = NO_GROUP if name is None else group_id(name)
    return groups


def groups_suffix(fields: FieldsConfig) -> str:
    """What is added to a shard's name for its file of groups."""
    key = hashlib.blake2b(json.dumps([fields.metadata, fields.group]).encode(), digest_size=4).hexdigest()
    return f".{key}{GROUPS}"


def encode_groups(groups: np.ndarray, tar: TarFingerprint, modified: int | None = None) -> bytes:
    """A file of the groups of a tar, and of its modification time if the file may be older than that."""
    return save({"group": groups, "digest": _digest(groups), "tar": _digest(tar, modified)})


class GroupFile:
    """The stored groups of a shard, next to it or in the cache folder."""

    def __init__(self, location: str, fields: FieldsConfig, cache: ShardCache) -> None:
        self._location, self._cache, self._suffix = location, cache, groups_suffix(fields)
        self._cached = cache.index_path(location).with_suffix(self._suffix)

    def lock(self) -> contextlib.ExitStack:
        """Held while the groups are read from the samples, so that one process of a host does so."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a folder that cannot be written
                stack.enter_context(locked(self._cached.with_suffix(".lock"), wait=True))
            return stack.pop_all()

    def load(self, samples: int, tar: TarFingerprint | None) -> np.ndarray | None:
        """The groups of a shard of `samples` samples, and of this tar if it is known; None if none are stored.

        Raises:
            OSError: the store of a remote shard cannot be reached.
        """
        with contextlib.suppress(OSError):
            if (found := _decode(self._cached.read_bytes(), samples, tar, self._modified())) is not None:
                return found
        with contextlib.suppress(OSError):
            if not is_remote(self._location) and self._beside.stat().st_mtime_ns >= (self._modified() or 0):
                return _decode(self._beside.read_bytes(), samples, tar, None)
        if is_remote(self._location):
            data = self._cache.read_small(beside(self._location, self._suffix))
            if data is not None and (found := _decode(data, samples, tar, None)) is not None:
                self._write(self._cached, data)
                return found
        return None

    def save(self, groups: np.ndarray, tar: TarFingerprint, next_to_shard: bool = False) -> None:
        """Stores the groups of a shard. A folder that cannot be written is no error, since this only saves time."""
        is_beside = next_to_shard and not is_remote(self._location)
        data = encode_groups(groups, tar, None if is_beside else self._modified())
        self._write(self._beside if is_beside else self._cached, data)

    def _modified(self) -> int | None:
        """The modification time of a local shard: its bytes can change without its headers."""
        return None if is_remote(self._location) else Path(self._location).stat().st_mtime_ns

    @property
    def _beside(self) -> Path:
        return Path(self._location + self._suffix)

    def _write(self, path: Path, data: bytes) -> None:
        with contextlib.suppress(OSError):
            write_atomic(path, data)


def _decode(data: bytes, samples: int, tar: TarFingerprint | None, modified: int | None) -> np.ndarray | None:
    with contextlib.suppress(SafetensorError, KeyError, TypeError, ValueError):
        arrays = load(data)
        groups = arrays["group"]
        is_sound = groups.dtype == np.int64 and groups.shape == (samples,)
        is_sound &= np.array_equal(arrays["digest"], _digest(groups))
        if is_sound and (tar is None or np.array_equal(arrays["tar"], _digest(tar, modified))):
            return groups
    return None


def _digest(*facts: object) -> np.ndarray:
    data = facts[0].tobytes() if isinstance(facts[0], np.ndarray) else repr(facts).encode()
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint8)
