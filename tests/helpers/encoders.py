"""Encoders with random weights, for tests of export, search and rotation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import drawing, encoded, write_tar

from mmrl.export.bundles import export
from mmrl.model import bundle, two_tower
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig

TEXTS = ["a red square", "green stripes", "x"]
IMAGES = [drawing(number, size)[0] for number, size in enumerate((32, 40, 64))]


def save_random_encoder(
    name: str, folder: Path, per_dim: bool = False, towers: Literal["both", "image", "text"] = "both"
) -> Path:
    """Writes a bundle with random weights, nested at 4, 8 and 16."""
    torch.manual_seed(1)
    built = bundle.initial_towers(TowersConfig(name=name, towers=towers))
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


def pair_members(side: str, number: int) -> list[tuple[str, bytes]]:
    """The members of a sample for an encoder with one tower: a question and its passage, or two images of an item."""
    (image, caption, _), (other, _, _) = drawing(number), drawing(number + 1200)
    if side == "text":
        metadata = {"captions": [f"what is {caption}?"], "second_text": f"it shows {caption} {number}"}
        return [(f"{number:05}.json", json.dumps(metadata).encode())]
    return [(f"{number:05}.png", encoded(image)), (f"{number:05}.second.png", encoded(other))]


@dataclass(frozen=True)
class OneTower:
    """An encoder with one tower, and a shard of 24 pairs for it."""

    side: Literal["text", "image"]
    encoder: Path
    shards: Path

    @property
    def absent(self) -> Literal["text", "image"]:
        return "image" if self.side == "text" else "text"


@pytest.fixture(scope="session", params=["text", "image"])
def one_tower(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OneTower:
    side, folder = request.param, tmp_path_factory.mktemp("one-tower")
    shards = write_tar(folder / "pairs.tar", [member for n in range(24) for member in pair_members(side, n)])
    return OneTower(side, save_random_encoder(str(tiny_model), folder / side, towers=side), shards)
