"""Random tars and captions: no crash, no hang, and every sample is read, or counted as bad with its reason."""

import json
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing, encoded

from mmrl.data.check.shard import NOT_INDEXED, CheckOptions, check_shard
from mmrl.data.index import NotATar, index_shard
from mmrl.data.samples import SAMPLE_ERRORS, FieldsConfig, parse, reason_of
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.data.texts import clean_captions

IMAGE = encoded(drawing(0, 8)[0])
NAMES = (
    "a",
    "b",
    "Nr. 1",
    "Nr. 2",
    "caf\udce9",
    "日本",
    ".hidden",
    "dir/a",
    "a b",
    "../up",
    "x" * 120,
    "",
    "a.b.c",
    "\x1b[2J",
)
EXTENSIONS = ("png", "PNG", "txt", "json", "cls", "", "seg.png", "jpg", "npy")
CAPTIONS: tuple[bytes, ...] = (
    b"a caption", b"", b" \n", b"\xff\xfea\0", b"caf\xe9", b"\xef\xbb\xbfx", "\u200b".encode(), b"\0", b"x" * 5000,
    "\U0001f600".encode(),
)  # fmt: skip
METADATA: tuple[bytes, ...] = (
    b"{}", b"[]", b"{", b'{"captions": ["a", 5, null, ["b"], {}, "\\ud800"]}', b'{"captions": NaN, "group": NaN}',
    b'{"group": [1]}', b'{"captions": 1e999}', b"[" * 5000, b'{"Captions": "x"}', b"\xff\xfe{\0}\0", b"1" * 5000, b"",
)  # fmt: skip


def _pick(rng: np.random.Generator, choices: tuple) -> object:
    return choices[int(rng.integers(len(choices)))]


def _members(rng: np.random.Generator) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for _ in range(int(rng.integers(1, 12))):
        extension = str(_pick(rng, EXTENSIONS))
        info = tarfile.TarInfo(f"{_pick(rng, NAMES)}.{extension}")
        content = (
            METADATA if extension == "json" else CAPTIONS if extension in ("txt", "cls") else (IMAGE, IMAGE, b"", b"x")
        )
        data = _pick(rng, content)
        assert isinstance(data, bytes)
        info.type = bytes(_pick(rng, (tarfile.REGTYPE,) * 12 + (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)))  # type: ignore[arg-type]
        info.linkname = str(_pick(rng, NAMES))
        info.size = len(data) if info.type == tarfile.REGTYPE else 0
        yield info, data if info.size else b""


def _tar(rng: np.random.Generator) -> bytes:
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    chosen, blocks = formats[int(rng.integers(3))], bytearray()
    for info, data in _members(rng):
        try:
            blocks += info.tobuf(chosen, "utf-8", "surrogateescape")
        except ValueError:  # a name too long for the format
            continue
        blocks += data + bytes(-len(data) % 512)
    return bytes(blocks + bytes(1024))


def _damaged(rng: np.random.Generator, data: bytes) -> bytes:
    damaged = bytearray(data[: int(rng.integers(len(data)))] if rng.random() < 0.3 else data)
    for _ in range(int(rng.integers(4)) if damaged else 0):
        damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
    return bytes(damaged)


def _read(path: Path, members: dict[str, tuple[int, int]], extension: str) -> bytes:
    offset, size = members[extension]
    return path.read_bytes()[offset : offset + size]


def _fuzz_tars(folder: Path, count: int) -> None:
    options = CheckOptions(ShardCache(RemoteConfig(folder=str(folder / "cache"))), True, None, False)
    fields, path = FieldsConfig(), folder / "a.tar"
    for seed in range(count):
        rng = np.random.default_rng(seed)
        data = _tar(rng)
        path.write_bytes(_damaged(rng, data) if seed % 2 else data)
        facts = check_shard(str(path), fields, options)
        for problem in facts.problems:
            "".join((problem.shard, problem.key, problem.reason)).encode()
        try:
            index = index_shard(path)
        except NotATar:
            assert not facts.usable
            continue
        # A sample is usable, or one problem has its key and a reason; the count agrees.
        usable, untold, told = 0, set(), {(problem.key, problem.reason) for problem in facts.problems}
        for row in range(len(index)):
            members = index.members(row)
            try:
                parsed = parse(fields, members, partial(_read, path, members))
            except SAMPLE_ERRORS as error:
                untold |= {(index.key(row), reason_of(error))} - told
            else:
                assert parsed.captions
                usable += parsed.image == IMAGE
        assert not untold
        outside = sum(facts.tally.bad[kind] for kind in NOT_INDEXED)
        assert facts.tally.bad.total() == len(index) - usable + outside
        # Every member of a whole tar is read, or belongs to a sample or a key that is told.
        if not seed % 2:
            listed = {problem.key.split(".")[0] for problem in facts.problems}
            kept = {index.key(row) for row in range(len(index))}
            with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
                for member in tar:
                    key = member.name.rpartition("/")[2].partition(".")[0]
                    if member.isfile() and key:
                        shown = key.encode(errors="surrogateescape").decode(errors="backslashreplace")
                        assert any(one.endswith(shown) for one in kept | listed)


def _fuzz_captions(count: int) -> None:
    rng = np.random.default_rng(0)
    fields, kinds = FieldsConfig(), set()
    for _ in range(count):
        members: dict[str, bytes] = {"png": IMAGE}
        text = bytes(rng.integers(256, size=int(rng.integers(12))).astype(np.uint8)) if rng.random() < 0.5 else b""
        members["txt"] = text or bytes(_pick(rng, CAPTIONS))  # type: ignore[arg-type]
        if rng.random() < 0.7:
            value = json.dumps({"captions": [chr(int(code)) for code in rng.integers(0x11000, size=3)]})
            members["json"] = bytes(_pick(rng, (*METADATA, value.encode(), value[:-1].encode())))  # type: ignore[arg-type]
        try:
            parsed = parse(fields, members, members.__getitem__)
        except SAMPLE_ERRORS as error:
            kinds.add(reason_of(error).partition(":")[0])
        else:
            assert parsed.captions == clean_captions(parsed.captions) != []
            assert "\0" not in parsed.captions[0][:1] + parsed.captions[0][-1:]
    assert kinds == {"text not UTF-8", "metadata not JSON", "only empty captions"}


def test_fuzzed_tars(tmp_path: Path) -> None:
    _fuzz_tars(tmp_path, 400)


def test_fuzzed_captions() -> None:
    _fuzz_captions(1000)


@pytest.mark.slow
def test_many_fuzzed_tars(tmp_path: Path) -> None:
    _fuzz_tars(tmp_path, 20_000)


@pytest.mark.slow
def test_many_fuzzed_captions() -> None:
    _fuzz_captions(20_000)
