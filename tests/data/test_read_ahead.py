"""Remote shards are downloaded ahead of their use, by several connections, each once per host."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import sample_members, write_tar
from helpers.server import Server

import mmrl
from mmrl.data.download import Prefetcher
from mmrl.data.index import index_shard
from mmrl.data.index_file import SUFFIX, save_index
from mmrl.data.sources import DataConfig
from mmrl.data.stores import RemoteConfig, ShardCache

SHARDS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    for shard in range(SHARDS):
        path = folder / f"{shard:02}.tar"
        write_tar(path, [m for n in range(4 * shard, 4 * shard + 4) for m in sample_members(n)])
        save_index(index_shard(path), folder / f"{path.name}{SUFFIX}")
    return folder


class Gate:
    """Lets requests for tars pass in groups of `together`, and notes their order and how many were there at once."""

    def __init__(self, together: int) -> None:
        self.most, self.paths = 0, list[str]()
        self._barrier, self._lock, self._inside = threading.Barrier(together, timeout=30), threading.Lock(), 0

    def __call__(self, path: str) -> None:
        if not path.endswith(".tar"):
            return
        with self._lock:
            self.paths.append(path)
            self._inside += 1
            self.most = max(self.most, self._inside)
        self._barrier.wait()
        with self._lock:
            self._inside -= 1


@contextmanager
def serving(folder: Path, gate: Callable[[str], None]) -> Iterator[Server]:
    server = Server(folder, gate=gate)
    try:
        yield server
    finally:
        server.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_host_downloads_as_many_shards_at_once_as_configured_and_each_once(folder: Path, tmp_path: Path) -> None:
    gate = Gate(together=3)  # no request is answered before three are there
    with serving(folder, gate) as server:
        ranks = [ShardCache(RemoteConfig(folder=str(tmp_path), read_ahead=3)) for _ in range(3)]
        for rank in ranks:
            rank.prefetch(f"{server.url}/{shard:02}.tar" for shard in range(SHARDS))
        wait_for(lambda: len([*ranks[0].folder.glob("*.tar")]) == SHARDS)
        assert gate.most == 3
        assert sorted(gate.paths) == [f"/{shard:02}.tar" for shard in range(SHARDS)]
        wait_for(lambda: all(rank._prefetcher is not None and not rank._prefetcher._threads for rank in ranks))
        assert len([*(tmp_path / "index").glob(f"*{SUFFIX}")]) == SHARDS


def test_a_shard_that_is_asked_for_alone_does_not_wait_for_the_one_before() -> None:
    both = threading.Barrier(2, timeout=10)

    def fetch(_: str) -> None:
        both.wait()

    prefetcher = Prefetcher(fetch, 16)
    for location in ("first", "second"):
        prefetcher.add([location])
        wait_for(lambda location=location: location not in prefetcher._waiting)
    wait_for(lambda: not prefetcher._threads)
    assert not both.broken


def test_shards_are_downloaded_in_the_order_of_their_use(folder: Path, tmp_path: Path) -> None:
    gate = Gate(together=1)
    with serving(folder, gate) as server:
        cache = ShardCache(RemoteConfig(folder=str(tmp_path), read_ahead=1))
        wanted = [7, 2, 9, 0, 4]
        cache.prefetch(f"{server.url}/{shard:02}.tar" for shard in wanted)
        wait_for(lambda: len(gate.paths) == 5)
        assert gate.paths == [f"/{shard:02}.tar" for shard in wanted]


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_a_stream_reads_that_number_of_shards_ahead(folder: Path, tmp_path: Path, ahead: int) -> None:
    gate = Gate(together=1)
    with serving(folder, gate) as server:
        data = DataConfig.model_validate({
            "train": f"{server.url}/{{00..{SHARDS - 1}}}.tar", "shuffle_window": 4, "lanes": 1,
            "remote": {"folder": str(tmp_path), "read_ahead": ahead},
        })  # fmt: skip
        stream = mmrl.stream(data, 4, seed=5)
        batches, seen = iter(stream), set[str]()
        for number in range(1, stream.batches_per_epoch + 1):
            seen |= {key.partition("/")[0] for key in next(batches).keys}
            # The first shard was read to check the fields; a batch lies in one shuffle window or across two.
            wait_for(lambda: len(gate.paths) >= min(SHARDS, len(seen) + ahead))  # noqa: B023
            assert len(gate.paths) <= number + 2 + ahead
        assert len(gate.paths) == len(set(gate.paths)) == SHARDS


def test_indexes_count_against_the_limit_of_the_cache(folder: Path, tmp_path: Path) -> None:
    limit = 100_000
    with serving(folder, Gate(together=1)) as server:
        data = DataConfig.model_validate({
            "train": f"{server.url}/{{00..{SHARDS - 1}}}.tar",
            "remote": {"folder": str(tmp_path), "gigabytes": limit / 1e9, "read_ahead": 0},
        })  # fmt: skip
        keys = [key for batch in mmrl.stream(data, 4) for key in batch.keys]
        assert len(keys) == len(set(keys)) == 4 * SHARDS
    sizes = [path.stat().st_size for folder in ("shards", "index") for path in (tmp_path / folder).glob("*.[ti]*")]
    assert limit / 2 < sum(sizes) <= limit
    assert len([*(tmp_path / "index").glob(f"*{SUFFIX}")]) < SHARDS
