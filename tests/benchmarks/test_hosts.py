"""Many hosts with caches of their own download about each shard once."""

from pathlib import Path

import hosts


def test_hosts_download_the_shards_of_their_lanes(tmp_path: Path) -> None:
    one_epoch, one_lane, few, fewer, replaced = (ratio for _, ratio in hosts.RemoteSet(tmp_path, 32, 40, 4).cases())
    bound = (32 + 3 + 4) / 32  # a cut between neighbouring hosts, and the shard for the check of the fields
    shared = (4 + 3 - 1) / 4  # 3 hosts share 4 lanes
    assert one_epoch <= bound
    assert one_lane > 3
    assert few <= bound + shared - 1
    # What each of the 4 lanes has begun and read ahead is downloaded again; 3 hosts more check the fields.
    assert fewer <= bound + shared - 1 + 4 * (1 + hosts.READ_AHEAD) / 32 + 3 / 32
    assert replaced <= bound + 9 / 32
