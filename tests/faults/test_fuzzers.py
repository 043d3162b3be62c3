"""Seeded fuzzers of everything that is read from strangers, from the network or from a disk.

An attempt damages something sound and reads it. It is refused with a sentence or does no harm; there are no tracebacks,
no hangs and no silent losses. Each fuzzer must find a fault that is injected into what it tests.
"""

import contextlib
import http.server
import json
import random
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_MODEL, sample_members, write_tar
from helpers.broken_images import BROKEN_METADATA, mutated, noise, saved
from helpers.checkpoints import read_back, save_run
from helpers.encoders import save_random_encoder
from helpers.fuzz import Attempt, damage, fuzz
from helpers.fuzzed_encoders import start_graphs, start_search, vectors_of
from helpers.fuzzed_shards import start_captions, start_tars
from PIL import Image

import mmrl
from mmrl.data import index, index_file, parsing
from mmrl.data.index import index_shard
from mmrl.data.index_file import SUFFIX, save_index
from mmrl.data.samples import SampleReader
from mmrl.data.sources import open_reader
from mmrl.data.stores import RemoteConfig, ShardCache
from mmrl.distributed.coordinator import NONCE_BYTES, Coordinator, hello
from mmrl.engine import checkpoint
from mmrl.errors import InputError
from mmrl.images import decode
from mmrl.images.decode import decode_pixels
from mmrl.images.upright import open_upright, readable_formats
from mmrl.inference import standalone
from mmrl.model import bundle
from mmrl.search import embeddings_api
from mmrl.search import index as search_index

Start = Callable[[Path], Attempt]


# ---------------------------------------------------------------------------------------------------------- pictures


def _start_pictures(_: Path) -> Attempt:
    draw = random.Random(0)
    writable = [kind for kind in readable_formats() if kind in Image.SAVE and kind != "XBM"]
    whole = [saved(noise(), kind) for kind in writable] + [make(draw)[0] for make in BROKEN_METADATA]
    whole += [saved(noise(), kind, save_all=True, append_images=[noise()]) for kind in ("GIF", "WEBP", "PNG", "TIFF")]

    def attempt(draw: random.Random) -> bool:
        if draw.random() < 0.3:  # damaged metadata beside sound pixels
            damaged, sound = draw.choice(BROKEN_METADATA)(draw)
            pixels, want = (Image.fromarray(np.asarray(open_upright(one))) for one in (damaged, sound))
            # The damage may have become a valid orientation.
            return any(pixels == one for one in (want, *map(want.transpose, Image.Transpose)))
        data = draw.choice([mutated, damage])(draw.choice(whole), draw)
        image = open_upright(data)
        pixels_CHW = decode_pixels(data)
        return np.array_equal(np.asarray(image).transpose(2, 0, 1), pixels_CHW.numpy())

    return attempt


# ----------------------------------------------------------------------------------------------------------- indexes


def _start_indexes(folder: Path) -> Attempt:
    shard = write_tar(folder / "set" / "a.tar", [member for number in range(8) for member in sample_members(number)])
    neighbour, cache = Path(f"{shard}{SUFFIX}"), folder / "cache"
    save_index(index_shard(shard), neighbour)
    sound = neighbour.read_bytes()

    remote = RemoteConfig(folder=str(cache))
    want = _contents(open_reader(shard, remote=remote))

    def attempt(draw: random.Random) -> bool:
        shutil.rmtree(cache, ignore_errors=True)
        neighbour.write_bytes(damage(sound, draw))
        return _contents(open_reader(shard, remote=remote)) == want

    return attempt


def _contents(reader: SampleReader) -> list[tuple[str, bytes, list[str]]]:
    return [(one.name, one.image, one.captions) for one in map(reader.read, range(len(reader)))]


# -------------------------------------------------------------------------------------------------------------- HTTP


