"""One encoder in five tools: OpenAI's client, sentence-transformers, transformers, onnxruntime and OpenVINO give the
vectors of mmrl for all hard texts and ten kinds of images."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoders import save_random_encoder
from helpers.server import serving_app
from PIL import Image

import mmrl
from mmrl.export import hard_inputs
from mmrl.export.bundles import export
from mmrl.images.upright import composite, upright
from mmrl.model import bundle

pytestmark = pytest.mark.slow
TEXTS = hard_inputs.texts()[:-4]  # without mojibake, which tokenizer.json cannot repair
IMAGES = hard_inputs.images(32, 32)


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def expected(source: Path) -> tuple[np.ndarray, np.ndarray]:
    encoder = mmrl.load(source)
    return encoder.encode_texts(TEXTS), encoder.encode_images([*IMAGES.values()])


def assert_same(vectors: Any, expected: np.ndarray, atol: float = 2e-5) -> None:
    vectors = np.asarray(vectors, np.float32)
    np.testing.assert_allclose(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), expected, atol=atol)


def prepared(source: Path) -> list[Image.Image]:
    """The images as the model card says to prepare them for tools that only resize, at the tower's size: what a tool
    makes of other sizes is measured by the export."""
    spec = bundle.load(source).image_spec
    pixels = [spec.pixels(composite(upright(image), spec.background)) for image in IMAGES.values()]
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]


@pytest.mark.parametrize("layout", ["onnx", "openvino"])
def test_onnxruntime_and_openvino(
    layout: str, source: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[layout], reason=f"no runtime of {layout}")
    export(str(source), tmp_path / "out", [16], layout)
    encoder = mmrl.load(tmp_path / "out")
    assert_same(encoder.encode_texts(TEXTS), expected[0])
    # encoder.py resizes by Pillow, mmrl by torch: single values of the pixels differ by one of 255 levels.
    assert_same(encoder.encode_images([*IMAGES.values()]), expected[1], atol=2e-4)


@torch.inference_mode()
def test_transformers(source: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    export(str(source), tmp_path / "out", [16], "transformers")
    model: Any = CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor: Any = CLIPProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    assert_same(model.get_text_features(**inputs).pooler_output, expected[0])
    inputs = processor(images=prepared(source), return_tensors="pt")
    assert_same(model.get_image_features(**inputs).pooler_output, expected[1])


def test_sentence_transformers(source: Path, expected: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    export(str(source), tmp_path / "out", [16], "sentence_transformers")
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_same(model.encode(TEXTS), expected[0])
    assert_same(model.encode(prepared(source)), expected[1])


def test_openai(source: Path, expected: tuple[np.ndarray, np.ndarray]) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    from mmrl.search.app import create_app

    urls = []
    for image in IMAGES.values():
        buffer = io.BytesIO()
        image.save(buffer, "TIFF" if image.mode == "CMYK" else "PNG", exif=image.getexif())
        urls.append(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    with (
        serving_app(create_app(mmrl.load(source), ["127.0.0.1"])) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client,
    ):
        answer = client.embeddings.create(model="any", input=TEXTS)
        assert_same([one.embedding for one in answer.data], expected[0])
        answer = client.embeddings.create(model="any", input=urls, extra_body={"modality": "image"})
        assert_same([one.embedding for one in answer.data], expected[1])
