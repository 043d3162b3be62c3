"""Folders of transformers and sentence-transformers: the same embeddings and token ids as the library's own."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.encoders import IMAGES, TEXTS, export_bundle
from helpers.hugging_face import NASTY, save_chinese_clip, save_clip, save_siglip
from safetensors.torch import load_file, save_file

import mmrl
from mmrl.errors import InputError
from mmrl.export.bundles import export
from mmrl.inference.evaluated import open_encoder
from mmrl.model import bundle
from mmrl.rotation.command import rotate_model

Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """{kind: (folder, transformers' model)}"""
    folder = tmp_path_factory.mktemp("saved")
    save = {"clip": save_clip, "chinese_clip": save_chinese_clip}
    return {kind: (folder / kind, save[kind](folder / kind)) for kind in save}


@pytest.fixture
def clip(saved: dict[str, tuple[Path, Any]], tmp_path: Path) -> Path:
    """A copy of the CLIPModel's folder, to change."""
    return shutil.copytree(saved["clip"][0], tmp_path / "clip")


@pytest.mark.parametrize("kind", ["clip", "chinese_clip"])
def test_embeddings_and_tokens_are_those_of_transformers(kind: str, saved: dict[str, tuple[Path, Any]]) -> None:
    check_against_transformers(*saved[kind])


@pytest.mark.slow
def test_siglip_embeddings_and_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    check_against_transformers(tmp_path / "siglip", save_siglip(tmp_path / "siglip"))


def check_against_transformers(folder: Path, model: Any) -> None:
    from transformers import AutoTokenizer

    opened = bundle.open_model(folder)
    length = opened.tokenise.context_length
    encoded = AutoTokenizer.from_pretrained(folder)(
        NASTY, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids = opened.tokenise(NASTY)
    assert torch.equal(ids, encoded["input_ids"])
    height, width = opened.image_spec.height, opened.image_spec.width
    pixels = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    mask = {} if model.config.model_type == "siglip" else {"attention_mask": encoded["attention_mask"]}
    with torch.no_grad():
        image = model.get_image_features(pixel_values=opened.image_spec.normalise(pixels)).pooler_output
        text = model.get_text_features(input_ids=ids, **mask).pooler_output
        torch.testing.assert_close(opened.model.encode_image(pixels), image, rtol=0, atol=2e-5)
        torch.testing.assert_close(opened.model.encode_text(ids), text, rtol=0, atol=1e-5)
    assert opened.model.logit_scale.item() == pytest.approx(model.logit_scale.exp().item(), rel=1e-5)


def test_pictures_are_prepared_as_by_the_processor(clip: Path) -> None:
    from transformers import CLIPImageProcessor

    opened, processor = bundle.open_model(clip), CLIPImageProcessor.from_pretrained(clip)
    for image in IMAGES:
        expected = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
        ours = opened.image_spec.normalise(opened.image_spec.pixels(image)[None])
        assert (ours - expected).abs().max() < 0.06  # 2 of 255 levels, by another resize


@pytest.mark.parametrize("kind", ["clip", "chinese_clip"])
def test_every_command_takes_the_folder(
    kind: str, saved: dict[str, tuple[Path, Any]], shards: Path, tmp_path: Path
) -> None:
    from transformers import CLIPModel

    folder = saved[kind][0]
    whole = mmrl.load(folder)
    texts, images = whole.encode_texts([*TEXTS, *NASTY]), whole.encode_images(IMAGES)
    assert open_encoder(str(folder)).dim == 24
    rotate_model(str(folder), str(shards), tmp_path / "rotated", steps=0, quiet=True)
    export_bundle(str(tmp_path / "rotated"), tmp_path / "exported", 24)
    again = mmrl.load(tmp_path / "exported")
    # Rotated vectors have the same similarities, and the bundle tokenises as the folder did.
    similarities = again.encode_texts([*TEXTS, *NASTY]) @ again.encode_images(IMAGES).T
    np.testing.assert_allclose(similarities, texts @ images.T, atol=1e-5)
    if kind == "clip":  # and back: transformers has the token ids and the vectors that it had
        export(str(folder), tmp_path / "clip", [24], "transformers")
        check_against_transformers(folder, CLIPModel.from_pretrained(tmp_path / "clip").eval())
        # open_clip cleans texts before every tokenizer.
        manifest = export(str(folder), tmp_path / "open_clip", [24], "open_clip")["24"]
        assert manifest["contract"]


def test_a_manifest_names_no_folder_of_the_text_tower(saved: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    manifest = export_bundle(str(saved["chinese_clip"][0]), tmp_path / "out", 8)
    assert manifest["model_cfg"]["text_cfg"]["hf_model_name"] == "text_model"
    for source in (saved["chinese_clip"][0], tmp_path / "out"):
        with pytest.raises(InputError, match="it came from a local folder; use bundle or onnx"):
            export(str(source), tmp_path / "open_clip", [8], "open_clip")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino", "sentence_transformers"])
@pytest.mark.parametrize("kind", ["clip", "chinese_clip"])
def test_other_tools_give_the_vectors_of_transformers(
    kind: str, format: str, saved: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """The CLIPModel's tokenizer pads with the token that ends a text."""
    from transformers import AutoTokenizer

    if format == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed: pip install 'mmrl-clip[openvino]'")
    folder, model = saved[kind]
    manifest = export(str(folder), tmp_path / "out", [24], format)["24"]
    assert manifest["contract"]["hard_texts"]["tokenised_differently"] == []
    tokenizer, loaded = AutoTokenizer.from_pretrained(folder), mmrl.load(tmp_path / "out")
    encode, spec = loaded.encode_texts, loaded.image_spec
    if format == "sentence_transformers":
        from sentence_transformers import SentenceTransformer

        encode = partial(SentenceTransformer(str(tmp_path / "out")).encode, normalize_embeddings=True)
    for text in [*TEXTS, *NASTY]:
        inputs = tokenizer([text], truncation=True, return_tensors="pt")  # without padding
        assert_unit_vectors(encode([text]), model.get_text_features(**inputs))
    pixels = torch.stack([spec.pixels(image) for image in IMAGES])
    features = model.get_image_features(pixel_values=spec.normalise(pixels))
    assert_unit_vectors(loaded.encode_pixels(pixels), features)


def assert_unit_vectors(vectors: np.ndarray, features: Any) -> None:
    expected = torch.nn.functional.normalize(features.pooler_output.detach()).numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_other_layouts_of_the_same_weights(clip: Path, tmp_path: Path) -> None:
    expected = mmrl.load(clip).encode_texts(TEXTS)
    state = load_file(clip / "model.safetensors")
    names = sorted(state)
    (clip / "model.safetensors").unlink()
    torch.save({**state, "text_model.embeddings.position_ids": torch.arange(16)}, clip / "pytorch_model.bin")
    np.testing.assert_array_equal(mmrl.load(clip).encode_texts(TEXTS), expected)
    (clip / "pytorch_model.bin").unlink()
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, clip / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(mmrl.load(clip).encode_texts(TEXTS), expected)
    modules = [
        {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    shutil.copytree(clip, tmp_path / "st" / "0_CLIPModel")
    (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_array_equal(mmrl.load(tmp_path / "st").encode_texts(TEXTS), expected)
    (tmp_path / "st" / "modules.json").write_text(json.dumps([*modules, modules[0] | {"type": "a.Dense"}]))
    with pytest.raises(InputError, match="CLIPModel, Normalize, Dense are more than a CLIP model"):
        mmrl.load(tmp_path / "st")


def test_a_name_on_the_hub(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local cache, as huggingface_hub lays it out: tests have no network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--tiny-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(clip, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = mmrl.load(clip).encode_texts(TEXTS)
    for name in ("hf-hub:org/tiny-clip", "open_clip:hf-hub:org/tiny-clip"):
        np.testing.assert_array_equal(mmrl.load(name).encode_texts(TEXTS), expected)


def test_the_end_of_a_text_is_found_by_its_id(tmp_path: Path) -> None:
    """An id for the end that is not the largest: tokens were added to the vocabulary."""
    check_against_transformers(tmp_path / "clip", save_clip(tmp_path / "clip", vocab_size=600, eos_token_id=517))


def change_json(name: str, **values: Any) -> Edit:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        for key, value in values.items():
            section, _, inner = key.rpartition("__")
            (config[section] if section else config)[inner] = value
        (folder / name).write_text(json.dumps(config))

    return change


def without(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def shorter(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "visual_projection.weight": torch.zeros(20, 32)}, folder / "model.safetensors")


def lacking(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, folder / "model.safetensors")


def with_objects(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": {}, "path": folder}, folder / "pytorch_model.bin")


def in_place_of_weights(name: str, data: bytes) -> Edit:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name).write_bytes(data)

    return change


def without_names(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(torch.zeros(3), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_json("config.json", model_type="siglip2"), "NaFlex.*siglip2-base-patch16-256"),
        (change_json("config.json", model_type="bert"), "'bert' is no image-text model.*allowed: clip, siglip"),
        (change_json("config.json", text_config__hidden_act="relu"), "text_config.hidden_act: 'relu'; allowed"),
        (change_json("config.json", text_config__hidden_act="gelu"), "quick_gelu both or none"),
        (change_json("config.json", auto_map={"AutoModel": "evil.Model"}), "auto_map: this key names code"),
        (change_json("preprocessor_config.json", resample=1), "resample: 1; allowed: 2"),
        (change_json("preprocessor_config.json", do_rescale=False), "do_rescale and do_normalize must be true"),
        (change_json("preprocessor_config.json", size={"shortest_edge": 40}), "is cropped to 32"),
        (change_json("preprocessor_config.json", crop_size=64), r"images of \(64, 64\) pixels"),
        (change_json("preprocessor_config.json", image_mean=None), "damaged"),
        (without("preprocessor_config.json"), "no preprocessor_config.json.*save_pretrained"),
        (without("model.safetensors"), "has no weights: neither model.safetensors"),
        (shorter, "the weights do not fit config.json"),
        (lacking, "the weights lack 'text_projection.weight'"),
        (with_objects, "holds Python objects or code besides tensors"),
        (without("tokenizer.json"), "tokenizer"),
        (change_json("preprocessor_config.json", rescale_factor=None), "clip is damaged, or holds another kind"),
        (change_json("preprocessor_config.json", resample=[2]), "clip is damaged, or holds another kind"),
        (change_json("preprocessor_config.json", image_std=[0, 1, 1]), "preprocessor_config.json is damaged"),
        (change_json("preprocessor_config.json", image_mean=["a", 1, 1]), "preprocessor_config.json is damaged"),
        (change_json("config.json", model_type=["clip"]), "clip is damaged, or holds another kind"),
        (change_json("config.json", text_config__hidden_size="x"), "clip is damaged, or holds another kind"),
        (change_json("config.json", vision_config__num_attention_heads=0), "clip is damaged, or holds another kind"),
        (in_place_of_weights("model.safetensors.index.json", b'{"weight_map": ["a"]}'), "clip is damaged, or holds"),
        (without_names, "clip is damaged, or holds another kind of model .AttributeError"),
    ],
)
def test_what_cannot_be_read_is_refused(change: Edit, message: str, clip: Path) -> None:
    change(clip)
    with pytest.raises(InputError, match=message):
        bundle.open_model(clip)
