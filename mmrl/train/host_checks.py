"""Checks before a run of several processes: every host must have the same versions, config, clock and data.

One table is printed, and a host that differs is named. Each check has a time limit, so that a hanging file system
ends in an error message."""

import hashlib
import importlib.metadata
import math
import platform
import shutil
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TypeVar

import torch
from rich.console import Console
from rich.table import Table

import mmrl
from mmrl.config import Config, dump_config
from mmrl.data.shards import expand, spec_list
from mmrl.data.sources import named_sources
from mmrl.data.stores import cache_folder, is_remote
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.errors import InputError
from mmrl.version import __version__

T = TypeVar("T")

# A file system that does not answer within this time is reported as hanging.
_TIMEOUT_S = 30.0
# A larger clock difference makes log files and file ages misleading.
_MAX_CLOCK_DIFFERENCE_S = 60.0
_MIN_FREE_GB = 1.0
# A host that receives at less than this share of the median rate is reported.
_SLOW_SHARE = 0.25
_PACKAGES = ("torch", "deepspeed", "open_clip_torch", "transformers", "numpy", "webdataset")


@dataclass(frozen=True)
class HostFacts:
    """What one process found on its host."""

    host: str
    device: str
    versions: dict[str, str] = field(default_factory=dict)
    config: str = ""
    """Digest of the resolved config."""
    seed: int = 0
    clock: float = 0.0
    """Unix time in seconds, read by all processes right after a barrier."""
    free_gb: float = float("inf")
    """Free space for the run folder or the cache of remote shards, whichever is smaller."""
    problem: str | None = None
    receives_gb_s: float = float("nan")
    """Rate at which this process receives from the previous rank."""


def check(config: Config, world: World, console: Console) -> None:
    """Compares all processes, prints the table on rank 0, and stops all of them if a host differs. Collective.

    Raises:
        InputError: on rank 0, naming the host; other ranks exit with code 2.
    """
    if world.size == 1:
        return
    own = _facts(config)
    facts = comm.all_gather_objects(own)
    problems, rate = problems_of(facts), math.nan
    if not problems:
        received, rate = _rates(world)
        facts = comm.all_gather_objects(replace(own, receives_gb_s=received))
    if world.is_rank_0:
        console.print(table(facts))
        if not math.isnan(rate):
            console.print(f"All-reduce: {rate:.2f} GB/s per process.", highlight=False)
        for note in notes_of(facts):
            console.print(f"Note: {note}", highlight=False, soft_wrap=True)
    if problems:
        _stop_all(world, " ".join(problems[:3]))


