"""Random tars and captions, for fuzzers: every sample is read, or counted as bad with its reason."""

import json
import random
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from conftest import drawing, encoded

from helpers.fuzz import Attempt, damage
from mmrl.data.check.shard import NOT_INDEXED, CheckOptions, check_shard
from mmrl.data.index import NotATar, Problem, index_shard
from mmrl.data.samples import SAMPLE_ERRORS, FieldsConfig, parse, reason_of
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.data.texts import clean_captions
from mmrl.errors import InputError

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


def start_tars(folder: Path) -> Attempt:
    """Random tars, half of them damaged."""
    options = CheckOptions(ShardCache(RemoteConfig(folder=str(folder / "cache"))), True, None, False)
    fields, path = FieldsConfig(), folder / "a.tar"

    def attempt(draw: random.Random) -> bool:
        rng = np.random.default_rng(draw.getrandbits(32))
        data, is_whole = _tar(rng), draw.random() < 0.5
        path.write_bytes(data if is_whole else draw.choice([_damaged(rng, data), damage(data, draw)]))
        facts = check_shard((str(path), fields), options)
        for problem in facts.problems:
            "".join((problem.shard, problem.key, problem.reason)).encode()
        try:
            index = index_shard(path)
        except NotATar as error:
            assert not facts.usable
            raise InputError(str(error)) from error
        # A sample is usable, or one problem has its key and a reason; the count agrees.
        usable, unlisted, listed = 0, set(), {(problem.key, problem.reason) for problem in facts.problems}
        for row in range(len(index)):
            members = index.members(row)
            try:
                parsed = parse(fields, members, partial(_read, path, members))
            except SAMPLE_ERRORS as error:
                unlisted |= {(index.key(row), reason_of(error))} - listed
            else:
                assert parsed.captions
                usable += parsed.image == IMAGE
        assert not unlisted
        outside = sum(facts.tally.bad[kind] for kind in NOT_INDEXED)
        assert facts.tally.bad.total() == len(index) - usable + outside
        if is_whole:
            _check_all_members(path, {index.key(row) for row in range(len(index))}, facts.problems)
        return True

    return attempt


def _check_all_members(path: Path, kept: set[str], problems: Iterable[Problem]) -> None:
    """Every member of a whole tar is read, or belongs to a sample or a key that is listed."""
    kept |= {problem.key.split(".")[0] for problem in problems}
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            key = member.name.rpartition("/")[2].partition(".")[0]
            if member.isfile() and key:
                shown = key.encode(errors="surrogateescape").decode(errors="backslashreplace")
                assert any(one.endswith(shown) for one in kept)


def start_captions(_: Path) -> Attempt:
    """Random captions and JSON of a sample."""
    fields = FieldsConfig()

    def attempt(draw: random.Random) -> bool:
        members: dict[str, bytes] = {"png": IMAGE}
        text = draw.randbytes(draw.randrange(12)) if draw.random() < 0.5 else b""
        members["txt"] = text or draw.choice(CAPTIONS)
        if draw.random() < 0.7:
            value = json.dumps({"captions": [chr(draw.randrange(0x11000)) for _ in range(3)]})
            members["json"] = draw.choice([*METADATA, value.encode(), value[:-1].encode()])
        try:
            parsed = parse(fields, members, members.__getitem__)
        except SAMPLE_ERRORS as error:
            kind = reason_of(error)
            assert kind.partition(":")[0] in ("text not UTF-8", "metadata not JSON", "only empty captions")
            raise InputError(kind) from error
        captions = parsed.captions
        return captions == clean_captions(captions) != [] and "\0" not in captions[0][:1] + captions[0][-1:]

    return attempt
