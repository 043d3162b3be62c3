"""Damaged shard indexes next to a sound tar: no sample is lost or has another's name, nothing ends in a traceback."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import sample_members, write_tar
from safetensors.numpy import load, save

from mmrl.data.index import index_shard
from mmrl.data.index_file import SUFFIX, load_index, save_index
from mmrl.data.sources import open_reader
from mmrl.data.stores import RemoteConfig, ShardCache

Damage = Callable[[bytes, np.random.Generator], bytes]


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bits, most of them in one place."""
    damaged, at = bytearray(data), int(rng.integers(len(data)))
    for _ in range(int(rng.integers(1, 5))):
        damaged[min(at + int(rng.integers(8)), len(data) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def flip_in_header(data: bytes, rng: np.random.Generator) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    return flip(data[:end], rng) + data[end:]


def replace_digits(data: bytes, rng: np.random.Generator) -> bytes:
    """Another number in the JSON of the header."""
    end = 8 + int.from_bytes(data[:8], "little")
    digits = [at for at in range(8, end) if chr(data[at]).isdigit()]
    at = int(rng.choice(digits))
    return data[:at] + str((int(chr(data[at])) + 1) % 10).encode() + data[at + 1 :]


def shorten(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def lengthen(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 100)))


def zero(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data)))
    count = int(rng.integers(1, 200))
    return data[:at] + bytes(len(data[at : at + count])) + data[at + count :]


def swap(data: bytes, rng: np.random.Generator) -> bytes:
    first, second = sorted(rng.integers(8, len(data) - 64, 2).tolist())
    return data[:first] + data[second : second + 32] + data[first + 32 : second] + data[first : first + 32] + data[
        second + 32 :
    ] if second - first > 32 else flip(data, rng)  # fmt: skip


def another_index(data: bytes, rng: np.random.Generator) -> bytes:
    """That of a tar with the same members in another order."""
    return OTHER[0]


OTHER: list[bytes] = []
DAMAGES: list[Damage] = [
    flip, flip, flip, flip_in_header, replace_digits, replace_digits, shorten, lengthen, zero, swap, another_index,
]  # fmt: skip


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    other = write_tar(folder / "other" / "a.tar", [m for n in reversed(range(8)) for m in sample_members(n)])
    save_index(index_shard(other), folder / "other.index")
    OTHER[:] = [(folder / "other.index").read_bytes()]
    return write_tar(folder / "a.tar", [m for n in range(8) for m in sample_members(n)])


def contents(shard: Path, cache: Path) -> list[tuple[str, bytes, list[str]]]:
    reader = open_reader(shard, remote=RemoteConfig(folder=str(cache)))
    samples = [reader.read(row) for row in range(len(reader))]
    return [(sample.name, sample.image, sample.captions) for sample in samples]


def try_damages(shard: Path, tmp_path: Path, seeds: range) -> Counter[str]:
    """Damages the index next to the shard, or the one in the cache folder, and reads the set."""
    neighbour, outcome = Path(f"{shard}{SUFFIX}"), Counter[str]()
    save_index(index_shard(shard), neighbour)
    sound, truth = neighbour.read_bytes(), contents(shard, tmp_path / "none")
    neighbour.unlink()
    for seed in seeds:
        rng, is_cached, cache = np.random.default_rng(seed), seed % 3 == 0, tmp_path / "cache"
        damaged = DAMAGES[seed % len(DAMAGES)](sound, rng)
        path = neighbour
        if is_cached:
            contents(shard, cache)
            (path,) = (cache / "index").glob(f"*{SUFFIX}")
            damaged = DAMAGES[seed % len(DAMAGES)](path.read_bytes(), rng)
            if seed % 2:  # also without the list of what was opened before
                shutil.rmtree(cache / "sets")
        path.write_bytes(damaged)
        assert contents(shard, cache) == truth, seed
        outcome["rebuilt" if not is_cached or path.read_bytes() != damaged else "harmless"] += 1
        neighbour.unlink(missing_ok=True)
        shutil.rmtree(cache, ignore_errors=True)
    return outcome


def test_damaged_indexes_lose_nothing(shard: Path, tmp_path: Path) -> None:
    assert try_damages(shard, tmp_path, range(33)).total() == 33


@pytest.mark.slow
def test_many_damaged_indexes_lose_nothing(shard: Path, tmp_path: Path) -> None:
    assert try_damages(shard, tmp_path, range(100, 2100)).total() == 2000


def test_each_changed_byte_of_an_index_is_noticed(shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.index"
    save_index(index_shard(shard), path)
    sound, whole = path.read_bytes(), load_index(path)
    for at in range(0, len(sound), 7):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        try:
            index = load_index(path)
        except ValueError:
            continue
        assert index.problems == whole.problems  # a byte that means nothing, such as padding
        assert all(np.array_equal(vars(index)[name], array) for name, array in vars(whole).items() if name != "tar")


@pytest.mark.parametrize(
    ("array", "value"), [("size", 2**63), ("first", 2**64 - 1), ("offset", 2**40), ("key_end", 2**32)]
)
def test_numbers_beyond_the_tar_are_refused(shard: Path, tmp_path: Path, array: str, value: int) -> None:
    index = index_shard(shard)
    wrong = getattr(index, array).astype(np.uint64)
    wrong[2] = value
    save_index(dataclasses.replace(index, **{array: wrong}), tmp_path / "wrong.index")
    with pytest.raises(ValueError, match="is a damaged index"):
        load_index(tmp_path / "wrong.index")


@pytest.mark.parametrize("offset", [-512, 2**70])
def test_an_index_with_headers_outside_of_the_tar_is_not_used(shard: Path, tmp_path: Path, offset: int) -> None:
    index = index_shard(shard)
    tar = dataclasses.replace(index.tar, headers=[offset])
    save_index(dataclasses.replace(index, tar=tar), Path(f"{shard}{SUFFIX}"))
    save_index(
        dataclasses.replace(index, tar=tar), ShardCache(RemoteConfig(folder=str(tmp_path))).index_path(str(shard))
    )
    assert len(contents(shard, tmp_path)) == 8
    Path(f"{shard}{SUFFIX}").unlink()


def test_an_index_of_an_older_version_is_read(shard: Path, tmp_path: Path) -> None:
    path = Path(f"{shard}{SUFFIX}")
    index = index_shard(shard)
    header = {"samples": 8, "extensions": index.extensions, "problems": [], "tar": vars(index.tar), "modified": None}
    save_index(index, path)
    path.write_bytes(save(load(path.read_bytes()), {"mmrl-index-1": json.dumps(header)}))
    reader = open_reader(shard, remote=RemoteConfig(folder=str(tmp_path)))
    assert not (tmp_path / "index").exists()
    assert len(reader) == 8
    assert reader.sources[0].shards[0].count_extensions() == {"png": 8, "txt": 8, "json": 8}
    path.unlink()
