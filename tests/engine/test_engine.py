"""The logit scale is clamped in the forward pass, at every ZeRO stage."""

import math
from pathlib import Path

import pytest
import torch

from mmrl.distributed import comm
from mmrl.engine import optim
from mmrl.engine.engine import Engine, EngineConfig
from mmrl.engine.optim import OptimConfig
from mmrl.model import towers, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_logit_scale_is_clamped_to_100_and_recovers(tiny_model: Path, stage: int) -> None:
    comm.start()
    built = towers.build(TowersConfig(name=str(tiny_model)))
    model = two_tower.from_towers(built, LogitScaleConfig(init=90.0), 1)
    optimizer = optim.build(model, built.model_cfg, OptimConfig(lr=1e-3, lr_logit_scale=0.02, betas=[0.5, 0.9]))
    engine = Engine(model, optimizer, EngineConfig(zero_stage=stage), clip_norm=None, micro_batch=2)
    pixels, tokens = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), built.tokenise(["a", "b"])

    def push(direction: float, steps: int) -> list[float]:
        scales = []
        for _ in range(steps):
            image_BD, text_BD, scale, _ = engine(pixels, tokens)
            scales.append(scale.item())
            engine.backward(direction * scale.sum() + 0 * (image_BD.sum() + text_BD.sum()), last=True)
            engine.step()
        return scales

    upward = push(-1.0, 20)
    assert upward[0] == pytest.approx(90)
    assert upward[-1] == pytest.approx(100)
    assert max(upward) <= 100.001
    engine.gather_full_model()
    assert engine.full_model.log_logit_scale.item() > math.log(100)  # only the output is clamped
    assert push(1.0, 20)[-1] < 95
