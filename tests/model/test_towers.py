"""Towers from open_clip names, JSON configs, weights files and Hugging Face text towers."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import TINY_MODEL

from mmrl.errors import InputError
from mmrl.model import bundle, registry, towers, trainable, two_tower
from mmrl.model.towers import TowersConfig, projection_axes
from mmrl.model.two_tower import LogitScaleConfig


def test_towers_from_a_json_config(tiny_model: Path) -> None:
    built = towers.build(TowersConfig(name=str(tiny_model)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 3)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    image_BD, text_BD, scale, _ = model(pixels, built.tokenise(["a red square", "x"]))
    assert image_BD.shape == text_BD.shape == (2, 16)
    torch.testing.assert_close(scale, torch.tensor([1 / 0.07]))


@pytest.mark.parametrize(
    ("extra", "config", "scale", "bias"),
    [
        ({}, LogitScaleConfig(), 10, -10),
        ({"init_logit_bias": -7.0}, LogitScaleConfig(), 1 / 0.07, -7),
        ({}, LogitScaleConfig(init=20.0, bias_init=0.0), 20, 0),
    ],
)
def test_initial_scale_and_bias_of_the_sigmoid_loss(
    tmp_path: Path, extra: dict[str, float], config: LogitScaleConfig, scale: float, bias: float
) -> None:
    (tmp_path / "with-bias.json").write_text(json.dumps(TINY_MODEL | extra))
    built = towers.build(TowersConfig(name=str(tmp_path / "with-bias.json")))
    model = two_tower.from_towers(built, config, 2, with_bias=True)
    assert model.logit_scale.item() == pytest.approx(scale)
    assert model.logit_bias is not None
    assert model.logit_bias.tolist() == [bias]


def test_unmodified_open_clip_builds_the_shipped_towers() -> None:
    built = towers.build(TowersConfig(name="mmrl-starter"))
    stock = open_clip.create_model("mmrl-starter", force_custom_text=True)
    names = {f"visual.{name}" for name in built.image.state_dict()} | {f"text.{n}" for n in built.text.state_dict()}
    assert names == stock.state_dict().keys() - {"logit_scale"}
    kinds = {type(module).__name__ for module in stock.modules()}
    assert not any("BatchNorm" in kind for kind in kinds)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("custom_text", [False, True])
def test_pretrained_files_of_either_open_clip_class_load(
    tiny_model: Path, tmp_path: Path, suffix: str, custom_text: bool
) -> None:
    from safetensors.torch import save_file

    open_clip.add_model_config(tiny_model)
    source: Any = open_clip.create_model("tiny-test", force_custom_text=custom_text).eval()
    with torch.no_grad():
        source.get_parameter("logit_scale").fill_(3.0)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    built = towers.build(TowersConfig(name=str(tiny_model), pretrained=str(path)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 2).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = built.tokenise(["a red square", "green"])
    with torch.no_grad():
        image_BD, text_BD, scale, _ = model(pixels, tokens)
        assert torch.equal(image_BD, source.encode_image(built.image_spec.normalise(pixels)))
        assert torch.equal(text_BD, source.encode_text(tokens))
        torch.testing.assert_close(scale, torch.tensor([3.0]).exp())


def test_a_hugging_face_text_tower_with_its_tokenizer(hf_model: Path) -> None:
    built = towers.build(TowersConfig(name=str(hf_model)))
    model = two_tower.from_towers(built, LogitScaleConfig(), 1)
    tokens = built.tokenise(["a red square", "stripes"])
    assert tokens.shape == (2, 12)
    assert tokens[0, :5].tolist() == [2, 5, 6, 8, 3]
    assert model.encode_text(tokens).shape == (2, 16)
    assert projection_axes(built.model_cfg, "text") == {"proj.weight": 0}


def test_projections_are_found_in_every_architecture() -> None:
    native = registry.read_model_cfg("ViT-B-32")
    assert projection_axes(native, "image") == {"proj": 1}
    assert projection_axes(native, "text") == {"text_projection": 1}
    assert projection_axes(registry.read_model_cfg("RN50"), "image") == {
        "attnpool.c_proj.weight": 0,
        "attnpool.c_proj.bias": 0,
    }
    assert projection_axes(registry.read_model_cfg("mmrl-starter"), "image") == {"head.proj.weight": 0}
    # SigLIP's image tower has no projection.
    assert projection_axes(registry.read_model_cfg("ViT-B-16-SigLIP"), "image") is None


def test_a_locked_tower_keeps_a_trainable_projection(tiny_model: Path) -> None:
    built = bundle.initial_towers(TowersConfig(name=str(tiny_model), lock_image=True))
    assert [name for name, p in built.image.named_parameters() if p.requires_grad] == ["proj"]
    assert all(p.requires_grad for p in built.text.parameters())


@pytest.mark.parametrize("model", ["tiny_model", "hf_model", "mmrl-starter"])
def test_grad_checkpointing_gives_the_same_gradients(model: str, request: pytest.FixtureRequest) -> None:
    """For open_clip's ViT and text transformer, a BERT with dropout and timm's NFNet; with less memory for backward."""
    name = model if model == "mmrl-starter" else str(request.getfixturevalue(model))
    gradients, kept = [], []
    for recomputes in (False, True):
        torch.manual_seed(0)
        built = bundle.initial_towers(TowersConfig(name=name, grad_checkpointing=recomputes))
        clip = two_tower.from_towers(built, LogitScaleConfig(), 1).train()
        side = built.image_spec.height
        pixels = torch.randint(
            0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        storages: dict[int, int] = {}

        def keep(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            image_BD, text_BD, _, _ = clip(pixels, built.tokenise(["a red square", "stripe"]))
        assert image_BD is not None
        assert text_BD is not None
        (image_BD.square().sum() + text_BD.square().sum()).backward()
        gradients.append({n: p.grad for n, p in clip.named_parameters() if p.grad is not None})
        kept.append(sum(storages.values()))
    assert kept[1] < kept[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tower", ["RN50", "inception_v3"])
def test_a_tower_without_grad_checkpointing_is_refused(tower: str, tmp_path: Path) -> None:
    """open_clip ignores the setting for both without an error."""
    name = tower
    if tower != "RN50":
        vision = {"timm_model_name": tower, "timm_model_pretrained": False, "timm_pool": "", "image_size": 96}
        (tmp_path / "timm-tower.json").write_text(json.dumps(TINY_MODEL | {"vision_cfg": vision}))
        name = str(tmp_path / "timm-tower.json")
    config = TowersConfig(name=name, grad_checkpointing=True)
    with torch.device("meta"), pytest.raises(InputError, match=r"the image tower, a .*, cannot recompute .* false"):
        trainable.prepare(towers.build_empty(name), registry.read_model_cfg(name), config)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-33", None, "no model 'ViT-B-33'; the nearest: ViT-B-32, ViT-[^,]*, ViT-[^,]*\\.$"),
        ("clip", None, "no model 'clip'; the nearest: [^,]*, [^,]*, [^,]*\\.$"),
        ("nowhere.json", None, "nowhere.json does not exist"),
        ("{folder}/half.json", None, "lacks text_cfg, vision_cfg"),
        ("{folder}/number.json", None, "^model.name: .*number.json lacks embed_dim, text_cfg, vision_cfg"),
        ("{folder}/broken.json", None, "is not JSON"),
        ("{folder}/latin.json", None, "^model.name: .*latin.json is not JSON .*can't decode byte"),
        ("mmrl-starter", "weights/none.pt", "model.pretrained: the file weights/none.pt does not exist"),
        ("ViT-B-32", "laion3b", "ViT-B-32 has no weights 'laion3b'; the nearest: laion2b_e16, [^,]*, [^,]*\\.$"),
        ("mmrl-starter", "laion3b", "mmrl-starter has no weights 'laion3b'; it has none; give a weights file"),
        ("mmrl-starter", "{folder}", "model.pretrained: .* is a folder; give a weights file"),
    ],
)
def test_wrong_names_and_files_are_reported(name: str, pretrained: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"embed_dim": 4}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "number.json").write_text("5")
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    pretrained = pretrained and pretrained.format(folder=tmp_path)
    with pytest.raises(InputError, match=message):
        towers.build(TowersConfig(name=name.format(folder=tmp_path), pretrained=pretrained))
