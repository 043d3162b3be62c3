"""Training: everything that can be refused is refused first, then the parts are built in the order below.

Shapes: b pairs of this process, C channels, H and W the image's size, L tokens, D the embedding's width, K dims.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmrl import config as configs
from mmrl import distributed, optim
from mmrl.checkpoint import Checkpoints, read_state
from mmrl.config import Config
from mmrl.data import draws
from mmrl.data.samples import SampleReader
from mmrl.data.shards import Problem
from mmrl.data.stream import Batch, Stream, open_reader
from mmrl.distributed import World
from mmrl.engine import Engine
from mmrl.errors import InputError, RunStopped, did_you_mean
from mmrl.evaluate import report, sets
from mmrl.losses.nested_infonce import NestedLoss, nested_info_nce
from mmrl.model import bundle, towers, two_tower
from mmrl.model.bundle import Bundle
from mmrl.model.two_tower import MatryoshkaCLIP
from mmrl.nesting import Nesting, check_dims, nesting
from mmrl.tracking import Tracker

_DROPOUT_DRAW = 1 << 21


def train(config: Config, console: Console | None = None) -> Path:
    """Carries out a run, or the rest of one; returns its folder.

    Raises:
        InputError: a mistake in the config or the data, before any long work starts.
        RunStopped: the run could not go on; the message says how to resume.
    """
    console = console or Console()
    world = distributed.start(config.engine.timeout_minutes * 60)
    plan = prepare(config, world)
    with _stop_on_signals() as stop:
        trainer = Trainer(config, plan, world, console)
        trainer.run(stop)
    return Path(config.run)


@dataclass(frozen=True)
class Plan:
    """What was found out before the model is built."""

    nested: Nesting
    reader: SampleReader
    evaluation_readers: dict[str, SampleReader]
    evaluation_dims: list[int]
    resume_from: Path | None


def prepare(config: Config, world: World) -> Plan:
    """Every check that needs no model, on every process; then the run folder, by the main one.

    Raises:
        InputError: something does not fit.
    """
    if config.train.batch_size % world.size:
        raise InputError(
            f"train.batch_size: {config.train.batch_size} cannot be divided over {world.size} processes; "
            f"take a multiple of {world.size}."
        )
    width = towers.read_model_cfg(config.model.name)["embed_dim"]
    nested = nesting(config.nesting.dims, config.nesting.weights, width)
    evaluation_dims = config.evaluation.dims or list(nested.dims)
    check_dims(evaluation_dims, width, "evaluation.dims")
    _check_best(config, evaluation_dims)
    reader = open_reader(config.data.train, config.data.fields)
    evaluation_readers = {
        name: open_reader(one.shards, one.fields or config.data.fields) for name, one in config.evaluation.sets.items()
    }
    try:
        resume_from = open_run(config) if world.is_main else None
        refusal = None
    except InputError as error:
        resume_from, refusal = None, str(error)
    resume_from, refusal = distributed.from_main((resume_from, refusal))
    if refusal:
        raise InputError(refusal)
    return Plan(nested, reader, evaluation_readers, evaluation_dims, resume_from)


def _check_best(config: Config, dims: list[int]) -> None:
    best, names = config.evaluation.best, config.evaluation.sets
    if best is None:
        return
    if best.set not in names:
        raise InputError(
            f"evaluation.best.set: there is no evaluation set {best.set!r}.{did_you_mean(best.set, names)}"
        )
    if best.dim not in dims:
        raise InputError(f"evaluation.best.dim: {best.dim} is not evaluated; evaluated are {dims}.")
    allowed = ["R@1", "R@5", "R@10", "mAP", "nDCG@10", "median_rank"]
    if best.metric not in allowed:
        raise InputError(f"evaluation.best.metric: {best.metric!r} is not measured; allowed: {', '.join(allowed)}.")


def open_run(config: Config) -> Path | None:
    """Makes the run folder, or finds the checkpoint to go on from; writes config.yaml.

    Raises:
        InputError: the folder holds something else, a run that was not asked to go on, or one of another config.
    """
    folder = Path(config.run)
    stored = folder / "config.yaml"
    if folder.exists() and not stored.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"run: {folder} exists and is no run folder; choose another with run=FOLDER.")
    last = Checkpoints(folder, config.checkpoint.keep).last()
    if stored.exists():
        differing = configs.differences(configs.load(stored, [f"run={folder}"]), config)
        if differing:
            raise InputError(
                f"run: {folder} holds a run of another config ({'; '.join(differing[:3])}); "
                "choose another folder with run=FOLDER."
            )
    if last and config.resume is None:
        raise InputError(
            f"run: {folder} already holds a run (last checkpoint {last.name}); "
            "add resume=auto to go on with it, or choose another folder with run=FOLDER."
        )
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".config.yaml.partial"
    beside.write_text(configs.dump(config))
    beside.replace(stored)
    return last


class Trainer:
    """Model, engine, stream and their step."""

    def __init__(self, config: Config, plan: Plan, world: World, console: Console) -> None:
        self.config, self.plan, self.world, self.console = config, plan, world, console
        torch.manual_seed(config.seed)
        built = towers.build(config.model)
        model = two_tower.from_towers(built, config.model.logit_scale, len(plan.nested.dims))
        self._warn_of_batch_norm(model)
        self.stream = Stream(
            plan.reader,
            config.train.batch_size // world.size,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=config.data.workers,
            image=built.image_spec,
            text=built.tokenise,
            config=config.data,
        )
        self.engine = Engine(
            model,
            optim.build(model, built.model_cfg, config.optim),
            config.engine,
            config.optim.clip_norm,
            config.train.batch_size // world.size,
        )
        self.ema = None if config.train.ema is None else _ema(model, config.train.ema)
        self.encoder: Bundle = bundle.of_towers(self._best_known(), built, plan.nested.dims)
        self.checkpoints = Checkpoints(Path(config.run), config.checkpoint.keep)
        self.total, self.warmup, self.cooldown, self.save_every, self.evaluate_every = (
            max(1, self._steps(duration))
            for duration in (
                config.train.duration,
                config.optim.warmup,
                config.optim.cooldown,
                config.checkpoint.every,
                config.evaluation.every,
            )
        )
        self.step_done = 0
        self.best = -math.inf
        self._unlisted: list[Problem] = []
        self._bad, self._seen = 0, 0
        if plan.resume_from is not None:
            self._resume(plan.resume_from)

    def run(self, stop: "Stop") -> None:
        """The loop: step, log, evaluate, save; until the end or a signal."""
        tracker = self._tracker() if self.world.is_main else None
        if tracker is None:
            self._loop(None, stop)
            return
        with tracker:
            self._introduce(tracker)
            self._loop(tracker, stop)
            tracker.say(f"Done: {self.config.run} holds the run, {self.checkpoints.folder}/best its best encoder.")

    def _loop(self, tracker: Tracker | None, stop: "Stop") -> None:
        began, began_at = time.monotonic(), self.step_done
        if self.step_done >= self.total:
            self._say(tracker, "This run is already finished.")
            return
        for batch in self.stream.forever():
            loss, norm, rate = self.step(batch)
            if tracker:
                tracker.advance(self.step_done)
            if self.step_done % self.config.tracking.log_every == 0 or self.step_done == self.total:
                speed = (self.step_done - began_at) * self.config.train.batch_size / (time.monotonic() - began)
                self._log(tracker, loss, norm, rate, speed)
                began, began_at = time.monotonic(), self.step_done
            last = self.step_done == self.total
            stopping = distributed.from_main(stop.asked) if self.world.size > 1 else stop.asked
            evaluated = None
            if last or (self.step_done % self.evaluate_every == 0 and not stopping):
                pause = time.monotonic()
                evaluated = self.evaluate(tracker, final=last)
                began += time.monotonic() - pause
            if last or stopping or evaluated or self.step_done % self.save_every == 0:
                pause = time.monotonic()
                self._save(tracker, evaluated)
                began += time.monotonic() - pause
            if last:
                return
            if stopping:
                raise RunStopped(
                    f"Stopped by {stop.name} at step {self.step_done:,} of {self.total:,}; all is saved. "
                    "Go on with the same command and resume=auto."
                )

    def step(self, batch: Batch) -> tuple[NestedLoss, float, float]:
        """One optimiser step on one global batch; the only place where weights change.

        Returns: the loss, the gradient's norm, the learning rate.
        """
        rate = optim.set_lr(
            self.engine.optimizer,
            optim.lr_factor(self.config.optim, self.step_done, self.total, self.warmup, self.cooldown),
        )
        # Dropout, where a tower has any, is a function of (seed, step, rank): a resumed step repeats it.
        torch.manual_seed(int(draws.bits(self.config.seed, self.step_done, self.world.rank, _DROPOUT_DRAW) >> 1))
        image_bD, text_bD, scale = self.engine(batch.image, batch.text)
        nested = self.plan.nested
        loss = nested_info_nce(image_bD, text_bD, scale, nested.dims, nested.shares, batch.group.to(self.engine.device))
        if not math.isfinite(loss.total.item()):
            last = self.checkpoints.last()
            remedy = f"the last good checkpoint is {last}" if last else "no checkpoint was written before it"
            raise RunStopped(
                f"Step {self.step_done + 1:,}: the loss is {loss.total.item()}; no weight was changed, and {remedy}. "
                "Lower optim.lr or lengthen optim.warmup."
            )
        norm = self.engine.step(loss.total)
        if self.ema is not None:
            self.ema.update_parameters(self.engine.model)
        self.step_done += 1
        self._unlisted += batch.bad
        self._seen += len(batch.keys)
        return loss, norm, rate

    def evaluate(self, tracker: Tracker | None, final: bool) -> dict[str, dict[str, Any]] | None:
        """Scores every named set at every dim, on all processes' hands; the result is the main process's."""
        if not self.plan.evaluation_readers:
            return None
        model = self.encoder.model
        was_training = model.training
        model.eval()
        results: dict[str, dict[str, Any]] = {}
        for name, reader in self.plan.evaluation_readers.items():
            embedded = sets.embed(
                reader,
                model,
                self.encoder.image_spec,
                self.encoder.tokenise,
                captions=self.config.evaluation.sets[name].captions,
            )
            if self.world.is_main:
                results[name] = sets.score(embedded, self.plan.evaluation_dims)
        model.train(was_training)
        if tracker:
            self._show_evaluation(tracker, results, final)
        return results or {"elsewhere": {}}

    def _show_evaluation(self, tracker: Tracker, results: dict[str, dict[str, Any]], final: bool) -> None:
        folder = Path(self.config.run)
        sets.write_retrieval_json(folder, {"step": self.step_done, **sets.as_retrieval_json(results)})
        if final:
            for name, result in results.items():
                tracker.say(report.table(name, result))
            picture = report.write(folder / "report", folder.name, results)
            tracker.say(f"Picture: {picture}")
            return
        best = self.config.evaluation.best
        for name, result in results.items():
            shown = "  ".join(
                f"{dim}d {100 * scores['text_to_image']['R@10']:.1f}" for dim, scores in result["dims"].items()
            )
            mark = "*" if best and best.set == name else " "
            tracker.say(f"step {self.step_done:,} {mark}{name} text→image R@10: {shown}")

    def _save(self, tracker: Tracker | None, evaluated: dict[str, dict[str, Any]] | None) -> None:
        best, is_best = self.config.evaluation.best, False
        if best and evaluated and self.world.is_main:
            score = sets.best_score(best, evaluated)
            is_best = score > self.best
            self.best = max(score, self.best)
        state = {
            "step": self.step_done,
            "stream": self.stream.state_dict(),
            "best": self.best if math.isfinite(self.best) else None,
            "bad": self._bad,
        }
        weights = self.encoder.state()
        path = self.checkpoints.save(self.step_done, self.encoder, weights, self.engine, state)
        if is_best and self.world.is_main:
            self.checkpoints.mark_best(path)

    def _resume(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.engine.load(checkpoint / "training")
        self.stream.load_state_dict(state["stream"])
        self.step_done = state["step"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self._bad, self._seen = state["bad"], self.step_done * self.config.train.batch_size // self.world.size
        if self.ema is not None:
            self.ema.module.load_state_dict(bundle.read_weights(checkpoint, bundle.read_manifest(checkpoint)))
            self.ema.n_averaged.fill_(self.step_done)

    def _log(self, tracker: Tracker | None, loss: NestedLoss, norm: float, rate: float, speed: float) -> None:
        problems = [p for share in distributed.gather_objects(self._unlisted) for p in share]
        self._unlisted = []
        self._bad += len(problems)
        if tracker:
            scales = self.engine.model.logit_scale.detach().tolist()
            tracker.log(
                {
                    "step": self.step_done,
                    "samples": self.step_done * self.config.train.batch_size,
                    "epoch": self.step_done / self.stream.batches_per_epoch,
                    "loss": loss.total.item(),
                    "loss_by_dim": {str(dim): value.item() for dim, value in loss.by_dim.items()},
                    "logit_scale": scales[0] if len(scales) == 1 else scales,
                    "lr": rate,
                    "grad_norm": norm,
                    "samples_per_second": speed,
                    "bad_samples": self._bad,
                }
            )
            tracker.bad_samples(self.step_done, [dataclasses.asdict(problem) for problem in problems])
        self._check_bad_share()

    def _check_bad_share(self) -> None:
        seen = max(self._seen * self.world.size, 1000)
        if self._bad > self.config.data.max_bad_fraction * seen:
            raise RunStopped(
                f"{self._bad:,} of {self._seen * self.world.size:,} samples were bad, more than "
                f"data.max_bad_fraction {self.config.data.max_bad_fraction:.2%} allows; "
                f"{self.config.run}/bad_samples.jsonl lists them with their reasons."
            )

    def _introduce(self, tracker: Tracker) -> None:
        count = sum(p.numel() for p in self.engine.model.parameters())
        tail = self.stream.samples % self.stream.global_batch_size
        tracker.say(
            f"{self.config.model.name}: {count / 1e6:.1f} M parameters, nested dims {list(self.plan.nested.dims)}",
            f"{self.stream.samples:,} pairs, {self.stream.batches_per_epoch:,} steps an epoch of "
            f"{self.config.train.batch_size:,} (another {tail} left out each epoch), {self.total:,} steps; "
            f"{self.world.size} process(es) on {self.world.device.type}, {self.config.engine.precision}",
        )
        problems = self.plan.reader.problems
        if problems:
            tracker.say(f"{len(problems)} problems in the shards, such as {problems[0].shard}: {problems[0].reason}")
            if not self.step_done:
                tracker.bad_samples(0, [dataclasses.asdict(problem) for problem in problems])
        if self.step_done:
            tracker.say(f"Resumed after step {self.step_done:,}.")

    def _warn_of_batch_norm(self, model: MatryoshkaCLIP) -> None:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        if kinds and self.world.is_main and self.world.size > 1:
            self.console.print(
                f"Note: this tower has {', '.join(sorted(kinds))}, which mixes the samples of one process: "
                "what is learnt depends on the number of processes."
            )

    def _best_known(self) -> MatryoshkaCLIP:
        """The weights to evaluate and to store: the moving average where there is one."""
        return self.engine.model if self.ema is None else self.ema.module  # pyright: ignore[reportReturnType]

    def _steps(self, duration: int | str) -> int:
        return optim.steps(duration, self.config.train.batch_size, self.stream.batches_per_epoch)

    def _tracker(self) -> Tracker:
        return Tracker(Path(self.config.run), self.config.tracking, self.step_done, self.total, self.console)

    @staticmethod
    def _say(tracker: Tracker | None, line: str) -> None:
        if tracker:
            tracker.say(line)


def _ema(model: MatryoshkaCLIP, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


class Stop:
    """Whether a signal has asked the run to end after its present step."""

    def __init__(self) -> None:
        self.asked = False
        self.name = ""

    def __call__(self, number: int, _frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.asked, self.name = True, signal.Signals(number).name


@contextmanager
def _stop_on_signals() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM let the step finish and a checkpoint be written."""
    stop = Stop()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
