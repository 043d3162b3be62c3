"""Many hosts with caches of their own download about each shard once."""

from pathlib import Path

import hosts


def test_hosts_download_the_shards_of_their_lanes(tmp_path: Path) -> None:
    one_epoch, one_lane, fewer, replaced = (ratio for _, ratio in hosts.RemoteSet(tmp_path, 32, hosts=4).cases())
    bound = (32 + 3 + 4) / 32  # a cut between neighbouring hosts, and the shard for the check of the fields
    assert one_epoch <= bound
    assert one_lane > 3
    assert fewer <= bound + (4 + 3 - 1) / 4 + 3 / 32  # 3 hosts share 4 lanes
    assert replaced <= bound + 9 / 32
