import multiprocessing
import os
import pickle
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from conftest import sample_members, write_tar
from helpers.server import Server

from mmrl.data import stores
from mmrl.data.index import SUFFIX, index_shard, save_index
from mmrl.data.samples import BadSample
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stores import Store, StoreConfig
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
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_LONGEST_PAUSE", 0.05)


def config(folder: Path, **options: object) -> StoreConfig:
    return StoreConfig.model_validate({"folder": str(folder), "timeout": 0.3, **options})


def epoch(shards: str | list[str], store: StoreConfig, **options: bool) -> list[str]:
    reader = open_training_set(DataConfig(train=shards, remote=store, **options))  # pyright: ignore[reportArgumentType]
    return [key for batch in Stream(reader, 4, seed=3) for key in batch.keys]


@pytest.mark.parametrize("with_ranges", [True, False])
def test_an_epoch_over_a_bad_line_is_complete_and_exact(
    shards: Path, tmp_path: Path, serve: type[Server], with_ranges: bool
) -> None:
    server = serve(shards, troubles=0.6, with_ranges=with_ranges)
    # Without ranges each attempt begins anew, so it takes more of them.
    store = config(tmp_path, retries=40)
    remote = epoch(server.url + "/part-{0..2}.tar", store)
    assert remote == epoch(str(shards), config(tmp_path / "local"))
    assert server.made["trouble"]


