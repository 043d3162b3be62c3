"""Each format, opened by the tool that it is for: its embeddings equal the prefix of the source's."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_MODEL, drawing, encoded
from helpers.encoders import IMAGES, TEXTS, export_bundle, prefix, save_random_encoder
from helpers.graphs import save_graph_encoder
from PIL import Image

import mmrl
from mmrl.errors import InputError, RunStopped
from mmrl.export import bundles, contract, hard_inputs, onnx_graphs
from mmrl.export.card import summary
from mmrl.export.formats import base
from mmrl.model import bundle
from mmrl.model.manifest import read_manifest, write_manifest
from mmrl.model.registry import build_tokenizer

PAGE = Path(__file__).parent / "clip.mjs"


@pytest.fixture(scope="module")
def source(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_encoder(str(tiny_model), tmp_path_factory.mktemp("source"), per_dim=True)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, np.ndarray]:
    """The source's embeddings at the full dim."""
    whole = mmrl.load(source)
    return {"images": whole.encode_images(IMAGES), "texts": whole.encode_texts(TEXTS)}


@pytest.fixture(scope="module")
def graphs(source: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX export of dim 8 with all variants and their recall."""
    out = tmp_path_factory.mktemp("graphs") / "online"
    bundles.export(str(source), out, [8], "onnx", quantize=["fp16", "int8"], measure_shards=str(shards))
    return out


def assert_prefix(vectors: Any, full: np.ndarray, dim: int, atol: float = 1e-5) -> None:
    """Asserts that `vectors`, of any length, have the directions of the source's prefix."""
    array = np.asarray(vectors)
    assert array.shape == (3, dim)
    np.testing.assert_allclose(prefix(array, dim), prefix(full, dim), atol=atol)


def assert_mmrl_loads(folder: Path, expected: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    again = mmrl.load(folder)
    assert again.nested_dims == (4, 8)
    assert_prefix(again.encode_images(IMAGES), expected["images"], 8, atol)
    assert_prefix(again.encode_texts(TEXTS), expected["texts"], 8, atol)


MOJIBAKE = 4  # the last of the hard texts, which tokenizer.json cannot repair


def assert_token_ids(source: Path, rows: list[list[int]], count: int = 200) -> None:
    """Asserts that the first `count` hard texts have the token ids of training; `rows` are padded with 0 or not."""
    expected = bundle.load(source).tokenise(hard_inputs.texts()[:count]).tolist()
    assert [row + [0] * (12 - len(row)) for row in rows] == expected


def scale_of_8(source: Path) -> float:
    """The log logit scale of dim 8, of those of 4, 8 and 16."""
    return bundle.load(source).model.log_logit_scale[1].item()


@torch.inference_mode()
def test_unmodified_open_clip_opens_the_folder(source: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    bundles.export(str(source), tmp_path / "out", [8], "open_clip")
    model: Any
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert model.eval().visual.proj.shape == (32, 8)
    assert model.logit_scale.item() == scale_of_8(source)
    transform: Any = preprocess
    # The first image has the tower's size; the others are resized by Pillow, with differences of up to two levels.
    assert_prefix(
        model.encode_image(torch.stack([transform(image) for image in IMAGES])), expected["images"], 8, atol=0.05
    )
    np.testing.assert_allclose(
        F.normalize(model.encode_image(transform(IMAGES[0])[None]), dim=1), prefix(expected["images"][:1], 8), atol=1e-6
    )
    assert_prefix(model.encode_text(tokenizer(TEXTS)), expected["texts"], 8, atol=1e-6)
    assert_token_ids(source, tokenizer(hard_inputs.texts()).tolist())
    assert_mmrl_loads(tmp_path / "out", expected, atol=1e-6)
    # Files have the mode of any new file.
    (tmp_path / "new").touch()
    assert (
        len({path.stat().st_mode for path in (tmp_path / "out").glob("*.*")} | {(tmp_path / "new").stat().st_mode}) == 1
    )


@torch.inference_mode()
def test_clip_model_and_its_processor_open_the_folder(
    source: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

    bundles.export(str(source), tmp_path / "out", [8], "transformers")
    model: Any = CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor: Any = CLIPProcessor.from_pretrained(tmp_path / "out")
    assert model.visual_projection.weight.shape == (8, 32)
    assert model.logit_scale.item() == scale_of_8(source)
    assert model.config.logit_scale_init_value == scale_of_8(source)
    assert (model.config.is_matryoshka, model.config.matryoshka_dimensions) == (True, [8, 4])  # what vLLM reads
    assert model.config.embedding_size == 8
    texts = processor(text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    assert_prefix(model.get_text_features(**texts).pooler_output, expected["texts"], 8)
    images = processor(images=IMAGES, return_tensors="pt")
    assert_prefix(model.get_image_features(**images).pooler_output, expected["images"], 8, atol=0.05)
    long = processor(text=["word " * 50], return_tensors="pt", padding=True, truncation=True)
    assert long["input_ids"].shape == (1, 12)
    hard = hard_inputs.texts()[:-MOJIBAKE]
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert_token_ids(source, tokenizer(hard, truncation=True)["input_ids"], len(hard))
    manifest = read_manifest(tmp_path / "out")
    reported = manifest["contract"]["hard_texts"]
    assert reported["tokenised_differently"] == hard_inputs.texts()[-MOJIBAKE:]
    inputs = processor(text=[reported["worst"]], return_tensors="pt", truncation=True)
    vector = prefix(model.get_text_features(**inputs).pooler_output.numpy(), 8)
    own = mmrl.load(source, dim=8).encode_texts([reported["worst"]])
    assert 1 - (vector * own).sum() == pytest.approx(reported["worst_cosine_error"], abs=1e-5)
    assert reported["worst_cosine_error"] > 1e-3
    worst = f"texts: training's token ids for 196 of 200 difficult texts, cosine error up to {reported['worst_cosine_error']:.0e}"  # noqa: E501
    assert worst in summary(tmp_path / "out", manifest)
    assert worst[6:] in (tmp_path / "out" / "README.md").read_text()
    assert_mmrl_loads(tmp_path / "out", expected)


def test_sentence_transformers_opens_the_folder_at_shorter_dims_too(
    source: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    bundles.export(str(source), tmp_path / "out", [8], "sentence_transformers")
    for dim in (8, 4):
        model: Any = SentenceTransformer(str(tmp_path / "out"), truncate_dim=dim, device="cpu")
        assert model.get_embedding_dimension() == dim
        assert_prefix(model.encode(TEXTS), expected["texts"], dim)
        assert_prefix(model.encode(IMAGES), expected["images"], dim, atol=0.05)
        np.testing.assert_allclose(np.linalg.norm(model.encode(TEXTS, normalize_embeddings=True), axis=1), 1, atol=1e-6)
    hard = hard_inputs.texts()[:-MOJIBAKE]
    np.testing.assert_allclose(
        model.encode(hard, normalize_embeddings=True), mmrl.load(source, dim=4).encode_texts(hard), atol=1e-5
    )
    assert_mmrl_loads(tmp_path / "out", expected)


_OLDEST = """
import sys, numpy, sentence_transformers
assert sentence_transformers.__version__ == sys.argv[1], sentence_transformers.__version__
model = sentence_transformers.SentenceTransformer(sys.argv[2], device="cpu")
numpy.save(sys.argv[3], model.encode(["a red square", "green stripes", "x"]))
"""


@pytest.mark.slow
def test_the_oldest_sentence_transformers_opens_the_folder(
    source: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    oldest = extras["sentence-transformers"][0].partition(">=")[2] + ".0"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(tmp_path)]
    found = subprocess.run([*command, f"sentence-transformers=={oldest}"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"pip cannot download sentence-transformers {oldest}: {found.stderr.splitlines()[-1:]}")
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path / "site", "zip")
    bundles.export(str(source), tmp_path / "out", [8], "sentence_transformers")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    arguments = [oldest, str(tmp_path / "out"), str(tmp_path / "vectors.npy")]
    subprocess.run([sys.executable, "-c", _OLDEST, *arguments], check=True, env=environment)
    assert_prefix(np.load(tmp_path / "vectors.npy"), expected["texts"], 8)


def test_sentence_transformers_has_a_route_per_modality_for_a_hugging_face_text_tower(
    hf_model: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    source = save_random_encoder(str(hf_model), tmp_path / "source")
    bundles.export(str(source), tmp_path / "out", [8], "sentence_transformers")
    ours, loaded = mmrl.load(source, dim=8), mmrl.load(tmp_path / "out")
    hard = [*TEXTS, *hard_inputs.texts()[:-MOJIBAKE]]
    model: Any = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    vectors = model.encode(hard, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, ours.encode_texts(hard), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_texts(hard), ours.encode_texts(hard), atol=1e-5)
    images = model.encode(IMAGES, normalize_embeddings=True)
    np.testing.assert_allclose(images[:1], ours.encode_images(IMAGES[:1]), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_images(IMAGES), ours.encode_images(IMAGES), atol=1e-5)


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["mmrl"] = None
sys.path.insert(0, sys.argv[1])
import numpy, PIL.Image
from encoder import Encoder
encoder = Encoder(sys.argv[1], variant="fp32")
pictures = [PIL.Image.open(path) for path in sys.argv[3:]]
numpy.savez(sys.argv[2], images=encoder.encode_images(pictures), texts=encoder.encode_texts(["a red square", "green stripes", "x"]),
            alone=encoder.encode_texts(["x"]), paths=encoder.encode_images(sys.argv[3:]))
assert not {name.partition(".")[0] for name in sys.modules} & {"open_clip", "transformers", "torchvision", "deepspeed"}
"""  # noqa: E501


def test_graphs_run_where_torch_cannot_be_imported(
    graphs: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, name in zip(IMAGES, names, strict=True):
        image.save(name)
    subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(graphs), str(tmp_path / "vectors.npz"), *names], check=True
    )
    found = np.load(tmp_path / "vectors.npz")
    assert_prefix(found["texts"], expected["texts"], 8)
    assert_prefix(found["images"], expected["images"], 8, atol=0.05)
    np.testing.assert_array_equal(found["paths"], found["images"])
    # Alone it is not padded to the longest text of the batch.
    np.testing.assert_allclose(found["alone"], found["texts"][2:], atol=1e-6)


_FIRST_VECTOR = """
import sys, mmrl
assert mmrl.load(sys.argv[1], towers="text").encode_texts(["a red square"]).shape == (1, 8)
assert mmrl.load(sys.argv[1], dim=4).encode_images([sys.argv[2]]).shape == (1, 4)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_mmrl_load_opens_graphs_without_torch(graphs: Path, tmp_path: Path) -> None:
    IMAGES[0].save(tmp_path / "a.png")
    subprocess.run([sys.executable, "-c", _FIRST_VECTOR, str(graphs), str(tmp_path / "a.png")], check=True)


def test_graphs_and_torch_read_difficult_images_alike(source: Path, graphs: Path, tmp_path: Path) -> None:
    images = [drawing(1)[0].convert("RGBA"), Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)]
    images[0].putalpha(images[0].convert("L"))
    data = [encoded(image) for image in images]
    torch_vectors = mmrl.load(source, dim=8).encode_images([*data, *images])
    onnx_vectors = mmrl.load(graphs, variant="fp32").encode_images([*data, *images])
    np.testing.assert_allclose(onnx_vectors, torch_vectors, atol=1e-5)
    np.testing.assert_array_equal(torch_vectors[:2], torch_vectors[2:])
    # A bundle of an earlier version, without a background in its manifest, drops alpha as it did.
    for folder in (source, graphs):
        old = tmp_path / folder.name
        shutil.copytree(folder, old)
        manifest = json.loads((old / "manifest.json").read_text())
        assert manifest["image"].pop("background") == [255, 255, 255]
        (old / "manifest.json").write_text(json.dumps(manifest))
        encoder = mmrl.load(old, dim=8, variant="fp32" if folder == graphs else None)
        vectors = encoder.encode_images([data[0], drawing(1)[0]])
        np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
        assert np.abs(vectors[0] - torch_vectors[0]).max() > 1e-3
    wrong = Image.fromarray(np.array([[-1.0]], np.float32))
    for folder in (source, graphs):
        cut = Image.open(io.BytesIO(encoded(drawing(1)[0])[:500]))  # opened, not decoded yet
        with pytest.raises(InputError, match=r"image <PIL"):
            mmrl.load(folder).encode_images([cut])
        with pytest.raises(InputError, match=r"grey values from -1 to -1"):
            mmrl.load(folder).encode_images([wrong])


@pytest.mark.parametrize("variant", ["", ".fp16", ".int8"])
def test_the_dim_is_an_optional_input_of_a_graph(source: Path, graphs: Path, variant: str) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ids = bundle.load(source).tokenise(TEXTS).numpy()
    session = onnxruntime.InferenceSession(graphs / f"text{variant}.onnx", options)
    assert [one.name for one in session.get_inputs()] == ["input_ids"]
    whole = np.asarray(session.run(None, {"input_ids": ids})[0])
    assert whole.shape == (3, 8)
    for dim in (1, 4, 8):
        vectors = np.asarray(session.run(None, {"input_ids": ids, "dim": np.array([dim])})[0])
        np.testing.assert_allclose(vectors, prefix(whole, dim), atol=1e-6)


def test_graphs_take_any_batch_and_any_dim(graphs: Path, expected: dict[str, np.ndarray]) -> None:
    whole, short = mmrl.load(graphs, variant="fp32"), mmrl.load(graphs, dim=4, variant="fp32")
    assert_prefix(whole.encode_images(IMAGES), expected["images"], 8, atol=0.05)
    pixels = torch.stack([whole.image_spec.pixels(image) for image in IMAGES])
    assert_prefix(whole.encode_pixels(pixels), expected["images"], 8)
    assert_prefix(whole.encode_pixels(pixels, batch_size=1), expected["images"], 8)
    assert_prefix(short.encode_texts(TEXTS), expected["texts"], 4)
    assert_prefix(short.encode_texts(TEXTS, batch_size=2), expected["texts"], 4)
    many = whole.encode_texts(TEXTS * 7, batch_size=21)
    np.testing.assert_allclose(many, np.tile(many[:3], (7, 1)), atol=1e-6)
    assert whole.encode_texts([]).shape == (0, 8)


def test_graphs_read_hard_texts_and_images_alike(source: Path, graphs: Path) -> None:
    ours, exported = mmrl.load(source, dim=8), mmrl.load(graphs, variant="fp32")
    texts = [*hard_inputs.texts(), "\ud83d\ude00 lone \ud800"]
    np.testing.assert_allclose(exported.encode_texts(texts), ours.encode_texts(texts), atol=1e-5)
    images = [*hard_inputs.images(32, 32).values()]
    # Pillow and torch resize within two levels of each other.
    np.testing.assert_allclose(exported.encode_images(images), ours.encode_images(images), atol=0.05)


def test_openvino_opens_the_folder(source: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'mmrl-clip[openvino]'")
    bundles.export(str(source), tmp_path / "out", [8], "openvino", quantize=["fp16"])
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    ids = bundle.load(source).tokenise(TEXTS).numpy()
    loaded, ours = mmrl.load(tmp_path / "out", variant="fp32"), mmrl.load(source, dim=8)
    core = openvino.Core()  # after the one of mmrl.load, which is kept: the other order damages the process
    for variant, atol in (("", 1e-5), (".fp16", 1e-2)):
        text = core.compile_model(tmp_path / "out" / f"text{variant}.xml", "CPU", settings)
        assert_prefix(text(ids)[0], expected["texts"], 8, atol)
        assert_prefix(text(ids[:, :7])[0], expected["texts"], 8, atol)  # without the padding
    texts, images = hard_inputs.texts(), [*hard_inputs.images(32, 32).values()]
    np.testing.assert_allclose(loaded.encode_texts(texts), ours.encode_texts(texts), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_images(images), ours.encode_images(images), atol=0.05)
    assert mmrl.load(tmp_path / "out", dim=4).encode_texts(TEXTS).shape == (3, 4)
    weights = tmp_path / "out" / "text.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"text.bin is not the file that manifest.json was written for"):
        mmrl.load(tmp_path / "out", variant="fp32")


_SIGNAL = """
import os, signal, sys
from mmrl.inference.standalone import Encoder
encoders = [Encoder(sys.argv[1]) for _ in range(2)]
while encoders:
    del encoders[0]
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_is_handled_after_openvino_encoders_are_deleted(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'mmrl-clip[openvino]'")
    folder = save_graph_encoder(tmp_path / "encoder", "openvino")
    done = subprocess.run([sys.executable, "-c", _SIGNAL, folder], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_a_word_may_have_the_padding_id(source: Path, graphs: Path) -> None:
    texts = ["!$ !% !~", "a !$", "x"]
    expected, tokens = mmrl.load(source).encode_texts(texts), bundle.load(source).tokenise(texts)
    assert (tokens[0, :8] == 0).sum() == 3  # "!" within a word has open_clip's padding id
    assert_prefix(mmrl.load(graphs, variant="fp32").encode_texts(texts), expected, 8)
    assert_prefix(base.get_format("onnx").reopen(graphs, "fp32").tokens(tokens), expected, 8)


def test_long_texts_are_read_alike_with_and_without_torch(source: Path, graphs: Path) -> None:
    texts = ["abc" * 15_000, "a red shoe " * 5000, "犬😂" * 20_000]
    began = time.process_time()
    expected = mmrl.load(source).encode_texts(texts)
    assert_prefix(mmrl.load(graphs, variant="fp32").encode_texts(texts), expected, 8)
    assert time.process_time() - began < 10


def test_the_default_variant_is_chosen_by_recall_loss(graphs: Path, expected: dict[str, np.ndarray]) -> None:
    manifest = read_manifest(graphs)
    assert set(manifest["variants"]) == {"fp32", "fp16", "int8"}
    sizes = {name: one["megabytes"] for name, one in manifest["variants"].items()}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8"] < 0.5 * sizes["fp32"]
    for name, atol in (("fp32", 1e-5), ("fp16", 1e-2), ("int8", 0.3)):
        one = manifest["variants"][name]
        vectors = mmrl.load(graphs, variant=name, towers="text").encode_texts(TEXTS)
        assert_prefix(vectors, expected["texts"], 8, atol)
        assert one["cosine_error"]["text"]["worst"] <= atol
        # The recall of the source with torch equals that of the fp32 graphs.
        assert one["recall"]["source"] == manifest["variants"]["fp32"]["recall"]["variant"]
        assert one["recall"]["count"] == 48
    lost = manifest["variants"]["int8"]["recall"]["relative_loss"]
    assert manifest["graphs"]["default"] == ("int8" if lost <= 0.01 else "fp16")


def test_the_default_variant_keeps_its_recall() -> None:
    from mmrl.export.measure import default_variant

    tiny = {"image": {"worst": 1e-6}, "text": {"worst": 1e-6}}
    int8 = {"cosine_error": tiny}
    assert default_variant({"int8": int8}, ["int8"]) == "fp32"  # not measured
    assert default_variant({"int8": int8 | {"recall": {"relative_loss": 0.011}}}, ["int8"]) == "fp32"
    assert default_variant({"int8": int8 | {"recall": {"relative_loss": 0.009}}}, ["int8"]) == "int8"
    assert default_variant({"fp16": {"cosine_error": tiny}}, ["fp16"]) == "fp16"
    assert default_variant({"fp16": {"cosine_error": {"image": {"worst": 1e-6}}}}, ["fp16"]) == "fp16"
    assert default_variant({"fp16": {"cosine_error": {**tiny, "text": {"worst": 2e-4}}}}, ["fp16"]) == "fp32"


def test_damaged_graphs_are_refused(graphs: Path, tmp_path: Path) -> None:
    shutil.copytree(graphs, tmp_path / "online")
    with pytest.raises(InputError, match=r"variant: .* has no 'int4'; it has fp32, fp16, int8"):
        mmrl.load(tmp_path / "online", variant="int4")
    for dim in (0, 9):
        with pytest.raises(InputError, match=f"^dim: {dim} is out of range; this embedding has dims 1 to 8.$"):
            mmrl.load(tmp_path / "online", dim=dim)
    with pytest.raises(InputError, match="dtype: graphs compute"):
        mmrl.load(tmp_path / "online", dtype=torch.bfloat16)
    with pytest.raises(InputError, match="this tower was not loaded"):
        mmrl.load(tmp_path / "online", towers="image").encode_texts(["x"])
    with pytest.raises(InputError, match="want a list of texts"):
        mmrl.load(tmp_path / "online").encode_texts("x")
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad.jpg: no picture in a known format"):
        mmrl.load(tmp_path / "online").encode_images([tmp_path / "bad.jpg"])
    with pytest.raises(InputError, match="holds ONNX graphs, which have no weights"):
        export_bundle(str(tmp_path / "online"), tmp_path / "out", 4)
    for variant, name in (("int8", "text.int8.onnx.data"), ("fp32", "text.onnx.data"), ("fp32", "text.onnx")):
        with (tmp_path / "online" / name).open("ab") as file:
            file.write(b"x")
        with pytest.raises(InputError, match=rf"{name} is not the file that manifest.json was written for"):
            mmrl.load(tmp_path / "online", variant=variant)
    (tmp_path / "online" / "text.fp16.onnx.data").unlink()
    with pytest.raises(InputError, match=r"is incomplete: text.fp16.onnx.data is missing"):
        mmrl.load(tmp_path / "online", variant="fp16")
    mmrl.load(tmp_path / "online", variant="fp32", towers="image")
    (tmp_path / "online" / "image.onnx").unlink()
    with pytest.raises(InputError, match=r"is incomplete: image.onnx is missing"):
        mmrl.load(tmp_path / "online", variant="fp32")


def outside(folder: Path, manifest: dict[str, Any]) -> str:
    manifest["graphs"]["text"]["fp32"] = "../text.onnx"
    shutil.copy(folder / "text.onnx", folder.parent)
    return r"graphs\.text\.fp32"


def linked_graph(folder: Path, manifest: dict[str, Any]) -> str:
    (folder / "text.onnx").rename(folder.parent / "elsewhere.onnx")
    (folder / "text.onnx").symlink_to("../elsewhere.onnx")
    return "text.onnx"


def unlisted_weights(folder: Path, manifest: dict[str, Any]) -> str:
    del manifest["files"]["text.onnx.data"]
    return "has no hash of text.onnx.data"


def no_list(folder: Path, manifest: dict[str, Any]) -> str:
    manifest["files"] = {}
    return "files: the list of hashes is empty"


def weights_elsewhere(folder: Path, manifest: dict[str, Any]) -> str:
    rename_weights(folder, manifest, b"\x12\x0etext.onnx.data", b"\x12\x0c../text.data")
    return "names files in an unknown way"  # a name of another length


def unlisted_name(folder: Path, manifest: dict[str, Any]) -> str:
    rename_weights(folder, manifest, b"\x12\x0etext.onnx.data", b"\x12\x0e../other.datax")
    return "other.datax"


def second_value(folder: Path, manifest: dict[str, Any]) -> str:
    """Of a field that stands twice, protobuf takes the last."""
    rename_weights(folder, manifest, b"j\x1a\n\x08location\x12\x0etext.onnx.data",
                   b"j\x2a\n\x08location\x12\x0etext.onnx.data\x12\x0e../other.datax")  # fmt: skip
    return "names files in an unknown way"


def rename_weights(folder: Path, manifest: dict[str, Any], old: bytes, new: bytes) -> None:
    data = (folder / "text.onnx").read_bytes()
    assert old in data
    (folder / "text.onnx").write_bytes(data.replace(old, new))
    manifest["files"]["text.onnx"] = hashlib.sha256((folder / "text.onnx").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "change", [outside, linked_graph, unlisted_weights, no_list, weights_elsewhere, unlisted_name, second_value]
)
def test_graphs_stay_inside_their_folder(
    graphs: Path, tmp_path: Path, change: Callable[[Path, dict[str, Any]], str]
) -> None:
    folder = tmp_path / "online"
    shutil.copytree(graphs, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    says = change(folder, manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=says):
        mmrl.load(folder, variant="fp32", towers="text")
    spec = importlib.util.spec_from_file_location("encoder", folder / "encoder.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(encoder := importlib.util.module_from_spec(spec))
    with pytest.raises(ValueError, match=r"outside its folder|has no hash of|unknown way"):
        encoder.Encoder(folder, variant="fp32", towers="text")


def test_links_of_a_hub_cache_are_followed(graphs: Path, source: Path, tmp_path: Path) -> None:
    for origin in (graphs, source):
        snapshot, blobs = tmp_path / origin.name / "snapshots" / "abc" / "512", tmp_path / origin.name / "blobs"
        shutil.copytree(origin, snapshot)
        blobs.mkdir()
        for number, path in enumerate(path for path in snapshot.rglob("*") if path.is_file()):
            path.rename(blobs / str(number))
            path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
        np.testing.assert_array_equal(mmrl.load(snapshot).encode_texts(TEXTS), mmrl.load(origin).encode_texts(TEXTS))


@pytest.mark.parametrize("layout", ["open_clip", "bundle"])
def test_a_changed_file_is_refused(source: Path, tmp_path: Path, layout: str) -> None:
    bundles.export(str(source), tmp_path / "out", [8], layout)
    file = tmp_path / "out" / "tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"bpe_simple_vocab_16e6.txt.gz is not the file that manifest.json"):
        mmrl.load(tmp_path / "out")
    with pytest.raises(InputError, match="has weights, no ONNX graphs"):
        mmrl.load(tmp_path / "out", variant="int8")


def unhashed_tokenizer(folder: Path, manifest: dict[str, Any]) -> str:
    del manifest["files"]["tokenizer/bpe_simple_vocab_16e6.txt.gz"]
    return "has no hash of tokenizer/bpe_simple_vocab_16e6.txt.gz"


def unhashed_weights(folder: Path, manifest: dict[str, Any]) -> str:
    del manifest["files"]["model.safetensors"]
    return "has no hash of model.safetensors"


def linked_weights(folder: Path, manifest: dict[str, Any]) -> str:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to("../elsewhere")
    return "leads out of"


def linked_tokenizer(folder: Path, manifest: dict[str, Any]) -> str:
    (folder / "tokenizer").rename(folder.parent / "tokenizer")
    (folder / "tokenizer").symlink_to("../tokenizer")
    return "leads out of"


def added_tokenizer_file(folder: Path, manifest: dict[str, Any]) -> str:
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    return "has no hash of tokenizer/tokenizer_config.json"


@pytest.mark.parametrize(
    "change", [no_list, unhashed_tokenizer, unhashed_weights, linked_weights, linked_tokenizer, added_tokenizer_file]
)
def test_a_bundle_reads_only_hashed_files_of_its_folder(
    source: Path, tmp_path: Path, change: Callable[[Path, dict[str, Any]], str]
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    says = change(folder, manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=says):
        mmrl.load(folder)
    if "weights" not in change.__name__:
        with pytest.raises(InputError, match=says):
            build_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 3}, "is mmrl-bundle version 3; this version of mmrl reads mmrl-bundle up to version 2"),
        ({"format": "other"}, "is other version 2"),
        ({"dim": 0}, "dim: Input should be greater than or equal to 1"),
        ({"weights_sha256": "x"}, "weights_sha256: String should match"),
        ({"files": {"../model.safetensors": "0" * 64}}, "files"),
        ({"layout": "onnx"}, "graphs: required for the layouts onnx, openvino, transformers.js"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ],
)
def test_an_invalid_manifest_is_refused(source: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    manifest = json.loads((source / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=says) as error:
        mmrl.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_manifest_of_version_1_still_loads(source: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "old")
    manifest = read_manifest(source) | {"version": 1}
    write_manifest(tmp_path / "old", {name: v for name, v in manifest.items() if name not in ("layout", "files")})
    np.testing.assert_array_equal(mmrl.load(tmp_path / "old").encode_texts(TEXTS), expected["texts"])


def test_an_encoder_beyond_the_tolerance_is_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = base.get_format("bundle")

    def reopen_with_error(folder: Path, variant: str | None) -> contract.Reopened:
        opened = real.reopen(folder, variant)
        noise = np.float32(1e-3) * np.arange(8, dtype=np.float32)
        return replace(opened, tokens=lambda tokens_BL: opened.tokens(tokens_BL) + noise)

    monkeypatch.setattr("mmrl.export.bundles.base.get_format", lambda _: replace(real, reopen=reopen_with_error))
    with pytest.raises(RunStopped, match=r"differ from the source's prefix by .* nothing was written"):
        export_bundle(str(source), tmp_path / "out", 8)
    assert not list(tmp_path.iterdir())


def test_formats_that_cannot_hold_a_tower_are_refused(hf_model: Path, source: Path, tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_proj": "none", "timm_pool": "token", "image_size": 160}
    (tmp_path / "bare.json").write_text(json.dumps({**TINY_MODEL, "embed_dim": 64, "vision_cfg": vision}))
    bare, bert = f"open_clip:{tmp_path / 'bare.json'}:random", f"open_clip:{hf_model}:random"
    for model, format, says in (
        (bare, "open_clip", "cannot hold the projection that mmrl added to this image tower"),
        (bare, "transformers", "this model has vision_cfg.timm_model_name: 'test_vit'"),
        (bert, "transformers", "this model has text_cfg.hf_model_name"),
        (bert, "open_clip", "came from a local folder"),
        (bert, "transformers.js", "need CLIP's tokenizer"),
        (bert, "tflite", "format: 'tflite' is unknown. Allowed: bundle, onnx"),
    ):
        with pytest.raises(InputError, match=says) as error:
            bundles.export(model, tmp_path / "out", [8], format)
        assert "\n" not in str(error.value)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"quantize": ["int8"]}, "quantize: the format bundle has float32 weights only"),
        ({"measure_shards": "x"}, "measure: the format bundle"),
        (
            {"format": "onnx", "quantize": ["int4"]},
            "quantize: 'int4' is unknown to the format onnx; allowed: fp16, int8",
        ),
        ({"check_shards": "nowhere.tar"}, "nowhere.tar does not exist"),
    ]
    for keywords, says in mistakes:
        with pytest.raises(InputError, match=says):
            bundles.export(str(source), tmp_path / "out", [8], **keywords)
    assert not (tmp_path / "out").exists()


def test_a_tower_too_large_for_one_file_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graphs, "_MAX_BYTES", 0)
    with pytest.raises(InputError, match=r"transformers.js needs each tower in one file, .* use onnx"):
        bundles.export(str(source), tmp_path / "out", [8], "transformers.js")
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named_with_its_command(
    source: Path, graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmrl.inference.extras.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"onnx is not installed; pip install 'mmrl-clip\[export\]'"):
        bundles.export(str(source), tmp_path / "out", [8], "onnx")
    with pytest.raises(InputError, match=r"sentence-transformers is not installed; pip install 'mmrl-clip\[sentence-"):
        bundles.export(str(source), tmp_path / "out", [8], "sentence_transformers")
    with pytest.raises(InputError, match=r"onnxruntime is not installed"):
        mmrl.load(graphs)


@pytest.mark.slow
def test_a_hugging_face_text_tower_becomes_a_graph(hf_model: Path, tmp_path: Path) -> None:
    source = save_random_encoder(str(hf_model), tmp_path / "source")
    bundles.export(str(source), tmp_path / "out", [8], "onnx", quantize=["fp16"])
    expected = mmrl.load(source, dim=8).encode_texts(TEXTS)
    np.testing.assert_allclose(mmrl.load(tmp_path / "out", variant="fp32").encode_texts(TEXTS), expected, atol=1e-5)


@pytest.mark.slow
def test_transformers_js_under_node(source: Path, expected: dict[str, np.ndarray], tmp_path: Path) -> None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    folder = Path(os.environ.get("MMRL_NODE_MODULES", tmp_path / "js"))
    folder.mkdir(exist_ok=True)
    if not (folder / "node_modules" / "@huggingface" / "transformers").is_dir():
        command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "@huggingface/transformers@4"]
        installed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"npm cannot install @huggingface/transformers: {installed.stderr.splitlines()[-1:]}")
    bundles.export(str(source), tmp_path / "model", [8], "transformers.js", quantize=["int8"])
    shutil.copyfile(PAGE, folder / "clip.mjs")
    for i, image in enumerate(IMAGES):
        image.save(folder / f"{i}.png")
    for dtype, atol in (("fp32", 1e-5), ("q8", 0.3)):
        ran = subprocess.run(
            [node, "clip.mjs", str(tmp_path), "model", dtype], cwd=folder, capture_output=True, text=True, check=True
        )
        found = json.loads(ran.stdout.splitlines()[-1])
        assert_prefix(np.array(found["texts"]), expected["texts"], 8, atol)
        assert_prefix(np.array(found["images"]), expected["images"], 8, max(atol, 0.1))
    assert_mmrl_loads(tmp_path / "model", expected, atol=0.3)
