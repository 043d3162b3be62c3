"""What many hosts download of a set of remote shards: bytes served by one web server, divided by the bytes of the set.

    python tests/benchmarks/hosts.py [--hosts 16] [--shards 2560] [--jobs 2]

Each simulated host is a process with a cache folder of its own, and loads its rows of every batch of one epoch:

    16 hosts                        the default number of lanes
    16 hosts, one lane              every host reads every shard, as before there were lanes; an eighth of the set
    12 hosts                        a number that does not divide the lanes: neighbouring hosts share some
    16 hosts, then 12               the second half is resumed on three quarters of the hosts, with empty caches
    16 hosts, one of them replaced  one host fails after half the epoch; its successor has an empty cache

In each case all samples must be loaded exactly once, but for those that fill no batch. Each host also downloads one
shard when it starts, to check the names of the fields. tests/benchmarks/test_hosts.py runs the same on fewer shards.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmrl
from mmrl.data.counts import LIST, write_list
from mmrl.data.index import index_shard
from mmrl.data.index_file import save_index
from mmrl.data.sources import DataConfig

sys.path.append(str(Path(__file__).parents[1]))
from conftest import write_tar
from helpers.server import Server

WINDOW = 256
ROWS_PER_HOST = 12  # 192 rows of 16 hosts: a multiple of 64 lanes and of 12 hosts
# One shard of a lane ahead of the current one. The default has four, which is much of a lane of so small a set.
READ_AHEAD = 4


@dataclass(frozen=True)
class Host:
    """What one host loads."""

    shards: str
    cache: Path
    rank: int
    hosts: int
    batch_size: int
    lanes: int
    state: dict[str, Any] | None = None
    """Where the epoch is resumed."""
    batches: int | None = None
    """After how many batches it is left; None for the whole epoch."""


Run = Callable[[Callable[[Host], Any], Iterable[Host]], Iterable[tuple[list[str], dict[str, Any]]]]


def load(host: Host) -> tuple[list[str], dict[str, Any]]:
    """Loads the rows of a host; returns their keys and the stream's state."""
    remote = {"folder": str(host.cache), "read_ahead": READ_AHEAD}
    data = DataConfig.model_validate(
        {"train": host.shards, "lanes": host.lanes, "shuffle_window": WINDOW, "remote": remote}
    )
    stream = mmrl.stream(data, host.batch_size // host.hosts, seed=3, rank=host.rank, world_size=host.hosts)
    if host.state:
        stream.load_state_dict(host.state)
    keys: list[str] = []
    for count, batch in enumerate(stream, start=1):
        keys += batch.keys
        if count == host.batches:
            break
    return keys, stream.state_dict()


class RemoteSet:
    """Shards with their indexes behind a web server. Its samples have some bytes in place of an image."""

    def __init__(self, folder: Path, shards: int, samples_per_shard: int, hosts: int, run: Run = map) -> None:
        self.folder, self.hosts, self.batch_size, self._run = folder, hosts, hosts * ROWS_PER_HOST, run
        self.shards, self.samples_per_shard = shards, samples_per_shard
        (folder / "set").mkdir()
        for shard in range(shards):
            path = folder / "set" / f"{shard:05}.tar"
            names = [f"{shard:05}-{number:05}" for number in range(samples_per_shard)]
            write_tar(path, [(f"{name}.{end}", b"caption" * 300) for name in names for end in ("jpg", "txt")])
            save_index(index_shard(path), Path(f"{path}.index"))
        write_list(folder / "set" / LIST, {one.name: Path(f"{one}.index") for one in (folder / "set").glob("*.tar")})
        self.shard_bytes = (folder / "set/00000.tar").stat().st_size

    def cases(self) -> Iterator[tuple[str, float]]:
        """(case, bytes of tars served / bytes of the set) of each case. Asserts that each sample is loaded once."""
        half = self.shards * self.samples_per_shard // self.batch_size // 2
        yield f"{self.hosts} hosts", self._epoch("whole", [{}])
        yield f"{self.hosts} hosts, one lane", self._epoch("one", [{"lanes": 1}], self.shards // 8)
        fewer = {"hosts": self.hosts * 3 // 4}
        yield f"{fewer['hosts']} hosts", self._epoch("few", [fewer])
        yield f"{self.hosts} hosts, then {fewer['hosts']}", self._epoch("fewer", [{"batches": half}, fewer])
        replaced = [{"batches": half}, {"replaced": 1}]
        yield f"{self.hosts} hosts, one of them replaced", self._epoch("replaced", replaced)

    def _epoch(self, name: str, parts: list[dict[str, Any]], shards: int | None = None) -> float:
        """The ratio of an epoch over the first `shards` shards."""
        shards = shards or self.shards
        server, keys, state = Server(self.folder / "set"), Counter[str](), None
        for number, part in enumerate(parts):
            hosts, replaced = part.get("hosts", self.hosts), part.get("replaced", 0)
            is_new = [hosts != self.hosts or rank < replaced for rank in range(hosts)]
            jobs = [
                Host(
                    shards=f"{server.url}/{{00000..{shards - 1:05}}}.tar",
                    cache=self.folder / f"{name}-{rank}-{number if is_new[rank] else 0}",
                    rank=rank,
                    hosts=hosts,
                    batch_size=self.batch_size,
                    lanes=part.get("lanes", 64),
                    state=state,
                    batches=part.get("batches"),
                )
                for rank in range(hosts)
            ]
            for loaded, state in self._run(load, jobs):  # noqa: B007 (the state is equal on all hosts)
                keys.update(loaded)
        server.close()
        assert set(keys.values()) == {1}
        assert len(keys) == shards * self.samples_per_shard // self.batch_size * self.batch_size
        return sum(server.sent[path] for path in server.sent if path.endswith(".tar")) / (shards * self.shard_bytes)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Bytes that many hosts download of a set of remote shards.")
    parser.add_argument("--hosts", type=int, default=16)
    parser.add_argument("--shards", type=int, default=2560, help="of 7 samples each")
    parser.add_argument("--jobs", type=int, default=2, help="simulated hosts at the same time")
    given = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(given.jobs, mp_context=spawn) as pool:
        for case, ratio in RemoteSet(Path(folder), given.shards, 7, given.hosts, pool.map).cases():
            print(f"{case:40} {ratio:6.2f} x the set")


if __name__ == "__main__":
    main()
