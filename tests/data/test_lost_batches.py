"""Batches that no worker will deliver end in one sentence, slow ones do not; the shared memory that batches need."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import sample_members, write_tar
from helpers.samples import SPEC

from mmrl.config import load_config
from mmrl.data.download import locked
from mmrl.data.samples import SampleReader
from mmrl.data.sources import open_reader
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.data.stream import Stream
from mmrl.data.workers import LoaderMemory, usable_cores
from mmrl.distributed.comm import World
from mmrl.errors import InputError, RunStopped
from mmrl.train.preflight import _check, bytes_per_sample, prepare

LOST_AFTER_S = 2.0


@pytest.fixture
def make_stream(tmp_path: Path) -> Callable[..., Stream]:
    reader = open_reader(write_tar(tmp_path / "a.tar", [m for n in range(48) for m in sample_members(n)]))

    def make(workers: int = 2, **options: object) -> Stream:
        return Stream(reader, 4, image=SPEC, num_workers=workers, lost_after_s=LOST_AFTER_S, **options)  # pyright: ignore[reportArgumentType]

    return make


def workers_of(stream: Stream) -> list[int]:
    return [worker.pid for worker in stream._loader._iterator._workers]  # pyright: ignore


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_stopped_worker_is_one_sentence_in_time_and_ends(make_stream: Callable[..., Stream]) -> None:
    """As one that waits for a file system that hangs; SIGTERM does not end it."""
    stream = make_stream()
    awaited = stream.forever()
    next(awaited)
    pids = workers_of(stream)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(
        RunStopped, match=r"^data: a batch was lost: for 2 s no DataLoader worker has loaded a sample; "
    ):
        deque(awaited, maxlen=0)
    assert time.monotonic() - began < LOST_AFTER_S + 1
    while any(map(is_alive, pids)) and time.monotonic() < began + 10:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def test_a_read_that_hangs_and_a_batch_that_is_not_sent(
    make_stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(*_: object) -> None:
        time.sleep(3600)

    class Unsendable(list[str]):
        def __reduce__(self) -> str:
            raise OSError("cannot be sent")  # in the thread that sends batches, as for want of file descriptors

    with monkeypatch.context() as patch:
        patch.setattr(SampleReader, "read_image", hang)
        with pytest.raises(RunStopped, match="a batch was lost"):
            next(iter(make_stream()))
    with pytest.raises(RunStopped, match="a batch was lost"):
        next(iter(make_stream(text=Unsendable)))


def test_a_slow_worker_is_not_a_lost_one(make_stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    read = SampleReader.read_image

    def slow(*arguments: object) -> object:
        time.sleep(0.8 * LOST_AFTER_S / 2)
        return read(*arguments)  # pyright: ignore

    monkeypatch.setattr(SampleReader, "read_image", slow)
    assert len(next(iter(make_stream(workers=1))).keys) == 4


def test_a_download_is_waited_for_while_bytes_may_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(RemoteConfig(folder=str(tmp_path), retries=1, timeout=1))
    assert not cache.is_downloading()
    cache.folder.mkdir(parents=True)
    lock = cache.folder / "a.tar.lock"
    with locked(lock, wait=True):
        assert cache.is_downloading()
        os.utime(lock, (0, 0))
        assert not cache.is_downloading()
        (cache.folder / "a.tar.partial").write_bytes(b"some")
        assert cache.is_downloading()
    assert not cache.is_downloading()


def test_a_full_shared_memory_is_told_at_once(
    make_stream: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    share = torch.Tensor.share_memory_

    def full(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > 1000:
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
        return share(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    began = time.monotonic()
    with pytest.raises(RunStopped, match=r"does not fit into the shared memory, /dev/shm \(unable.*--shm-size=8g"):
        next(iter(make_stream()))
    assert time.monotonic() - began < LOST_AFTER_S


def test_an_epoch_after_an_epoch_with_the_same_workers(make_stream: Callable[..., Stream]) -> None:
    stream, before = make_stream(), threading.active_count()
    assert sum(len(batch.keys) for _ in range(2) for batch in stream) == 96
    assert threading.active_count() < before + 20


def space(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """As if /dev/shm had this number of free bytes."""
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096))


MEGABYTE = 1 << 20


def test_what_is_prepared_in_advance_is_counted_in_samples() -> None:
    for rows, micro_batch, workers, units, rows_of_unit in (
        (12, 12, 2, 4, 12), (64, 64, 8, 4, 64), (128, 128, 8, 4, 128), (256, 256, 8, 2, 256), (2048, 2048, 15, 2, 256),
        (2048, 2048, 2, 5, 256), (300, 300, 4, 4, 150), (8192, 64, 8, 17, 64),
    ):  # fmt: skip
        memory = LoaderMemory(1, rows, micro_batch, processes=1)
        assert (memory.units_ahead(workers), memory.unit_bytes) == (units, rows_of_unit)


def test_the_prefetch_is_what_the_shared_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = LoaderMemory(MEGABYTE, rows=1, micro_batch=1, processes=2)
    for free, fitting in ((8, 1), (11, 1), (12, 2), (20, 4), (1000, 4)):
        space(monkeypatch, free * MEGABYTE)
        assert memory.fitting_units_ahead(workers=2) == fitting
        assert memory.shared(2, fitting) <= free * MEGABYTE
    space(monkeypatch, 64 * MEGABYTE)
    memory = LoaderMemory(3 * 224 * 224, rows=256, micro_batch=256, processes=1)
    says = r"2 workers on each of 1 processes pass units of 38\.5 MB .* needs 154 MB and has 67 MB free; .*=221m; "
    with pytest.raises(InputError, match=says):
        memory.fitting_units_ahead(workers=2)
    assert memory.fitting_units_ahead(workers=0) == 1
    assert memory.shared(workers=0, units_ahead=4) == memory.private(workers=0) == 0


def test_workers_that_do_not_fit_into_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    space(monkeypatch, 10**12)
    monkeypatch.setattr("mmrl.data.workers.host_memory", lambda: 4e9)
    memory = LoaderMemory(3 * 224 * 224, rows=256, micro_batch=256, processes=2)
    assert memory.fitting_units_ahead(workers=2) == 2
    with pytest.raises(InputError, match=r"^data.workers: 16 workers on each of 2 processes need about .* has 4\.0 GB"):
        memory.fitting_units_ahead(workers=16)
    monkeypatch.setattr("mmrl.data.workers.usable_cores", lambda: 64)
    assert 1 <= memory.default_workers(0.25) < memory.default_workers() <= 5


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 1), ("6400000 100000", 8), ("max 100000", 8), ("", 8)])
def test_the_cores_are_those_that_a_container_may_use(
    limit: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr("mmrl.data.workers._CPU_LIMIT", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores() == cores


def test_the_default_number_of_workers_fits_cores_and_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl.data.workers.usable_cores", lambda: 16)
    monkeypatch.setattr("mmrl.data.workers.host_memory", lambda: 1e15)
    for processes, free, wanted in ((1, 10**6, 15), (8, 10**6, 1), (16, 10**6, 0), (1, 8, 6), (2, 8, 2), (1, 2, 0)):
        space(monkeypatch, free * MEGABYTE)
        assert LoaderMemory(MEGABYTE, 1, 1, processes).default_workers() == wanted


def test_a_batch_takes_the_bytes_that_are_counted(make_stream: Callable[..., Stream]) -> None:
    """A tensor in shared memory is a file; its size is torch's own account."""
    batch = next(iter(make_stream(text=lambda texts: torch.zeros(len(texts), 77, dtype=torch.int64))))
    tensors = [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 3
    assert all(x.is_shared() for x in tensors)
    taken = sum(x.untyped_storage().nbytes() for x in tensors)
    counted = len(batch.keys) * bytes_per_sample({"vision_cfg": {"image_size": [32, 32]}, "text_cfg": {}})
    assert taken <= counted <= 1.01 * taken
    assert bytes_per_sample({"vision_cfg": {}, "text_cfg": {"context_length": 64}}) == 3 * 224 * 224 + 64 * 8 + 32


def test_too_little_shared_memory_is_refused_before_the_run(
    write_config: Callable[..., Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(data={"train": str(shards), "workers": 2}, evaluation={}))
    space(monkeypatch, 150_000)
    with pytest.raises(InputError, match=r"^data.workers: 2 workers on each of 1 processes .* lower data.workers"):
        prepare(config, World())
    assert not (tmp_path / "run").exists()
    space(monkeypatch, 300_000)
    prepared = prepare(config, World())
    assert prepared.prefetch == 2
    assert any("memory has room for 2 of the 4 units of" in note for note in prepared.reader.notes)


def test_workers_of_evaluation_count(
    write_config: Callable[..., Path], shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrl.data.workers.host_memory", lambda: 1.3e9)
    monkeypatch.setattr("mmrl.data.workers.usable_cores", lambda: 8)
    path = write_config(data={"train": str(shards), "workers": 4})
    assert _check(load_config(path), World(), 1).workers == 4, "a CPU that embeds decodes by itself"
    monkeypatch.setattr(World, "device", torch.device("cuda"))
    with pytest.raises(
        InputError, match=r"need about 1\.5 GB of memory, with 0\.3 GB of those that decode for evaluat"
    ):
        _check(load_config(path), World(), 1)
    assert _check(load_config(path, ["evaluation.sets={}"]), World(), 1).workers == 4


_UNDER_64_MB = """
import sys, time
from mmrl.data.sources import DataConfig, SourceConfig, open_training_set
from mmrl.data.stream import Stream
from mmrl.data.workers import LoaderMemory
from mmrl.errors import InputError, RunStopped
from mmrl.images.image_spec import ImageSpec
from mmrl.train.preflight import bytes_per_sample
spec = ImageSpec(height=224, width=224, mean=(0.5,) * 3, std=(0.5,) * 3)
config = DataConfig(sources=[SourceConfig(shards=sys.argv[1], repeat=100)])
row = bytes_per_sample({"vision_cfg": {}, "text_cfg": {}})
def run(rows, prefetch, steps):
    stream = Stream(open_training_set(config), rows, num_workers=2, image=spec, config=config, prefetch=prefetch)
    batches = stream.forever()
    for _ in range(steps):
        next(batches)
        time.sleep(1)  # the workers fill the shared memory meanwhile
try:
    LoaderMemory(row, 256, 256, 1).fitting_units_ahead(2)
except InputError as error:
    print("256:", error)
run(64, LoaderMemory(row, 64, 64, 1).fitting_units_ahead(2), 5)
print("64: fits")
try:
    run(64, 4, 60)
except RunStopped as error:
    print("64 x 4:", error)
"""


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"]).returncode != 0, reason="namespaces are not allowed")
def test_in_a_container_with_64_mb(tmp_path: Path) -> None:
    """In a mount namespace with a /dev/shm of that size."""
    path = write_tar(tmp_path / "a.tar", [m for n in range(48) for m in sample_members(n)])
    mounted = f"mount -t tmpfs -o size=64m tmpfs /dev/shm && exec {sys.executable} - {path}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted], input=_UNDER_64_MB, capture_output=True, text=True, timeout=120
    )
    refused, fits, full = done.stdout.splitlines()
    assert refused.startswith("256: data.workers: 2 workers on each of 1 processes pass units of 38.7 MB")
    assert fits == "64: fits"
    assert full.startswith("64 x 4: data: a batch does not fit into the shared memory, /dev/shm (unable to allocate")
    assert "Traceback" not in done.stderr
