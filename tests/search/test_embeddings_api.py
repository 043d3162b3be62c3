"""POST /v1/embeddings of `mmrl serve`, called by OpenAI's own client: embeddings equal those of `mmrl.load`."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import drawing, encoded
from helpers.encoders import prefix
from helpers.indexes import indexed
from helpers.server import serving_app
from PIL import Image

import mmrl
from mmrl.errors import InputError
from mmrl.export import hard_inputs
from mmrl.inference.base import LoadedEncoder
from mmrl.search import embeddings_api
from mmrl.search.query import Searcher
from mmrl.search.serve import _api_key, _open

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

from starlette.testclient import TestClient  # noqa: E402

from mmrl.search.app import create_app  # noqa: E402

__all__ = ["indexed"]

TEXTS = hard_inputs.texts()


def image_files() -> list[bytes]:
    """Images of several formats, sizes and colour modes."""
    images = hard_inputs.images(32, 32).values()
    return [encoded(image, "TIFF" if image.mode == "CMYK" else "PNG") for image in images] + [
        encoded(drawing(2, 300)[0], "JPEG")
    ]


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@contextmanager
def serving(encoder: LoadedEncoder, api_key: str | None = None) -> Iterator[Any]:
    """A client of OpenAI's library, connected to a running server."""
    app = create_app(encoder, ["127.0.0.1"], "tiny", api_key)
    with (
        serving_app(app) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "any", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def encoder(indexed: Path) -> LoadedEncoder:
    return mmrl.load(indexed / "model")


@pytest.fixture(scope="module")
def client(encoder: LoadedEncoder) -> Iterator[Any]:
    with serving(encoder) as client:
        yield client


def vectors(response: Any) -> np.ndarray:
    assert [one.index for one in response.data] == list(range(len(response.data)))
    return np.array([one.embedding for one in response.data], np.float32)


def check_equal(client: Any, encoder: LoadedEncoder) -> None:
    """Texts and images, in every form, have the embeddings of `encoder`."""
    expected = encoder.encode_texts(TEXTS)
    for options in ({}, {"encoding_format": "float"}):  # by default the client asks for base64
        np.testing.assert_allclose(
            vectors(client.embeddings.create(model="x", input=TEXTS, **options)), expected, atol=1e-6
        )
    images = image_files()
    expected = encoder.encode_images(images)
    urls, modality = [data_url(data) for data in images], {"modality": "image"}
    got = client.embeddings.create(model="x", input=urls, extra_body=modality)
    np.testing.assert_allclose(vectors(got), expected, atol=1e-6)
    for data, vector in zip(images, expected, strict=True):
        content = [{"type": "image_url", "image_url": {"url": data_url(data)}}]
        body = {"model": "x", "messages": [{"role": "user", "content": content}]}
        got = client.post("/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=body)
        np.testing.assert_allclose(vectors(got), vector[None], atol=1e-6)


def test_embeddings_equal_those_of_the_encoder(client: Any, encoder: LoadedEncoder) -> None:
    check_equal(client, encoder)
    expected = encoder.encode_texts(["one"])
    np.testing.assert_allclose(vectors(client.embeddings.create(model="x", input="one")), expected, atol=1e-6)
    for content in ("one", [{"type": "text", "text": "one"}]):
        body = {"messages": [{"role": "user", "content": content}], "encoding_format": "float"}
        got = client.post("/embeddings", cast_to=openai.types.CreateEmbeddingResponse, body=body)
        np.testing.assert_allclose(vectors(got), expected, atol=1e-6)


@pytest.mark.slow
def test_embeddings_equal_those_of_an_onnx_export(indexed: Path, tmp_path: Path) -> None:
    from mmrl.export.bundles import export

    pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    export(str(indexed / "model"), tmp_path / "onnx", [8], "onnx")
    encoder = mmrl.load(tmp_path / "onnx")
    with serving(encoder) as client:
        check_equal(client, encoder)


@pytest.mark.parametrize("dim", [16, 8, 5, 1])
def test_any_dim_in_both_formats(client: Any, encoder: LoadedEncoder, dim: int) -> None:
    """4, 8 and 16 are trained."""
    expected = prefix(encoder.encode_texts(TEXTS[:2]), dim)
    for encoding in ("float", "base64"):
        response = client.embeddings.create(
            model="x", input=TEXTS[:2], dimensions=dim, encoding_format=encoding, user="someone"
        )
        found = [one.embedding for one in response.data]
        if encoding == "base64":
            found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (response.object, response.model) == ("list", "tiny")


def test_the_model_is_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.dimensions, model.trained_dimensions) == ("tiny", "model", 16, [4, 8, 16])


# ------------------------------------------------------------------------------------------------ errors

IMAGE = data_url(encoded(drawing(0)[0]))


def message(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": [1, 2, 3]}, "input", "token ids are not accepted"),
        ({"input": [[1, 2], [3]]}, "input", "token ids are not accepted"),
        ({"input": []}, "input", "a list of at least one"),
        ({"input": {"text": "a"}}, "input", "a list of at least one"),
        ({"input": ["a", None]}, "input", "input[1]: want a text"),
        ({}, "input", "give either input or messages"),
        ({"input": "a", **message({"type": "text", "text": "a"})}, "input", "give either input or messages"),
        ({"input": ["a"] * 2049}, "input", "2,049 inputs are more than the 2,048 allowed"),
        ({"input": "x" * 10_001}, "input", "10,001 characters, more than the 10,000"),
        ({"input": "half \ud800"}, "input", "not valid Unicode"),
        ({"input": IMAGE}, "input", "a data URL is no text"),
        ({"input": "a", "dimensions": 17}, "dimensions", "17 is out of range; this embedding has dims 1 to 16"),
        ({"input": "a", "dimensions": 0}, "dimensions", "0 is out of range"),
        ({"input": "a", "dimensions": "8"}, "dimensions", "valid integer"),
        ({"input": "a", "dimensions": True}, "dimensions", "valid integer"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "modality": "audio"}, "modality", "'text' or 'image'"),
        ({"input": "a", "normalize": False}, "normalize", "not permitted"),
        ({"input": ["https://example.com/a.jpg"], "modality": "image"}, "input", "this server fetches no URLs"),
        ({"input": ["file:///etc/passwd"], "modality": "image"}, "input", "this server fetches no URLs"),
        ({"input": [7], "modality": "image"}, "input", "want an image"),
        ({"input": "data:image/png;base64,a_b", "modality": "image"}, "input", "not valid base64"),
        ({"input": [IMAGE, data_url(b"no")], "modality": "image"}, "input", "input[1]: image 2 bytes: no picture"),
        ({"input": [IMAGE] * 33, "modality": "image"}, "input", "33 inputs are more than the 32 allowed"),
        (message({"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "a"}), "messages", "one"),
        (message({"type": "input_audio"}), "messages", "not a part of type 'input_audio'"),
        (message({"type": "image_url"}), "messages", "want an image"),
        (message("a"), "messages", "one text or one image"),
        ({"messages": []}, "messages", "one message"),
        ({"messages": [{}]}, "messages", "one text or one image"),
        ([1], None, "valid dictionary"),
    ],
)
def test_invalid_requests_have_the_error_body_of_openai(
    encoder: LoadedEncoder, body: Any, param: str | None, says: str
) -> None:
    client = TestClient(create_app(encoder, ["*"]))
    response = client.post("/v1/embeddings", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, None)


def test_openais_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="token ids are not accepted") as caught:
        client.embeddings.create(model="x", input=[[1, 2], [3]])
    assert (caught.value.param, caught.value.type) == ("input", "invalid_request_error")
    with pytest.raises(openai.APIStatusError, match="too large; an image may have 16 MB") as too_large:
        client.embeddings.create(model="x", input="x" * (17 << 20))
    assert too_large.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_decompression_bomb_is_refused(encoder: LoadedEncoder) -> None:
    buffer = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(buffer, "PNG")
    body = {"input": data_url(buffer.getvalue()), "modality": "image"}
    response = TestClient(create_app(encoder, ["*"])).post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert "too large a picture: 10000x10000 pixels" in response.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------ batches


class SlowEncoder:
    """Encodes a number as a unit vector in its direction; the first batch waits for `free`."""

    towers, dim, nested_dims = ("image", "text"), 50, (50,)

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.started, self.free = threading.Event(), threading.Event()

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        self.batches.append(len(texts))
        self.started.set()
        assert self.free.wait(20)
        return np.eye(50, dtype=np.float32)[[int(text) for text in texts]]


def test_requests_that_arrive_together_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    slow: Any = SlowEncoder()
    monkeypatch.setattr(embeddings_api, "MAX_WAITING", {"text": 29, "image": 0})
    with serving(slow) as client, ThreadPoolExecutor(30) as pool:
        embed = lambda text: client.embeddings.create(model="x", input=text)  # noqa: E731
        answers = [pool.submit(embed, "0")]
        assert slow.started.wait(20)
        answers += [pool.submit(embed, str(number)) for number in range(1, 30)]
        while "mmrl_waiting_inputs 29" not in client.get("/../metrics", cast_to=str):
            pass
        with pytest.raises(openai.InternalServerError, match="Too many texts wait to be encoded") as full:
            embed("30")
        assert (full.value.status_code, full.value.response.headers["retry-after"]) == (503, "1")
        assert full.value.body["type"] == "server_error"
        slow.free.set()
        found = [np.argmax(vectors(answer.result())[0]) for answer in answers]
    assert found == list(range(30))
    assert slow.batches == [1, 29]


def test_a_bad_input_fails_only_its_own_request(encoder: LoadedEncoder) -> None:
    from mmrl.search.batching import Batcher
    from mmrl.search.metrics import Metrics

    images = image_files()
    metrics = Metrics()
    futures = Batcher(encoder, metrics).submit("image", [images[0], b"no picture", images[1]])
    expected = encoder.encode_images(images[:2])
    np.testing.assert_allclose([futures[0].result(), futures[2].result()], expected, atol=1e-6)
    with pytest.raises(InputError, match="image 10 bytes: no picture in a known format"):
        futures[1].result()
    assert 'mmrl_inputs_total{modality="image"} 3\n' in metrics.text()
    assert 'mmrl_batches_total{modality="image"} 1\n' in metrics.text()


# ------------------------------------------------------------------------------------------------ key, health, metrics


def test_the_api_key_is_required_except_for_health_and_pages(indexed: Path, encoder: LoadedEncoder) -> None:
    with serving(encoder, "the-key") as client:
        assert len(client.embeddings.create(model="x", input="a").data) == 1
        for wrong in ("the-ke", "the-key2"):
            with pytest.raises(openai.AuthenticationError, match="needs its API key") as refused:
                client.with_options(api_key=wrong).embeddings.create(model="x", input="a")
            assert (refused.value.code, refused.value.response.headers["www-authenticate"]) == (
                "invalid_api_key",
                "Bearer",
            )
    searcher = Searcher.open(indexed / "index")
    client = TestClient(create_app(searcher, ["*"], api_key="the-key"))
    for path in ("/", "/docs", "/app.js", "/docs.js", "/style.css", "/icon.svg", "/health", "/openapi.json"):
        assert client.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/api/index", "/api/thumbnails/0", "/nothing", "/health/", "/app.js/"):
        assert client.get(path).status_code == 401
        for wrong in (b"", b"Bearer", b"Bearer ", b"the-key", b"Basic the-key", b"Bearer the-key\xe9"):
            assert client.get(path, headers={b"Authorization": wrong}).status_code == 401
        assert client.get(path, headers={"Authorization": "Bearer the-key"}).status_code in (200, 404)
    assert client.post("/api/search/text", json={"text": "a"}).json()["detail"].startswith("This server needs its API")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])  # noqa: S104
