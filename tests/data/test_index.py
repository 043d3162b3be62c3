import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sample_members, write_tar
from webdataset.tariterators import group_by_keys, tar_file_iterator

from mmrl.data import opening
from mmrl.data.counts import Shard
from mmrl.data.index import ShardIndex, index_shard
from mmrl.data.index_file import SUFFIX, load_index, save_index
from mmrl.data.opening import load_shard_index, open_shards
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.errors import InputError


def keys(index: ShardIndex) -> list[str]:
    return [index.key(row) for row in range(len(index))]


def cache(folder: Path) -> ShardCache:
    return ShardCache(RemoteConfig(folder=str(folder)))


def test_the_index_groups_members_as_webdataset_does(shards: Path) -> None:
    path = shards / "part-0.tar"
    index = index_shard(path)
    with path.open("rb") as file:
        tar_bytes: Any = file
        theirs = list(group_by_keys({**member, "__url__": ""} for member in tar_file_iterator(tar_bytes)))
    assert keys(index) == [sample["__key__"] for sample in theirs]
    raw = path.read_bytes()
    for row, sample in enumerate(theirs):
        mine = {kind: raw[offset : offset + size] for kind, (offset, size) in index.members(row).items()}
        assert mine == {kind: data for kind, data in sample.items() if not kind.startswith("__")}


def contents(index: ShardIndex) -> dict[str, dict[str, tuple[int, int]]]:
    return {index.key(row): index.members(row) for row in range(len(index))}


def test_a_truncated_tar_keeps_its_complete_samples_and_lists_the_problem(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "part-0.tar").read_bytes()
    index = index_shard(shards / "part-0.tar")
    inside = index.members(10)["png"][0] + 5
    at_an_edge = index.members(10)["png"][0] - 512
    in_a_header = at_an_edge + 100
    # Sample 9 is known to be complete only if a member of sample 10 follows it.
    for cut, kept in ((inside, 10), (at_an_edge, 9), (in_a_header, 9)):
        path = tmp_path / f"cut-{cut}.tar"
        path.write_bytes(whole[:cut])
        short = index_shard(path)
        assert keys(short) == keys(index)[:kept]
        kinds = {key: reason.partition(":")[0] for key, reason in short.problems}
        assert kinds.pop("") in ("truncated tar", "damaged tar")
        assert kinds == ({} if kept == 10 else {"00009": "cut sample"})


def test_tars_joined_with_cat_are_a_problem(shards: Path, tmp_path: Path) -> None:
    joined = tmp_path / "joined.tar"
    joined.write_bytes((shards / "part-1.tar").read_bytes() + (shards / "part-2.tar").read_bytes())
    index = index_shard(joined)
    assert len(index) == 17
    ((key, reason),) = index.problems
    assert key == ""
    assert reason.startswith("data beyond the end of the tar")


def test_duplicate_keys_are_listed_and_left_out(tmp_path: Path) -> None:
    members = [*sample_members(1), *sample_members(2), *sample_members(1)]
    index = index_shard(write_tar(tmp_path / "twice.tar", members))
    assert keys(index) == ["00001", "00002"]
    assert index.problems == [("00001", "duplicate key: it occurs earlier in this shard; the first sample is used")]


