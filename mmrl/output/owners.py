"""Who can write to a folder: in one that strangers can write to, they could plant files and links."""

import contextlib
import functools
import os
import stat
import tempfile
from pathlib import Path

from mmrl.errors import InputError


@functools.cache
def check_writers(folder: Path, key: str, remedy: str) -> None:
    """Creates a folder for this user alone, and checks once that it, the folders in it and those above it can be
    written only by this user, root and, where the group may write, groups of this user. A folder above may be
    writable by everyone if it has the sticky bit, as /tmp has.

    Args:
        key: the config key of the folder, for the message.

    Raises:
        InputError: others can write there, or a link of theirs leads there.
    """
    with contextlib.suppress(OSError):  # whoever needs the folder says why it cannot be written
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    inside = [folder]
    with contextlib.suppress(OSError):
        inside += [one for one in folder.iterdir() if one.is_dir()]
    # Links have folders above them as well as their targets have.
    paths = {Path(name) for one in inside for name in (os.path.abspath(one), os.path.realpath(one))}  # noqa: PTH100
    above = {parent for path in paths for parent in path.parents} - paths
    for path in sorted(paths | above):
        if problem := _problem(path, path in above):
            raise InputError(f"{key}: {path} {problem}, so what is in {folder} cannot be trusted; {remedy}.")


def _problem(path: Path, is_above: bool) -> str | None:
    try:
        link, status, parent = path.lstat(), path.stat(), path.parent.stat()
    except OSError:  # it does not exist
        return None
    users, groups = (0, os.geteuid()), (os.getegid(), *os.getgroups())
    if stat.S_ISLNK(link.st_mode) and parent.st_mode & stat.S_IWOTH and link.st_uid not in users:
        return f"is a link of user {link.st_uid}"
    if status.st_mode & stat.S_IWOTH and not (is_above and status.st_mode & stat.S_ISVTX):
        return "can be written by every user"
    if is_above:
        return None
    if status.st_mode & stat.S_IWGRP:  # shared on purpose, whoever owns it
        return None if status.st_gid in groups else f"can be written by group {status.st_gid}, which you are not in"
    return None if status.st_uid in (*users, _owner_of_new(path)) else f"belongs to user {status.st_uid}"


def _owner_of_new(folder: Path) -> int | None:
    """The owner that the file system gives to new files: for root on NFS that is another one. None if none can be
    created."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None