def test_an_address_that_others_reach_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for unset in ("", None):
        monkeypatch.setenv("MMRL_API_KEY", unset) if unset is not None else monkeypatch.delenv("MMRL_API_KEY")
        with pytest.raises(
            InputError, match=r"host: other machines can reach .*MMRL_API_KEY.* or serve on 127\.0\.0\.1"
        ):
            _api_key(host)
        assert [_api_key(loopback) for loopback in ("127.0.0.1", "::1", "localhost")] == [None] * 3
    monkeypatch.setenv("MMRL_API_KEY", "secret")
    assert _api_key(host) == _api_key("127.0.0.1") == "secret"
    for bad in ("two words", "clé", "line\n"):
        monkeypatch.setenv("MMRL_API_KEY", bad)
        with pytest.raises(InputError, match="must be printable ASCII"):
            _api_key(host)


def test_metrics_and_health(encoder: LoadedEncoder) -> None:
    client = TestClient(create_app(encoder, ["*"]))
    assert client.get("/health").json() == {"status": "ok"}
    client.post("/v1/embeddings", json={"input": ["a", "b"]})
    client.post("/v1/embeddings", json={"input": []})
    client.get("/no/such/path")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['mmrl_requests_total{path="/v1/embeddings",status="200"}'] == "1"
    assert values['mmrl_requests_total{path="/v1/embeddings",status="400"}'] == "1"
    assert values['mmrl_requests_total{path="other",status="404"}'] == "1"
    assert values['mmrl_inputs_total{modality="text"}'] == "2"
    assert values["mmrl_waiting_inputs"] == "0"
    counts = [
        float(values[f'mmrl_request_seconds_bucket{{path="/v1/embeddings",le="{le}"}}']) for le in ("30.0", "+Inf")
    ]
    assert counts == [2, 2] == [float(values['mmrl_request_seconds_count{path="/v1/embeddings"}'])] * 2
    assert float(values['mmrl_request_seconds_sum{path="/v1/embeddings"}']) > 0
    assert "# TYPE mmrl_request_seconds histogram" in lines


# ------------------------------------------------------------------------------------------------ index or model


def test_an_index_is_served_with_its_page_and_a_model_without(indexed: Path, encoder: LoadedEncoder) -> None:
    searcher = _open(str(indexed / "index"), None)
    assert isinstance(searcher, Searcher)
    with_page = TestClient(create_app(searcher, ["*"]))
    assert "Describe an image" in with_page.get("/").text
    embedding = with_page.post("/v1/embeddings", json={"input": "a red square"}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(embedding, encoder.encode_texts(["a red square"])[0], atol=1e-6)
    alone = _open(str(indexed / "model"), None)
    assert isinstance(alone, LoadedEncoder)
    without = TestClient(create_app(alone, ["*"]))
    assert "API reference" in without.get("/").text
    assert without.get("/api/index").status_code == 404
    for source, model, says in (
        (str(indexed), None, "is not an index, and not an encoder that can be served: model: .*neither a run folder"),
        (str(indexed / "model"), "x", "model: --model is the encoder of an index"),
    ):
        with pytest.raises(InputError, match=says):
            _open(source, model)