def _start_http(folder: Path) -> Attempt:
    shard = write_tar(folder / "a.tar", [member for number in range(4) for member in sample_members(number)])
    data, chosen, requests = shard.read_bytes(), random.Random(), iter(range(10**9))
    want = _contents(open_reader(shard))

    class Hostile(http.server.BaseHTTPRequestHandler):
        """Statuses, lengths, ranges and bodies that do not fit each other."""

        def do_GET(self) -> None:
            if not self.path.endswith(".tar"):
                self.send_error(404)
                return
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            body = data[start:]
            body = chosen.choice([body, body, data, body[: len(body) // 2], body + b"x", b"", b"<html>error</html>"])
            self.send_response(chosen.choice([200, 200, 206 if start else 200, 206, 204, 302, 404, 416, 500, 503]))
            lengths = (len(body), len(body), len(data), len(body) // 2, len(body) * 2, -1, "x", None)
            fields: dict[str, object] = {
                "Content-Length": chosen.choice(lengths),
                "Content-Range": chosen.choice(
                    [None, f"bytes {start}-{len(data) - 1}/{len(data)}", "bytes 5-9/10", "x"]
                ),
                "ETag": chosen.choice([None, '"1"', '"1"', f'"{next(requests)}"']),
                "Location": chosen.choice([None, "/a.tar", "file:///etc/passwd"]),
            }
            for name, value in fields.items():
                if value is not None:
                    self.send_header(name, str(value))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            """Logs nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = RemoteConfig(folder=str(folder / "cache"), retries=1, timeout=1)

    def attempt(draw: random.Random) -> bool:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        chosen.seed(draw.random())
        reader = open_reader(f"http://127.0.0.1:{server.server_port}/a.tar", remote=remote)
        # A whole answer with other bytes cannot be known from a sound one; what it lacks is listed.
        return _contents(reader) == want or bool(reader.problems)

    return attempt


# ----------------------------------------------------------------------------------------------------------- bundles


def _start_bundles(folder: Path) -> Attempt:
    (folder / "tiny.json").write_text(json.dumps(TINY_MODEL))
    sound = save_random_encoder(str(folder / "tiny.json"), folder / "sound")
    want = vectors_of(sound)
    shutil.copytree(sound, folder / "damaged")
    files = [path for path in sorted((folder / "damaged").rglob("*")) if path.is_file()]

    def attempt(draw: random.Random) -> bool:
        path = draw.choice(files)
        before = path.read_bytes()
        try:
            path.unlink() if draw.random() < 0.1 else path.write_bytes(damage(before, draw))
            return np.array_equal(vectors_of(folder / "damaged"), want)
        finally:
            path.write_bytes(before)

    return attempt


# ------------------------------------------------------------------------------------------------------- checkpoints


def _start_checkpoints(folder: Path) -> Attempt:
    run = save_run(folder)
    last = run / "checkpoints" / "step-12"
    want = {name: read_back(run / "checkpoints" / name) for name in ("step-8", "step-12")}
    files = [path for path in sorted(last.rglob("*")) if path.is_file()]

    def attempt(draw: random.Random) -> bool:
        path, said = draw.choice(files), list[str]()
        before = path.read_bytes()
        try:
            path.unlink() if draw.random() < 0.1 else path.write_bytes(damage(before, draw))
            found = checkpoint.Checkpoints(run, 3, said.append).last_sound()
            assert found is not None
            if found.name == "step-8":  # which is resumed from
                assert len(said) == 1
                assert "The run resumes from step-8." in said[0]
                raise InputError(said[0])
            return read_back(found) == want["step-12"]
        finally:
            path.write_bytes(before)

    return attempt


# --------------------------------------------------------------------------------------------------------- heartbeat


def _start_heartbeat(_: Path) -> Attempt:
    coordinator = Coordinator(["a", "b"], 3600.0, lambda: {"step": 7, "doing": "training"})
    coordinator.start()

    def attempt(draw: random.Random) -> bool:
        with socket.create_connection(("127.0.0.1", coordinator.port), timeout=10) as stranger:
            nonce = stranger.recv(NONCE_BYTES)
            answer = hello(b"not the key", nonce, draw.randrange(3))
            sent = draw.choice([damage(answer, draw), draw.randbytes(draw.randrange(5000)), b"[" * 3000, answer * 50])
            stranger.sendall(sent)
            if draw.random() < 0.5:
                with contextlib.suppress(OSError):  # it is closed already
                    stranger.shutdown(socket.SHUT_WR)
                    assert not stranger.recv(4096)
        known = [peer for peer in coordinator._peers if peer.connection is not None]
        return coordinator.is_alive() and coordinator._loss is None and not known

    return attempt


# ------------------------------------------------------------------------------------------------------------ server


def _start_server(folder: Path) -> Attempt:
    testclient = pytest.importorskip("starlette.testclient", reason="the extra [serve] is not installed")
    from mmrl.search.app import create_app

    (folder / "tiny.json").write_text(json.dumps(TINY_MODEL))
    encoder = mmrl.load(save_random_encoder(str(folder / "tiny.json"), folder / "sound"), device="cpu")
    client = testclient.TestClient(create_app(encoder, ["*"], "tiny"), raise_server_exceptions=False)
    bodies = [
        {"input": "red shoes"}, {"input": ["a", "b"], "dimensions": 8}, {"input": "a", "encoding_format": "base64"},
        {"input": ["data:image/png;base64,iVBORw0KGgo="], "modality": "image"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    ]  # fmt: skip
    values = [None, -1, 10**30, "", "x" * 20_000, [], [[]], {}, [1, 2], True, 1.5, "\ud800", "\0", "data:;base64,AA"]
    methods, types = ["POST"] * 8 + ["GET", "PUT", "HEAD"], ["application/json"] * 5 + ["text/plain", "", "multipart/"]
    paths = ["/v1/embeddings"] * 8 + ["/v1/models", "/health", "/metrics", "/v1/%00", "/../etc/passwd"]

    def attempt(draw: random.Random) -> bool:
        body = json.loads(json.dumps(draw.choice(bodies)))
        for _ in range(draw.randrange(3)):
            body[draw.choice([*body, "input", "dimensions", "modality", "user", "extra"])] = draw.choice(values)
        data = json.dumps(body).encode()
        data = damage(data, draw) if draw.random() < 0.5 else data
        headers = {"Content-Type": draw.choice(types)}
        response = client.request(draw.choice(methods), draw.choice(paths), content=data, headers=headers)
        if response.status_code >= 500:
            raise RuntimeError(f"status {response.status_code} for {data[:100]!r}")
        if response.status_code == 200:
            return True
        sentence = "" if response.request.method == "HEAD" else _sentence(response.json())
        raise InputError(sentence or "(HEAD has no body)")

    return attempt


def _sentence(answer: dict[str, Any]) -> str:
    return str(answer.get("detail") or answer["error"]["message"])


@dataclass(frozen=True)
class Target:
    """A fuzzer, how often it runs, and a fault that it must find."""

    start: Start
    short: int
    long: int
    fault: tuple[Any, str, Any]
    """(object, attribute, replacement)"""
    refusals: tuple[type[Exception], ...] = (InputError,)
    least_refused: float = 0.2
    """Of the attempts: less would mean that the damage misses what is read."""


def _fails(*_: object) -> Any:
    raise KeyError("injected")


class _Anything:
    """Takes any manifest for sound."""

    @staticmethod
    def model_validate(*_: object, **__: object) -> None:
        """Checks nothing."""


def _other_pixels(*_: object) -> np.ndarray:
    return np.zeros((4, 4, 3), np.uint8)


TARGETS = {
    "pictures": Target(_start_pictures, 600, 10_000, (decode, "_by_simplejpeg", _other_pixels), (ValueError,)),
    "tars": Target(start_tars, 300, 20_000, (index, "_split_name", lambda _: ("", "")), least_refused=0.05),
    "captions": Target(start_captions, 1000, 20_000, (parsing, "parse_json", _fails)),
    "indexes": Target(
        _start_indexes, 60, 2_000, (index_file, "_digest_of_arrays", lambda _: "0" * 32), least_refused=0
    ),
    "HTTP": Target(_start_http, 60, 600, (ShardCache, "discard", _fails)),
    "bundles": Target(_start_bundles, 15, 300, (bundle, "check_files", lambda *_: None)),
    "graphs": Target(
        start_graphs, 15, 2_000, (standalone.Encoder, "_checked_path", lambda one, name: one.folder / name)
    ),
    "search indexes": Target(start_search, 60, 2_000, (search_index, "_Manifest", _Anything)),
    "checkpoints": Target(_start_checkpoints, 30, 600, (checkpoint, "find_damage", lambda _: None)),
    "heartbeat": Target(
        _start_heartbeat, 200, 20_000, (Coordinator, "_authenticate", lambda one, _: one._peers[1]), least_refused=0
    ),
    "server": Target(_start_server, 60, 1_000, (embeddings_api, "parse_inputs", _fails)),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    _check(name, TARGETS[name].short, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_long_run_finds_nothing(name: str, tmp_path: Path) -> None:
    _check(name, TARGETS[name].long, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_an_injected_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS[name]
    monkeypatch.setattr(*target.fault)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert fuzz(target.start(tmp_path), 100, target.refusals, until_found=True).found


def _check(name: str, count: int, folder: Path) -> None:
    target = TARGETS[name]
    counts = fuzz(target.start(folder), count, target.refusals)
    print(counts.row(name))
    assert not counts.found
    assert counts.tried == count
    assert counts.refused >= target.least_refused * count
