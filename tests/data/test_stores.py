import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from conftest import sample_members, write_tar
from helpers.server import Server

from mmrl.data import download, stores
from mmrl.data.index import index_shard
from mmrl.data.index_file import SUFFIX, save_index
from mmrl.data.samples import BadSample
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.data.stream import Stream, stream
from mmrl.errors import InputError


@pytest.fixture
def serve(shards: Path) -> Iterator[type[Server]]:
    servers: list[Server] = []

    class Kept(Server):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # pyright: ignore[reportArgumentType]
            servers.append(self)

    yield Kept
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def short_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_RETRY_DELAY", 0.05)


def config(folder: Path, **options: object) -> RemoteConfig:
    return RemoteConfig.model_validate({"folder": str(folder), "timeout": 0.3, **options})


def epoch(shards: str | list[str], remote: RemoteConfig, **options: bool) -> list[str]:
    """The keys of one epoch, in order."""
    reader = open_training_set(DataConfig(train=shards, remote=remote, **options))  # pyright: ignore[reportArgumentType]
    return [key for batch in Stream(reader, 4, seed=3) for key in batch.keys]


def read(cache: ShardCache, url: str) -> bytes:
    with os.fdopen(cache.open(url), "rb") as file:
        return file.read()


@pytest.mark.parametrize("with_ranges", [True, False])
def test_an_epoch_from_a_failing_server_equals_the_local_one(
    shards: Path, tmp_path: Path, serve: type[Server], with_ranges: bool
) -> None:
    server = serve(shards, failure_rate=0.6, with_ranges=with_ranges)
    # Without ranges each attempt starts over, so more are needed.
    keys = epoch(server.url + "/part-{0..2}.tar", config(tmp_path, retries=40))
    assert keys == epoch(str(shards), config(tmp_path / "local"))
    assert server.failures["failed"]


