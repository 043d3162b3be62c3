"""Expand a shard spec (pattern, folder, list file, URL …) to a list of paths and URLs, without duplicates."""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import braceexpand

from mmrl.data import starter
from mmrl.data.groups import GROUPS
from mmrl.data.index_file import SUFFIX
from mmrl.data.stores import RemoteConfig, cache_folder, cache_name, check_location, is_remote, list_tars
from mmrl.errors import InputError

ShardSpec = str | Path | Sequence[str | Path]
_MOST_FILES = 10_000_000
HUB = "hf:"
"""Begins the spec of a Hugging Face data set; training packs it into `hub_folder` once, see pack/hub.py."""


def hub_folder(spec: str) -> Path:
    """The folder in the cache for the shards of a Hugging Face data set."""
    return cache_folder(RemoteConfig()) / "packed" / cache_name(spec)


def expand(shards: ShardSpec, allow_pipe: bool = False, keep_missing: bool = False) -> list[str]:
    """The paths and URLs of a shard spec: a tar, a brace pattern, a folder, a list file (`@shards.txt`), the shipped
    set (`starter:train`), a Hugging Face data set that is packed (`hf:NAME:SPLIT`), a URL of one of these (https://,
    s3://, gs:// …), or a list of specs.

    Args:
        keep_missing: return local files that do not exist too, unless none exists.

    Raises:
        InputError: a file is missing, a pattern names files that do not exist, nothing or a shard twice is named, a
            store is unknown, a `pipe:` is not allowed.
    """
    specs = spec_list(shards)
    locations = [location for spec in specs for location in _expand_one(str(spec), allow_pipe, keep_missing)]
    if keep_missing and not any(is_remote(location) or Path(location).is_file() for location in locations):
        return expand(shards, allow_pipe)  # raises the error that names the wrong spec
    if not locations:
        raise InputError(f"shards: {shards!r} names no file; give a tar, a pattern, a folder or @list.txt.")
    files = {one: one if is_remote(one) else os.path.realpath(one) for one in locations}
    location, times = Counter(files[one] for one in locations).most_common(1)[0]
    if times > 1:
        location = next(one for one in locations if files[one] == location)
        raise InputError(
            f"shards: {location} is named twice, but an epoch reads each shard once. To read it more often, make it "
            "one of data.sources, with repeat."
        )
    return locations


def spec_list(shards: ShardSpec) -> list[str | Path]:
    """The specs in a list of them, or the one spec."""
    return [shards] if isinstance(shards, str | Path) else list(shards)


def files_below(folder: Path) -> Iterator[Path]:
    """All files that are not hidden. Links to folders are followed, but no folder is visited twice.

    Raises:
        InputError: there are more than ten million files, most likely because the wrong folder was named.
    """
    visited: set[tuple[int, int]] = set()
    count = 0
    for current, folders, names in os.walk(folder, followlinks=True):
        status = Path(current).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        count += len(names)
        if count > _MOST_FILES:
            raise InputError(f"{folder} holds more than {_MOST_FILES:,} files; name the folder of your data.")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(current, name) for name in sorted(names) if not name.startswith("."))


def _expand_one(spec: str, allow_pipe: bool, keep_missing: bool) -> list[str]:
    if not spec.strip():
        raise InputError("shards: the name is empty, as of a shell variable that is not set; name a tar or a folder.")
    if spec.startswith("starter:"):
        return [str(path) for path in starter.shards(spec.removeprefix("starter:"))]
    if spec.startswith(HUB):
        folder = hub_folder(spec)
        if not any(folder.glob("*.tar")):
            raise InputError(
                f"shards: {spec} is not packed on this host; mmrl train does it, or: mmrl pack {spec} {folder}"
            )
        return _expand_one(str(folder), allow_pipe, keep_missing)
    if spec.startswith("@"):
        return [
            location
            for line in _list_file_lines(Path(spec[1:]))
            for location in _expand_one(line, allow_pipe, keep_missing)
        ]
    if is_remote(spec):
        check_location(spec, allow_pipe)
        if "*" in spec and not spec.startswith("pipe:"):
            raise InputError(
                f"shards: {spec} has a *, which is expanded for local files only; give the folder, "
                f"{spec.partition('*')[0].rpartition('/')[0]}/, or a range such as {{000..127}}."
            )
        expanded = _expand_braces(spec)
        is_folder = len(expanded) == 1 and not spec.startswith("pipe:") and not spec.partition("?")[0].endswith(".tar")
        return list_tars(spec) if is_folder else expanded
    if Path(spec).is_dir():
        # Without hidden folders, where `mmrl pack` writes unfinished shards.
        found = sorted(str(path) for path in files_below(Path(spec)) if path.name.endswith(".tar"))
        if not found:
            raise InputError(
                f"shards: the folder {spec} holds no .tar file; images are packed by mmrl pack {spec} shards."
            )
        return found
    names = _expand_braces(spec)
    if any(glob.has_magic(name) and not Path(name).exists() for name in names):
        matches = [path for name in names for path in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
        found = [path for path in matches if not path.endswith((SUFFIX, GROUPS))]
        if not found:
            raise InputError(f"shards: no file matches {spec!r}; correct the pattern.")
        return [location for path in found for location in _expand_one(path, allow_pipe, keep_missing)]
    if Path(spec).suffix.lower() in (".csv", ".tsv", ".jsonl", ".parquet"):
        raise InputError(f"shards: {spec} is a table; it is packed by mmrl pack {spec} shards.")
    paths = [Path(name) for name in names]
    missing = [] if keep_missing else [path for path in paths if not path.is_file()]
    if missing and len(paths) == 1:
        raise InputError(f"shards: {missing[0]} does not exist.")
    if missing:
        raise InputError(
            f"shards: {spec!r} names {len(paths)} files and {len(missing)} of them do not exist, such as {missing[0]}; "
            "correct the pattern or restore the files."
        )
    return [str(path) for path in paths]


def _list_file_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"shards: the list file {path} does not exist.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise InputError(f"shards: the list file {path} is not UTF-8 text; write one shard spec per line.") from None
    specs = [line for line in lines if line and not line.startswith("#")]
    inner_list = next((line for line in specs if line.startswith("@")), None)
    if inner_list:
        raise InputError(f"shards: the list file {path} names another list file, {inner_list}; name shards instead.")
    return specs


def _expand_braces(spec: str) -> list[str]:
    too_many = f"shards: {spec!r} names more than {_MOST_FILES:,} files; correct the numbers in its braces."
    for first, last in re.findall(r"\{-?(\d+)\.\.-?(\d+)", spec):  # braceexpand makes a list of each range
        if max(len(first), len(last)) > 15 or abs(int(last) - int(first)) >= _MOST_FILES:
            raise InputError(too_many)
    try:
        names = list(itertools.islice(braceexpand.braceexpand(spec), _MOST_FILES + 1))
    except ValueError:  # braceexpand.UnbalancedBracesError, which type checkers do not see
        raise InputError(
            f"shards: the braces in {spec!r} do not match; write a pattern such as part-{{000..127}}.tar."
        ) from None
    if len(names) > _MOST_FILES:
        raise InputError(too_many)
    return names
