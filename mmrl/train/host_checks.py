"""Before a run of several processes: has every host what the others have? One table, and the name of the host that is
off. Each part is bounded in time, so that a hanging file system ends in a sentence."""

import hashlib
import importlib.metadata
import platform
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import mmrl
from mmrl import config as configs
from mmrl.config import Config
from mmrl.data.shards import expand
from mmrl.data.sources import named_sources
from mmrl.data.stores import cache_folder, is_remote
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.errors import InputError
from mmrl.version import __version__

T = TypeVar("T")

# A file system that has not answered for so long is taken for hanging.
_PATIENCE_S = 30.0
# Clocks further apart than this make nonsense of log files and of the ages of files; certificates fail much later.
_CLOCK_S = 60.0
_LEAST_FREE_GB = 1.0
# A host that receives at less than this share of the median is pointed out.
_SLOW = 0.25
_PACKAGES = ("torch", "deepspeed", "open_clip_torch", "transformers", "numpy", "webdataset")


@dataclass(frozen=True)
class Facts:
    """What one process found on its host."""

    host: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    config: str = ""
    """A digest of the resolved config."""
    seed: int = 0
    clock: float = 0.0
    """Seconds since 1970, read at one moment by all."""
    free_gb: float = float("inf")
    """Of the disk that has the run folder, or the cache of remote shards if that has less."""
    problem: str | None = None
    receives_gb_s: float = float("nan")
    """From the process before it."""


def check(config: Config, world: World, console: Console) -> None:
    """Compares all processes, prints the table on the main one, and stops all where a host is off.

    Raises:
        InputError: on the main process, naming the host; the others end with exit code 2.
    """
    if world.size == 1:
        return
    facts = comm.all_gather_objects(_facts(config))
    problems = problems_of(facts)
    rate = float("nan")
    if not problems:
        received, rate = _rates(world)
        slow = comm.all_gather_objects(received)
        facts = [Facts(**{**vars(one), "receives_gb_s": speed}) for one, speed in zip(facts, slow, strict=True)]
    if world.is_rank_0:
        console.print(table(facts))
        if rate == rate:
            console.print(f"All-reduce: {rate:.2f} GB/s a process.", highlight=False)
        for note in notes_of(facts):
            console.print(f"Note: {note}", highlight=False, soft_wrap=True)
    if problems:
        _stop_all(world, " ".join(problems[:3]))


def agree(world: World, work: Callable[[], T], rank_0_only: bool = False) -> T | None:
    """This process's own work, such as opening the shards. Where it fails on any process all stop, with the sentence
    of the first that failed, and with its host where others have succeeded. None where the work is the main process's
    alone and this is another.

    Raises:
        InputError: on the main process; the others end with exit code 2.
    """
    result, problem = None, None
    try:
        result = work() if world.is_rank_0 or not rank_0_only else None
    except InputError as error:
        if world.size == 1:
            raise
        problem = str(error)
    found = comm.all_gather_objects((comm.host(), problem))
    failed = [(host, sentence) for host, sentence in found if sentence]
    if failed:
        sentence = failed[0][1]
        hosts = sorted({host for host, _ in failed})
        everywhere = rank_0_only or len(failed) == len(found)
        _stop_all(world, sentence if everywhere else f"On host {', '.join(hosts[:5])} alone: {sentence}")
    return result


def same_folder(config: Config, world: World) -> None:
    """Sees that all hosts have the run folder that the main process has just written to.

    Raises:
        InputError: on the main process, naming a host that has another; the others end with exit code 2.
    """
    if world.size == 1:
        return
    file, wanted = Path(config.run) / "config.yaml", comm.broadcast_object(configs.dump(config))

    def look() -> None:
        for _ in range(10):  # a network file system may show a new file a moment later
            if file.exists() and file.read_text() == wanted:
                return
            time.sleep(0.5)
        raise InputError(
            f"run: {config.run} is not the folder that rank 0 writes to; put the run on a file system that all hosts "
            "share, under the same path."
        )

    agree(world, lambda: _within(_PATIENCE_S, look, f"run: {config.run}"))


