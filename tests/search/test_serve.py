"""The JSON API of `mmrl serve`: responses equal `mmrl search`, invalid and oversized requests get an error."""

import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import drawing, encoded
from helpers.indexes import COUNT, indexed
from helpers.slow_images import of_scans
from PIL import Image

from mmrl.errors import InputError
from mmrl.search import app as app_module
from mmrl.search import serve as serve_module
from mmrl.search.build import compact_index, delete_from_index, write_index
from mmrl.search.query import Searcher, search_index
from mmrl.search.serve import make_server, serve

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
from starlette.testclient import TestClient

__all__ = ["indexed"]


@pytest.fixture(scope="module")
def client(indexed: Path) -> Iterator[TestClient]:
    searcher = Searcher.open(indexed / "index")
    app = app_module.create_app(searcher, hosts=["127.0.0.1", "localhost"])
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


def test_text_search_equals_the_command(client: TestClient, indexed: Path) -> None:
    expected = search_index(indexed / "index", "a red square", dim=8, k=7, quiet=True)["results"]
    answer = client.post("/api/search/text", json={"text": "a red square", "dim": 8, "k": 7}).json()
    assert (answer["dim"], answer["bytes_per_vector"]) == (8, 32)
    assert [one["key"] for one in answer["results"]] == [one["key"] for one in expected]
    np.testing.assert_allclose(
        [one["score"] for one in answer["results"]], [one["score"] for one in expected], atol=1e-6
    )
    assert answer["milliseconds"]["search"] > 0
    # The same text at another dim is not encoded again.
    again = client.post("/api/search/text", json={"text": "a red square", "dim": 4}).json()
    assert again["milliseconds"]["encode"] == 0
    assert len(again["results"]) == 24


def test_an_uploaded_image_finds_itself(client: TestClient) -> None:
    data = encoded(drawing(7)[0])
    answer = client.post("/api/search/image", files={"picture": data}, data={"k": "3", "dim": "16"}).json()
    assert len(answer["results"]) == 3
    assert answer["results"][0]["key"] == "images.tar/00007"
    assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-5)
    by_row = client.post("/api/search/item", json={"row": answer["results"][0]["row"], "k": 3}).json()
    assert [one["key"] for one in by_row["results"]] == [one["key"] for one in answer["results"]]


def test_groups_are_listed_and_filter_the_search(client: TestClient) -> None:
    facts = client.get("/api/index").json()
    assert (facts["count"], facts["dim"], facts["dims"]) == (COUNT + 1, 16, [4, 8, 16])
    assert {"name": "green square", "count": 2} in facts["groups"]
    assert client.get("/api/groups", params={"containing": "Green"}).json() == [
        {"name": f"green {shape}", "count": 2} for shape in ("corner", "square", "stripe")
    ]
    answer = client.post("/api/search/text", json={"text": "x", "group": "green square"}).json()
    assert {one["group_name"] for one in answer["results"]} == {"green square"}
    assert len(answer["results"]) == 2
    some = client.get("/api/sample", params={"k": 5, "group": "green square"}).json()
    assert sorted(one["key"] for one in some) == ["images.tar/00001", "images.tar/00013"]


def test_thumbnails(client: TestClient) -> None:
    found = client.post("/api/search/text", json={"text": "x", "k": 1}).json()["results"][0]
    answer = client.get(found["thumbnail"])
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).format == "WEBP"
    for row in (-1, COUNT + 1, 10**30):
        assert client.get(f"/api/thumbnails/{row}").status_code in (404, 422)
    for path in ("..%2f..%2fmanifest.json", "a", "/etc/passwd"):
        assert client.get(f"/api/thumbnails/{path}").status_code in (404, 422)


def test_a_running_server_shows_the_index_as_it_is(indexed: Path, tmp_path: Path) -> None:
    index = tmp_path / "i"
    write_index(indexed / "embeddings", index, quiet=True)
    client = TestClient(app_module.create_app(Searcher.open(index, str(indexed / "model")), ["*"]))

    def keys() -> list[str]:
        return [one["key"] for one in client.post("/api/search/text", json={"text": "x", "k": 100}).json()["results"]]

    first = keys()
    assert (len(first), client.get("/api/thumbnails/0").status_code) == (COUNT + 1, 200)
    groups = {one["name"]: one["count"] for one in client.get("/api/groups").json()}
    delete_from_index(index, ["images.tar/00000"], quiet=True)
    assert {one["name"]: one["count"] for one in client.get("/api/groups").json()} == {
        name: count - (name == "red square") for name, count in groups.items()
    }
    assert keys() == [key for key in first if key != "images.tar/00000"]
    assert client.get("/api/thumbnails/0").status_code == 404
    assert client.post("/api/search/item", json={"row": 0}).status_code == 404
    assert client.get("/api/index").json()["count"] == COUNT
    compact_index(index, quiet=True)
    assert keys() == [key for key in first if key != "images.tar/00000"]
    assert client.get("/api/sample").json()[0]["thumbnail"].endswith("?of=data-2")
    manifest = json.loads((index / "manifest.json").read_text())
    (index / "manifest.json").write_text("half of")  # while it is replaced, the index that is open is served
    assert len(keys()) == COUNT
    manifest["encoder"]["origin_sha256"] = "0" * 64
    (index / "manifest.json").write_text(json.dumps(manifest))
    answer = client.post("/api/search/text", json={"text": "x"})
    assert (answer.status_code, answer.json()["detail"]) == (
        503,
        "The index was rebuilt with another encoder; restart the server.",
    )


# ------------------------------------------------------------------------------------------------ page and docs


