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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from mmrl import distributed
from mmrl.engine import Engine
from mmrl.errors import RunStopped
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.optim import Duration
from mmrl.settings import Settings, machine

_STATE = "state.json"
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

    def save(self, step: int, encoder: Bundle, engine: Engine, state: dict[str, Any]) -> Path:
        """Writes step-N and points `last` to it; called on every process.

        Raises:
            RunStopped: it could not be written (a full disk); earlier checkpoints are untouched.
        """
        final, partial = self.folder / f"step-{step}", self.folder / f".step-{step}.partial"
        self._unless_failed(step, partial, lambda: _make_afresh(partial / "training") if _is_main() else None)
        self._unless_failed(step, partial, lambda: self._write(partial, step, encoder, engine, state))
        if _is_main():
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._point("last", final)
            self._tidy()
        distributed.barrier()
        return final

    def _write(self, partial: Path, step: int, encoder: Bundle, engine: Engine, state: dict[str, Any]) -> None:
        engine.save(partial / "training")
        if _is_main():
            bundle.save(encoder, partial, encoder.state(), {"step": step, "run": self.folder.parent.name})
            (partial / "training" / _STATE).write_text(json.dumps(state, indent=2) + "\n")

    def _unless_failed(self, step: int, partial: Path, work: Callable[[], None]) -> None:
        """Does this process's work, then stops all processes if it failed on any: none is left waiting for another."""
        problem = None
        try:
            work()
        except OSError as error:
            problem = str(error) or repr(error)
        problems = [p for p in distributed.gather_objects(problem) if p]
        if not problems:
            return
        free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
        if _is_main():
            shutil.rmtree(partial, ignore_errors=True)
        last = self.last()
        kept = f"{last} is whole; run again with resume=auto" if last else "there is none before it"
        raise RunStopped(
            f"The checkpoint of step {step} could not be written ({problems[0]}); {free / 1e9:.1f} GB of the disk are "
            f"free. {kept}."
        )

    def mark_best(self, checkpoint: Path) -> None:
        """Points `best` to a checkpoint; main process only."""
        self._point("best", checkpoint)
        self._tidy()

    def last(self) -> Path | None:
        """The latest whole checkpoint."""
        link = self.folder / "last"
        if link.exists():
            return link.resolve()
        found = self._found()
        return found[-1][1] if found else None

    def _found(self) -> list[tuple[int, Path]]:
        folders = self.folder.iterdir() if self.folder.exists() else ()
        return sorted((int(m[1]), path) for path in folders if (m := _STEP.match(path.name)))

    def _point(self, name: str, target: Path) -> None:
        beside = self.folder / f".{name}.partial"
        beside.unlink(missing_ok=True)
        beside.symlink_to(target.name)
        beside.replace(self.folder / name)

    def _tidy(self) -> None:
        best = (self.folder / "best").resolve()
        for _, path in self._found()[: -self._keep]:
            if path.resolve() != best:
                shutil.rmtree(path)
        for leftover in self.folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The step, stream position and best score that `save` was given."""
    return json.loads((checkpoint / "training" / _STATE).read_text())


def _is_main() -> bool:
    return distributed.world().is_main


def _make_afresh(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
