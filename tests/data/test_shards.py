from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sample_members, write_tar
from webdataset.tariterators import group_by_keys, tar_file_iterator

from mmrl.data import draws
from mmrl.data.shards import EpochOrder, expand, index_shard, index_shards
from mmrl.errors import InputError


def test_every_way_of_naming_shards(shards: Path, tmp_path: Path) -> None:
    names = ["part-0.tar", "part-1.tar", "part-2.tar"]
    listing = tmp_path / "list.txt"
    listing.write_text(f"# the first\n{shards}/part-0.tar\n\n{shards}/part-{{1..2}}.tar\n")
    for spec in (str(shards), f"{shards}/part-{{0..2}}.tar", f"@{listing}", [shards / name for name in names]):
        assert [path.name for path in expand(spec)] == names  # pyright: ignore[reportArgumentType]
    assert len(expand("starter:train")) == 4


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nowhere.tar", "nowhere.tar does not exist"),
        ("{shards}/part-{{0..5}}.tar", "names 6 files and 3 of them do not exist, such as .*part-3.tar"),
        ("@nolist.txt", "list file nolist.txt does not exist"),
        ("{empty}", "holds no .tar file"),
        ("pipe:rm -rf x", "not a local path"),
        ("http://example.org/a.tar", "not a local path"),
        ("starter:training", "no split 'training'.*val-pictures"),
    ],
)
def test_shards_that_are_not_there_are_named(spec: str, says: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        expand(spec.format(shards=shards, empty=tmp_path))


def test_a_shard_named_twice_is_refused(shards: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        expand([shards, shards / "part-1.tar"])


def test_the_index_groups_members_as_webdataset_does(shards: Path) -> None:
    path = shards / "part-0.tar"
    index = index_shard(path)
    with path.open("rb") as file:
        tar_bytes: Any = file
        theirs = list(group_by_keys({**member, "__url__": ""} for member in tar_file_iterator(tar_bytes)))
    assert index.keys == [sample["__key__"] for sample in theirs]
    raw = path.read_bytes()
    for row, sample in enumerate(theirs):
        mine = {kind: raw[offset : offset + size] for kind, (offset, size) in index.members(row).items()}
        assert mine == {kind: data for kind, data in sample.items() if not kind.startswith("__")}


def test_a_tar_cut_short_keeps_what_is_whole_and_says_so(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "part-0.tar").read_bytes()
    index = index_shard(shards / "part-0.tar")
    inside = index.members(10)["png"][0] + 5
    at_an_edge = index.members(10)["png"][0] - 512
    in_a_header = at_an_edge + 100
    for number, cut in enumerate((inside, at_an_edge, in_a_header)):
        path = tmp_path / f"cut-{number}.tar"
        path.write_bytes(whole[:cut])
        short = index_shard(path)
        assert short.keys == index.keys[:10]
        assert len(short.problems) == 1
        assert short.problems[0].reason.startswith("truncated tar")


def test_duplicate_keys_are_listed_and_left_out(tmp_path: Path) -> None:
    members = [*sample_members(1), *sample_members(2), *sample_members(1)]
    index = index_shard(write_tar(tmp_path / "twice.tar", members))
    assert index.keys == ["00001", "00002"]
    assert [problem.reason for problem in index.problems] == ["duplicate key in this shard"]


def test_files_that_are_no_shards_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("hello " * 1000)
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(InputError, match=r"text.tar is not a plain tar file"):
        index_shards([tmp_path / "text.tar"])
    with pytest.raises(InputError, match="decompress it first"):
        index_shards([tmp_path / "zipped.tar"])
    with pytest.raises(InputError, match=r"empty.tar holds no sample"):
        index_shards([tmp_path / "empty.tar"])


@pytest.mark.parametrize("counts", [[7], [5, 1, 30], [100] * 20])
@pytest.mark.parametrize("window", [1, 16, 10_000])
def test_an_epoch_holds_each_sample_once_in_an_order_of_its_own(counts: list[int], window: int) -> None:
    everywhere = np.arange(sum(counts))
    epochs = [EpochOrder(counts, seed=5, epoch=epoch, window=window).samples(everywhere) for epoch in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == everywhere.tolist()
    assert epochs[0].tolist() != epochs[1].tolist() != epochs[2].tolist()
    # Any part of the order is found without the rest.
    again = EpochOrder(counts, seed=5, epoch=1, window=window)
    assert again.samples(everywhere[3:6]).tolist() == epochs[1][3:6].tolist()
    assert again.samples(everywhere[:2] + sum(counts)).tolist() == epochs[1][:2].tolist()


def test_draws_are_even_and_do_not_depend_on_their_company() -> None:
    numbers = draws.uniform(1, 2, np.arange(20_000))
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.histogram(numbers, 10)[0] / 2000 - 1).max() < 0.1
    assert draws.uniform(1, 2, np.array([77]))[0] == numbers[77]
    assert draws.uniform(1, 3, 77) != numbers[77]
    assert sorted(draws.permutation(50, 9).tolist()) == list(range(50))
