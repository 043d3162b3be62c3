import signal

import numpy as np
import pytest

from mmrl.distributed import comm
from mmrl.train import signals
from mmrl.train.signals import StopRequest


def test_all_ranks_name_the_signal_and_the_rank_that_received_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfRank:
        def __init__(self, rank: int) -> None:
            self.rank = rank

    stops, codes = [StopRequest() for _ in range(4)], list[np.float32]()
    stops[1](signal.SIGINT, None)
    stops[2](signal.SIGTERM, None)
    for rank, stop in enumerate(stops):
        monkeypatch.setattr(comm, "world", lambda rank=rank: OfRank(rank if rank != 2 else signals._RANKS - 1))
        codes.append(np.float32(stop.code()))  # as it is reduced
    assert [bool(code) for code in codes] == [False, True, True, False]
    assert [stop.describe(int(max(codes))) for stop in stops] == [
        f"SIGTERM to rank {signals._RANKS - 1}",
        "SIGTERM",
        "SIGTERM",
        f"SIGTERM to rank {signals._RANKS - 1}",
    ]
    with pytest.raises(KeyboardInterrupt):
        stops[2](signal.SIGINT, None)
