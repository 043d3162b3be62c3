"""A run folder with checkpoints of a tiny encoder, made without training."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from conftest import TINY_MODEL

from mmrl.engine.checkpoint import Checkpoints, read_checkpoint
from mmrl.model import bundle, towers, two_tower
from mmrl.model.bundle import Bundle
from mmrl.model.towers import TowersConfig
from mmrl.model.two_tower import LogitScaleConfig

STEPS = (4, 8, 12)


def tiny_encoder(folder: Path) -> Bundle:
    """An encoder of random weights; its config is written to the folder."""
    (folder / "tiny.json").write_text(json.dumps(TINY_MODEL))
    built = towers.build(TowersConfig(name=str(folder / "tiny.json")))
    return bundle.make_bundle(two_tower.from_towers(built, LogitScaleConfig(), 1), built, (4, 8, 16))


def save(checkpoints: Checkpoints, encoder: Bundle, step: int, is_best: bool = False) -> None:
    """Saves a checkpoint whose state and tensors depend on the step."""
    engine: Any = SimpleNamespace(moments=lambda: {"step": torch.tensor(step)}, full_model=encoder.model)
    checkpoints.save(step, encoder, engine, None, {"q": torch.eye(16) * step}, {"step": step}, is_best, {"dims": {}})


def save_run(folder: Path) -> Path:
    """A run with checkpoints of STEPS; that of step 8 is the best."""
    encoder, run = tiny_encoder(folder), folder / "run"
    checkpoints = Checkpoints(run, len(STEPS), print)
    for step in STEPS:
        save(checkpoints, encoder, step, is_best=step == 8)
    checkpoints.finish()
    return run


def without_hashes(checkpoint: Path) -> None:
    """Makes a checkpoint one of an earlier version, which stored no hashes of its training state."""
    training = checkpoint / "training"
    (training / "files.json").unlink()
    state = json.loads((training / "state.json").read_text())
    del state["has_hashes"]
    (training / "state.json").write_text(json.dumps(state))


def read_back(checkpoint: Path) -> tuple[Any, ...]:
    """All that a run resumes from, in a form that can be compared."""
    loaded = read_checkpoint(checkpoint)
    tensors = (loaded.training_weights, loaded.average_weights, loaded.moments, loaded.prefixes)
    return loaded.state, *({name: one.numpy().tobytes() for name, one in part.items()} for part in tensors)