def test_the_page_makes_no_external_requests(client: TestClient) -> None:
    for path in ("/", "/docs", "/app.js", "/style.css", "/docs.js", "/icon.svg"):
        answer = client.get(path)
        assert answer.status_code == 200
        # The SVG namespace is an identifier, not a URL that is fetched.
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/../index.py", "/%2e%2e/index.py", "/page/app.js", "/manifest.json", "/static"):
        assert client.get(path).status_code == 404


def test_every_operation_of_the_api_is_described(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    operations = {path: next(iter(methods.values())) for path, methods in described["paths"].items()}
    assert set(operations) == {
        *("/api/index", "/api/groups", "/api/sample", "/api/thumbnails/{row}"),
        *("/api/search/text", "/api/search/image", "/api/search/item"),
        *("/v1/embeddings", "/v1/models", "/health", "/metrics"),
    }
    assert all(operation["description"] for operation in operations.values())


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("path", "request_", "status", "message"),
    [
        (
            "text",
            {"json": {"text": "x" * 100_000}},
            422,
            "100,000 characters, more than the 10,000 allowed; shorten",
        ),
        ("text", {"json": {"text": "   "}}, 422, "query: give a text"),
        ("text", {"json": {"text": "x", "k": 1000}}, 422, "k: Input should be less than or equal to 100"),
        ("text", {"json": {"text": "x", "group": "nobody"}}, 422, "group: no image has the group 'nobody'"),
        ("text", {"json": {}}, 422, "text: Field required"),
        ("text", {"json": ["x"]}, 422, "body: Input should be a valid dictionary"),
        ("text", {"content": b'{"text": "\\ud800"}'}, 422, "nicode"),
        ("text", {"content": b"{"}, 422, "body: JSON decode error"),
        ("text", {"content": b"\xff\xfe"}, 422, "body: "),
        ("image", {"files": {"picture": b"no picture"}}, 422, "no picture in a known format"),
        ("image", {"files": {"picture": b""}}, 422, "no picture in a known format"),
        ("image", {"data": {"picture": "/etc/passwd"}}, 422, "picture: "),
        ("image", {"files": {"picture": encoded(drawing(0)[0])[:200]}}, 422, "damaged picture"),
        ("image", {"files": {"picture": b"x" * (17 << 20)}}, 413, "The request is too large; an image may have 16 MB"),
        ("item", {"json": {"row": 99}}, 404, "row: no image has row 99"),
    ],
)
def test_invalid_requests_get_a_one_sentence_error(
    client: TestClient, path: str, request_: dict[str, Any], status: int, message: str
) -> None:
    headers = {"Content-Type": "application/json"} if "content" in request_ else {}
    answer = client.post(f"/api/search/{path}", headers=headers, **request_)
    assert answer.status_code == status
    detail = answer.json()["detail"]
    assert message in detail
    assert "\n" not in detail


def test_a_decompression_bomb_is_refused(client: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(buffer, "PNG")
    answer = client.post("/api/search/image", files={"picture": buffer.getvalue()})
    assert answer.status_code == 422
    assert "too large a picture: 10000x10000 pixels" in answer.json()["detail"]
    answer = client.post("/api/search/image", files={"picture": of_scans(3600)})
    assert answer.status_code == 422
    assert "too slow a picture: more than 100 scans" in answer.json()["detail"]


def test_a_body_without_content_length_is_limited(client: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b"x" * 65_536

    answer = client.post("/api/search/text", content=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_an_unknown_host_header_is_refused(client: TestClient) -> None:
    assert client.get("/api/index", headers={"Host": "elsewhere.example"}).status_code == 400


def test_slow_searches_time_out_and_a_full_queue_is_refused(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "_SEARCH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(app_module, "_MAX_CONCURRENT", 1)
    monkeypatch.setattr(app_module, "_MAX_QUEUED", 0)
    searcher, free = Searcher.open(indexed / "index"), threading.Event()
    ones = np.ones((1, 16), np.float32)
    monkeypatch.setattr(searcher.encoder, "encode_texts", lambda _: ones if free.wait(20) else None)
    with TestClient(app_module.create_app(searcher, ["*"])) as client:
        slow = client.post("/api/search/text", json={"text": "a"})
        assert (slow.status_code, slow.json()["detail"]) == (504, "The search took more than 0.2 seconds.")
        # Its thread still runs and counts as pending.
        busy = client.post("/api/search/text", json={"text": "b"})
        assert (busy.status_code, busy.json()["detail"][:26]) == (503, "Too many searches at once;")
        free.set()
        deadline = time.monotonic() + 20
        while (answer := client.post("/api/search/text", json={"text": "c"})).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert answer.status_code in (200, 504)


class _FileOfOthers(logging.Handler):
    is_closed = False

    def close(self) -> None:
        self.is_closed = True
        super().close()


def test_the_server_closes_no_log_handlers_of_others() -> None:
    others = _FileOfOthers()
    make_server(None)
    assert not others.is_closed


def test_a_port_in_use_is_reported(indexed: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port: cannot listen on 127.0.0.1:{port} .*in use"):
            serve(str(indexed / "index"), port=port)
    with pytest.raises(InputError, match="is not an index"):
        serve(str(indexed), port=0)


def test_an_ipv6_address_is_printed_in_brackets(
    indexed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_module, "open_listener", lambda _host, _port: socket.socket())  # IPv6 or not
    monkeypatch.setattr(serve_module, "make_server", lambda _: SimpleNamespace(run=lambda sockets: None))
    serve(str(indexed / "index"), host="::1")
    assert " at http://[::1]:0 (API: http://[::1]:0/docs)." in capsys.readouterr().out
