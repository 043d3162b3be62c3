"""Folders that others can write to: cache folders of strangers are refused, links planted there are not followed."""

import contextlib
import os
from pathlib import Path

import pytest
from conftest import sample_members, write_tar
from helpers.server import Server

from mmrl.data.download import download, locked, partial_file, version_file
from mmrl.data.index_file import SUFFIX
from mmrl.data.pack.hub import pack_missing
from mmrl.data.shards import hub_folder
from mmrl.data.sources import open_reader
from mmrl.data.stores import RemoteConfig, ShardCache, cache_folder
from mmrl.errors import InputError
from mmrl.output import owners
from mmrl.output.files import exclusive, write_atomic

STRANGER = 54_321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing the owner of a folder needs root")


def shared(root: Path, mode: int, owner: int = -1, group: int = -1, at: str = "cache") -> Path:
    """A cache folder in `root`, where one folder has another owner, group or mode."""
    cache = root / "above" / "cache"
    (cache / "shards").mkdir(parents=True)
    place = {"above": cache.parent, "cache": cache, "shards": cache / "shards"}[at]
    os.chown(place, owner, group)
    place.chmod(mode)
    return cache


@pytest.mark.parametrize(
    ("mode", "place", "problem"),
    [
        (0o777, "cache", "can be written by every user"),
        (0o1777, "cache", "can be written by every user"),
        (0o702, "shards", "can be written by every user"),
        (0o777, "above", "can be written by every user"),
        (0o1777, "above", None),
        (0o775, "cache", None),  # one's own group, as under the umask 002
        (0o770, "shards", None),
    ],
)
def test_what_everyone_can_write_is_no_cache(tmp_path: Path, mode: int, place: str, problem: str | None) -> None:
    config = RemoteConfig(folder=str(shared(tmp_path, mode, at=place)))
    if problem is None:
        assert cache_folder(config) == tmp_path / "above" / "cache"
    else:
        with pytest.raises(InputError, match=rf"^data\.remote\.folder: /.*{place} {problem}, .* MMRL_CACHE .*\.$"):
            ShardCache(config)


@needs_root
@pytest.mark.parametrize(
    ("mode", "owner", "group", "place", "problem"),
    [
        (0o700, STRANGER, 0, "cache", "belongs to user 54321"),
        (0o755, STRANGER, STRANGER, "shards", "belongs to user 54321"),
        (0o775, STRANGER, STRANGER, "cache", "can be written by group 54321"),
        (0o770, 0, STRANGER, "shards", "can be written by group 54321"),
        (0o2770, STRANGER, 0, "cache", None),  # a team's, for a group of ours
        (0o755, STRANGER, STRANGER, "above", None),  # who owns a folder above gave us this one
    ],
)
def test_whose_cache_is_trusted(
    tmp_path: Path, mode: int, owner: int, group: int, place: str, problem: str | None
) -> None:
    cache = shared(tmp_path, mode, owner, group, place)
    if problem is None:
        owners.check_writers(cache, "key", "remedy")
    else:
        with pytest.raises(InputError, match=rf"^key: /.*{place} {problem}.*; remedy\.$"):
            owners.check_writers(cache, "key", "remedy")


@needs_root
def test_the_owner_that_a_file_system_gives_to_new_files_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "_owner_of_new", lambda _: STRANGER)  # as root's files on NFS
    owners.check_writers(shared(tmp_path, 0o755, STRANGER), "key", "remedy")


@needs_root
def test_a_link_of_a_stranger_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    link = tmp_path / "tmp" / "cache"
    link.symlink_to(tmp_path / "mine")
    owners.check_writers(link, "key", "remedy")  # one's own
    owners.check_writers.cache_clear()
    os.chown(link, STRANGER, -1, follow_symlinks=False)
    with pytest.raises(InputError, match=r"cache is a link of user 54321"):
        owners.check_writers(link, "key", "remedy")


def test_a_new_cache_is_for_its_owner_alone_and_a_user_needs_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_folder(RemoteConfig(folder=str(tmp_path / "new" / "cache")))
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("MMRL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(InputError, match="no home folder; set it or MMRL_CACHE"):
        cache_folder(RemoteConfig())


def test_planted_links_are_replaced_not_followed(tmp_path: Path) -> None:
    write_tar(tmp_path / "web" / "a.tar", [member for number in range(4) for member in sample_members(number)])
    mine = tmp_path / "mine"
    mine.write_text("precious")
    with contextlib.closing(Server(tmp_path / "web")) as server:
        url = server.url
        cache = ShardCache(RemoteConfig(folder=str(tmp_path / "cache"), retries=0))
        target = cache._cached_path(f"{url}/a.tar")
        index = cache.index_path(f"{url}/a.tar")
        for path in (target, partial_file(target), version_file(target), index):
            path.parent.mkdir(exist_ok=True)
            path.symlink_to(mine)
        reader = open_reader(f"{url}/a.tar", remote=cache.config)
        assert [reader.read(row).name for row in range(4)] == [f"a.tar/{row:05}" for row in range(4)]
        assert not any(path.is_symlink() for path in (target, index))
        assert download(f"{url}/a.tar", target, 0, 5, 1e9).stat().st_size == target.stat().st_size
    assert mine.read_text() == "precious"


def test_a_planted_lock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path / "cache"))
    cache = ShardCache(RemoteConfig())
    packed = hub_folder("hf:name").with_suffix(".lock")
    for path in (cache.folder / "a.lock", packed, tmp_path / "run" / ".lock"):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(mine)
    with pytest.raises(OSError, match="symbolic links"), locked(cache.folder / "a.lock", wait=True):
        pass
    with pytest.raises(InputError, match=r"^data\.remote\.folder: .*\.lock"):
        pack_missing(["hf:name"])
    with (
        pytest.raises(InputError, match=r"run/\.lock cannot be opened .* delete it"),
        exclusive(tmp_path / "run", "it"),
    ):
        pass
    assert mine.read_text() == "precious"


def test_a_file_is_written_to_no_planted_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, path = tmp_path / "mine", tmp_path / f"a{SUFFIX}"
    mine.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / f".a{SUFFIX}.guessed.partial").symlink_to(mine)
    with pytest.raises(FileExistsError):
        write_atomic(path, "planted")
    assert mine.read_text() == "precious"
    assert not path.exists()
