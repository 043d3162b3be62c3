"""The kept corpus: damages and inputs, each of which is tried, in the same order each time.

test_fuzzers.py tries others at random. `make test` takes every STRIDE-th case, `make test-all` all of them.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import sample_members, write_tar
from helpers.checkpoints import read_back, save_run
from helpers.corpus import PICTURES, TARS, damages
from helpers.fuzz import fuzz

from mmrl.config import load_config
from mmrl.data.check.shard import CheckOptions, check_shard
from mmrl.data.index import index_shard
from mmrl.data.index_file import SUFFIX, save_index
from mmrl.data.samples import BadSample, FieldsConfig, SampleReader
from mmrl.data.sources import open_reader
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.engine.checkpoint import Checkpoints
from mmrl.engine.tracking import EVALUATIONS, METRICS
from mmrl.errors import InputError
from mmrl.images.decode import decode_pixels
from mmrl.output.appended import read_records

Case = Callable[[], bool]
"""True: no harm was done. Refusals are raised."""


def put(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_cases(folder: Path) -> Iterator[Case]:
    """Damages of each file of the latest checkpoint, of the link to it, and of the run's config and logs."""
    run = save_run(folder)
    last = run / "checkpoints" / "step-12"
    want = {name: read_back(run / "checkpoints" / name) for name in ("step-8", "step-12")}

    def resumed() -> bool:
        said = list[str]()
        found = Checkpoints(run, 3, said.append).last_sound()
        assert found is not None
        assert read_back(found) == want[found.name]
        if found.name == "step-8":
            (sentence,) = said
            assert sentence.endswith("The run resumes from step-8.")
            raise InputError(sentence)
        return True

    for path in sorted(one for one in last.rglob("*") if one.is_file()):
        sound = path.read_bytes()
        for _, content in damages(sound, 1 if len(sound) > 10_000 else 3):

            def damaged(path: Path = path, content: bytes | None = content, sound: bytes = sound) -> bool:
                put(path, content)
                try:
                    return resumed()
                finally:
                    put(path, sound)

            yield damaged
    yield from _odd_entries(last, resumed)
    yield from _run_file_cases(run)


def _odd_entries(last: Path, resumed: Case) -> Iterator[Case]:
    """What is no file in the place of one, and files that do not belong there."""
    state, kept = last / "training" / "state.json", last / "training" / "kept"
    makers: list[Callable[[], None]] = [
        state.mkdir,
        lambda: state.symlink_to("nowhere"),
        lambda: state.symlink_to("state.json"),
        lambda: state.symlink_to("/dev/null"),
        lambda: os.mkfifo(state),
    ]
    for make in makers:

        def odd(make: Callable[[], None] = make) -> bool:
            state.rename(kept)
            make()
            try:
                return resumed()
            finally:
                state.rmdir() if state.is_dir() else state.unlink()
                kept.rename(state)

        yield odd


def _run_file_cases(run: Path) -> Iterator[Case]:
    log = b"".join(b'{"step": %d, "loss": 1.5}\n' % step for step in range(3))
    for name in (METRICS, EVALUATIONS):
        for _, content in damages(log, 5):

            def read(name: str = name, content: bytes | None = content) -> bool:
                put(run / name, content)
                found, bad = read_records(run / name)
                # A changed digit cannot be known; a line is read, or it is counted.
                return len(found) + len(bad) == sum(bool(line.strip()) for line in (content or b"").split(b"\n"))

            yield read
    path, config = (
        run / "config.yaml",
        (
            b"run: run\nseed: 3\nmodel: {name: tiny.json}\ndata: {train: shards}\noptim: {lr: 0.1}\n"
            b"train: {batch_size: 8, duration: 1 epochs}\nnesting: {dims: [8]}\n"
        ),
    )
    put(path, config)
    load_config(path)  # it is sound
    for _, content in damages(config, 5):

        def load(content: bytes | None = content) -> bool:
            put(path, content)
            load_config(path)  # or refuses: a file of a user's has no hash
            return True

        yield load


# ----------------------------------------------------------------------------------------------------------- indexes


