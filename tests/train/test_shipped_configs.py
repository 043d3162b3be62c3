"""Every shipped config trains as it is, on little data: two steps of its own towers, with its own recipe."""

import json
from pathlib import Path

import pytest
import torch
from helpers.encoders import save_random_encoder
from rich.console import Console
from safetensors.torch import save_file

from mmrl.config import load_config
from mmrl.train.trainer import train

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MINILM = "starter_minilm.yaml"  # needs an extracted model; tests/model/test_minilm.py trains with it


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of ViT-B/32 as open_clip's trainer writes them, with random values."""
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(open_clip.create_model("ViT-B-32").state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name != MINILM], ids=lambda path: path.stem)
def test_a_shipped_config_trains(path: Path, shards: Path, vit_weights: Path, tmp_path: Path) -> None:
    shipped = load_config(path)
    overrides = [f"run={tmp_path / 'run'}", f"data.train={shards}", "data.workers=0", "train.batch_size=4"]
    overrides += ["train.micro_batch=2", "train.duration=2 steps", "optim.warmup=1 steps", "engine.precision=fp32"]
    overrides += ["tracking.log_every=1", "tracking.tensorboard=false"]
    overrides += [f"evaluation.sets.{name}.shards={shards}/part-2.tar" for name in shipped.evaluation.sets]
    if shipped.model.pretrained:
        overrides.append(f"model.pretrained={vit_weights}")
    if shipped.teacher is not None:
        overrides.append(f"teacher.model={save_random_encoder('mmrl-starter', tmp_path / 'teacher')}")
    console = Console(record=True, width=200)
    folder = train(load_config(path, overrides), console)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == [1, 2]
    assert list(lines[0]["loss_by_dim"]) == [str(dim) for dim in sorted(shipped.nesting.dims)]
    assert ("rotated by" in console.export_text(clear=False)) == shipped.nesting.rotate_at_start
    assert ("Random weights at the start" in console.export_text()) == (shipped.model.pretrained is None)
    assert (folder / "checkpoints/best").exists()
