"""The numbers of samples that an epoch needs come from files next to the shards, or are counted once per host."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import sample_members, write_tar
from helpers.server import Server

from mmrl.data import counts, opening
from mmrl.data.check.command import check_shards
from mmrl.data.index import index_shard
from mmrl.data.index_file import SUFFIX, save_index
from mmrl.data.opening import open_shards
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.data.stream import Stream
from mmrl.errors import InputError

COUNTS = {"a.tar": 3, "b.tar": 5, "c.tar": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    first = 0
    for name, count in COUNTS.items():
        write_tar(tmp_path / "set" / name, [m for n in range(first, first + count) for m in sample_members(n)])
        first += count
    return tmp_path / "set"


def cache(folder: Path) -> ShardCache:
    return ShardCache(RemoteConfig(folder=str(folder.parent / "cache"), retries=0))


def open_set(folder: Path) -> list[int]:
    return [shard.samples for shard in open_shards([str(folder / name) for name in COUNTS], cache(folder))]


def wids_list(entries: dict[str, int], **more: Any) -> str:
    listed = [{"url": url, "nsamples": count, "md5sum": "0"} for url, count in entries.items()]
    return json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed, **more})


def by_pack(folder: Path) -> None:
    by_index(folder)
    counts.write_list(folder / counts.LIST, {name: folder / f"{name}{SUFFIX}" for name in COUNTS})
    for name in COUNTS:
        (folder / f"{name}{SUFFIX}").unlink()


def by_index(folder: Path) -> None:
    for name in COUNTS:
        save_index(index_shard(folder / name), folder / f"{name}{SUFFIX}")


def by_sizes(folder: Path) -> None:
    (folder / "sizes.json").write_text(json.dumps({**COUNTS, "other.tar": 7}))


def by_wids(folder: Path) -> None:
    (folder / "shardindex.json").write_text(wids_list(COUNTS))


def by_wids_of_another_folder(folder: Path) -> None:
    entries = {f"https://store/x/{name}": count for name, count in COUNTS.items()}
    (folder / "my-data.json").write_text(wids_list(entries, base="https://store/x"))


def by_wids_above(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "a.tar").rename(folder / "more" / "a.tar")
    (folder / "shardindex.json").write_text(wids_list({**COUNTS, "more/a.tar": 3}))


def by_img2dataset(folder: Path) -> None:
    for name, count in COUNTS.items():
        stats = {"count": count + 9, "successes": count, "failed_to_download": 9, "status_dict": {"success": count}}
        (folder / f"{name[0]}_stats.json").write_text(json.dumps(stats))


Declare = Callable[[Path], None]
DECLARED: list[Declare] = [by_pack, by_index, by_sizes, by_wids, by_wids_of_another_folder, by_img2dataset]


@pytest.mark.parametrize("declare", DECLARED)
def test_declared_numbers_spare_the_scan(declare: Declare, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(folder)
    with monkeypatch.context() as patch:
        patch.setattr(opening, "index_shard", None)
        assert open_set(folder) == [3, 5, 2]
        assert open_set(folder) == [3, 5, 2]
    server = Server(folder)
    remote = RemoteConfig(folder=str(folder.parent / "remote"), retries=0)
    reader = open_reader([f"{server.url}/{name}" for name in COUNTS], remote=remote)
    server.close()
    if declare is not by_wids_of_another_folder:  # only local folders are searched for other names
        assert len(reader) == 10
        assert [server.requests[f"/{name}"] for name in COUNTS] == [1, 0, 0]  # the first one is looked into


def test_a_list_may_be_in_the_folder_above_all_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_wids_above(folder)
    monkeypatch.setattr(opening, "index_shard", None)
    found = open_shards([str(folder / name) for name in ("more/a.tar", "b.tar")], cache(folder))
    assert [shard.samples for shard in found] == [3, 5]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("declare", [by_sizes, by_img2dataset])
def test_a_number_that_disagrees_with_the_tar_stops_the_run(declare: Declare, folder: Path, workers: int) -> None:
    declare(folder)
    declared = folder / ("sizes.json" if declare is by_sizes else "b_stats.json")
    write_tar(folder / "b.tar", [m for n in range(3, 7) for m in sample_members(n)])
    says = rf"^shards: .*/b\.tar holds 4 samples, but {declared} declares 5; correct or delete that file, or restore"
    config = DataConfig(train=str(folder), remote=RemoteConfig(folder=str(folder.parent / "cache")))
    with pytest.raises(InputError, match=says):
        list(Stream(open_training_set(config), 2, num_workers=workers, config=config))
    result = check_shards(config, quiet=True)
    assert not result.ok
    assert declared.name in result.stops[0]
    declared.unlink()
    assert len(open_training_set(config)) == 9


def test_a_damaged_list_is_one_sentence_and_a_file_of_another_kind_is_none(folder: Path) -> None:
    (folder / "sizes.json").write_text(json.dumps({"small": [1, 2]}))
    (folder / "shards.json").write_text('["a.tar"]')
    assert open_set(folder) == [3, 5, 2]
    for name, damage in (
        ("sizes.json", '{"a.tar": "many"}'), ("sizes.json", '{"a.tar": -1}'), ("shards.json", '{"shardlist": [{}]}'),
        ("shards.json", '{"shardlist": 3'), ("shardindex.json", wids_list({"a.tar": -2})), ("a_stats.json", "{}"),
        ("a_stats.json", ""), ("b_stats.json", '{"successes": 1.5}'),
    ):  # fmt: skip
        (folder / name).write_text(damage)
        (folder.parent / "cache" / "sets").rename(folder.parent / f"sets-{time.time_ns()}")
        with pytest.raises(InputError, match=rf"{name} is not a (list of shards|file of img2dataset)"):
            open_set(folder)
        (folder / name).unlink()


def test_a_set_is_counted_once_by_all_processes_of_a_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned, lock = Counter[str](), threading.Lock()

    def slow_index(path: str, *arguments: Any) -> Any:
        with lock:
            scanned[Path(path).name] += 1
        time.sleep(0.02)
        return index_shard(path, *arguments)

    monkeypatch.setattr(opening, "index_shard", slow_index)
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(open_set(folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[3, 5, 2]] * 6
    assert scanned == dict.fromkeys(COUNTS, 1)
    # Neither is it read again by a later command, unless a shard has changed.
    monkeypatch.setattr(opening, "read_header", None)
    assert open_set(folder) == [3, 5, 2]
    write_tar(folder / "b.tar", sample_members(3))
    monkeypatch.undo()
    assert open_set(folder) == [3, 1, 2]


def test_many_local_shards_are_counted_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "usable_cores", lambda: 2)
    monkeypatch.setattr(opening, "_FEW_SHARDS", 4)
    for shard in range(9):
        write_tar(tmp_path / "set" / f"{shard}.tar", [m for n in range(shard + 1) for m in sample_members(n)])
    locations = [str(tmp_path / "set" / f"{shard}.tar") for shard in range(9)]
    found = open_shards(locations, cache(tmp_path / "set"))
    assert [shard.samples for shard in found] == list(range(1, 10))
    (tmp_path / "set" / "7.tar").write_text("no tar" * 200)
    with pytest.raises(InputError, match=r"^shards: .*/7\.tar is not a plain tar"):
        open_shards(locations, cache(tmp_path / "set"))


def test_a_run_continues_however_the_samples_were_counted(folder: Path) -> None:
    config = DataConfig(train=str(folder), remote=RemoteConfig(folder=str(folder.parent / "cache")))
    indexed = Stream(open_training_set(config), 2, config=config)
    state, fingerprint = indexed.state_dict(), indexed._reader.fingerprint
    settings = state["data"].partition("-")[2]
    older = {name: value for name, value in state.items() if name != "tars"} | {"data": f"{fingerprint}-{settings}"}
    by_sizes(folder)
    declared = Stream(open_training_set(config), 2, config=config)
    for stream in (indexed, declared):
        for one in (state, older, declared.state_dict()):
            stream.load_state_dict(one)
    for changed in ({**state, "tars": "0"}, {**older, "data": f"0-{settings}"}):
        with pytest.raises(InputError, match="have changed since this state was saved"):
            indexed.load_state_dict(changed)
    write_tar(folder / "b.tar", [m for n in range(50, 55) for m in sample_members(n)])  # of equal numbers of samples
    (folder / "sizes.json").unlink()
    with pytest.raises(InputError, match="have changed since this state was saved"):
        Stream(open_training_set(config), 2, config=config).load_state_dict(state)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_first_positions_of_400_million_samples_need_no_scan_and_little_memory(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [m for n in range(10) for m in sample_members(n)])
    sizes = {"00000.tar": 10} | {f"{shard:05}.tar": 10_000 for shard in range(1, 40_000)}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    server = Server(tmp_path)
    config = DataConfig(train=f"{server.url}/{{00000..39999}}.tar", remote=RemoteConfig(folder=str(tmp_path / "cache")))
    began, before = time.process_time(), _resident_bytes()
    stream = Stream(open_training_set(config), 32_768, config=config)
    indices = stream._dataset._epoch_order(0).indices(np.arange(32_768))
    grown = _resident_bytes() - before
    print(f"{time.process_time() - began:.1f} s of CPU, {grown / 1e6:,.0f} MB")
    server.close()
    assert stream.samples == 399_990_010
    assert len(np.unique(indices)) == 32_768
    assert np.ptp(indices) > 300_000_000
    assert grown < 500e6
    assert sum(server.requests.values()) < 10
