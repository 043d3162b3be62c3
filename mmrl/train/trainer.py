"""`mmrl train`: builds what a config names, then steps, evaluates and saves."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmrl import durations, turn
from mmrl.config import Config
from mmrl.data.batches import Batch
from mmrl.data.stream import Stream, dead_worker_error
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.distributed.heartbeat import Heartbeat
from mmrl.engine import optim
from mmrl.engine.checkpoint import Checkpoints, read_checkpoint
from mmrl.engine.engine import Engine
from mmrl.engine.loss_scale import LossScale
from mmrl.engine.timing import ThroughputMeter, Trace
from mmrl.errors import RunStopped
from mmrl.evaluate import sets
from mmrl.model import bundle, towers, two_tower
from mmrl.model.bundle import Bundle
from mmrl.model.two_tower import MatryoshkaCLIP
from mmrl.train import host_checks
from mmrl.train.bad_samples import BadSamples
from mmrl.train.log import TrainingLog
from mmrl.train.preflight import PreparedRun, prepare
from mmrl.train.signals import StopRequest, stop_on_signals
from mmrl.train.step import NonFiniteError, Schedule, StepResult, TrainStep


def train(config: Config, console: Console | None = None) -> Path:
    """Runs a training, or resumes it; returns its folder.

    Raises:
        InputError: a mistake in the config or the data, before any long work starts.
        RunStopped: the run could not continue; the message says how to resume.
    """
    console = console or Console()
    world = comm.start(config.engine.timeout_minutes * 60)
    with Heartbeat(world, config.engine.lost_after_seconds) as heartbeat:
        host_checks.check(config, world, console)
        prepared = prepare(config, world)
        with stop_on_signals() as stop:
            trainer = Trainer(config, prepared, world, console, heartbeat)
            try:
                trainer.run(stop)
            except RuntimeError as error:
                stopped = dead_worker_error(error)
                if stopped is None:
                    raise
                raise stopped from None
    return Path(config.run)


class Trainer:
    """Model, engine and stream of a run, and its loop: step, evaluate, save, resume."""

    def __init__(
        self,
        config: Config,
        prepared: PreparedRun,
        world: World,
        console: Console,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.config, self.prepared, self.world, self.console = config, prepared, world, console
        self._heartbeat = heartbeat
        torch.manual_seed(config.seed)
        built = towers.build(config.model)
        with_bias = config.loss.name == "sigmoid"
        model = two_tower.from_towers(built, config.model.logit_scale, len(prepared.nested.dims), with_bias)
        self._warn_of_batch_norm(model)
        self.stream = Stream(
            prepared.reader,
            config.train.batch_size // world.size,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=config.data.workers,
            image=built.image_spec,
            text=built.tokenise,
            config=config.data,
            pin_memory=world.device.type == "cuda",
            micro_batch=config.train.micro_batch,
        )
        self.engine = Engine(
            model,
            optim.build(model, built.model_cfg, config.optim),
            config.engine,
            config.optim.clip_norm,
            config.train.batch_size // world.size // prepared.accumulation,
        )
        self.ema = None
        if config.train.ema is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.train.ema))
        self.encoder: Bundle = bundle.make_bundle(self._evaluated_model(), built, prepared.nested.dims)
        self.checkpoints = Checkpoints(Path(config.run), config.checkpoint.keep)
        self.schedule = self._schedule()
        self._train_step = TrainStep(config, prepared.nested, self.engine, self.schedule, self.ema)
        self.step_done = 0
        self.best = -math.inf
        self._scores: dict[str, Any] | None = None
        self._bad_samples = BadSamples(config.run, prepared.reader.problems, config.data.max_bad_fraction)
        if prepared.resume_from is not None:
            self._resume(prepared.resume_from)

    def run(self, stop: StopRequest) -> None:
        """Steps, logs, evaluates and saves until the last step or a signal. Collective."""
        if self.step_done >= self.schedule.total:
            if self.world.is_rank_0:
                self.console.print(f"This run is finished: {self.config.run}", soft_wrap=True, highlight=False)
            return
        with TrainingLog(
            self.config,
            self.prepared,
            self.world,
            self.engine,
            self.stream,
            self.schedule,
            self._bad_samples,
            self.step_done,
            self.console,
        ) as log:
            log.start()
            self._loop(log, stop)
            log.end()

    def _loop(self, log: TrainingLog, stop: StopRequest) -> None:
        config, total = self.config, self.schedule.total
        save_every = max(1, self._steps(config.checkpoint.every))
        evaluate_every = max(1, self._steps(config.evaluation.every))
        if config.evaluation.at_start and not self.step_done and self.evaluate(log):
            self._save(log, is_best=True)
        clock, batches, epoch = ThroughputMeter(self.step_done), self.stream.forever(), self.stream.epoch
        trace = Trace(Path(config.run) / "profile", self.world.rank, config.tracking.profile)
        while self.step_done < total:
            if self.step_done == self.schedule.nests_from:
                log.lines(self._rotate(clock))
            self._report("loading data")
            with self.engine.timer.phase("data"):
                micro_batches = list(islice(batches, self.prepared.accumulation))
            self._report("training")
            result = self.step(micro_batches)
            trace.step()
            if self.stream.epoch != epoch:
                epoch = self.stream.epoch
                log.bad_samples(self.step_done)
                log.epoch(epoch)
            last = self.step_done == total
            log.advance(self.step_done)
            if last or self.step_done % config.tracking.log_every == 0:
                log.step(self.step_done, result, clock.steps_per_second(self.step_done) * config.train.batch_size)
            if last and self.schedule.nests_from == total:
                log.lines(self._rotate(clock))
            with clock.paused():
                stopping = comm.any_rank(stop.requested)
                is_best = False
                if last or (self.step_done % evaluate_every == 0 and not stopping):
                    self._report("evaluating")
                    is_best = self.evaluate(log)
                if last or stopping or is_best or self.step_done % save_every == 0:
                    self._report("saving")
                    self._save(log, is_best)
            if stopping and not last:
                self.checkpoints.finish()
                raise RunStopped(
                    f"Stopped by {stop.signal_name or 'a signal to another rank'} at step {self.step_done:,} of "
                    f"{total:,}; all is saved. Resume with the same command and resume=auto."
                )
        trace.stop()
        self.checkpoints.finish()

    def step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Trains one step on this process's share of a global batch, given as micro-batches. Collective.

        Raises:
            RunStopped: the loss or the gradient norm is not finite.
        """
        try:
            result = self._train_step(self.step_done, micro_batches)
        except NonFiniteError as error:
            self.checkpoints.finish()
            last = self.checkpoints.last()
            remedy = f"The last good checkpoint is {last}" if last else "No checkpoint was written before it"
            raise RunStopped(
                f"Step {self.step_done + 1:,}: {error}. {remedy}; lower optim.lr or lengthen optim.warmup."
            ) from None
        self.step_done += 1
        for batch in micro_batches:
            self._bad_samples.add(batch)
        return result

    def evaluate(self, log: TrainingLog) -> bool:
        """Scores every evaluation set and logs the results. Collective.

        Returns: whether `evaluation.best` improved.
        """
        results = self.score_sets()
        best, improved = self.config.evaluation.best, False
        if results:
            self._scores = {"step": self.step_done, **sets.as_retrieval_json(results)}
            log.evaluation(self.step_done, results, self._scores)
        if best and results:
            score = sets.best_score(best, results)
            improved, self.best = score > self.best, max(score, self.best)
        return comm.any_rank(improved)

    def score_sets(self) -> dict[str, dict[str, Any]]:
        """The scores of each evaluation set at every dim, on every rank. Collective: the work is divided."""
        self.engine.gather_full_model()
        encoder, model = self.encoder, self.encoder.model
        results: dict[str, dict[str, Any]] = {}
        with self._in_evaluation(model):
            for name, reader in self.prepared.evaluation_readers.items():
                captions = self.config.evaluation.sets[name].captions
                embedded = sets.embed(reader, model, encoder.image_spec, encoder.tokenise, captions=captions)
                results[name] = sets.score(embedded, self.prepared.evaluation_dims, over_ranks=True)
                if len(reader) < self.prepared.evaluation_samples[name]:
                    results[name]["drawn"] = {"samples": len(reader), "of": self.prepared.evaluation_samples[name]}
        return results

    @contextlib.contextmanager
    def _in_evaluation(self, model: MatryoshkaCLIP) -> Iterator[None]:
        """Within, the model is in evaluation mode and on this process's device."""
        was_training, device = model.training, next(model.parameters()).device
        model.to(self.world.device).eval()
        yield
        model.train(was_training).to(device)

    def _rotate(self, clock: ThroughputMeter) -> str:
        """Rotates the embedding; from here on every dim is trained. Returns a line for the console.

        A checkpoint of this step holds the encoder before the rotation, except for the last step's.
        """
        self._report("rotating the embedding")
        with clock.paused():
            self.engine.gather_full_model()
            training = dataclasses.replace(self.encoder, model=self.engine.full_model)
            with self._in_evaluation(training.model):
                found = turn.find(self.config.run, training, self.prepared.reader)
            turn.apply(self.engine, training, self.encoder, found.rotation_DD)
        return f"step {self.step_done:,}  {found.told()}"

    def _save(self, log: TrainingLog, is_best: bool) -> None:
        log.bad_samples(self.step_done)  # the stream's position is beyond them
        self.engine.gather_full_model()
        state = {
            "step": self.step_done,
            "stream": self.stream.state_dict(),
            "best": self.best if math.isfinite(self.best) else None,
            "bad": self._bad_samples.counts,
            "loss_scale": self.engine.loss_scale and dataclasses.asdict(self.engine.loss_scale),
        }
        scores = self._scores if self._scores and self._scores["step"] == self.step_done else None
        self.checkpoints.save(self.step_done, self.encoder, self.engine, state, is_best, scores)

    def _resume(self, checkpoint: Path) -> None:
        saved = read_checkpoint(checkpoint)
        self.engine.load(saved.training_weights, saved.moments)
        state = saved.state
        self.stream.load_state_dict(state["stream"])
        self.step_done = state["step"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self._bad_samples.restore(state["bad"], self.step_done * self.config.train.batch_size // self.world.size)
        if self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(**state["loss_scale"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.encoder_weights)
            self.ema.n_averaged.fill_(self.step_done)

    def _report(self, activity: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.report_progress(self.step_done, activity)

    def _warn_of_batch_norm(self, model: MatryoshkaCLIP) -> None:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        if kinds and self.world.is_rank_0 and self.world.size > 1:
            self.console.print(
                f"Note: this tower has {', '.join(sorted(kinds))}, which mixes the samples of one process: the result "
                "depends on the number of processes."
            )

    def _evaluated_model(self) -> MatryoshkaCLIP:
        """The weights to evaluate and to store: the moving average if there is one."""
        return self.engine.full_model if self.ema is None else self.ema.module  # pyright: ignore[reportReturnType]

    def _schedule(self) -> Schedule:
        config = self.config
        total, start = max(1, self._steps(config.train.duration)), config.nesting.start
        nests_from = None if start is None else int(start * total)
        return Schedule(total, self._steps(config.optim.warmup), self._steps(config.optim.cooldown), nests_from)

    def _steps(self, duration: int | str) -> int:
        return durations.to_steps(duration, self.config.train.batch_size, self.stream.batches_per_epoch)