def test_a_broken_download_goes_on_where_it_was_cut(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    store = Store(config(tmp_path))
    url = f"{server.url}/part-0.tar"
    target = store.folder / stores.cache_name(url)
    target.parent.mkdir(parents=True)
    data = (shards / "part-0.tar").read_bytes()
    partial, mark = (target.with_name(f"{target.name}.{kind}") for kind in ("partial", "mark"))
    partial.write_bytes(data[:5000])
    mark.write_text(f'"{(shards / "part-0.tar").stat().st_mtime_ns}"')
    assert store.local(url).read_bytes() == data
    assert server.seen["/part-0.tar"] == 1
    assert store.local(url).read_bytes() == data
    assert server.seen["/part-0.tar"] == 1  # it is here
    # What was begun of an older version is not joined to the newer one; what is whole already is not asked for again.
    target.unlink()
    partial.write_bytes(b"older" * 100)
    mark.write_text('"older"')
    assert store.local(url).read_bytes() == data
    target.rename(partial)
    mark.write_text(f'"{(shards / "part-0.tar").stat().st_mtime_ns}"')
    assert store.local(url).read_bytes() == data
    assert not mark.exists()


def test_a_remote_shard_that_has_changed_is_fetched_anew(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    folder, cache = tmp_path / "served", config(tmp_path / "cache")
    folder.mkdir()
    shutil.copy(shards / "part-0.tar", folder / "a.tar")
    server = serve(folder)
    reader = open_training_set(DataConfig(train=server.url + "/a.tar", remote=cache))
    assert len(reader) == 20
    # The copy is of another time than the index: it is thrown away, and what the server has is the right one.
    (copy,) = (path for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix == ".tar")
    copy.unlink()
    shutil.copy(shards / "part-1.tar", copy)
    reader._open_none()  # as a worker that has not come to it
    assert reader.read(0).name.endswith("00000")
    assert copy.read_bytes() == (shards / "part-0.tar").read_bytes()
    # The server's has changed: no sample of the new shard passes for one of the old, until a new start indexes it.
    shutil.copy(shards / "part-1.tar", folder / "a.tar")
    copy.unlink()
    reader._open_none()
    with pytest.raises(BadSample, match="not the shard that was indexed any more; start again"):
        reader.read(0)
    assert len(open_training_set(DataConfig(train=server.url + "/a.tar", remote=cache))) == 17


def test_a_copy_pushed_out_as_soon_as_it_is_there_is_read_all_the_same(
    shards: Path, tmp_path: Path, serve: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(shards)
    store = Store(config(tmp_path))
    really = Path.replace

    def raced(path: Path, target: Path) -> Path:
        really(path, target).unlink()
        return target

    monkeypatch.setattr(Path, "replace", raced)
    for fetched in (1, 2):
        with os.fdopen(store.open(f"{server.url}/part-0.tar"), "rb") as file:
            assert file.read() == (shards / "part-0.tar").read_bytes()
        assert server.seen["/part-0.tar"] == fetched


def test_the_index_beside_a_remote_shard_saves_reading_it(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    folder = tmp_path / "served"
    for path in shards.glob("*.tar"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
        save_index(index_shard(path), folder / (path.name + SUFFIX))
    server = serve(folder)
    reader = open_reader(server.url + "/part-{0..2}.tar", store=config(tmp_path / "cache"))
    assert len(reader) == 48
    assert set(server.seen) == {"/part-0.tar", *(f"/part-{n}.tar{SUFFIX}" for n in range(3))}
    reader.read(47)
    assert server.seen["/part-2.tar"] == 1


def test_a_shard_that_is_not_there_is_named_at_once(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    with pytest.raises(InputError, match=r"part-3.tar cannot be read \(.* does not exist \(HTTP 404\)\)"):
        epoch(server.url + "/part-{0..3}.tar", config(tmp_path))
    assert server.seen["/part-3.tar"] == 1


def test_a_server_that_is_gone_is_named_after_the_retries(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/a.tar cannot be read"):
        epoch("http://127.0.0.1:9/a.tar", config(tmp_path, retries=1))


def test_a_server_is_asked_as_often_as_configured(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards, troubles=1.0)
    server.answers_nothing()
    with pytest.raises(OSError, match="cannot be fetched: HTTP 500"):
        Store(config(tmp_path, retries=3)).local(f"{server.url}/part-0.tar")
    assert server.seen["/part-0.tar"] == 4


def test_a_shard_that_vanishes_in_mid_epoch_is_skipped_and_listed(
    shards: Path, tmp_path: Path, serve: type[Server]
) -> None:
    folder = tmp_path / "served"
    for path in shards.glob("*.tar"):
        (folder / path.name).parent.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    server, store = serve(folder), config(tmp_path / "cache", retries=1)
    location = server.url + "/part-{0..2}.tar"
    reader = open_training_set(DataConfig(train=location, remote=store))
    for path in (tmp_path / "cache" / "shards").iterdir():  # fetched for their indexes, and evicted since
        path.unlink()
    (folder / "part-1.tar").unlink()
    reader = open_training_set(DataConfig(train=location, remote=store))
    batches = list(Stream(reader, 4, seed=3))
    assert len(batches) == 12
    bad = [problem for batch in batches for problem in batch.bad]
    assert len({problem.key for problem in bad}) == 17
    assert {problem.kind for problem in bad} == {"shard out of reach"}
    assert server.seen["/part-1.tar"] == 2  # not asked for again for every sample


def test_the_copies_keep_to_their_room(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    size = (shards / "part-0.tar").stat().st_size
    store = Store(config(tmp_path, gigabytes=1.5 * size / 1e9))
    first = store.local(f"{server.url}/part-0.tar")
    with first.open("rb") as held:
        store.local(f"{server.url}/part-1.tar")
        assert not first.exists()
        assert held.read() == (shards / "part-0.tar").read_bytes()
    assert store.local(f"{server.url}/part-0.tar").exists()


def _fetch(url: str, folder: str) -> None:
    Store(StoreConfig(folder=folder)).local(url)


def test_many_processes_fetch_a_shard_once(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    context = multiprocessing.get_context("fork")
    arguments = (f"{server.url}/part-0.tar", str(tmp_path))
    processes = [context.Process(target=_fetch, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.seen["/part-0.tar"] == 1


def test_shards_are_fetched_before_they_are_needed(shards: Path, tmp_path: Path, serve: type[Server]) -> None:
    server = serve(shards)
    store = Store(config(tmp_path))
    store.fetch_ahead([f"{server.url}/part-{n}.tar" for n in range(3)])
    deadline = time.monotonic() + 20
    while len(server.seen) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(server.seen) == {f"/part-{n}.tar" for n in range(3)}
    pickle.loads(pickle.dumps(store))  # as to a spawned worker, which starts threads of its own  # noqa: S301
    copies = store.folder
    while len(list(copies.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path.read_bytes() for path in copies.glob("*.tar")) == sorted(
        path.read_bytes() for path in shards.glob("*.tar")
    )


def test_any_store_of_fsspec_serves(shards: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    remote = epoch("memory://bucket", config(tmp_path))
    assert sorted(remote) == sorted(epoch(str(shards), config(tmp_path / "local")))
    assert open_reader("memory://bucket/part-0.tar", store=config(tmp_path)).is_remote
    with pytest.raises(InputError, match="cannot be read"):
        epoch("memory://bucket/none.tar", config(tmp_path))


def test_a_pipe_is_run_only_where_it_is_allowed(shards: Path, tmp_path: Path) -> None:
    spec = f"pipe:cat {shards}/part-0.tar"
    with pytest.raises(InputError, match=r"data\.allow_pipe"):
        epoch(spec, config(tmp_path))
    with pytest.raises(InputError, match=r"data\.allow_pipe"):
        stream(spec, 4)
    assert len(epoch(spec, config(tmp_path), allow_pipe=True)) == 20
    with pytest.raises(InputError, match=r"cannot be read \(.*the command ended with status 1"):
        epoch("pipe:cat nothing-of-this-name 2> /dev/null", config(tmp_path, retries=0), allow_pipe=True)


def test_sources_with_fields_and_shares_of_their_own(shards: Path, tmp_path: Path) -> None:
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
    # The copies of a sample are of one group.
    groups = {(key, int(g)) for b in batches for key, g in zip(b.keys, b.group, strict=True) if key.startswith("extra")}
    assert len(groups) == 10
    assert min(group for _, group in groups) >= 0
    with pytest.raises(InputError, match="two are called 'base'"):
        stream(DataConfig.model_validate({"sources": [sources[0], sources[0]]}), 6)
    with pytest.raises(InputError, match=r"given beside data\.sources"):
        stream(DataConfig.model_validate({"train": "a.tar", "sources": sources}), 6)
    with pytest.raises(InputError, match="names no file"):
        stream(DataConfig(), 6)
