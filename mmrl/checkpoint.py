"""What a run keeps, and how it goes on.

RUN/
    config.yaml               resolved, written before anything runs
    metrics.jsonl             one object a logged step
    bad_samples.jsonl         what was skipped
    checkpoints/
        step-400/             whole or absent: written beside, then renamed
            manifest.json, model.safetensors, tokenizer/    the encoder, as in model/bundle.py
            training/         state.json (step, stream, best) and DeepSpeed's files: for resuming alone
        last -> step-400      symbolic links, replaced in one move
        best -> step-300
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from mmrl import distributed
from mmrl.engine import Engine
from mmrl.errors import RunStopped
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.optim import Duration
from mmrl.settings import Settings, machine

_STEP = re.compile(r"^step-(\d+)$")


class CheckpointConfig(Settings):
    """When a run saves, and how much it keeps."""

    every: Duration = machine("1000 steps")
    keep: int = Field(default=2, ge=1, json_schema_extra={"machine": True})
    """How many of the latest checkpoints stay; the best one stays besides."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self._keep = keep

    def save(
        self, step: int, encoder: Bundle, weights: dict[str, torch.Tensor], engine: Engine, state: dict[str, Any]
    ) -> Path:
        """Writes step-N and points `last` to it; called on every process.

        Raises:
            RunStopped: it could not be written (a full disk); earlier checkpoints are untouched.
        """
        final, partial = self.folder / f"step-{step}", self.folder / f".step-{step}.partial"
        problem = None
        try:
            if distributed.world().is_main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "training").mkdir(parents=True)
            distributed.barrier()
            engine.save(partial / "training")
            if distributed.world().is_main:
                bundle.save(encoder, partial, weights, {"step": step, "run": self.folder.parent.name})
                (partial / "training" / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            problem = str(error)
        problems = [p for p in distributed.gather_objects(problem) if p]
        if problems:
            self._give_up(step, partial, problems[0])
        if distributed.world().is_main:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._point("last", final)
            self._tidy()
        distributed.barrier()
        return final

    def _give_up(self, step: int, partial: Path, problem: str) -> None:
        if distributed.world().is_main:
            shutil.rmtree(partial, ignore_errors=True)
        last = self.last()
        kept = f"{last} is whole; free some space and run again with resume=auto" if last else "there is none before it"
        raise RunStopped(f"The checkpoint of step {step} could not be written ({problem.splitlines()[0]}): {kept}.")

    def mark_best(self, checkpoint: Path) -> None:
        """Points `best` to a checkpoint; main process only."""
        self._point("best", checkpoint)
        self._tidy()

    def last(self) -> Path | None:
        """The latest whole checkpoint."""
        link = self.folder / "last"
        return link.resolve() if link.exists() else None

    def _point(self, name: str, target: Path) -> None:
        beside = self.folder / f".{name}.partial"
        beside.unlink(missing_ok=True)
        beside.symlink_to(target.name)
        beside.replace(self.folder / name)

    def _tidy(self) -> None:
        best = (self.folder / "best").resolve()
        found = sorted((int(m[1]), path) for path in self.folder.iterdir() if (m := _STEP.match(path.name)))
        for _, path in found[: -self._keep]:
            if path.resolve() != best:
                shutil.rmtree(path)
        for leftover in self.folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The step, stream position and best score that `save` was given."""
    return json.loads((checkpoint / "training" / "state.json").read_text())
