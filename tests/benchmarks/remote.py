"""How fast many shards are opened, and how much of a network's rate the stream uses.

    python tests/benchmarks/remote.py [--shards 10000] [--link 40]

    opened, nothing known      local shards without indexes: all are scanned
    opened again               by the next command on the same host
    by the other ranks         by another process that asked while the first one opened them
    opened, declared           by one file with the numbers of samples (sizes.json)
    link                       bytes received by a stream, divided by what a link of --link MB/s carries meanwhile; each
                               connection has a quarter of that rate and each answer 0.2 s latency

tests/data/test_read_ahead.py holds how many shards are in flight.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mmrl
from mmrl.data.index import index_shard
from mmrl.data.index_file import save_index
from mmrl.data.opening import open_shards
from mmrl.data.sources import DataConfig
from mmrl.data.stores import RemoteConfig, ShardCache

sys.path.append(str(Path(__file__).parents[1]))
from conftest import write_tar
from helpers.server import Link, Server

LATENCY, CONNECTIONS_PER_LINK = 0.2, 4


def timed(name: str, work: Callable[[], object]) -> None:
    """Prints how long something takes."""
    began = time.monotonic()
    work()
    print(f"{name:40} {time.monotonic() - began:6.2f} s", flush=True)


def opening(folder: Path, shards: int) -> None:
    """Prints the times to open a set of local shards with three samples each."""
    locations = [str(folder / f"{shard:05}.tar") for shard in range(shards)]
    for location in locations:
        write_tar(Path(location), [(f"{n}.{end}", b"x") for n in range(3) for end in ("jpg", "txt")])
    cache = ShardCache(RemoteConfig(folder=str(folder / "cache")))
    timed(f"{shards:,} shards, nothing known", lambda: open_shards(locations, cache))
    timed(f"{shards:,} shards, opened again", lambda: open_shards(locations, cache))
    threads = [threading.Thread(target=open_shards, args=(locations, cache)) for _ in range(8)]

    def all_ranks() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    timed(f"{shards:,} shards, opened by 8 ranks", all_ranks)
    (folder / "sizes.json").write_text(json.dumps({Path(one).name: 3 for one in locations}))
    fresh = ShardCache(RemoteConfig(folder=str(folder / "fresh")))
    timed(f"{shards:,} shards, declared", lambda: open_shards(locations, fresh))


def link(folder: Path, rate: float, shards: int, shard_bytes: int) -> float:
    """The share of a link's rate that one epoch over remote shards uses, after the first shard."""
    for shard in range(shards):
        path = folder / f"{shard:03}.tar"
        samples = [f"{shard:03}-{n}" for n in range(8)]
        image = bytes(shard_bytes // 8)
        write_tar(path, [m for one in samples for m in ((f"{one}.jpg", image), (f"{one}.txt", b"a caption"))])
        save_index(index_shard(path), Path(f"{path}.index"))
    network = Link(rate, rate / CONNECTIONS_PER_LINK, LATENCY)
    server = Server(folder, link=network)
    remote = {"folder": str(folder / "cache")}
    data = DataConfig.model_validate({"train": f"{server.url}/{{000..{shards - 1:03}}}.tar", "remote": remote})
    stream = mmrl.stream(data, 8)
    before, began = sum(server.sent.values()), time.monotonic()
    for _ in stream:
        pass
    took, received = time.monotonic() - began, sum(server.sent.values()) - before
    server.close()
    return received / took / rate


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="The start on many shards, and the use of a slow network.")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--link", type=float, default=40.0, help="MB/s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        opening(Path(folder), given.shards)
    with tempfile.TemporaryDirectory() as folder:
        share = link(Path(folder), given.link * 1e6, shards=160, shard_bytes=2_000_000)
        print(f"{'share of the link':40} {share:6.2f}")


if __name__ == "__main__":
    main()
