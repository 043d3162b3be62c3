"""The numbers of samples of a set's shards, and the files next to the shards that declare them.

An epoch needs only these numbers. The first of these that knows a shard is used:

    shards.json, shardindex.json     mmrl's list of shards, as `mmrl pack` writes it, or an index of wids
    sizes.json                       {"00000.tar": 9876, …}, as open_clip reads it
    00000.tar.index                  the shard's index
    00000_stats.json                 as img2dataset writes it

A list of shards has the format of wids, so that wids reads it too; in the cache folder it is the list of what was
counted before. Each shard's number is compared with its tar when that is opened.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PlainSerializer, PlainValidator, ValidationError

from mmrl.data.index import Problem, TarFingerprint, printable
from mmrl.data.index_file import IndexHeader, read_header
from mmrl.data.stores import is_remote, sibling
from mmrl.data.transport import PIPE
from mmrl.errors import InputError
from mmrl.output.files import parse_json, write_atomic

LIST = "shards.json"
"""The list of shards that `mmrl pack` writes."""
_LISTS, _SIZES, _STATS = (LIST, "shardindex.json"), "sizes.json", "_stats.json"
# JSON files of a local folder that may be indexes of wids, and the bytes that tell whether they are.
_MOST_JSON_FILES, _CHUNK = 32, 4096
Read = Callable[[str], bytes | None]
"""The contents of a small file, by its path or URL; None if there is none."""


def _as_name(value: object) -> str:
    """A location: pydantic's own check refuses names that are not UTF-8."""
    if not isinstance(value, str):
        raise ValueError("a location is a string")
    return value


class Shard(BaseModel):
    """A shard and the number of its samples; an entry of a list of shards."""

    model_config = ConfigDict(frozen=True)

    location: Annotated[str, PlainValidator(_as_name), PlainSerializer(printable)] = Field(alias="url")
    samples: NonNegativeInt = Field(alias="nsamples")
    size: NonNegativeInt | None = Field(default=None, alias="filesize")
    """Bytes of the tar; None if unknown."""
    header: IndexHeader | None = Field(default=None, alias="index")
    """The header of its index; None if only the number of samples is known yet."""
    declared_by: str | None = None
    """The file that declares the number of samples; None if they were counted in the tar on this host."""
    modified: int | None = None
    """The modification time in ns of the local file that the number is from: `declared_by` or the tar."""

    @classmethod
    def of(cls, location: str, header: IndexHeader) -> "Shard":
        """The shard by the header of its index."""
        return cls(
            url=location, nsamples=header.samples, filesize=header.tar.size, index=header, modified=header.modified
        )

    @property
    def tar(self) -> TarFingerprint | None:
        """The fingerprint of the tar in which the samples were counted on this host."""
        return None if self.header is None or self.declared_by else self.header.tar

    @property
    def problems(self) -> list[Problem]:
        """What cannot be used, as far as it is known."""
        return [Problem(self.location, key, reason) for key, reason in (self.header.problems if self.header else ())]

    def count_extensions(self) -> dict[str, int]:
        """Extension -> number of samples that have it; empty if unknown."""
        if self.header is None:
            return {}
        extensions = self.header.extensions
        return dict(zip(extensions, self.header.counts or [0] * len(extensions), strict=True))

    def check_count(self, samples: int) -> None:
        """Raises InputError if the tar holds another number of samples than a file declares."""
        if self.declared_by and samples != self.samples:
            raise InputError(
                f"shards: {self.location} holds {samples:,} samples, but {self.declared_by} declares {self.samples:,}; "
                "correct or delete that file, or restore the shard."
            )

    def is_unchanged(self) -> bool:
        """Whether the local file that the number of samples is from is still as it was."""
        try:
            status = Path(self.declared_by or self.location).stat()
        except OSError:
            return False
        return status.st_mtime_ns == self.modified and (bool(self.declared_by) or status.st_size == self.size)