def agree(world: World, work: Callable[[], T], rank_0_only: bool = False) -> T | None:
    """Runs `work` on every process, or on rank 0 only, and stops all processes if it fails on any. Collective.

    The message is that of the lowest rank that failed; it names the hosts if the work succeeded elsewhere.

    Returns: the result of this process; None on other ranks if `rank_0_only`.

    Raises:
        InputError: on rank 0; other ranks exit with code 2.
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
        on_all = rank_0_only or len(failed) == len(found)
        _stop_all(world, sentence if on_all else f"Only on host {', '.join(hosts[:5])}: {sentence}")
    return result


def same_folder(config: Config, world: World) -> None:
    """Checks that every host sees the run folder that rank 0 has just written to. Collective.

    Raises:
        InputError: on rank 0, naming a host that sees another folder; other ranks exit with code 2.
    """
    if world.size == 1:
        return
    file = Path(config.run) / "config.yaml"
    wanted = comm.broadcast_object(file.read_text() if world.is_rank_0 else None)

    def look() -> None:
        for _ in range(10):  # a network file system may show a new file a moment later
            if file.exists() and file.read_text() == wanted:
                return
            time.sleep(0.5)
        raise InputError(
            f"run: {config.run} is not the folder that rank 0 writes to; put the run on a file system that all hosts "
            "share, under the same path."
        )

    agree(world, lambda: _within(_TIMEOUT_S, look, f"run: {config.run}"))


def _stop_all(world: World, sentence: str) -> NoReturn:
    if world.is_rank_0:
        raise InputError(sentence)
    raise SystemExit(2)


def problems_of(facts: Sequence[HostFacts]) -> list[str]:
    """One sentence for each host that differs; empty if none does."""
    problems = [f"Host {one.host}: {one.problem}" for one in _one_per_host(facts) if one.problem]
    answered, remedy = [one for one in facts if not one.problem], "install the same version on all hosts"
    for name in sorted({name for one in answered for name in one.versions}):
        problems += _differing(answered, lambda one, name=name: one.versions.get(name, "none"), name, remedy)
    remedy = "give all processes the same command and file"
    seeds = _differing(answered, lambda one: str(one.seed), "seed", remedy)  # a part of the config
    problems += seeds or _differing(answered, lambda one: one.config, "config", remedy)
    median = statistics.median([one.clock for one in answered] or [0.0])
    for one in _one_per_host(answered):
        if abs(one.clock - median) > _MAX_CLOCK_DIFFERENCE_S:
            problems.append(
                f"Host {one.host}: its clock differs from the other hosts' by {one.clock - median:+,.0f} s; "
                "synchronise it (chrony, ntpd)."
            )
        if one.free_gb < _MIN_FREE_GB:
            problems.append(
                f"Host {one.host}: {one.free_gb:.1f} GB of disk space are free for the run folder or the shard cache; "
                "free some for the checkpoints."
            )
    return problems


def _differing(facts: Sequence[HostFacts], value: Callable[[HostFacts], str], what: str, remedy: str) -> list[str]:
    counts = Counter(value(one) for one in facts)
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    off = [one for one in _one_per_host(facts, value) if value(one) != usual]
    return [f"Host {one.host}: {what} is {value(one)}, but {usual} on other hosts; {remedy}." for one in off]


def notes_of(facts: Sequence[HostFacts]) -> list[str]:
    """Differences that may be intended: slow links, unequal devices."""
    notes = []
    first_of_host = {one.host: rank for rank, one in reversed(list(enumerate(facts)))}
    median = statistics.median(facts[rank].receives_gb_s for rank in first_of_host.values())
    for rank in sorted(first_of_host.values()):
        one, before = facts[rank], facts[rank - 1]
        if len(first_of_host) > 2 and one.receives_gb_s < _SLOW_SHARE * median:
            notes.append(
                f"host {one.host} receives {one.receives_gb_s:.2f} GB/s from host {before.host}, others {median:.2f} "
                "GB/s; the slowest link limits the whole run."
            )
    devices = Counter(one.device for one in facts)
    if len(devices) > 1:
        shown = ", ".join(f"{count} × {device}" for device, count in devices.most_common())
        notes.append(f"the devices differ ({shown}); the slowest limits the run.")
    return notes


def _one_per_host(
    facts: Sequence[HostFacts], value: Callable[[HostFacts], object] = lambda one: one.problem
) -> list[HostFacts]:
    """The first process of each host, and each further one whose value differs."""
    return list({(one.host, value(one)): one for one in reversed(facts)}.values())[::-1]


def table(facts: Sequence[HostFacts]) -> Table:
    """One row per host."""
    shown = Table(title="Hosts", title_justify="left")
    for heading in ("host", "ranks", "device", "torch", "clock", "free", "receives", ""):
        shown.add_column(heading, justify="right" if heading in ("clock", "free", "receives") else "left")
    median, problems = statistics.median(one.clock for one in facts), problems_of(facts)
    for host in dict.fromkeys(one.host for one in facts):
        ranks = [rank for rank, one in enumerate(facts) if one.host == host]
        first, speed = facts[ranks[0]], min(facts[rank].receives_gb_s for rank in ranks)
        has_problem = any(facts[rank].problem for rank in ranks)
        shown.add_row(
            host,
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}",
            first.device,
            first.versions.get("torch", "?"),
            "?" if has_problem else f"{first.clock - median:+.1f} s",
            "?" if has_problem else f"{first.free_gb:,.0f} GB",
            "–" if math.isnan(speed) else f"{speed:.2f} GB/s",
            "differs" if any(line.startswith(f"Host {host}:") for line in problems) else "ok",
        )
    return shown


def _facts(config: Config) -> HostFacts:
    """The facts of this process, collected within a time limit. Collective."""
    device = comm.world().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    versions = {"python": platform.python_version(), "mmrl": f"{__version__} ({_digest_of_code()})"}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    if torch.version.cuda and device.type == "cuda":
        versions["CUDA"] = torch.version.cuda
    problem, free = None, 0.0
    try:
        free = _within(_TIMEOUT_S, lambda: _free_gb(config), "the disks of the run folder and the shard cache")
        _within(_TIMEOUT_S, lambda: _touch_shards(config), "data.train")
    except InputError as error:
        problem = str(error)
    comm.barrier()
    return HostFacts(
        host=comm.host(),
        device=name,
        versions=versions,
        config=hashlib.sha256(dump_config(config).encode()).hexdigest()[:12],
        seed=config.seed,
        clock=time.time(),
        free_gb=free,
        problem=problem,
    )


def _free_gb(config: Config) -> float:
    folders = [Path(config.run)]
    remote = [one for one in named_sources(config.data) if any(is_remote(str(spec)) for spec in spec_list(one.shards))]
    if remote:
        folders.append(cache_folder(config.data.remote))
    paths = ([folder.absolute(), *folder.absolute().parents] for folder in folders)
    return min(shutil.disk_usage(next(path for path in some if path.exists())).free for some in paths) / 1e9


def _touch_shards(config: Config) -> None:
    """Opens the first and the last local shard of each source. All are opened later."""
    for source in named_sources(config.data):
        local = [path for path in expand(source.shards, config.data.allow_pipe) if not is_remote(path)]
        for path in {local[0], local[-1]} if local else ():
            try:
                with Path(path).open("rb") as file:
                    file.read(1)
            except OSError as error:
                raise InputError(f"data.train: {path} cannot be read ({error.strerror or error}).") from None


def _within(seconds: float, work: Callable[[], T], what: str) -> T:
    """Runs work() in a thread with a time limit: a call that hangs in the kernel cannot be interrupted."""
    outcome = Future[T]()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # unlike the threads of a pool, it keeps no process alive
    try:
        return outcome.result(seconds)
    except TimeoutError:
        raise InputError(f"{what}: no answer within {seconds:.0f} s; check whether the file system hangs.") from None
    except OSError as error:
        raise InputError(f"{what}: {error}.") from error


def _digest_of_code() -> str:
    """Digest of mmrl's source: two checkouts of one version may differ."""
    digest = hashlib.sha256()
    for path in sorted(Path(mmrl.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _rates(world: World) -> tuple[float, float]:
    """GB/s received from the previous rank, and of an all-reduce (bytes divided by time). Collective.

    The message size grows until a round takes 0.1 s, so that a slow network costs seconds, not minutes.
    """
    numel, ring, reduced = 1 << 16, float("nan"), float("nan")
    while numel <= 1 << 24:
        values = torch.ones(numel, device=world.device)
        comm.barrier()
        began = time.monotonic()
        comm.ring_shift(values)
        ring = values.nbytes / (time.monotonic() - began) / 1e9
        comm.barrier()
        began = time.monotonic()
        comm.all_reduce_sum(values)[0].item()
        took = time.monotonic() - began
        reduced = values.nbytes / took / 1e9
        if comm.any_rank(took > 0.1):
            break
        numel *= 4
    return ring, reduced