def index_cases(folder: Path) -> Iterator[Case]:
    """Damages of an index next to its shard and in the cache folder, there with and without the list of the set."""
    members = [member for number in range(8) for member in sample_members(number)]
    shard, cache = write_tar(folder / "set" / "a.tar", members), folder / "cache"
    other = write_tar(folder / "other" / "a.tar", members[::-1])
    remote = RemoteConfig(folder=str(cache))
    want = contents(open_reader(shard, remote=remote))
    (cached,) = (cache / "index").glob(f"*{SUFFIX}")
    shutil.copytree(cache, folder / "kept")
    save_index(index_shard(other), folder / "other.index")
    sound, of_other = cached.read_bytes(), (folder / "other.index").read_bytes()
    for _, content in [*damages(sound, 25), ("of another shard", of_other)]:
        for place in ("next to the shard", "in the cache", "in the cache, without the list"):

            def damaged(place: str = place, content: bytes | None = content) -> bool:
                shutil.rmtree(cache)
                if place == "next to the shard":
                    put(Path(f"{shard}{SUFFIX}"), content)
                else:
                    shutil.copytree(folder / "kept", cache)
                    put(cached, content)
                    if place != "in the cache":
                        shutil.rmtree(cache / "sets")
                try:
                    return contents(open_reader(shard, remote=remote)) == want
                finally:
                    Path(f"{shard}{SUFFIX}").unlink(missing_ok=True)

            yield damaged
    (stored,) = (folder / "kept" / "sets").glob("*.json")
    for _, content in damages(stored.read_bytes(), 10):

        def of_list(content: bytes | None = content) -> bool:
            shutil.rmtree(cache)
            shutil.copytree(folder / "kept", cache)
            put(cache / "sets" / stored.name, content)
            return contents(open_reader(shard, remote=remote)) == want

        yield of_list


def contents(reader: SampleReader) -> list[tuple[str, bytes, list[str]]]:
    return [(one.name, one.image, one.captions) for one in map(reader.read, range(len(reader)))]


# ------------------------------------------------------------------------------------------------- pictures and tars


def picture_cases(_: Path) -> Iterator[Case]:
    for is_decoded, make in PICTURES.values():

        def decoded(is_decoded: bool | None = is_decoded, make: Callable[[], bytes] = make) -> bool:
            try:
                pixels_CHW = decode_pixels(make())
            except ValueError as error:
                assert is_decoded is not True
                raise InputError(str(error)) from error
            return is_decoded is not False and pixels_CHW.shape[0] in (3, 4)

        yield decoded


def tar_cases(folder: Path) -> Iterator[Case]:
    """`check` and training find both sound samples, or a problem is listed."""
    remote, fields = RemoteConfig(folder=str(folder / "cache")), FieldsConfig()
    options, path = CheckOptions(ShardCache(remote), True, None, False), folder / "a.tar"
    for data in TARS.values():

        def read(data: bytes = data) -> bool:
            path.write_bytes(data)
            facts = check_shard((str(path), fields), options)
            reader = open_reader(path, remote=remote)  # refuses what is no shard
            assert facts.usable
            keys, bad = set[str](), 0
            for row in range(len(reader)):
                try:
                    keys.add(reader.read(row).name)
                except BadSample:
                    bad += 1
            assert len(reader) == facts.samples
            return keys >= {"a.tar/a", "a.tar/b"} or (bool(facts.problems) and bool(reader.problems))

        yield read


TARGETS = {
    "damaged checkpoints": (checkpoint_cases, 132, 12),
    "damaged indexes": (index_cases, 321, 12),
    "known pictures": (picture_cases, 60, 6),
    "known tars": (tar_cases, 75, 3),
}
"""Name -> (the cases, their least number, how many of them `make test` passes over after each one)."""


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("share", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_nothing_in_the_corpus_does_harm(name: str, share: str, tmp_path: Path) -> None:
    start, least, stride = TARGETS[name]
    cases = [*start(tmp_path)]
    assert len(cases) >= least
    cases = cases[:: 1 if share == "all" else stride]
    remaining = iter(cases)

    def attempt(_: random.Random) -> bool:
        return next(remaining)()

    counts = fuzz(attempt, len(cases))
    print(counts.row(name))
    assert not counts.found
    assert next(remaining, None) is None