def test_a_cut_download_is_resumed(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    cache = ShardCache(config(tmp_path))
    url = f"{server.url}/part-0.tar"
    target = cache.folder / stores.cache_name(url)
    target.parent.mkdir(parents=True)
    data = (shards / "part-0.tar").read_bytes()
    partial, version = (target.with_name(f"{target.name}.{kind}") for kind in ("partial", "mark"))
    partial.write_bytes(data[:5000])
    version.write_text(f'"{(shards / "part-0.tar").stat().st_mtime_ns}"')
    assert read(cache, url) == data
    assert server.requests["/part-0.tar"] == 1
    assert read(cache, url) == data
    assert server.requests["/part-0.tar"] == 1  # cached
    # A partial file of an older version is not continued; a complete partial file is not downloaded again.
    target.unlink()
    partial.write_bytes(b"older" * 100)
    version.write_text('"older"')
    assert read(cache, url) == data
    target.rename(partial)
    version.write_text(f'"{(shards / "part-0.tar").stat().st_mtime_ns}"')
    assert read(cache, url) == data
    assert not version.exists()


def test_a_changed_remote_shard_is_downloaded_again(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    folder, remote = tmp_path / "served", config(tmp_path / "cache")
    folder.mkdir()
    shutil.copy(shards / "part-0.tar", folder / "a.tar")
    server = serve(folder)
    reader = open_training_set(DataConfig(train=server.url + "/a.tar", remote=remote))
    assert len(reader) == 20
    # The cached copy does not match the index, but the server's file does: the copy is replaced.
    (copy,) = (path for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix == ".tar")
    copy.unlink()
    shutil.copy(shards / "part-1.tar", copy)
    reader._reset_caches()  # as in a new worker
    assert reader.read(0).name.endswith("00000")
    assert copy.read_bytes() == (shards / "part-0.tar").read_bytes()
    # The server's file has changed: its samples are bad until a restart indexes it again.
    shutil.copy(shards / "part-1.tar", folder / "a.tar")
    copy.unlink()
    reader._reset_caches()
    with pytest.raises(BadSample, match="changed since it was indexed; restore it"):
        reader.read(0)
    assert len(open_training_set(DataConfig(train=server.url + "/a.tar", remote=remote))) == 17


def test_a_copy_that_another_process_has_replaced_is_not_discarded(
    shards: Path, tmp_path: Path, serve: type[Server]
) -> None:
    cache, url = ShardCache(config(tmp_path)), serve(shards).url + "/part-0.tar"
    stale = cache.open(url)
    cache.discard(url, stale)
    replaced = cache.open(url)
    cache.discard(url, stale)  # as a process that has opened the old copy does a moment later
    assert os.path.samestat(os.fstat(replaced), cache._cached_path(url).stat())
    with download.locked(stores._lock_of(cache._cached_path(url)), wait=True):
        partial = download.partial_file(cache._cached_path(url))
        partial.touch()
        discarding = threading.Thread(target=cache.discard, args=(url, replaced))
        discarding.start()  # while a third one downloads
        discarding.join(0.2)
        assert partial.exists()
    discarding.join(10)
    assert not cache._cached_path(url).exists()
    os.close(stale)
    os.close(replaced)


def test_a_lock_that_cannot_be_opened_is_no_download_of_this_host(tmp_path: Path) -> None:
    cache = ShardCache(config(tmp_path))
    cache.folder.mkdir(parents=True)
    (cache.folder / "of-another-user.tar.lock").symlink_to("nowhere")
    (cache.folder / "of-another-user.tar.partial").touch()
    assert not cache.is_downloading()


def test_a_copy_evicted_right_after_the_download_can_be_read(
    shards: Path, tmp_path: Path, serve: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(shards)
    cache = ShardCache(config(tmp_path))
    replace = Path.replace

    def replace_and_evict(path: Path, target: Path) -> Path:
        replace(path, target).unlink()
        return target

    monkeypatch.setattr(Path, "replace", replace_and_evict)
    for fetched in (1, 2):
        assert read(cache, f"{server.url}/part-0.tar") == (shards / "part-0.tar").read_bytes()
        assert server.requests["/part-0.tar"] == fetched


def test_the_index_next_to_a_remote_shard_spares_its_download(
    shards: Path, tmp_path: Path, serve: type[Server]
) -> None:
    folder = tmp_path / "served"
    for path in shards.glob("*.tar"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
        save_index(index_shard(path), folder / (path.name + SUFFIX))
    server = serve(folder)
    reader = open_reader(server.url + "/part-{0..2}.tar", remote=config(tmp_path / "cache"))
    assert len(reader) == 48
    indexes = [f"/part-{n}.tar{SUFFIX}" for n in range(3)]
    assert {path for path in server.requests if ".tar" in path} == {"/part-0.tar", *indexes}
    # Their headers were read at the start; one whole index came with its shard.
    assert [path.name[-10:] for path in (tmp_path / "cache" / "index").glob(f"*{SUFFIX}")] == [f"-0.tar{SUFFIX}"[-10:]]
    reader.read(47)
    assert server.requests["/part-2.tar"] == 1
    assert server.requests["/part-1.tar"] == 0


def test_a_missing_remote_shard_is_an_error_without_retries(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    with pytest.raises(InputError, match=r"part-3.tar cannot be read \(.* does not exist \(HTTP 404\)\)"):
        epoch(server.url + "/part-{0..3}.tar", config(tmp_path))
    assert server.requests["/part-3.tar"] == 1


def test_an_unreachable_server_is_an_error_after_the_retries(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/a.tar cannot be read"):
        epoch("http://127.0.0.1:9/a.tar", config(tmp_path, retries=1))


def test_a_download_is_retried_as_often_as_configured(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    server.fail_always()
    with pytest.raises(OSError, match="cannot be fetched: HTTP 500"):
        ShardCache(config(tmp_path, retries=3)).open(f"{server.url}/part-0.tar")
    assert server.requests["/part-0.tar"] == 4


def test_the_samples_of_a_shard_that_becomes_unavailable_are_skipped_and_listed(
    shards: Path, tmp_path: Path, serve: type[Server]
) -> None:
    folder = tmp_path / "served"
    for path in shards.glob("*.tar"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    server, remote = serve(folder), config(tmp_path / "cache", retries=1)
    location = server.url + "/part-{0..2}.tar"
    reader = open_training_set(DataConfig(train=location, remote=remote))
    for path in (tmp_path / "cache" / "shards").iterdir():  # downloaded to be indexed
        path.unlink()
    (folder / "part-1.tar").unlink()
    reader = open_training_set(DataConfig(train=location, remote=remote))
    batches = list(Stream(reader, 4, seed=3))
    assert len(batches) == 12
    bad = [problem for batch in batches for problem in batch.bad]
    assert len({problem.key for problem in bad}) == 17
    assert {problem.kind for problem in bad} == {"shard out of reach"}
    assert server.requests["/part-1.tar"] == 2  # not requested again for every sample


def test_the_least_recently_used_copy_is_evicted(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    size = (shards / "part-0.tar").stat().st_size
    cache = ShardCache(config(tmp_path, gigabytes=1.5 * size / 1e9))
    url = f"{server.url}/part-0.tar"
    copy = cache.folder / stores.cache_name(url)
    with os.fdopen(cache.open(url), "rb") as file:
        assert copy.exists()
        read(cache, f"{server.url}/part-1.tar")
        assert not copy.exists()
        assert file.read() == (shards / "part-0.tar").read_bytes()
    assert read(cache, url) == (shards / "part-0.tar").read_bytes()
    assert copy.exists()


def _fetch(url: str, folder: str) -> None:
    os.close(ShardCache(RemoteConfig(folder=folder)).open(url))


def test_several_processes_download_a_shard_once(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    context = multiprocessing.get_context("fork")
    arguments = (f"{server.url}/part-0.tar", str(tmp_path))
    processes = [context.Process(target=_fetch, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests["/part-0.tar"] == 1


def test_prefetch_downloads_shards_in_the_background(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    cache = ShardCache(config(tmp_path))
    cache.prefetch([f"{server.url}/part-{n}.tar" for n in range(3)])
    deadline = time.monotonic() + 20
    pickle.loads(pickle.dumps(cache))  # as to a spawned worker, which starts its own threads  # noqa: S301
    copies = cache.folder
    while len(list(copies.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path.read_bytes() for path in copies.glob("*.tar")) == sorted(
        path.read_bytes() for path in shards.glob("*.tar")
    )


def test_shards_are_read_from_any_fsspec_store(shards: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    keys = epoch("memory://bucket", config(tmp_path))
    assert sorted(keys) == sorted(epoch(str(shards), config(tmp_path / "local")))
    assert open_reader("memory://bucket/part-0.tar", remote=config(tmp_path)).is_remote
    with pytest.raises(InputError, match="cannot be read"):
        epoch("memory://bucket/none.tar", config(tmp_path))


def test_a_pipe_runs_only_with_allow_pipe(shards: Path, tmp_path: Path) -> None:
    spec = f"pipe:cat {shards}/part-0.tar"
    with pytest.raises(InputError, match=r"data\.allow_pipe"):
        epoch(spec, config(tmp_path))
    with pytest.raises(InputError, match=r"data\.allow_pipe"):
        stream(spec, 4)
    assert len(epoch(spec, config(tmp_path), allow_pipe=True)) == 20
    with pytest.raises(InputError, match=r"cannot be read \(.*the command ended with status 1"):
        epoch("pipe:cat nothing-of-this-name 2> /dev/null", config(tmp_path, retries=0), allow_pipe=True)


def test_sources_have_their_own_fields_and_repeats(shards: Path, tmp_path: Path) -> None:
    members = [
        (name.replace(".png", ".picture").replace(".txt", ".words"), data)
        for number in range(100, 110)
        for name, data in sample_members(number)
        if not name.endswith(".json")
    ]
    write_tar(tmp_path / "extra" / "a.tar", members)
    sources = [
        {"shards": str(shards), "name": "base"},
        {
            "shards": str(tmp_path / "extra"),
            "name": "extra",
            "repeat": 3,
            "fields": {"image": ["picture"], "text": "words"},
        },
    ]
    data = DataConfig.model_validate({"sources": sources})
    batches = list(stream(data, 6, seed=2))
    seen = Counter(key for batch in batches for key in batch.keys)
    assert {times for key, times in seen.items() if key.startswith("extra/a.tar/")} == {3}
    assert {times for key, times in seen.items() if key.startswith("base/part-")} == {1}
    assert sum(seen.values()) == 78
    # All copies of a sample are in one group.
    groups = {(key, int(g)) for b in batches for key, g in zip(b.keys, b.group, strict=True) if key.startswith("extra")}
    assert len(groups) == 10
    assert min(group for _, group in groups) >= 0
    with pytest.raises(InputError, match="two have the name 'base'"):
        stream(DataConfig.model_validate({"sources": [sources[0], sources[0]]}), 6)
    with pytest.raises(InputError, match=r"set together with data\.sources"):
        stream(DataConfig.model_validate({"train": "a.tar", "sources": sources}), 6)
    with pytest.raises(InputError, match="names no file"):
        stream(DataConfig(), 6)