def _stop_all(world: World, sentence: str) -> NoReturn:
    if world.is_rank_0:
        raise InputError(sentence)
    raise SystemExit(2)


def problems_of(facts: Sequence[Facts]) -> list[str]:
    """A sentence for each host that a run would fail on or, worse, would not; empty where all is well."""
    problems = [f"Host {one.host}: {one.problem}" for one in _one_a_host(facts) if one.problem]
    answered = [one for one in facts if not one.problem]
    for name in sorted({name for one in answered for name in one.versions}):
        problems += _unlike(
            answered, lambda one, name=name: one.versions.get(name, "none"), name, "install the same everywhere"
        )
    problems += _unlike(answered, lambda one: str(one.seed), "seed", "give all processes the same command")
    if not any(problem.startswith("Host") and "seed" in problem for problem in problems):
        problems += _unlike(answered, lambda one: one.config, "config", "give all processes the same command and file")
    middle = statistics.median([one.clock for one in answered] or [0.0])
    for one in _one_a_host(answered):
        if abs(one.clock - middle) > _CLOCK_S:
            problems.append(
                f"Host {one.host}: its clock is {one.clock - middle:+,.0f} s off the others'; set it (chrony, ntpd)."
            )
        if one.free_gb < _LEAST_FREE_GB:
            problems.append(
                f"Host {one.host}: {one.free_gb:.1f} GB of disk are free for the run folder or the shard cache; make "
                "room for the checkpoints."
            )
    return problems


def _unlike(facts: Sequence[Facts], value: Callable[[Facts], str], what: str, remedy: str) -> list[str]:
    counts = Counter(value(one) for one in facts)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    off = [one for one in _one_a_host(facts, value) if value(one) != usual]
    return [f"Host {one.host}: {what} is {value(one)}, and {usual} elsewhere; {remedy}." for one in off]


def notes_of(facts: Sequence[Facts]) -> list[str]:
    """What is odd and may be meant."""
    notes = []
    hosts = _one_a_host(facts)
    middle = statistics.median(one.receives_gb_s for one in hosts)
    for one in hosts:
        if len(hosts) > 2 and one.receives_gb_s < _SLOW * middle:
            before = facts[(next(r for r, other in enumerate(facts) if other is one) - 1) % len(facts)]
            notes.append(
                f"host {one.host} receives {one.receives_gb_s:.2f} GB/s from host {before.host}, others {middle:.2f} "
                "GB/s; the whole run goes at the pace of the slowest link."
            )
    devices = Counter(one.device for one in facts)
    if len(devices) > 1:
        shown = ", ".join(f"{count} × {device}" for device, count in devices.most_common())
        notes.append(f"the devices differ ({shown}); the slowest sets the pace.")
    return notes


def _one_a_host(facts: Sequence[Facts], value: Callable[[Facts], object] = lambda one: one.problem) -> list[Facts]:
    """The first process of each host, and every further one of another value."""
    return list({(one.host, value(one)): one for one in reversed(facts)}.values())[::-1]


def table(facts: Sequence[Facts]) -> Table:
    """One line a host."""
    shown = Table(title="Hosts", title_justify="left")
    for heading in ("host", "ranks", "device", "torch", "clock", "free", "receives", ""):
        shown.add_column(heading, justify="right" if heading in ("clock", "free", "receives") else "left")
    middle = statistics.median(one.clock for one in facts)
    hosts = list(dict.fromkeys(one.host for one in facts))
    for host in hosts:
        ranks = [rank for rank, one in enumerate(facts) if one.host == host]
        first = facts[ranks[0]]
        speed = min((facts[rank].receives_gb_s for rank in ranks), default=float("nan"))
        problem = next((facts[rank].problem for rank in ranks if facts[rank].problem), None)
        off = any(line.startswith(f"Host {host}:") for line in problems_of(facts))
        shown.add_row(
            host,
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
            first.device,
            first.versions.get("torch", "?"),
            "?" if problem else f"{first.clock - middle:+.1f} s",
            "?" if problem else f"{first.free_gb:,.0f} GB",
            f"{speed:.2f} GB/s" if speed == speed else "–",
            "off" if off else "ok",
        )
    return shown


