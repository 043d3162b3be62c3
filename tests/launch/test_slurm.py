"""launch/slurm.sbatch under a real Slurm: munged, slurmctld, and two slurmd on simulated hosts (namespaces.py)."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import namespaces
import pytest
import yaml
from namespaces import Hosts
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
STEPS, EVERY = 16, 4

pytestmark = pytest.mark.slow

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=node0(10.77.0.10)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=5
NodeName=node[0-1] NodeAddr=10.77.0.1[0-1] CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=node[0-1] Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """A cluster of two nodes."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._hosts, self._folder = hosts, folder
        self.environ = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable}
        for name in ("state", "spool-node0", "spool-node1"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, cpus=os.cpu_count()))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munged += [
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        ]
        hosts.start(0, munged, "munged.log", folder)
        _wait(lambda: (folder / "munge.socket").exists(), 20, lambda: hosts.log("munged.log"))
        hosts.start(0, ["slurmctld", "-D"], "slurmctld.log", folder, **self.environ)
        for host in range(2):
            hosts.start(host, ["slurmd", "-D", "-N", f"node{host}"], f"slurmd{host}.log", folder, **self.environ)
        _wait(
            lambda: "idle*" not in (now := self.run("sinfo", "-h", "-o", "%n %t")) and now.count("idle") == 2,
            60,
            self.logs,
        )

    def run(self, *command: str) -> str:
        """Runs a command on node0; returns its output."""
        environ = {**os.environ, **self.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            self._hosts.inside(0, command), cwd=self._folder, env=environ, capture_output=True, text=True, timeout=60
        )
        return done.stdout + done.stderr

    def logs(self) -> str:
        """The ends of all log files."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self._folder.glob("*.log")))


def _wait(until: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < seconds, what()
        time.sleep(0.5)


def test_batch_script_is_requeued_after_a_signal_and_a_fault_and_ends_with_the_undisturbed_weights(
    tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    reason = namespaces.lacking("slurmctld", "slurmd", "munged", "sbatch")
    if reason:
        pytest.skip(reason)
    path = write_config(
        train={"batch_size": 12, "duration": f"{STEPS} steps"}, evaluation={}, checkpoint={"every": f"{EVERY} steps"}
    )
    undisturbed = tmp_path / "undisturbed"
    command = [str(REPOSITORY / "launch" / "one_node.sh"), str(path), f"run={undisturbed}"]
    environ = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "PROCESSES": "2"}
    subprocess.run(command, env=environ, check=True, capture_output=True, timeout=600)
    # Slow steps, so that signals arrive during the run.
    run = tmp_path / "run"
    slow_steps = tmp_path / "slow_steps"
    slow_steps.mkdir()
    (slow_steps / "sitecustomize.py").write_text(
        "import time, mmrl.distributed.comm as d\nreal = d.any_rank\n"
        "def any_rank(flag):\n    time.sleep(1.0)\n    return real(flag)\nd.any_rank = any_rank\n"
    )
    folder = tmp_path / "slurm"
    folder.mkdir()
    with namespaces.hosts(folder, 2) as hosts:
        slurm = Slurm(hosts, folder)
        batch = [
            "sbatch",
            "--nodes=2",
            "--ntasks-per-node=1",
            "--export=ALL",
            str(REPOSITORY / "launch" / "slurm.sbatch"),
        ]
        said = slurm.run("env", f"PYTHONPATH={slow_steps}:{REPOSITORY}", *batch, str(path), f"run={run}")
        job = re.search(r"Submitted batch job (\d+)", said)
        assert job, said + slurm.logs()

        def steps() -> int:
            file = run / "metrics.jsonl"
            return len(file.read_text().splitlines()) if file.exists() else 0

        def was_requeued(times: int) -> bool:
            shown = slurm.run("scontrol", "show", "job", job[1])
            slurm.run("scontrol", "update", f"JobId={job[1]}", "StartTime=now")
            return f"Restarts={times}" in shown and "JobState=RUNNING" in shown

        _wait(lambda: steps() >= 2, 300, slurm.logs)
        slurm.run("scancel", "--batch", "--signal=USR1", job[1])  # as --signal=B:USR1@300 does before the time limit
        _wait(lambda: was_requeued(1), 200, slurm.logs)
        assert "Stopped by SIGTERM at step" in (folder / f"mmrl-{job[1]}.log").read_text()
        before = steps()
        assert json.loads((run / "checkpoints/last/training/state.json").read_text())["step"] >= before > 0
        _wait(lambda: steps() >= before + 1, 300, slurm.logs)
        pids = subprocess.run(["ip", "netns", "pids", hosts.name(1)], capture_output=True, text=True).stdout.split()
        rank = next(pid for pid in pids if b"mmrl.cli" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
        os.kill(int(rank), 9)
        _wait(lambda: was_requeued(2), 200, slurm.logs)
        assert "rank 1 on host node1 disconnected" in (folder / f"mmrl-{job[1]}.log").read_text()
        _wait(lambda: "COMPLETED" in slurm.run("scontrol", "show", "job", job[1]), 400, slurm.logs)
        print(slurm.run("sh", "-c", f"cat mmrl-{job[1]}.log")[-3000:])
    weights, expected = (load_file(one / "checkpoints/last/model.safetensors") for one in (run, undisturbed))
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, STEPS + 1)
    )
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 0
    shutil.rmtree(folder, ignore_errors=True)
