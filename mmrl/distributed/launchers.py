"""Who we are, as the program that started us tells: torchrun, DeepSpeed's launcher, Slurm's srun or an MPI's mpirun.

A launcher states machine facts alone, in environment variables. They are read here once and written back in
torchrun's words, which both torch and DeepSpeed read.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from mmrl.errors import InputError

# Each MPI's own names for the rank, the number of processes, the rank within a host and the number there.
# Sources: Open MPI's mpirun(1), "ENVIRONMENT VARIABLES"; MVAPICH2's user guide, section 6.2; Hydra, of MPICH and Intel
# MPI, sets PMI_* and MPI_LOCALRANKID, MPI_LOCALNRANKS.
_MPI = {
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MVAPICH": (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_FIRST_PORT, _PORTS = 20_000, 10_000


@dataclass(frozen=True)
class Place:
    """This process among all that a launcher started."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str
    """Of the host of rank 0."""
    port: int

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Says it in torchrun's words."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )


def find(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place that the launcher's variables describe; None where no launcher started this process.

    torchrun's words are looked for first: torchrun may itself have been started by srun, and so on. Slurm's are heeded
    within a step alone (srun), since a batch script or an salloc shell has variables of the whole job about it.

    Raises:
        InputError: variables that are incomplete, no numbers, or out of range.
    """
    if "WORLD_SIZE" in environ or "RANK" in environ:
        return _checked(
            Place(
                "torchrun",
                _number(environ, "RANK"),
                _number(environ, "WORLD_SIZE"),
                _number(environ, "LOCAL_RANK", 0),
                environ.get("MASTER_ADDR", "127.0.0.1"),
                _number(environ, "MASTER_PORT", 29500),
            )
        )
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        return _slurm(environ)
    for launcher, names in _MPI.items():
        if names[0] in environ and names[1] in environ:
            return _mpi(launcher, names, environ)
    return None


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """One task a process, as srun starts them; the first host of the step has rank 0. (srun(1), OUTPUT ENVIRONMENT
    VARIABLES.)"""
    size = _number(environ, "SLURM_STEP_NUM_TASKS")
    if size == 1:  # a shell under srun, most often
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    return _checked(
        Place(
            "Slurm",
            _number(environ, "SLURM_PROCID"),
            size,
            _number(environ, "SLURM_LOCALID", 0),
            environ.get("MASTER_ADDR") or first_host(nodes),
            _number(environ, "MASTER_PORT", port_of(job)),
        )
    )


def _mpi(launcher: str, names: tuple[str, str, str, str], environ: Mapping[str, str]) -> Place | None:
    rank, size = _number(environ, names[0]), _number(environ, names[1])
    if size == 1:
        return None
    local_size = _number(environ, names[3], 0)
    address = environ.get("MASTER_ADDR", "127.0.0.1" if local_size == size else "")
    if not address:
        raise InputError(
            f"MASTER_ADDR: {launcher} started {size} processes on several hosts and does not tell where rank 0 is; "
            "give its host, such as mpirun -x MASTER_ADDR=node1 (Open MPI) or -genv MASTER_ADDR node1 (MPICH)."
        )
    # Its name for the job is not among the variables of every MPI.
    port = _number(environ, "MASTER_PORT", 29500)
    return _checked(Place(launcher, rank, size, _number(environ, names[2], 0), address, port))


def _checked(place: Place) -> Place:
    if not 0 <= place.rank < place.size:
        raise InputError(
            f"RANK: {place.launcher} says that this is process {place.rank} of {place.size}; ranks go from 0 to "
            f"{place.size - 1}."
        )
    if not 0 < place.port < 1 << 16:
        raise InputError(f"MASTER_PORT: {place.port} is no port; take one of 1024 to 65535.")
    return place


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise InputError(
                f"{name} is not set, though others of the launcher's variables are (RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR, MASTER_PORT); set all, or none for one process."
            )
        return default
    if not re.fullmatch(r"\d+", text):
        raise InputError(f"{name}: {text!r} is no whole number; the launcher sets it, so leave it alone.")
    return int(text)


def first_host(nodes: str) -> str:
    """The first of a list in Slurm's notation: ``a[08-11,17],b3`` -> ``a08``.

    Raises:
        InputError: no such list.
    """
    found = re.match(r"(?:[^,\[\]\s]|\[[^\]]*\])+", nodes)
    if found is None:
        raise InputError(f"SLURM_STEP_NODELIST: {nodes!r} names no host; set MASTER_ADDR to the host of rank 0.")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def port_of(job: str) -> int:
    """A port that all processes of a job agree on without asking, and that two jobs rarely share."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
