"""Encoders with random weights, for tests of export and rotation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import drawing

from mmrl.export.bundles import export
from mmrl.model import bundle, towers, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig

TEXTS = ["a red square", "green stripes", "x"]
IMAGES = [drawing(number, size)[0] for number, size in enumerate((32, 40, 64))]


def save_random_encoder(name: str, folder: Path, per_dim: bool = False) -> Path:
    """Writes a bundle with random weights, nested at 4, 8 and 16."""
    torch.manual_seed(1)
    built = towers.build(TowersConfig(name=name))
    model = two_tower.from_towers(built, LogitScaleConfig(per_dim=per_dim), 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one = bundle.make_bundle(model, built, (4, 8, 16))
    bundle.save(one, folder, one.state(), {"step": 5})
    return folder


def export_bundle(model: str, out: Path, dim: int) -> dict[str, Any]:
    """Exports one dim in the bundle format; returns the manifest."""
    return export(model, out, [dim])[str(dim)]


def prefix(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` dims, renormalised."""
    return vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
