"""Rank and world size from each launcher's variables."""

from dataclasses import replace

import pytest

from mmrl.distributed.launchers import LaunchInfo, detect_launch, first_host, port_for_job
from mmrl.errors import InputError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29400"}
# As set by srun of Slurm 22.05 for the second of two tasks on two nodes.
SLURM = {
    "SLURM_JOB_ID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_JOB_NODELIST": "gpu[08-09]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, None),
        (TORCHRUN, LaunchInfo("torchrun", 5, 8, 1, "n0", 29400)),
        (SLURM, LaunchInfo("Slurm", 1, 2, 0, "gpu08", port_for_job("2.0"))),
        (SLURM | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "31000"}, LaunchInfo("Slurm", 1, 2, 0, "10.0.0.7", 31000)),
        (SLURM | TORCHRUN, LaunchInfo("torchrun", 5, 8, 1, "n0", 29400)),  # torchrun under srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # a shell under srun
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, None),  # the batch script itself
        (OPEN_MPI | {"MASTER_ADDR": "n1"}, LaunchInfo("Open MPI", 3, 4, 1, "n1", 29500)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, LaunchInfo("Open MPI", 3, 4, 1, "127.0.0.1", 29500)),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            LaunchInfo("MPICH", 1, 2, 1, "127.0.0.1", 29500),
        ),
        (
            {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "n2"},
            LaunchInfo("MVAPICH", 1, 2, 0, "n2", 29500),
        ),
    ],
)
def test_launcher_variables_are_read_and_exported_for_torch(environ: dict[str, str], launch: LaunchInfo | None) -> None:
    assert detect_launch(environ) == launch
    if launch is not None:
        exported: dict[str, str] = {}
        launch.export(exported)
        assert detect_launch(exported) == replace(launch, launcher="torchrun")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: not set"),
        ({"WORLD_SIZE": "2"}, "RANK: not set"),
        (TORCHRUN | {"RANK": "eight"}, "RANK: 'eight' is not a whole number"),
        (TORCHRUN | {"RANK": "8"}, "RANK: torchrun set rank 8 of 8 processes; ranks go from 0 to 7"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "70000 is not a valid port"),
        (OPEN_MPI, "MASTER_ADDR: Open MPI started 4 processes on several hosts"),
        (SLURM | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "names no host; set MASTER_ADDR"),
    ],
)
def test_invalid_variables_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        detect_launch(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b[1-3]", "a"),
        ("gpu[08-11,17],b3", "gpu08"),
        ("gpu[3,7]", "gpu3"),
        ("rack[1-2]n[04-09]-ib", "rack1n04-ib"),
        ("node-1.cluster.local", "node-1.cluster.local"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_the_port_of_a_job_is_stable_and_differs_between_jobs() -> None:
    assert port_for_job("17.0") == port_for_job("17.0")
    assert len({port_for_job(f"{job}.0") for job in range(50)}) == 50
    assert all(1024 < port_for_job(str(job)) < 32768 for job in range(1000))