class ShardList(BaseModel):
    """A JSON list of shards, in the format of wids."""

    kind: str = Field(default="wids-shard-index-v1", alias="__kind__")
    wids_version: int = 1
    shardlist: list[Shard]
    verified: float | None = None
    """Unix time at which all its shards were found unchanged, in the cache folder."""

    @classmethod
    def load(cls, path: Path) -> "ShardList":
        """Reads a list; an empty one if it is missing or damaged."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            return cls(shardlist=[])

    def save(self, path: Path) -> None:
        """Writes the list atomically. Raises OSError."""
        write_atomic(path, self.model_dump_json(by_alias=True, exclude_none=True))


def write_list(path: Path, index_of: Mapping[str, Path]) -> None:
    """Writes the list of the shards of a folder, given the index of each name. Others that are in the list already, and
    in the folder, stay.

    Raises:
        OSError, ValueError: an index cannot be read, or the list cannot be written.
    """
    before = ShardList.load(path).shardlist
    listed = {one.location: one for one in before if (path.parent / one.location).is_file()}
    for name, index in index_of.items():
        with index.open("rb") as file:
            listed[name] = Shard.of(name, read_header(file))
    ShardList(shardlist=[listed[name] for name in sorted(listed)]).save(path)


def declared_in_lists(locations: Sequence[str], read: Read, pool: Executor) -> dict[str, Shard]:
    """The shards that are named by lists in their own folders, or in the folder that all of them are in.

    Raises:
        InputError: such a list is damaged.
        OSError: a store cannot be reached.
    """
    first_of_folder: dict[str, str] = {}
    for location in locations:
        if not location.startswith(PIPE):
            first_of_folder.setdefault(sibling(location, "").partition("?")[0], location)
    root = "".join(os.path.commonprefix([*first_of_folder]).rpartition("/")[:2])  # noqa: RUF071 (of URLs too)
    if first_of_folder and root not in first_of_folder and (not is_remote(root) or root.count("/") > 2):
        first_of_folder[root] = f"{root}x.tar"
    entries: dict[str, Shard] = {}
    for found in pool.map(lambda one: _read_lists(one, read), first_of_folder.values()):
        entries = found | entries
    return {
        one: entries[name].model_copy(update={"location": one, "modified": None})
        for one in locations
        if (name := one.partition("?")[0] if is_remote(one) else one) in entries
    }


def _read_lists(shard: str, read: Read) -> dict[str, Shard]:
    """Location without a query -> entry, of the lists in the folder of a shard; those that come first hold."""
    folder, found = sibling(shard, "").partition("?")[0], dict[str, Shard]()
    for name in (*_LISTS, *_other_lists(folder), _SIZES):
        path = sibling(shard, name)
        if (data := read(path)) is None:
            continue
        try:
            content = parse_json(data)
            if name == _SIZES and isinstance(content, dict):
                sizes = {one: int(count) for one, count in content.items() if one.endswith(".tar")}
                entries = [Shard(url=one, nsamples=count) for one, count in sizes.items()]
            elif isinstance(content, dict) and "shardlist" in content:
                entries = ShardList.model_validate_json(data).shardlist
            else:  # a file of another kind
                continue
        except (ValueError, TypeError):
            raise InputError(
                f"shards: {path} is not a list of shards with their numbers of samples; correct or delete it."
            ) from None
        names = Counter(entry.location.rpartition("/")[2] for entry in entries)
        for entry in entries:
            entry, url = entry.model_copy(update={"declared_by": path}), entry.location
            found.setdefault(url if is_remote(url) or url.startswith("/") else folder + url, entry)
            # The list may have been made elsewhere, with other paths.
            if names[base := url.rpartition("/")[2]] == 1:
                found.setdefault(folder + base, entry)
    return found


def _other_lists(folder: str) -> list[str]:
    """Indexes of wids with names of their own, in a local folder."""
    if is_remote(folder):
        return []
    found = []
    names = sorted(one.name for one in Path(folder).glob("*.json") if not one.name.endswith(_STATS))
    for name in names[:_MOST_JSON_FILES]:
        with contextlib.suppress(OSError), Path(folder, name).open("rb") as file:
            if name not in _LISTS and b"wids-shard-index" in file.read(_CHUNK):
                found.append(name)
    return found


def declared_in_stats(location: str, read: Read) -> Shard | None:
    """The shard if img2dataset's file next to it holds the number of its samples.

    Raises:
        InputError: that file is damaged.
        OSError: the store cannot be reached.
    """
    name = location.partition("?")[0].rpartition("/")[2]
    if location.startswith(PIPE) or not name.endswith(".tar"):
        return None
    path = sibling(location, name.removesuffix(".tar") + _STATS)
    if (data := read(path)) is None:
        return None
    try:
        samples = parse_json(data)["successes"]
        modified = None if is_remote(path) else Path(path).stat().st_mtime_ns
        return Shard(url=location, nsamples=samples, declared_by=path, modified=modified)
    except (ValueError, TypeError, KeyError):
        raise InputError(f"shards: {path} is not a file of img2dataset's counts; correct or delete it.") from None
