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
                files.json               SHA-256 of manifest.json and of the files below
                state.json               step, position in the stream, best score
                optimizer.safetensors    optimizer moments, unsharded, by parameter name
                prefixes.safetensors     rotation, logit scales of the smaller dims, their optimizer (nesting.rotation)
                weights.safetensors      the trained weights that differ from the encoder's: all with a moving average
                                         (train.ema), the projections before the rotation is folded into them,
                                         adapters and the weights before they are merged (model.lora)
                average.safetensors      the same of the moving average
        last -> step-400      symbolic links, replaced atomically
        best -> step-300

A checkpoint is verified before a run resumes from it. If it is damaged, the run resumes from the newest sound one
before it. A checkpoint that cannot be written, because the disk is full, is written as soon as there is space.
"""

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
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
from mmrl.model.manifest import MANIFEST, check_files, read_manifest, sha256
from mmrl.output.files import atomic_path, parse_json, remove
from mmrl.settings import Settings, machine_field

RETRY_S = 30.0
"""How often a checkpoint is written again after it could not be written."""
_FILES, _STATE, _MOMENTS, _PREFIXES = "files.json", "state.json", "optimizer.safetensors", "prefixes.safetensors"
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
    """The checkpoints of one run folder, written in the background.

    `report` prints a line, from any thread.
    """

    def __init__(self, run: Path, keep: int, report: Callable[[str], None]) -> None:
        self.folder = run / "checkpoints"
        self._keep, self._report = keep, report
        self._writer: threading.Thread | None = None
        self._superseded = threading.Event()
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

        If an earlier checkpoint could not be written yet, this one is written in its place.

        Args:
            encoder: what is evaluated. It may share weights with the model of `engine`, or with the moving average.
            average: the moving average, if there is one.
            prefixes: the state of `train.prefixes.Prefixes`, if a rotation is learned.
            scores: the content of retrieval.json for this step, if it was evaluated.
        """
        self.close()
        moments = engine.moments()
        if not comm.world().is_rank_0:
            return
        training = {_MOMENTS: moments, _WEIGHTS: _cpu_copy(unshared(engine.full_model, encoder.model))}
        if average is not None:
            training[_AVERAGE] = _cpu_copy(unshared(average.module, encoder.model))
        if prefixes is not None:
            training[_PREFIXES] = prefixes
        snapshot = _Snapshot(step, is_best, encoder, _cpu_copy(encoder.state()), training, state, scores)
        self._superseded.clear()
        self._writer = threading.Thread(target=self._write_until_done, args=(snapshot,), name="checkpoint")
        self._writer.start()

    def finish(self) -> None:
        """Waits until the checkpoint of the last `save` is on disk. Collective.

        Raises:
            RunStopped: it could not be written, e.g. because the disk is full. Earlier checkpoints are unaffected.
        """
        self.close()
        error = comm.broadcast_object(self._error)
        if error:
            last = self.last()
            remedy = f"{last} is complete; run again with resume=auto" if last else "There is no earlier checkpoint"
            raise RunStopped(f"{error} {remedy}.")

    def close(self) -> None:
        """Waits until the writer has ended. It stops trying to write a checkpoint that could not be written."""
        self._superseded.set()
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write_until_done(self, snapshot: _Snapshot) -> None:
        name, failures = f"The checkpoint of step {snapshot.step:,}", 0
        while True:
            try:
                self._write_atomic(snapshot)
            except Exception as error:  # any: training goes on, and `finish` stops the run
                self._error = f"{name} could not be written ({str(error) or repr(error)}){self._free_space()}."
                if not failures:
                    self._report(
                        f"{self._error} Training goes on, and it is written again every {RETRY_S:.0f} seconds."
                    )
                failures += 1
                if self._superseded.wait(RETRY_S):
                    return
            else:
                self._error = ""
                if failures:
                    self._report(f"{name} is written now.")
                return

    def _free_space(self) -> str:
        with contextlib.suppress(OSError):  # the folder may be gone
            free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
            return f"; {free / 1e9:.1f} GB of disk are free"
        return ""

    def _write_atomic(self, snapshot: _Snapshot) -> None:
        final = self.folder / f"step-{snapshot.step}"
        with atomic_path(final) as partial:
            self._write(partial, snapshot)
            _fsync(partial)
        _fsync(self.folder)
        # `last` after `best`: a run that is killed between them resumes before this step and makes both anew.
        if snapshot.is_best:
            self._link("best", final)
        self._link("last", final)
        self._delete_old(snapshot.step)

    def _write(self, partial: Path, snapshot: _Snapshot) -> None:
        training = partial / "training"
        training.mkdir(parents=True)
        source = {"step": snapshot.step, "run": self.folder.parent.name}
        bundle.save(snapshot.encoder, partial, snapshot.encoder_weights, source)
        for name, tensors in snapshot.training.items():
            if tensors:
                save_file(tensors, training / name)
        (training / _STATE).write_text(json.dumps({**snapshot.state, "has_hashes": True}, indent=2) + "\n")
        hashed = [partial / MANIFEST, *training.iterdir()]
        files = {path.relative_to(partial).as_posix(): sha256(path) for path in hashed}
        (training / _FILES).write_text(json.dumps(files, indent=2) + "\n")
        if snapshot.scores is not None:
            (partial / "retrieval.json").write_text(json.dumps(snapshot.scores, indent=2) + "\n")

    def last(self) -> Path | None:
        """The latest complete checkpoint: that of the link `last`, which a user may set back."""
        link = self.folder / "last"
        if link.exists():
            return link.resolve()
        steps = self._by_step()
        return steps[-1][1] if steps else None

    def last_sound(self) -> Path | None:
        """The latest checkpoint that is not damaged; None if there is none at all. Reports those that are.

        Raises:
            InputError: all are damaged.
        """
        last = self.last()
        if last is None:
            return None
        problems = []
        for path in [last, *(path for _, path in reversed(self._by_step()) if step_of(path) < step_of(last))]:
            problem = find_damage(path)
            if problem is None:
                if problems:
                    self._report(f"{' '.join(problems)} The run resumes from {path.name}.")
                return path
            problems.append(f"The checkpoint {path} is damaged: {problem}")
        raise InputError(
            f"resume: no checkpoint of {self.folder.parent} is sound. {' '.join(problems)} Train anew in another "
            "folder with run=FOLDER."
        )

    def _by_step(self) -> list[tuple[int, Path]]:
        folders = self.folder.iterdir() if self.folder.exists() else ()
        return sorted((int(m[1]), path) for path in folders if (m := _STEP_FOLDER.match(path.name)))

    def _link(self, name: str, target: Path) -> None:
        partial = self.folder / f".{name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(target.name)
        partial.replace(self.folder / name)

    def _delete_old(self, step: int) -> None:
        """Deletes all but the latest before a step. Later ones remain: a run that was set back reaches them again."""
        best = (self.folder / "best").resolve()
        earlier = [path for one, path in self._by_step() if one <= step]
        for path in earlier[: -self._keep]:
            if path.resolve() != best:
                remove(path)
        for partial in self.folder.glob(".step-*.partial"):  # of a process that was killed
            remove(partial)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a run needs to resume, on the CPU."""

    state: dict[str, Any]
    """Step, position in the stream, best score."""
    training_weights: dict[str, torch.Tensor]
    average_weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    prefixes: dict[str, torch.Tensor]


def find_damage(checkpoint: Path) -> str | None:
    """Why a run cannot resume from a checkpoint: a file is missing, or does not have its hash."""
    try:
        odd = next((one for one in checkpoint.rglob("*") if not (one.is_file() or one.is_dir())), None)
        if odd is not None:  # e.g. a pipe, which would be waited for
            return f"{odd.name} is no file."
        manifest = read_manifest(checkpoint)
        check_files(checkpoint, manifest, manifest["files"])
        state = parse_json((checkpoint / "training" / _STATE).read_text())
        if not (checkpoint / "training" / _FILES).exists() and "has_hashes" not in state:
            read_checkpoint(checkpoint)  # of an earlier version
            return None
        files = parse_json((checkpoint / "training" / _FILES).read_text())
        found = {path.relative_to(checkpoint).as_posix() for path in (checkpoint / "training").iterdir()}
        expected = {f"training/{_STATE}", f"training/{_MOMENTS}", MANIFEST, *files, *found}
        for name in sorted(expected - {f"training/{_FILES}"}):
            if not (checkpoint / name).is_file() or sha256(checkpoint / name) != files.get(name):
                return f"{name} is missing or is not the file that was written."
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})."
    except (ValueError, TypeError, AttributeError) as error:  # no JSON, or not of this form
        return f"training/{_STATE} or training/{_FILES} cannot be read ({error})."
    return None


def read_checkpoint(checkpoint: Path) -> LoadedCheckpoint:
    """Reads a checkpoint to resume from.

    Raises:
        InputError: it cannot be read.
    """
    training = checkpoint / "training"
    encoder = bundle.read_weights(checkpoint, bundle.read_manifest(checkpoint))
    try:
        tensors = {
            name: load_file(training / name) if (training / name).exists() else {}
            for name in (_WEIGHTS, _AVERAGE, _PREFIXES)
        }
        state, moments = parse_json((training / _STATE).read_text()), load_file(training / _MOMENTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"resume: {checkpoint} cannot be read ({error}); delete it to resume before it.") from None
    return LoadedCheckpoint(
        state, encoder | tensors[_WEIGHTS], encoder | tensors[_AVERAGE], moments, tensors[_PREFIXES]
    )


def step_of(checkpoint: Path | None) -> int:
    """The step of a checkpoint; 0 without one."""
    match = checkpoint and _STEP_FOLDER.match(checkpoint.name)
    return int(match[1]) if match else 0


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
