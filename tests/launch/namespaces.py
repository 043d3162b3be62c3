"""Three hosts on one machine: network namespaces with addresses, names and an sshd of their own, and no way out.

Each host has one link to a bridge that stands in a namespace of its own, so that nothing else can be reached and
nothing outside notices. Root is needed. A link is cut, and a host killed, by the methods of `Hosts`.
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
    """Why no hosts can be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nsenter", "unshare", *programs) if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    return None


class Hosts:
    """The hosts node0, node1 …, by number."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        # Short, since a link's name may have 15 letters; of this process, since tests may run side by side.
        self._prefix = f"m{os.getpid()}"
        self._started: list[subprocess.Popen[str]] = []

    def name(self, host: int) -> str:
        """The network namespace."""
        return f"{self._prefix}h{host}"

    def make(self) -> None:
        """Bridge, links, addresses, names."""
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
        """Ends all that runs on the hosts, and the hosts."""
        for host in range(self.count):
            self.kill(host)
            subprocess.run(["ip", "netns", "del", self.name(host)], check=False)
        subprocess.run(["ip", "netns", "del", f"{self._prefix}sw"], check=False)
        for process in self._started:
            process.wait(10)

    def inside(self, host: int, command: Sequence[str]) -> list[str]:
        """A command as it is run on a host: with the host's network and name, and with all hosts' names known."""
        names = shlex.quote(str(self.folder / "hosts"))
        script = f'mount --bind {names} /etc/hosts; hostname node{host}; exec "$@"'
        spaces = ["nsenter", f"--net=/run/netns/{self.name(host)}", "unshare", "--uts", "--mount"]
        return [*spaces, "sh", "-c", script, "_", *command]

    def start(self, host: int, command: Sequence[str], log: str, cwd: Path, **environ: str) -> subprocess.Popen[str]:
        """Starts a command on a host; what it says goes to folder/log."""
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
        """What was said so far."""
        file = self.folder / log
        return file.read_text(errors="replace") if file.exists() else ""

    def cut(self, host: int) -> None:
        """Pulls the plug of a host's network: nothing is refused, packets are lost."""
        _ip("-n", self.name(host), "link", "set", "veth0", "down")

    def mend(self, host: int) -> None:
        """Plugs it in again."""
        _ip("-n", self.name(host), "link", "set", "veth0", "up")

    def kill(self, host: int) -> None:
        """Every process of a host, at once, without a word."""
        for _ in range(3):  # some may just be starting others
            listed = subprocess.run(["ip", "netns", "pids", self.name(host)], capture_output=True, text=True)
            for pid in listed.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)

    def start_sshd(self) -> dict[str, str]:
        """An sshd on each host, and the variables with which ssh uses a key made for them alone."""
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
        # ssh takes no config file from its environment, and the user's own is not ours to touch.
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
    """So many hosts, gone afterwards with all that ran on them."""
    made = Hosts(folder, count)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
