"""Saves and loads checkpoints. Layout of a run folder:

RUN/
    config.yaml               the resolved config, written before training starts
    metrics.jsonl             one object per logged step
    evaluations.jsonl         one object per evaluation: step, samples, and the scores of every set
    bad_samples.jsonl         the samples that were skipped
    checkpoints/
        step-400/             complete or absent: written under a temporary name, then renamed
            manifest.json, model.safetensors, tokenizer/    the encoder, see model/bundle.py
            retrieval.json    its scores on the evaluation sets, if they were measured at this step
            training/         only needed to resume; independent of ZeRO stage and number of processes
                state.json               step, position in the stream, best score
                optimizer.safetensors    optimizer moments, unsharded, by parameter name
                prefixes.safetensors     rotation, logit scales of the smaller dims, their optimizer (nesting.rotation)
                weights.safetensors      the trained weights that differ from the encoder's: all with a moving average
                                         (train.ema), the projections before the rotation is folded into them
                average.safetensors      the same of the moving average
        last -> step-400      symbolic links, replaced atomically
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from mmrl.distributed import comm
from mmrl.durations import Duration
from mmrl.engine.engine import Engine
from mmrl.errors import InputError, RunStopped
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.model.folding import unshared
from mmrl.settings import Settings, machine_field

_STATE, _MOMENTS, _PREFIXES = "state.json", "optimizer.safetensors", "prefixes.safetensors"
_WEIGHTS, _AVERAGE = "weights.safetensors", "average.safetensors"
_STEP_FOLDER = re.compile(r"^step-(\d+)$")


class CheckpointConfig(Settings):
    """How often checkpoints are saved, and how many are kept."""

    every: Duration = machine_field("1000 steps")
    """Interval between checkpoints. One is also saved at the end, on a signal and at a new best score."""
    keep: int = machine_field(2, ge=1)
    """Number of latest checkpoints to keep. The best one is kept in addition."""


@dataclass(frozen=True)
class _Snapshot:
    """A copy of everything that a checkpoint contains."""

    step: int
    is_best: bool
    encoder: Bundle
    encoder_weights: dict[str, torch.Tensor]
    training: dict[str, dict[str, torch.Tensor]]
    """Tensors by file of the folder `training`."""
    state: dict[str, Any]
    scores: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of one run folder, written in the background."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self._keep = keep
        self._writer: threading.Thread | None = None
        self._error = ""

    def save(
        self,
        step: int,
        encoder: Bundle,
        engine: Engine,
        average: AveragedModel | None,
        prefixes: dict[str, torch.Tensor] | None,
        state: dict[str, Any],
        is_best: bool = False,
        scores: dict[str, Any] | None = None,
    ) -> None:
        """Copies weights and optimizer state, then writes step-N and its links in a thread. Collective.

        Args:
            encoder: what is evaluated. It may share weights with the model of `engine`, or with the moving average.
            average: the moving average, if there is one.
            prefixes: the state of `train.prefixes.Prefixes`, if a rotation is learned.
            scores: the content of retrieval.json for this step, if it was evaluated.

        Raises:
            RunStopped: an earlier checkpoint could not be written.
        """
        self.finish()
        moments = engine.moments()
        if not comm.world().is_rank_0:
            return
        training = {_MOMENTS: moments, _WEIGHTS: _cpu_copy(unshared(engine.full_model, encoder.model))}
        if average is not None:
            training[_AVERAGE] = _cpu_copy(unshared(average.module, encoder.model))
        if prefixes is not None:
            training[_PREFIXES] = prefixes
        snapshot = _Snapshot(step, is_best, encoder, _cpu_copy(encoder.state()), training, state, scores)
        self._writer = threading.Thread(target=self._write_atomic, args=(snapshot,))
        self._writer.start()

    def finish(self) -> None:
        """Waits until the checkpoint of the last `save` is on disk. Collective.

        Raises:
            RunStopped: it could not be written, e.g. because the disk is full. Earlier checkpoints are unaffected.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error = comm.broadcast_object(self._error)
        if error:
            raise RunStopped(error)

    def _write_atomic(self, snapshot: _Snapshot) -> None:
        final, partial = (self.folder / name for name in (f"step-{snapshot.step}", f".step-{snapshot.step}.partial"))
        try:
            shutil.rmtree(partial, ignore_errors=True)
            self._write(partial, snapshot)
            _fsync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _fsync(self.folder)
            self._link("last", final)
            if snapshot.is_best:
                self._link("best", final)
            self._delete_old()
        except Exception as error:  # any: `finish` reports it in the main thread, which can stop the run
            free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
            shutil.rmtree(partial, ignore_errors=True)
            last = self.last()
            remedy = f"{last} is complete; run again with resume=auto" if last else "There is no earlier checkpoint"
            self._error = (
                f"The checkpoint of step {snapshot.step} could not be written ({str(error) or repr(error)}); "
                f"{free / 1e9:.1f} GB of disk are free. {remedy}."
            )

    def _write(self, partial: Path, snapshot: _Snapshot) -> None:
        training = partial / "training"
        training.mkdir(parents=True)
        source = {"step": snapshot.step, "run": self.folder.parent.name}
        bundle.save(snapshot.encoder, partial, snapshot.encoder_weights, source)
        for name, tensors in snapshot.training.items():
            if tensors:
                save_file(tensors, training / name)
        (training / _STATE).write_text(json.dumps(snapshot.state, indent=2) + "\n")
        if snapshot.scores is not None:
            (partial / "retrieval.json").write_text(json.dumps(snapshot.scores, indent=2) + "\n")

    def last(self) -> Path | None:
        """The latest complete checkpoint."""
        link = self.folder / "last"
        if link.exists():
            return link.resolve()
        steps = self._by_step()
        return steps[-1][1] if steps else None

    def _by_step(self) -> list[tuple[int, Path]]:
        folders = self.folder.iterdir() if self.folder.exists() else ()
        return sorted((int(m[1]), path) for path in folders if (m := _STEP_FOLDER.match(path.name)))

    def _link(self, name: str, target: Path) -> None:
        partial = self.folder / f".{name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.name)
        partial.replace(self.folder / name)

    def _delete_old(self) -> None:
        best = (self.folder / "best").resolve()
        for _, path in self._by_step()[: -self._keep]:
            if path.resolve() != best:
                shutil.rmtree(path)
        for partial in self.folder.glob(".step-*.partial"):  # of a process that was killed
            shutil.rmtree(partial)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a run needs to resume, on the CPU."""

    state: dict[str, Any]
    """Step, position in the stream, best score."""
    training_weights: dict[str, torch.Tensor]
    average_weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    prefixes: dict[str, torch.Tensor]


def read_checkpoint(checkpoint: Path) -> LoadedCheckpoint:
    """Reads a checkpoint to resume from.

    Raises:
        InputError: it is damaged, or of an older version.
    """
    training = checkpoint / "training"
    encoder = bundle.read_weights(checkpoint, bundle.read_manifest(checkpoint))
    try:
        tensors = {
            name: load_file(training / name) if (training / name).exists() else {}
            for name in (_WEIGHTS, _AVERAGE, _PREFIXES)
        }
        state, moments = json.loads((training / _STATE).read_text()), load_file(training / _MOMENTS)
        return LoadedCheckpoint(
            state, encoder | tensors[_WEIGHTS], encoder | tensors[_AVERAGE], moments, tensors[_PREFIXES]
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"resume: {checkpoint} is damaged or of an older version ({error}); delete it to resume from the previous "
            "checkpoint."
        ) from None


def _cpu_copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _fsync(path: Path) -> None:
    """Flushes a folder to the disk, with its files if it is partial, so that it survives a loss of power."""
    for one in [*(path.rglob("*") if path.name.endswith(".partial") else ()), path]:
        file = os.open(one, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
