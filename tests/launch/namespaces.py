"""Simulates several hosts on one machine: isolated network namespaces, each with an address, a host name and an sshd.

Each host has one link to a bridge in a separate namespace, so that hosts reach only each other. Requires root.
`Hosts` can cut a link and kill a host.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def lacking(*programs: str) -> str | None:
    """The reason why hosts cannot be simulated here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nsenter", "unshare", *programs) if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    return None


class Hosts:
    """The hosts node0, node1, …"""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        # Short, since a link's name has at most 15 letters; with the process id, since tests may run in parallel.
        self._prefix = f"m{os.getpid()}"
        self._started: list[subprocess.Popen[str]] = []

    def name(self, host: int) -> str:
        """The name of a host's network namespace."""
        return f"{self._prefix}h{host}"

    def make(self) -> None:
        """Creates the bridge, and the links, addresses and names of all hosts."""
        switch = f"{self._prefix}sw"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        names = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{10 + i} node{i}\n" for i in range(self.count))
        (self.folder / "hosts").write_text(names)
        for host in range(self.count):
            name = self.name(host)
            _ip("netns", "add", name)
            _ip("link", "add", "veth0", "netns", name, "type", "veth", "peer", "name", f"v{host}", "netns", switch)
            _ip("-n", switch, "link", "set", f"v{host}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{10 + host}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self) -> None:
        """Kills all processes on the hosts and removes the hosts."""
        for host in range(self.count):
            self.kill(host)
            subprocess.run(["ip", "netns", "del", self.name(host)], check=False)
        subprocess.run(["ip", "netns", "del", f"{self._prefix}sw"], check=False)
        for process in self._started:
            process.wait(10)

    def inside(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on a host, with its network and host name and with all host names."""
        names = shlex.quote(str(self.folder / "hosts"))
        script = f'mount --bind {names} /etc/hosts; hostname node{host}; exec "$@"'
        spaces = ["nsenter", f"--net=/run/netns/{self.name(host)}", "unshare", "--uts", "--mount"]
        return [*spaces, "sh", "-c", script, "_", *command]

    def start(self, host: int, command: Sequence[str], log: str, cwd: Path, **environ: str) -> subprocess.Popen[str]:
        """Starts a command on a host, with its output in folder/log."""
        with (self.folder / log).open("a") as file:
            process = subprocess.Popen(
                self.inside(host, command),
                cwd=cwd,
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        self._started.append(process)
        return process

    def log(self, log: str) -> str:
        """The output so far."""
        file = self.folder / log
        return file.read_text(errors="replace") if file.exists() else ""

    def cut(self, host: int) -> None:
        """Cuts a host's link: packets are lost, connections are not refused."""
        _ip("-n", self.name(host), "link", "set", "veth0", "down")

    def restore(self, host: int) -> None:
        """Restores the link."""
        _ip("-n", self.name(host), "link", "set", "veth0", "up")

    def kill(self, host: int) -> None:
        """Kills every process of a host with SIGKILL."""
        for _ in range(3):  # some may be starting others
            listed = subprocess.run(["ip", "netns", "pids", self.name(host)], capture_output=True, text=True)
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)

    def start_sshd(self) -> dict[str, str]:
        """Starts an sshd on each host. Returns environment variables that make ssh use a key of this test."""
        keys = self.folder / "ssh"
        keys.mkdir(mode=0o700)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
        (keys / "authorized").write_text((keys / "user.pub").read_text())
        (keys / "sshd.conf").write_text(
            f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/authorized\nPermitRootLogin prohibit-password\n"
            "PasswordAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\n"
        )
        host_key = (keys / "host.pub").read_text()
        (keys / "known").write_text("".join(f"node{i},10.77.0.{10 + i} {host_key}" for i in range(self.count)))
        (keys / "ssh.conf").write_text(
            f"Host *\n  IdentityFile {keys}/user\n  UserKnownHostsFile {keys}/known\n  StrictHostKeyChecking yes\n"
        )
        # ssh reads no config file from the environment, and the user's must not be changed.
        program = keys / "bin" / "ssh"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {keys}/ssh.conf "$@"\n')
        program.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        for host in range(self.count):
            self.start(host, [SSHD, "-D", "-e", "-f", str(keys / "sshd.conf")], f"sshd{host}.log", self.folder)
        return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


@contextmanager
def hosts(folder: Path, count: int = 3) -> Iterator[Hosts]:
    """Yields `count` hosts and removes them afterwards, with everything that runs on them."""
    made = Hosts(folder, count)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
