"""The host that differs is named; a failure of one process stops all."""

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.worlds import run_in_world
from rich.console import Console

from mmrl.distributed import comm
from mmrl.distributed.stragglers import StepTimings, describe_non_finite, describe_straggler
from mmrl.errors import InputError
from mmrl.train import host_checks
from mmrl.train.host_checks import HostFacts, agree, notes_of, problems_of, table

GOOD = HostFacts(
    host="a", device="GPU", versions={"torch": "2.9.1", "python": "3.11.4"}, config="1f", clock=1e9, free_gb=500
)


def _cluster(**changed: object) -> list[HostFacts]:
    """Three hosts of two processes; the second has something of its own."""
    facts = [replace(GOOD, host=host, receives_gb_s=10.0) for host in "aabbcc"]
    return [replace(one, **changed) if one.host == "b" else one for one in facts]  # pyright: ignore[reportArgumentType]


def test_equal_hosts_are_fine() -> None:
    assert problems_of(_cluster()) == []
    assert notes_of(_cluster()) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"versions": {"torch": "2.8.0", "python": "3.11.4"}}, "Host b: torch is 2.8.0, but 2.9.1 on other hosts"),
        ({"versions": {"python": "3.11.4"}}, "Host b: torch is none, but 2.9.1 on other hosts"),
        ({"config": "2e"}, "Host b: config is 2e, but 1f on other hosts; give all processes the same command"),
        ({"seed": 7, "config": "2e"}, "Host b: seed is 7, but 0 on other hosts"),
        ({"clock": 1e9 - 90}, "Host b: its clock differs from the other hosts' by -90 s"),
        ({"free_gb": 0.2}, "Host b: 0.2 GB of disk space are free"),
        ({"problem": "data.train: /data/0.tar cannot be read (I/O error)."}, "Host b: data.train: /data/0.tar"),
    ],
)
def test_the_host_that_is_off_is_named_once(changed: dict[str, object], says: str) -> None:
    (problem,) = problems_of(_cluster(**changed))
    assert problem.startswith(says)


def test_the_table_has_a_line_a_host() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(_cluster(free_gb=0.2)))
    rows = [line for line in console.export_text().splitlines() if "GPU" in line]
    assert [row.split("│")[2].strip() for row in rows] == ["0–1", "2–3", "4–5"]
    assert ["differs" in row for row in rows] == [False, True, False]


def test_a_slow_link_and_other_devices_are_noted() -> None:
    slow, devices = notes_of(_cluster(receives_gb_s=1.0, device="old GPU"))
    assert slow.startswith("host b receives 1.00 GB/s from host a, others 10.00 GB/s")
    assert devices.startswith("the devices differ (4 × GPU, 2 × old GPU)")


def test_a_file_system_that_hangs_ends_in_a_sentence() -> None:
    with pytest.raises(InputError, match=r"the disk: no answer within 0 s; check whether the file system hangs"):
        host_checks._within(0.05, threading.Event().wait, "the disk")


def _agree_where_one_fails(folder: Path) -> None:
    world = comm.world()

    def work() -> int:
        if world.rank == 2:
            raise InputError("data.train: it is not here.")
        return world.rank

    said = "nothing"
    try:
        agree(world, work)
    except InputError as error:
        said = str(error)
    except SystemExit as error:
        said = f"exit {error.code}"
    values = agree(world, lambda: world.rank)
    image_bD, text_bD = torch.ones(2, 4, 3)
    if world.rank == 1:
        image_bD[3, 1] = float("nan")
    where = describe_non_finite([image_bD, text_bD], [f"s{world.rank}{row}" for row in range(4)])
    torch.save((said, values, where, host_checks._rates(world)), folder / f"rank{world.rank}.pt")


def test_a_failure_anywhere_stops_all_and_nan_is_found_where_it_is(tmp_path: Path) -> None:
    run_in_world(3, _agree_where_one_fails, tmp_path)
    said, values, where, rates = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)), strict=True)
    host = comm.host()
    assert said == (f"Only on host {host}: data.train: it is not here.", "exit 2", "exit 2")
    assert values == (0, 1, 2)
    assert set(where) == {f"NaN or infinite: 1 of 4 embeddings of rank 1 on host {host} (samples s13)"}
    assert all(speed > 0 for pair in rates for speed in pair)


def own(host: str, data: float, towers: float) -> StepTimings:
    return StepTimings(host, {"data": data, "towers": towers, "loss": 1.0})


def test_a_straggler_is_named_where_it_costs_time() -> None:
    owns = [own("a", 0.01, 0.4), own("a", 0.02, 0.4), own("b", 0.5, 0.4), own("b", 0.01, 0.42)]
    said = describe_straggler(owns)
    assert said == (
        "rank 2 on host b slows all ranks down: 0.90 s per step (0.50 s loading data, 0.40 s in the towers), "
        "median of the other ranks 0.42 s"
    )
    assert describe_straggler(owns[:2] + owns[3:]) is None
    assert describe_straggler([own("a", 0.0, 0.01), own("b", 0.0, 0.03)]) is None  # a straggler of 20 ms
    assert describe_straggler(owns[:1]) is None
