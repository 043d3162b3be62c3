"""What a shard spec names: local files and addresses, in order, each once."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from mmrl.data import starter
from mmrl.data.stores import check_location, is_remote, listed
from mmrl.errors import InputError

Spec = str | Path | Sequence[str | Path]


def expand(shards: Spec, allow_pipe: bool = False, keep_missing: bool = False) -> list[str]:
    """The shards that a spec names, as paths and addresses. A spec is a tar, a brace pattern, a folder, a list file
    (`@shards.txt`), the shipped set (`starter:train`), an address of one of these (https://, s3://, gs:// …), or a list
    of specs.

    Args:
        keep_missing: local files that do not exist are among the answer, as long as any other does.

    Raises:
        InputError: a named file is missing or no tar, a pattern matches fewer files than it names, nothing is named, a
            store is unknown, a `pipe:` is not allowed.
    """
    specs = [shards] if isinstance(shards, str | Path) else list(shards)
    locations = [location for spec in specs for location in _expand_one(str(spec), allow_pipe, keep_missing)]
    if keep_missing and not any(is_remote(location) or Path(location).is_file() for location in locations):
        return expand(shards, allow_pipe)  # nothing is there at all: that is the spec's mistake, and is told as such
    if not locations:
        raise InputError(f"shards: {shards!r} names no file; give a tar, a pattern, a folder or @list.txt.")
    most_named, times = Counter(locations).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"shards: {most_named} is named twice; each shard is read once an epoch. To see it more "
            "often, make it one of data.sources, with repeat."
        )
    return locations


def _expand_one(spec: str, allow_pipe: bool, keep_missing: bool) -> list[str]:
    if spec.startswith("starter:"):
        return [str(path) for path in starter.shards(spec.removeprefix("starter:"))]
    if spec.startswith("@"):
        listing = Path(spec[1:])
        if not listing.is_file():
            raise InputError(f"shards: the list file {listing} does not exist.")
        try:
            lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError:
            raise InputError(
                f"shards: the list file {listing} is not UTF-8 text; it has one shard spec a line."
            ) from None
        specs = [line for line in lines if line and not line.startswith("#")]
        inner_list = next((line for line in specs if line.startswith("@")), None)
        if inner_list:
            raise InputError(f"shards: the list file {listing} names another list, {inner_list}; name shards in it.")
        return [one for inner in specs for one in _expand_one(inner, allow_pipe, keep_missing)]
    if is_remote(spec):
        check_location(spec, allow_pipe)
        named = _braces(spec)
        is_folder = len(named) == 1 and not spec.startswith("pipe:") and not spec.partition("?")[0].endswith(".tar")
        return listed(spec) if is_folder else named
    if Path(spec).is_dir():
        # Unlike rglob, this follows links to folders, and passes over hidden ones, where `mmrl pack` is at work.
        found = sorted(glob.glob(f"{glob.escape(spec)}/**/*.tar", recursive=True))  # noqa: PTH207
        if not found:
            raise InputError(f"shards: the folder {spec} holds no .tar file.")
        return found
    paths = [Path(name) for name in _braces(spec)]
    missing = [] if keep_missing else [path for path in paths if not path.is_file()]
    if missing and len(paths) == 1:
        raise InputError(f"shards: {missing[0]} does not exist.")
    if missing:
        raise InputError(
            f"shards: {spec!r} names {len(paths)} files and {len(missing)} of them do not exist, such as {missing[0]}; "
            "correct the pattern or restore the files."
        )
    return [str(path) for path in paths]


def _braces(spec: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(spec))
    except ValueError:  # braceexpand's own kind, which type checkers do not see
        raise InputError(f"shards: the braces in {spec!r} do not match; write such as part-{{000..127}}.tar.") from None
