"""Stored shard indexes: a safetensors file of arrays with a JSON header, so loading one runs no code.

Digests of the header and of the arrays tell a damaged index from a sound one. The header alone holds the number of
samples, so that counting the samples of a set reads a small part of each index.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mmrl.data.index import BLOCK, ShardIndex, TarFingerprint
from mmrl.data.transport import RemoteFile
from mmrl.output.files import parse_json, write_atomic

SUFFIX = ".index"
_FORMAT, _OLDER_FORMAT = "mmrl-index-2", "mmrl-index-1"
# Bytes of a header at most; it lists the problems of the shard.
_MOST_HEADER = 1 << 26
# Fields of ShardIndex that are stored as arrays under their own names.
_ARRAYS = ("key_bytes", "key_end", "first", "kind", "offset", "size")


class IndexHeader(BaseModel):
    """The JSON header of an index: what is known of a shard without the arrays. Validated, as it may be a download."""

    model_config = ConfigDict(frozen=True, strict=True)

    samples: NonNegativeInt
    extensions: list[str]
    counts: list[NonNegativeInt] | None = None
    """The number of samples that have each of `extensions`; None if an older version wrote the index."""
    problems: list[tuple[str, str]]
    tar: TarFingerprint
    modified: int | None = None
    """The tar's modification time in ns, for an index in the cache folder."""
    arrays: str = ""
    """Digest of the arrays; empty if an older version wrote the index."""

    @classmethod
    def of(cls, index: ShardIndex, modified: int | None = None) -> "IndexHeader":
        """The header of an index."""
        return cls(
            samples=len(index),
            extensions=index.extensions,
            counts=[*index.count_extensions().values()],
            problems=index.problems,
            tar=index.tar,
            modified=modified,
            arrays=_digest_of_arrays(vars(index)),
        )


def _digest_of_arrays(arrays: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in _ARRAYS:
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _digest_of_header(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def save_index(index: ShardIndex, path: Path, modified: int | None = None) -> None:
    """Writes an index atomically, with digests of its header and of its arrays.

    Raises:
        OSError: the file cannot be written.
    """
    header = json.dumps(IndexHeader.of(index, modified).model_dump())
    # One metadata entry: safetensors writes several in random order.
    metadata = {_FORMAT: _digest_of_header(header) + header}
    write_atomic(path, save({name: getattr(index, name) for name in _ARRAYS}, metadata))


def read_header(file: IO[bytes] | RemoteFile) -> IndexHeader:
    """Reads the header of an index from the beginning of its file, which is less than 1 % of it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or not an index.
    """
    size = int.from_bytes(file.read(8), "little")
    if not 0 < size <= _MOST_HEADER:
        raise ValueError("not an index")
    try:
        metadata = parse_json(file.read(size))["__metadata__"]
        header = metadata[_FORMAT if _FORMAT in metadata else _OLDER_FORMAT]
        if _FORMAT in metadata:
            digest, header = header[:32], header[32:]
            if digest != _digest_of_header(header):
                raise ValueError("a damaged index: its header differs from its digest")
        return IndexHeader.model_validate_json(header)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an index ({error!r})") from None


def load_index(path: Path) -> ShardIndex:
    """Reads an index that `save_index` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or not an index.
    """
    data = path.read_bytes()
    header = read_header(io.BytesIO(data))
    try:
        arrays = load(data)
        index = ShardIndex(
            **{name: arrays[name] for name in _ARRAYS},
            extensions=header.extensions,
            tar=header.tar,
            problems=header.problems,
            modified=header.modified,
        )
        is_sound = header.arrays in ("", _digest_of_arrays(arrays)) and _is_consistent(index)
    except (SafetensorError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is a damaged index ({error})") from None
    if not is_sound or len(index) != header.samples:
        raise ValueError(f"{path} is a damaged index (its arrays do not match)")
    return index


def _is_consistent(index: ShardIndex) -> bool:
    """Whether all values are within the index's arrays and within its tar: an index may be an untrusted download."""
    first, key_end, members = index.first, index.key_end, len(index.kind)
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    # Unsigned numbers would wrap around below.
    if any(one.ndim != 1 or one.dtype.kind != ("u" if name == "key_bytes" else "i") for name, one in arrays.items()):
        return False
    if len(first) != len(index) + 1 or first[0] != 0 or first[-1] != members:
        return False
    if not len(index.offset) == len(index.size) == members:
        return False
    if len(index.key_bytes) != (key_end[-1] if len(index) else 0):
        return False
    within = (index.kind >= 0) & (index.kind < len(index.extensions)) & (index.size >= 0) & (index.offset >= BLOCK)
    within &= index.offset <= index.tar.size - index.size
    return bool(within.all() and (np.diff(first) >= 0).all() and (np.diff(key_end) >= 0).all())
