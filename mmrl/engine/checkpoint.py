"""What a run keeps, and how it goes on.

RUN/
    config.yaml               resolved, written before anything runs
    metrics.jsonl             one object a logged step
    bad_samples.jsonl         what was skipped
    checkpoints/
        step-400/             whole or absent: written beside, then renamed
            manifest.json, model.safetensors, tokenizer/    the encoder, as in model/bundle.py
            training/         for resuming alone, at any ZeRO stage, on any number of processes
                state.json               step, stream, best
                optimizer.safetensors    its moments, whole, by the parameters' names
                weights.safetensors      only where the encoder's are a moving average of them
        last -> step-400      symbolic links, replaced in one move
        best -> step-300
"""

import json
import os
import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmrl.distributed import comm
from mmrl.durations import Duration
from mmrl.engine.engine import Engine
from mmrl.errors import InputError, RunStopped
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.settings import Settings, machine

_STATE, _MOMENTS, _WEIGHTS = "state.json", "optimizer.safetensors", "weights.safetensors"
_STEP = re.compile(r"^step-(\d+)$")


class CheckpointConfig(Settings):
    """When a run saves, and how much it keeps."""

    every: Duration = machine("1000 steps")
    keep: int = Field(default=2, ge=1, json_schema_extra={"machine": True})
    """How many of the latest checkpoints stay; the best one stays besides."""


@dataclass(frozen=True)
class _Snapshot:
    """All that a checkpoint holds, apart from what the next steps will change."""

    step: int
    is_best: bool
    encoder: Bundle
    encoder_weights: dict[str, torch.Tensor]
    training_weights: dict[str, torch.Tensor] | None
    moments: dict[str, torch.Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self._keep = keep
        self._writing: threading.Thread | None = None
        self._problem = ""

    def save(self, step: int, encoder: Bundle, engine: Engine, state: dict[str, Any], is_best: bool = False) -> None:
        """Takes a copy of everything, and writes step-N and the links to it while training goes on; called on every
        process. `encoder` holds other weights than `engine` where those are a moving average.

        Raises:
            RunStopped: an earlier one could not be written.
        """
        self.finish()
        moments = engine.moments()
        if not _is_main():
            return
        training = None if encoder.model is engine.whole_model else _copied(engine.whole_model.state_dict())
        snapshot = _Snapshot(step, is_best, encoder, _copied(encoder.state()), training, moments, state)
        self._writing = threading.Thread(target=self._write_whole, args=(snapshot,))
        self._writing.start()

    def finish(self) -> None:
        """Waits until what `save` began is on the disk; called on every process.

        Raises:
            RunStopped: it could not be written (a full disk); earlier checkpoints are untouched.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        problem = comm.broadcast_object(self._problem)
        if problem:
            raise RunStopped(problem)

    def _write_whole(self, snapshot: _Snapshot) -> None:
        final, partial = (self.folder / name for name in (f"step-{snapshot.step}", f".step-{snapshot.step}.partial"))
        try:
            shutil.rmtree(partial, ignore_errors=True)
            self._write(partial, snapshot)
            _flush(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _flush(self.folder)
            self._point("last", final)
            if snapshot.is_best:
                self._point("best", final)
            self._tidy()
        except Exception as error:  # any at all: `finish` tells of it, in the thread that can stop the run
            free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
            shutil.rmtree(partial, ignore_errors=True)
            last = self.last()
            kept = f"{last} is whole; run again with resume=auto" if last else "there is none before it"
            self._problem = (
                f"The checkpoint of step {snapshot.step} could not be written ({str(error) or repr(error)}); "
                f"{free / 1e9:.1f} GB of the disk are free. {kept}."
            )

    def _write(self, partial: Path, snapshot: _Snapshot) -> None:
        training = partial / "training"
        training.mkdir(parents=True)
        source = {"step": snapshot.step, "run": self.folder.parent.name}
        bundle.save(snapshot.encoder, partial, snapshot.encoder_weights, source)
        save_file(snapshot.moments, training / _MOMENTS)
        if snapshot.training_weights is not None:
            save_file(snapshot.training_weights, training / _WEIGHTS)
        (training / _STATE).write_text(json.dumps(snapshot.state, indent=2) + "\n")

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


@dataclass(frozen=True)
class Saved:
    """What `Checkpoints.save` kept, for resuming."""

    state: dict[str, Any]
    """The step, stream position and best score."""
    encoder_weights: dict[str, torch.Tensor]
    training_weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def read(checkpoint: Path) -> Saved:
    """What a checkpoint holds, on the CPU.

    Raises:
        InputError: it is damaged, or of an older version.
    """
    training = checkpoint / "training"
    encoder = bundle.read_weights(checkpoint, bundle.read_manifest(checkpoint))
    try:
        weights = load_file(training / _WEIGHTS) if (training / _WEIGHTS).exists() else encoder
        return Saved(json.loads((training / _STATE).read_text()), encoder, weights, load_file(training / _MOMENTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"resume: {checkpoint} is damaged or of an older version ({error}); remove it, and the run goes on from "
            "the one before."
        ) from None


def _is_main() -> bool:
    return comm.world().is_rank_0


def _copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _flush(path: Path) -> None:
    """To the disk itself, so that not even a loss of power leaves a name without its contents."""
    for one in [*(path.rglob("*") if path.name.endswith(".partial") else ()), path]:
        file = os.open(one, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