def test_files_that_are_not_shards_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("hello " * 1000)
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    write_tar(tmp_path / "empty.tar", [])
    for name, says in (("text", "is not a plain tar file"), ("zipped", "decompress it"), ("empty", "holds no sample")):
        with pytest.raises(InputError, match=rf"{name}.tar.* {says}"):
            open_shards([str(tmp_path / f"{name}.tar")], cache(tmp_path))


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_tar_yields_only_correct_samples_or_is_rejected(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    tar = write_tar(tmp_path / "whole.tar", (m for n in range(6) for m in sample_members(n)))
    whole, intact = tar.read_bytes(), contents(index_shard(tar))
    data = bytearray(whole[: rng.integers(1, len(whole))] if seed % 2 else whole)
    headers = [offset for offset in range(0, len(data), 512) if data[offset + 257 : offset + 262] == b"ustar"]
    for _ in range(3):  # most bit flips in headers, where they matter
        start = int(rng.choice(headers)) if headers and rng.random() < 0.8 else int(rng.integers(len(data)))
        data[min(start + int(rng.integers(512)), len(data) - 1)] ^= 1 << int(rng.integers(8))
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    try:
        index = index_shard(path)
    except InputError:
        return
    # Headers have checksums, so each loss is listed and no sample is wrong.
    assert contents(index) == intact or index.problems
    assert contents(index).items() <= intact.items()
    for row in range(len(index)):
        assert all(offset + size <= len(data) for offset, size in index.members(row).values())


def test_an_index_is_saved_and_loaded(shards: Path, tmp_path: Path) -> None:
    index = index_shard(write_tar(tmp_path / "a.tar", [*sample_members(1), ("\udcff.png", b""), *sample_members(1)]))
    save_index(index, tmp_path / "a.index")
    again = load_index(tmp_path / "a.index")
    assert keys(again) == keys(index) == ["00001", "\\xff"]
    assert again.problems == index.problems
    assert again.members(0) == index.members(0)
    assert again.tar == index.tar


def test_an_index_is_created_once_and_then_loaded(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locations = [str(path) for path in sorted(shards.glob("*.tar"))]
    first = open_shards(locations, cache(tmp_path))
    assert [shard.samples for shard in first] == [20, 17, 11]
    assert not list(shards.glob("*.index"))  # nothing is written to the data's folder
    monkeypatch.setattr(opening, "index_shard", None)
    assert open_shards(locations, cache(tmp_path)) == first


def load(shard: Shard, folder: Path) -> ShardIndex:
    with Path(shard.location).open("rb") as file:
        return load_shard_index(shard, file.fileno(), cache(folder))


def test_an_index_next_to_the_shard_is_used_unless_it_is_of_another_tar(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar = tmp_path / "a.tar"
    shutil.copy(shards / "part-0.tar", tar)
    neighbour = tmp_path / f"a.tar{SUFFIX}"
    save_index(index_shard(tar), neighbour)
    with monkeypatch.context() as patch:
        patch.setattr(opening, "index_shard", None)
        (shard,) = open_shards([str(tar)], cache(tmp_path / "cache"))
        assert len(load(shard, tmp_path / "cache")) == 20
    assert not (tmp_path / "cache" / "index").exists()
    # Of the same size: only the headers differ.
    data = tar.read_bytes()
    write_tar(tar, [m for number in range(100, 120) for m in sample_members(number)])
    tar.write_bytes(tar.read_bytes().ljust(len(data), b"\0")[: len(data)])
    (shard,) = open_shards([str(tar)], cache(tmp_path / "cache"))
    assert load(shard, tmp_path / "cache").key(0) == "00100"
    for damage in (b"", b"no index", neighbour.read_bytes()[:100]):
        neighbour.write_bytes(damage)
        (shard,) = open_shards([str(tar)], cache(tmp_path / "cache"))
        assert load(shard, tmp_path / "cache").key(0) == "00100"


def test_a_cache_folder_that_cannot_be_written_is_one_sentence_where_it_is_needed(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    tar = tmp_path / "a.tar"
    shutil.copy(shards / "part-1.tar", tar)
    says = (
        r"^data\.remote\.folder: .*/file cannot be written \(.*\), but the index of .*a\.tar is to be .* or MMRL_CACHE "
    )
    with pytest.raises(InputError, match=says):
        open_shards([str(tar)], cache(tmp_path / "file"))
    with pytest.raises(InputError, match=r"^data\.remote\.folder: .*http://127\.0\.0\.1:9/a\.tar"):
        open_shards(["http://127.0.0.1:9/a.tar"], cache(tmp_path / "file"))
    save_index(index_shard(tar), tmp_path / f"a.tar{SUFFIX}")
    (shard,) = open_shards([str(tar)], cache(tmp_path / "file"))
    assert len(load(shard, tmp_path / "file")) == 17
