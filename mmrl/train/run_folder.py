"""The folder of a run: created, checked, resumed; which keys may change when a run resumes, and what a longer run does.

A run may be lengthened: on resume `train.duration` may grow. From then on the learning rate follows the schedule of the
new duration, and the factor on the smaller dims' gradient keeps rising over the first one (which is stored as
nesting.prefix_gradient.duration), after which it stays at its end value.
"""

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmrl import durations
from mmrl.config import Config, config_differences, dump_config, load_config
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.engine import optim
from mmrl.engine.checkpoint import Checkpoints, step_of
from mmrl.engine.tracking import METRICS
from mmrl.errors import InputError, did_you_mean
from mmrl.output.appended import AppendedLines
from mmrl.output.files import LOCK, write_atomic
from mmrl.settings import hyperparameters
from mmrl.train import host_checks

CHANGES = "changes.jsonl"
"""The changes of a run's config on resume: {"step", "changed"}, one object per line."""
_LENGTHENED = ("train.duration", "nesting.prefix_gradient.duration")
# Keys (section, key), and what runs that began before a key existed do.
_OLDER = {
    ("data", "lanes"): 1,
    ("data", "mask_equal_captions"): False,
    ("data", "shuffle_window"): 16384,
    ("engine", "precision"): "fp32",
    ("image", "background"): None,
}


def with_stored_values(config: Config, world: World) -> Config:
    """The config with what it takes from the run that it resumes, if any: the keys _OLDER that it does not set, and the
    first duration of a run that is lengthened. Collective.

    Raises:
        InputError: on rank 0, the run's config is damaged; other ranks exit with code 2.
    """
    folder = Path(config.run)
    stored = host_checks.agree(
        world, lambda: _stored_config(folder) if _has_trained(folder) else None, rank_0_only=True
    )
    stored = comm.broadcast_object(stored)
    if stored is None:
        return config
    config = _with_defaults(config, {one: getattr(getattr(stored, one[0]), one[1]) for one in _OLDER})
    rise, first = config.nesting.prefix_gradient, stored.nesting.prefix_gradient.duration
    if first is None and config.train.duration != stored.train.duration:
        first = stored.train.duration
    if first is None or rise.duration is not None or not rise.power:
        return config
    rise = rise.model_copy(update={"duration": first})
    return config.model_copy(update={"nesting": config.nesting.model_copy(update={"prefix_gradient": rise})})


def _stored_config(folder: Path) -> Config | None:
    """The config of the run in a folder, if any; keys that it lacks have the values of _OLDER."""
    try:
        if not (folder / "config.yaml").exists():
            return None
        stored = load_config(folder / "config.yaml")
    except OSError:
        return None  # open_run names the error
    return _with_defaults(stored, _OLDER)


def _with_defaults(config: Config, defaults: Mapping[tuple[str, str], Any]) -> Config:
    """The config with these values of keys that it does not set."""
    for (section, key), value in defaults.items():
        before = getattr(config, section)
        if key not in before.model_fields_set:
            config = config.model_copy(update={section: before.model_copy(update={key: value})})
    return config


def check_run_folder(config: Config, own: Collection[str] = ()) -> Checkpoints:
    """Checks that a run may use its folder; returns the checkpoints in it.

    Args:
        own: names that a folder which is no run yet may hold.

    Raises:
        InputError: the folder is not a run, or holds a run without resume=auto.
    """
    folder = Path(config.run)
    is_run = not folder.exists() or (folder / "config.yaml").exists()
    temporary = (*own, LOCK)  # and what a process that was killed was writing
    others = (
        [one for one in folder.iterdir() if one.name not in temporary and not one.match(".*.partial")]
        if folder.is_dir()
        else []
    )
    if not is_run and (not folder.is_dir() or others):
        raise InputError(f"run: {folder} exists and is not a run folder; choose another with run=FOLDER.")
    checkpoints = Checkpoints(folder, config.checkpoint.keep, lambda line: print(f"mmrl: {line}", file=sys.stderr))
    last = checkpoints.last()
    if last and config.resume is None:
        raise InputError(
            f"run: {folder} already holds a run (last checkpoint {last.name}); "
            "add resume=auto to continue it, or choose another folder with run=FOLDER."
        )
    return checkpoints


