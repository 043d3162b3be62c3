"""Learning rates, weight decay and schedules."""

from pathlib import Path

import pytest
import torch

from mmrl.engine import optim
from mmrl.engine.optim import OptimConfig, lr_factor
from mmrl.errors import InputError
from mmrl.model import registry, towers, two_tower
from mmrl.model.depth import Depth
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig, MatryoshkaCLIP


def model_of(name: str) -> tuple[MatryoshkaCLIP, dict]:
    built = towers.build(TowersConfig(name=name))
    return two_tower.from_towers(built, LogitScaleConfig(), 1), built.model_cfg


@pytest.mark.parametrize("name", ["tiny", "mmrl-starter"])
def test_parameters_have_their_learning_rate_and_weight_decay(name: str, tiny_model: Path) -> None:
    model, model_cfg = model_of(str(tiny_model) if name == "tiny" else name)
    config = OptimConfig(
        lr=1.0,
        lr_image=2.0,
        lr_text=3.0,
        lr_projection=4.0,
        lr_logit_scale=5.0,
        lr_token_embedding=6.0,
        weight_decay=0.1,
    )
    groups = optim.build(model, model_cfg, config).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    rates = {n: found[id(p)][0] for n, p in model.named_parameters()}
    decays = {n: found[id(p)][1] for n, p in model.named_parameters()}
    assert rates["log_logit_scale"] == 5
    assert decays["log_logit_scale"] == 0
    assert sorted({rate for n, rate in rates.items() if n.startswith("image")}) == [2, 4]
    assert sorted({rate for n, rate in rates.items() if n.startswith("text")}) == [3, 4, 6]
    assert rates["text.tower.token_embedding.weight"] == 6
    assert decays["text.tower.positional_embedding"] == 0
    assert decays["text.tower.token_embedding.weight"] == 0.1
    assert all(decays[n] == 0 for n, p in model.named_parameters() if p.numel() == max(p.shape))


def test_layer_decay_slows_the_layers_near_the_input() -> None:
    model, model_cfg = model_of("ViT-S-32-alt")
    config = OptimConfig(lr=1.0, layer_decay=0.5)
    groups = optim.build(model, model_cfg, config).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    of = {n: rates[id(p)] for n, p in model.named_parameters()}
    last = max(int(n.split(".")[4]) for n in of if n.startswith("text.tower.transformer.resblocks"))
    assert of[f"text.tower.transformer.resblocks.{last}.mlp.c_fc.weight"] == 0.5
    assert of[f"text.tower.transformer.resblocks.{last - 1}.mlp.c_fc.weight"] == 0.25
    assert of["text.tower.token_embedding.weight"] == 0.5 ** (last + 2)
    assert of["text.tower.ln_final.weight"] == of["text.tower.text_projection"] == 1


def test_layer_decay_of_a_resnet() -> None:
    with torch.device("meta"):
        tower = towers.build_tower(registry.read_model_cfg("RN50"), "image", 8)
    depth = Depth(f"tower.{name}" for name, _ in tower.named_parameters())
    expected = {
        "conv1.weight": 5, "bn3.bias": 5, "layer1.0.conv1.weight": 4, "layer1.2.bn1.weight": 4,
        "layer4.2.conv3.weight": 1, "attnpool.positional_embedding": 0, "attnpool.q_proj.bias": 0,
    }  # fmt: skip
    assert {name: depth.from_output(f"tower.{name}") for name in expected} == expected


def test_layer_decay_of_other_towers(tiny_model: Path) -> None:
    """Names of timm's ViTamin, two stages before two blocks, and of a T5, whose blocks have layers."""
    vitamin = {
        "trunk.pos_embed": 5, "trunk.cls_token": 5, "trunk.patch_embed.backbone.stem.conv1.weight": 5,
        "trunk.patch_embed.backbone.stages.0.0.norm.weight": 4, "trunk.patch_embed.backbone.stages.1.3.norm.weight": 3,
        "trunk.blocks.0.mlp.weight": 2, "trunk.blocks.1.norm1.weight": 1, "trunk.attn_pool.latent": 0, "head.proj": 0,
    }  # fmt: skip
    t5 = {"transformer.embed_tokens.weight": 3, "transformer.block.0.layer.1.weight": 2,
          "transformer.block.1.layer.0.weight": 1, "transformer.final_layer_norm.weight": 0}  # fmt: skip
    for expected in (vitamin, t5):
        depth = Depth(f"tower.{name}" for name in expected)
        assert {name: depth.from_output(f"tower.{name}") for name in expected} == expected
    model, model_cfg = model_of(str(tiny_model))
    model.image.tower = torch.nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"optim\.layer_decay: the layers of this image tower .* optim\.lr_image"):
        optim.build(model, model_cfg, OptimConfig(lr=1.0, layer_decay=0.5))


def test_learning_rate_schedules() -> None:
    def curve(**settings: object) -> list[float]:
        config = OptimConfig.model_validate({"lr": 1.0, **settings})
        return [lr_factor(config, step, total=10, warmup=2, cooldown=2) for step in range(10)]

    assert curve()[:3] == [0.5, 1.0, 1.0]
    assert curve()[6] == pytest.approx(0.5)
    assert curve(final_lr=0.2)[9] > 0.2
    assert curve(schedule="linear")[6] == pytest.approx(0.5)
    assert curve(schedule="constant")[2:] == [1.0] * 6 + [0.5, 0.0]
    assert curve(schedule="rsqrt")[7] == pytest.approx(0.5)