def _facts(config: Config) -> Facts:
    """This process's own, gathered within a bounded time."""
    device = comm.world().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    versions = {"python": platform.python_version(), "mmrl": f"{__version__} ({_digest_of_code()})"}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    if torch.version.cuda and device.type == "cuda":
        versions["CUDA"] = torch.version.cuda
    problem, free = None, 0.0
    try:
        free = _within(_PATIENCE_S, lambda: _free_gb(config), "the disks of the run folder and the shard cache")
        _within(_PATIENCE_S, lambda: _touch_shards(config), "data.train")
    except InputError as error:
        problem = str(error)
    comm.barrier()
    return Facts(
        host=comm.host(),
        device=name,
        versions=versions,
        config=hashlib.sha256(configs.dump(config).encode()).hexdigest()[:12],
        seed=config.seed,
        clock=time.time(),
        free_gb=free,
        problem=problem,
    )


def _free_gb(config: Config) -> float:
    folders = [Path(config.run)]
    remote = [one for one in named_sources(config.data) if any(is_remote(spec) for spec in _specs(one.shards))]
    if remote:
        folders.append(cache_folder(config.data.remote))
    free = []
    for folder in folders:
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        free.append(shutil.disk_usage(there).free / 1e9)
    return min(free)


def _touch_shards(config: Config) -> None:
    """Opens the first and the last local shard of each source; all of them are opened, and counted, later on."""
    for source in named_sources(config.data):
        local = [path for path in expand(source.shards, config.data.allow_pipe) if not is_remote(path)]
        for path in {local[0], local[-1]} if local else ():
            try:
                with Path(path).open("rb") as file:
                    file.read(1)
            except OSError as error:
                raise InputError(f"data.train: {path} cannot be read ({error.strerror or error}).") from None


def _specs(shards: str | list[str]) -> list[str]:
    return [shards] if isinstance(shards, str) else shards


def _within(seconds: float, work: Callable[[], T], what: str) -> T:
    """work(), given up after so long; a call that hangs in the kernel cannot be interrupted, only left behind."""
    outcome: list[T | Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise InputError(f"{what}: no answer within {seconds:.0f} s; see whether the file system hangs.")
    result = outcome[0]
    if isinstance(result, OSError):
        raise InputError(f"{what}: {result}.") from result
    if isinstance(result, Exception):
        raise result
    return result


def _digest_of_code() -> str:
    """Of mmrl's own source, which two checkouts of one version may differ in."""
    digest = hashlib.sha256()
    for path in sorted(Path(mmrl.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _rates(world: World) -> tuple[float, float]:
    """GB/s of what this process receives from the one before it, and of an all-reduce (its bytes over its time).

    Sizes grow until a round takes a tenth of a second, so that a slow network costs seconds, not minutes.
    """
    numbers, ring, reduced = 1 << 16, float("nan"), float("nan")
    while numbers <= 1 << 24:
        given = torch.ones(numbers, device=world.device)
        comm.barrier()
        began = time.monotonic()
        comm.ring_shift(given)
        ring = given.nbytes / (time.monotonic() - began) / 1e9
        comm.barrier()
        began = time.monotonic()
        comm.all_reduce_sum(given)[0].item()
        took = time.monotonic() - began
        reduced = given.nbytes / took / 1e9
        if comm.any_rank(took > 0.1):
            break
        numbers *= 4
    return ring, reduced