def open_run(config: Config, steps_per_epoch: int) -> tuple[Path | None, str | None]:
    """Creates the run folder, or finds the checkpoint to resume from; writes config.yaml.

    Returns: the checkpoint; a sentence on what a lengthened run does, if it was lengthened.

    Raises:
        InputError: the folder is not a run, holds a run without resume=auto, or a run of another config.
    """
    try:
        return _open_run(config, Path(config.run), steps_per_epoch)
    except OSError as error:
        raise InputError(f"run: {config.run} cannot be written ({error}); choose another with run=FOLDER.") from error


def _open_run(config: Config, folder: Path, steps_per_epoch: int) -> tuple[Path | None, str | None]:
    before, notes = _stored_config(folder) if _has_trained(folder) else None, list[str]()
    differing = config_differences(before, config) if before else []
    allowed = [one for one in differing if one.partition(":")[0] in _allowed_keys(config)]
    lengthened = [one for one in differing if one.startswith(_LENGTHENED)]
    refused = [one for one in differing if one not in (*allowed, *lengthened)]
    if before and lengthened and not refused:
        steps = [_steps(one.train.duration, config, steps_per_epoch) for one in (before, config)]
        if steps[1] < steps[0]:
            raise InputError(
                f"train.duration: {folder} is a run of {before.train.duration}, which can grow but not shrink to "
                f"{config.train.duration}; choose another folder with run=FOLDER."
            )
    if refused:
        keys = ",".join(one.partition(":")[0] for one in refused)
        is_optim = all(one.startswith("optim.") for one in refused)
        allow = f", or let them change with resume_allow=[{keys}]" if is_optim else ""
        raise InputError(
            f"run: {folder} holds a run of another config ({'; '.join(refused[:3])}); "
            f"choose another folder with run=FOLDER{allow}."
        )
    last = check_run_folder(config).last_sound()
    if before and lengthened:
        notes.append(_lengthening_note(before, config, steps_per_epoch, last))
    if allowed:
        step = step_of(last)
        AppendedLines(folder / CHANGES, notes.append).append({"step": step, "changed": allowed})
        notes.append(f"From step {step:,} on: {'; '.join(allowed)} (resume_allow; recorded in {folder / CHANGES}).")
    if not _is_stored(config, folder):
        write_atomic(folder / "config.yaml", dump_config(config))
    return last, " ".join(notes) or None


def _is_stored(config: Config, folder: Path) -> bool:
    """Whether config.yaml says the same: then its text stays, with its comments."""
    try:
        return load_config(folder / "config.yaml").model_copy(update={"resume": config.resume}) == config
    except InputError:
        return False


def _has_trained(folder: Path) -> bool:
    """Whether a run has got beyond its start: another one may take the folder of a start that failed."""
    metrics = folder / METRICS
    return (folder / "checkpoints").is_dir() or (metrics.is_file() and metrics.stat().st_size > 0)


def _allowed_keys(config: Config) -> list[str]:
    for key in config.resume_allow:
        if key not in hyperparameters(config) or not key.startswith("optim."):
            keys = [one for one in hyperparameters(config) if one.startswith("optim.")]
            raise InputError(f"resume_allow: {key!r} is not a key of optim.{did_you_mean(key, keys)}")
    return config.resume_allow


def _lengthening_note(before: Config, config: Config, steps_per_epoch: int, last: Path | None) -> str:
    """What learning rate and prefix gradient do in a run that was lengthened, from its checkpoint `last` on."""
    done = step_of(last)
    totals = [_steps(one.train.duration, config, steps_per_epoch) for one in (before, config)]
    warmup, cooldown = (_steps(one, config, steps_per_epoch) for one in (config.optim.warmup, config.optim.cooldown))
    old, new = (optim.lr_factor(config.optim, min(done, total), total, warmup, cooldown) for total in totals)
    note = (
        f"Lengthened from {totals[0]:,} to {totals[1]:,} steps: from step {done:,} on, the learning rate follows the "
        f"schedule of {totals[1]:,} steps ({new:.0%} of its peak; {old:.0%} by that of {totals[0]:,})"
    )
    rise = config.nesting.prefix_gradient
    if config.nesting.learns_rotation and rise.duration is not None:
        steps = _steps(rise.duration, config, steps_per_epoch)
        now = "stays" if done >= steps else f"keeps rising until step {steps:,} and then stays"
        note += f"; the factor on the smaller dims' gradient {now} at {rise.end:g}"
    return f"{note}."


def _steps(duration: int | str, config: Config, steps_per_epoch: int) -> int:
    return durations.to_steps(duration, config.train.batch_size, steps_per_epoch)
