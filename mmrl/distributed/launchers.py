"""Reads rank and world size from the environment of torchrun, DeepSpeed's launcher, Slurm's srun or MPI's mpirun.

They are written back as torchrun's variables, which torch and DeepSpeed read.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mmrl.errors import InputError

# Each MPI's variables for: rank, world size, local rank, processes on this host.
# Sources: Open MPI's mpirun(1), "ENVIRONMENT VARIABLES"; MVAPICH2's user guide, section 6.2; Hydra, the launcher of
# MPICH and Intel MPI, sets PMI_*, MPI_LOCALRANKID and MPI_LOCALNRANKS.
_MPI = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_FIRST_PORT, _PORTS = 20_000, 10_000


@dataclass(frozen=True)
class LaunchInfo:
    """What a launcher says about this process."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str
    """Host name or address of rank 0."""
    port: int

    def __post_init__(self) -> None:
        """Raises InputError if the rank or the port is out of range."""
        if not 0 <= self.rank < self.size:
            raise InputError(
                f"RANK: {self.launcher} set rank {self.rank} of {self.size} processes; ranks go from 0 to "
                f"{self.size - 1}."
            )
        if not 0 < self.port < 1 << 16:
            raise InputError(f"MASTER_PORT: {self.port} is not a valid port; use 1024 to 65535.")

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Writes torchrun's variables."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )


def detect_launch(environ: Mapping[str, str] = os.environ) -> LaunchInfo | None:
    """Reads the launcher's variables; None if no launcher started this process.

    torchrun's variables take precedence, since torchrun may itself be started by srun or mpirun. Slurm's count only
    within a job step (srun), because batch scripts and salloc shells see variables of the whole job.

    Raises:
        InputError: variables that are incomplete, not numbers, or out of range.
    """
    if "WORLD_SIZE" in environ or "RANK" in environ:
        return LaunchInfo(
            "torchrun",
            _integer(environ, "RANK"),
            _integer(environ, "WORLD_SIZE"),
            _integer(environ, "LOCAL_RANK", 0),
            environ.get("MASTER_ADDR", "127.0.0.1"),
            _integer(environ, "MASTER_PORT", 29500),
        )
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    for launcher, names in _MPI.items():
        if names[0] in environ and names[1] in environ:
            return _mpi(launcher, names, environ)
    return None


def _slurm(environ: Mapping[str, str]) -> LaunchInfo | None:
    """One process per task; rank 0 is on the first host of the step. Source: srun(1), OUTPUT ENVIRONMENT VARIABLES."""
    size = _integer(environ, "SLURM_STEP_NUM_TASKS")
    if size == 1:  # most often an interactive shell under srun
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    return LaunchInfo(
        "Slurm",
        _integer(environ, "SLURM_PROCID"),
        size,
        _integer(environ, "SLURM_LOCALID", 0),
        environ.get("MASTER_ADDR") or first_host(nodes),
        _integer(environ, "MASTER_PORT", port_for_job(job)),
    )


def _mpi(launcher: str, names: tuple[str, str, str, str], environ: Mapping[str, str]) -> LaunchInfo | None:
    rank, size = _integer(environ, names[0]), _integer(environ, names[1])
    if size == 1:
        return None
    local_size = _integer(environ, names[3], 0)
    address = environ.get("MASTER_ADDR", "127.0.0.1" if local_size == size else "")
    if not address:
        raise InputError(
            f"MASTER_ADDR: {launcher} started {size} processes on several hosts without it; set it to the host of "
            "rank 0, e.g. mpirun -x MASTER_ADDR=node1 (Open MPI) or -genv MASTER_ADDR node1 (MPICH)."
        )
    # A fixed port: not every MPI sets a variable with the job's id.
    port = _integer(environ, "MASTER_PORT", 29500)
    return LaunchInfo(launcher, rank, size, _integer(environ, names[2], 0), address, port)


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise InputError(
                f"{name}: not set, although other launcher variables are; set all of RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT, or none of them for a single process."
            )
        return default
    if not re.fullmatch(r"\d+", text):
        raise InputError(f"{name}: {text!r} is not a whole number; unset it and let the launcher set it.")
    return int(text)


def first_host(nodes: str) -> str:
    """The first host of a node list in Slurm's notation: ``a[08-11,17],b3`` -> ``a08``.

    Raises:
        InputError: the list names no host.
    """
    found = re.match(r"(?:[^,\[\]\s]|\[[^\]]*\])+", nodes)
    if found is None:
        raise InputError(f"SLURM_STEP_NODELIST: {nodes!r} names no host; set MASTER_ADDR to the host of rank 0.")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def port_for_job(job: str) -> int:
    """A port derived from the job's id, so that all its processes agree on it and two jobs rarely collide."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
