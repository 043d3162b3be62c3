"""What a training starts from: stored encoders, checkpoints of open_clip's trainer, CoCa, random parts."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import TINY_MODEL
from helpers.encoders import TEXTS, save_random_encoder
from helpers.hugging_face import save_clip

from mmrl.errors import InputError
from mmrl.export.bundles import export
from mmrl.model import bundle, registry, towers, two_tower
from mmrl.model.towers import Towers, TowersConfig
from mmrl.model.two_tower import LogitScaleConfig, MatryoshkaCLIP

PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture(scope="module")
def stored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint."""
    run = tmp_path_factory.mktemp("run")
    (run / "checkpoints").mkdir()
    save_random_encoder(str(tiny_model), run / "checkpoints" / "last", per_dim=True)
    return run


def model_of(built: Towers) -> MatryoshkaCLIP:
    return two_tower.from_towers(built, LogitScaleConfig(), 1).eval()


def outputs(model: MatryoshkaCLIP, built: Towers) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.encode_image(PIXELS), model.encode_text(built.tokenise(TEXTS))


@pytest.mark.parametrize("key", ["name", "pretrained", "both"])
def test_a_run_gives_the_initial_weights(key: str, stored: Path, tiny_model: Path) -> None:
    config = {
        "name": TowersConfig(name=str(stored), lock_image=True),
        "pretrained": TowersConfig(name=str(tiny_model), pretrained=str(stored), lock_image=True),
        "both": TowersConfig(name=f"open_clip:{tiny_model}:{stored}", lock_image=True),
    }[key]
    built = bundle.initial_towers(config)
    original = bundle.load(stored / "checkpoints" / "last")
    for ours, theirs in zip(outputs(model_of(built), built), outputs(original.model, built), strict=True):
        assert torch.equal(ours, theirs)
    assert built.logit_scale == pytest.approx(original.model.logit_scale[-1].item())
    assert built.random == ()
    assert [name for name, p in built.image.named_parameters() if p.requires_grad] == ["proj"]
    assert registry.read_model_cfg(config.name)["embed_dim"] == 16
    assert registry.build_tokenizer(config.name).context_length == 12


def test_a_truncated_export_gives_the_initial_weights(stored: Path, tmp_path: Path) -> None:
    export(str(stored), tmp_path / "out", [4], "open_clip")
    built = bundle.initial_towers(TowersConfig(name=str(tmp_path / "out")))
    assert built.embed_dim == registry.read_model_cfg(str(tmp_path / "out"))["embed_dim"] == 4
    whole = outputs(bundle.load(stored / "checkpoints" / "last").model, built)
    for ours, theirs in zip(outputs(model_of(built), built), whole, strict=True):
        torch.testing.assert_close(ours, theirs[:, :4])
    with pytest.raises(InputError, match="has weights; remove one of the two keys"):
        bundle.initial_towers(TowersConfig(name=str(tmp_path / "out"), pretrained=str(stored)))


def test_an_added_projection_is_taken_over(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "timm_proj": "none", "timm_pool": "token", "image_size": 160}
    (tmp_path / "bare.json").write_text(json.dumps({**TINY_MODEL, "embed_dim": 64, "vision_cfg": vision}))
    save_random_encoder(str(tmp_path / "bare.json"), tmp_path / "bundle")
    original = bundle.load(tmp_path / "bundle").model
    model = model_of(bundle.initial_towers(TowersConfig(name=str(tmp_path / "bundle"))))
    for name, weight in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight)
    export(str(tmp_path / "bundle"), tmp_path / "small", [8])
    with pytest.raises(InputError, match="8 of 64 dims by a projection that mmrl added"):
        bundle.initial_towers(TowersConfig(name=str(tmp_path / "small")))


def test_weights_of_another_architecture_are_refused(stored: Path, tmp_path: Path) -> None:
    deeper = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 2}}  # pyright: ignore[reportGeneralTypeIssues]
    (tmp_path / "deeper.json").write_text(json.dumps(deeper))
    with pytest.raises(InputError, match=r"the image tower of .* is not that of model.name .*; set model.name="):
        bundle.initial_towers(TowersConfig(name=str(tmp_path / "deeper.json"), pretrained=str(stored)))
    with pytest.raises(InputError, match=r"model\.pretrained: .* is neither a run folder"):
        bundle.initial_towers(TowersConfig(name="mmrl-starter", pretrained=str(tmp_path)))


def test_a_hugging_face_folder_gives_the_initial_weights(tmp_path: Path) -> None:
    model = save_clip(tmp_path / "clip")
    built = bundle.initial_towers(TowersConfig(name=str(tmp_path / "clip"), grad_checkpointing=True))
    assert built.grad_checkpointing
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=built.image_spec.normalise(PIXELS)).pooler_output
        torch.testing.assert_close(model_of(built).encode_image(PIXELS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_open_clips_trainer(prefix: str, tiny_model: Path, tmp_path: Path) -> None:
    open_clip.add_model_config(tiny_model)
    source: Any = open_clip.create_model("tiny-test").eval()
    optimizer = torch.optim.AdamW(source.parameters())
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    checkpoint = {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    opened = bundle.open_model(f"open_clip:{tiny_model}:{tmp_path / 'epoch_3.pt'}")
    with torch.no_grad():
        expected = source.encode_image(opened.image_spec.normalise(PIXELS))
        assert torch.equal(opened.model.encode_image(PIXELS), expected)
    torch.save({**checkpoint, "args": tmp_path}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=r"^\S*foreign.pt holds Python objects or code .* never loaded; .*\.$"):
        bundle.open_model(f"open_clip:{tiny_model}:{tmp_path / 'foreign.pt'}")


def test_coca_gives_its_contrastive_embeddings(tmp_path: Path) -> None:
    text = {**TINY_MODEL["text_cfg"], "embed_cls": True, "output_tokens": True}  # pyright: ignore[reportGeneralTypeIssues]
    vision = {**TINY_MODEL["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}  # pyright: ignore[reportGeneralTypeIssues]
    decoder = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "attn_pooler_heads": 4}
    coca = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": decoder, "custom_text": True}
    (tmp_path / "tiny-coca.json").write_text(json.dumps(coca))
    open_clip.add_model_config(tmp_path / "tiny-coca.json")
    source: Any = open_clip.create_model("tiny-coca").eval()
    torch.save(source.state_dict(), tmp_path / "coca.pt")
    built = towers.build(TowersConfig(name=str(tmp_path / "tiny-coca.json"), pretrained=str(tmp_path / "coca.pt")))
    one = bundle.make_bundle(model_of(built), built, (16,))
    bundle.save(one, tmp_path / "bundle", one.state(), {})
    for model in (one.model, bundle.load(tmp_path / "bundle").model):
        image_BD, text_MD = outputs(model, built)
        with torch.no_grad():
            assert torch.equal(image_BD, source.visual(built.image_spec.normalise(PIXELS))[0])
            assert torch.equal(text_MD, source.text(built.tokenise(TEXTS))[0])


def test_random_parts_are_named(tiny_model: Path, hf_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert towers.build(TowersConfig(name=str(tiny_model))).random == ("the image tower", "the text tower")
    model_cfg = registry.read_model_cfg(str(hf_model))
    config = TowersConfig(name=str(hf_model), pretrained_text=True)
    assert towers._random_parts(config, model_cfg) == ("the image tower", "the text projection")
