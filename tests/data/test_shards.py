import shutil
from pathlib import Path

import pytest

from mmrl.data.shards import expand
from mmrl.errors import InputError


def test_expand_takes_folders_patterns_lists_and_the_starter_set(shards: Path, tmp_path: Path) -> None:
    names = ["part-0.tar", "part-1.tar", "part-2.tar"]
    listing = tmp_path / "list.txt"
    listing.write_text(f"# a comment\n{shards}/part-0.tar\n\n{shards}/part-{{1..2}}.tar\n")
    beside = [shards / f"part-0.tar{ending}" for ending in (".index", ".1234.groups")]
    for path in beside:
        path.touch()  # matches part-*, and is no shard
    named = [shards / name for name in names]
    for spec in (str(shards), f"{shards}/part-{{0..2}}.tar", f"{shards}/part-*", f"@{listing}", named):
        assert [Path(path).name for path in expand(spec)] == names  # pyright: ignore[reportArgumentType]
    for path in beside:
        path.unlink()
    assert len(expand("starter:train")) == 4


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere.tar", "nowhere.tar does not exist"),
        ("{shards}/part-{{0..5}}.tar", "names 6 files and 3 of them do not exist, such as .*part-3.tar"),
        ("@nolist.txt", "list file nolist.txt does not exist"),
        ("{empty}", "holds no .tar file; images are packed by mmrl pack .*empty shards"),
        ("{shards}/*.zip", r"no file matches '.*\*\.zip'"),
        ("items.csv", "items.csv is a table; it is packed by mmrl pack items.csv shards"),
        ("https://example.org/a/*.tar", r"for local files only; give the folder, https://example.org/a/, or a range"),
        ("pipe:rm -rf x", "would run a command; set data.allow_pipe=true"),
        ("http://example.org/shards/", r"cannot be listed; give a pattern such as http://example.org/shards/shard-"),
        ("nostore://bucket/a.tar", r"nostore:// in .* is not supported; use a path or one of http, https, "),
        ("memory://nothing/here", "holds no .tar file"),
        ("starter:training", "no split 'training'.*val-pictures"),
        (" ", "the name is empty, as of a shell variable that is not set"),
        ("part-{{0..99999999999}}.tar", "names more than 10 files; correct the numbers in its braces"),
        ("{{0..9}}{{0..9}}{{0..9}}{{a,b}}.tar", "names more than 10 files; correct the numbers in its braces"),
        ("{many}", "holds more than 10 files; name the folder of your data"),
    ],
)
def test_a_wrong_spec_is_an_error_that_names_it(
    spec: str, says: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrl.data.shards._MOST_FILES", 10)
    empty = tmp_path / "empty"
    empty.mkdir()
    for number in range(11):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(InputError, match=says):
        expand(spec.format(shards=shards, many=tmp_path, empty=empty))


def test_a_shard_named_twice_is_an_error(shards: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        expand([shards, shards / "part-1.tar"])


def test_a_link_to_a_parent_folder_adds_no_shard(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(shards, folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "sub" / "elsewhere").symlink_to(tmp_path)
    assert [Path(path).name for path in expand(folder)] == [Path(path).name for path in expand(shards)]
    (folder / "again.tar").symlink_to(folder / "part-1.tar")
    with pytest.raises(InputError, match=r"again\.tar is named twice"):
        expand(folder)
