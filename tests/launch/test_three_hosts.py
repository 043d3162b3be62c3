"""Trains the quickstart model on three hosts with torchrun and DeepSpeed's launcher, while a link or a host fails.

The launch scripts must resume from the last checkpoint and end with the weights of an undisturbed run. The hosts are
network namespaces of this machine (see namespaces.py).
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import namespaces
import pytest
import torch
from namespaces import Hosts
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[2]
LAUNCH = REPOSITORY / "launch"
STEPS, EVERY = 24, 4
LOST_AFTER_S = 20
# Maximum time from the fault to the message of the other ranks.
REPORTED_WITHIN_S = 60
ARGUMENTS = [
    str(REPOSITORY / "configs" / "quickstart.yaml"),
    "train.batch_size=24",
    f"train.duration={STEPS} steps",
    "optim.warmup=2",
    "data.workers=0",
    "engine.precision=fp32",
    f"engine.lost_after_seconds={LOST_AFTER_S}",
    "evaluation={}",
    f"checkpoint.every={EVERY} steps",
    "tracking.log_every=1",
]
ENVIRON = {
    "PYTHON": sys.executable,
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONWARNINGS": "ignore",
}

pytestmark = pytest.mark.slow


def _skip_without(*programs: str) -> None:
    reason = namespaces.lacking(*programs)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[Hosts]:
    _skip_without()
    with namespaces.hosts(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of an undisturbed run of three processes."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [str(LAUNCH / "one_node.sh"), *ARGUMENTS, f"run={run}"]
    environ = {**os.environ, **ENVIRON, "PROCESSES": "3"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return _weights(run)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


def _assert_undisturbed(run: Path, expected: dict[str, torch.Tensor]) -> None:
    """Bit-identical weights: the same sums in the same order, whatever host a process is on."""
    torch.testing.assert_close(_weights(run), expected, rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def _wait(until: Callable[[], object], seconds: float, what: Callable[[], str]) -> float:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < seconds, what()
        time.sleep(0.2)
    return time.monotonic() - began


def _steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _torchrun(hosts: Hosts, host: int, run: Path) -> "subprocess.Popen[str]":
    command = [str(LAUNCH / "nodes.sh"), *ARGUMENTS, f"run={run}"]
    return hosts.start(host, command, f"node{host}.log", REPOSITORY, **ENVIRON, NODES="3", HEAD="node0", PROCESSES="1")


def _lengths(hosts: Hosts) -> list[int]:
    return [len(hosts.log(f"node{host}.log")) for host in range(hosts.count)]


def _logs(hosts: Hosts) -> str:
    return "\n".join(f"--- node{host}\n{hosts.log(f'node{host}.log')[-6000:]}" for host in range(hosts.count))


def test_a_cut_link_is_reported_and_training_resumes(
    three_hosts: Hosts, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    run, hosts = tmp_path / "run", three_hosts
    agents = [_torchrun(hosts, host, run) for host in range(3)]
    _wait(lambda: _steps_done(run) >= EVERY + 2, 600, lambda: _logs(hosts))
    since = _lengths(hosts)
    hosts.cut(2)
    took = _wait(
        lambda: _loss(hosts, since, 0) and _loss(hosts, since, 1),
        REPORTED_WITHIN_S,
        lambda: _logs(hosts),
    )
    # node2 may have any rank. If it is rank 0, it is the others that get no answer.
    assert re.match(r"rank \d on host node2 has (not answered|sent no heartbeat)", _loss(hosts, since, 1)), _logs(hosts)
    assert re.match(r"rank \d on host node2 has (not answered|sent no heartbeat)", _loss(hosts, since, 0)), _logs(hosts)
    _wait(lambda: _loss(hosts, since, 2), REPORTED_WITHIN_S, lambda: _logs(hosts))
    print(f"reported after {took:.0f} s: {_loss(hosts, since, 1)}")
    hosts.restore(2)
    codes = [agent.wait(900) for agent in agents]
    assert codes == [0, 0, 0], _logs(hosts)
    _assert_undisturbed(run, undisturbed)


def test_a_host_that_dies_is_reported_and_replaced(
    three_hosts: Hosts, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    run, hosts = tmp_path / "run", three_hosts
    agents = [_torchrun(hosts, host, run) for host in range(3)]
    _wait(lambda: _steps_done(run) >= EVERY + 2, 600, lambda: _logs(hosts))
    since = _lengths(hosts)
    hosts.cut(1)  # a host that loses power does not close its connections either
    hosts.kill(1)
    took = _wait(
        lambda: _loss(hosts, since, 0) and _loss(hosts, since, 2),
        REPORTED_WITHIN_S,
        lambda: _logs(hosts),
    )
    assert all(re.match(r"rank \d on host node1 ", _loss(hosts, since, host)) for host in (0, 2)), _logs(hosts)
    print(f"reported after {took:.0f} s: {_loss(hosts, since, 2)}")
    agents[1].wait(30)
    hosts.restore(1)
    agents[1] = _torchrun(hosts, 1, run)
    codes = [agent.wait(900) for agent in agents]
    assert codes == [0, 0, 0], _logs(hosts)
    _assert_undisturbed(run, undisturbed)


def _loss(hosts: Hosts, since: list[int], host: int) -> str:
    """The sentence about a lost rank in a host's log, after position `since`."""
    found = re.search(r"mmrl: (rank \d on host .*)", hosts.log(f"node{host}.log")[since[host] :])
    return found[1] if found else ""


def test_deepspeeds_launcher_restarts_after_a_host_was_killed(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    _skip_without("sshd", "ssh-keygen", "pdsh")
    with namespaces.hosts(tmp_path) as hosts:
        run, environ = tmp_path / "run", hosts.start_sshd()
        (tmp_path / "hostfile").write_text("".join(f"node{host} slots=1\n" for host in range(3)))
        (tmp_path / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in ENVIRON.items() if k != "PYTHON"))
        command = [str(LAUNCH / "deepspeed.sh"), *ARGUMENTS, f"run={run}"]
        launcher = hosts.start(
            0, command, "launcher.log", tmp_path, **{**ENVIRON, **environ}, HOSTFILE="hostfile", PAUSE="1"
        )
        _wait(lambda: _steps_done(run) >= EVERY + 2, 600, lambda: hosts.log("launcher.log")[-6000:])
        began = time.monotonic()
        hosts.kill(1)
        hosts.start(1, [namespaces.SSHD, "-D", "-e", "-f", str(tmp_path / "ssh" / "sshd.conf")], "sshd1.log", tmp_path)
        _wait(
            lambda: "rank 1 on host node1" in hosts.log("launcher.log"),
            REPORTED_WITHIN_S,
            lambda: hosts.log("launcher.log")[-6000:],
        )
        print(f"reported after {time.monotonic() - began:.0f} s")
        assert launcher.wait(900) == 0, hosts.log("launcher.log")[-6000:]
        _assert_undisturbed(run, undisturbed)
