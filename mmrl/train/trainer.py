"""`mmrl train`: builds what a config names, then steps, evaluates and saves."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from mmrl import durations
from mmrl.config import Config
from mmrl.data.batches import Batch
from mmrl.data.stream import Stream
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.distributed.heartbeat import Heartbeat
from mmrl.engine import optim
from mmrl.engine.checkpoint import Checkpoints, read_checkpoint
from mmrl.engine.engine import Engine
from mmrl.engine.loss_scale import LossScale
from mmrl.engine.optim import MovingAverage
from mmrl.engine.timing import ThroughputMeter, Trace
from mmrl.errors import InputError, RunStopped
from mmrl.evaluate import sets
from mmrl.model import bundle, folding, two_tower
from mmrl.model.two_tower import MatryoshkaCLIP
from mmrl.output.console import print_line
from mmrl.output.files import exclusive
from mmrl.train import host_checks
from mmrl.train.bad_samples import BadSamples
from mmrl.train.feed import BatchFeed
from mmrl.train.log import TrainingLog
from mmrl.train.prefixes import Prefixes
from mmrl.train.preflight import PreparedRun, pack_data_sets, prepare
from mmrl.train.rotate import rotation_of_run
from mmrl.train.run_folder import with_stored_values
from mmrl.train.sides import open_teacher
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
        pack_data_sets(config, world)
        host_checks.check(config, world, console)
        config = with_stored_values(config, world)
        prepared = prepare(config, world)
        with contextlib.ExitStack() as held, stop_on_signals() as stop:
            lock = exclusive(Path(config.run), "mmrl train")
            host_checks.agree(world, lambda: held.enter_context(lock), rank_0_only=True)
            Trainer(config, prepared, world, console, heartbeat).run(stop)
    return Path(config.run)


class Trainer:
    """Model, engine and stream of a run, and its loop: step, evaluate, save, resume."""

    def __init__(
        self, config: Config, prepared: PreparedRun, world: World, console: Console, heartbeat: Heartbeat | None = None
    ) -> None:
        self.config, self.prepared, self.world, self.console = config, prepared, world, console
        self._heartbeat, self._stop = heartbeat, StopRequest()
        torch.manual_seed(config.seed)
        built = bundle.initial_towers(config.model)
        if built.random and prepared.resume_from is None:
            prepared.reader.notes.append(f"Random weights at the start: {', '.join(built.random)} (model.pretrained).")
        built = dataclasses.replace(built, image_spec=config.image.applied_to(built.image_spec))
        with_bias = config.loss.name == "sigmoid"
        dims, learns_rotation = prepared.nested.dims, config.nesting.learns_rotation
        num_scales = 1 if learns_rotation else len(dims)  # with a rotation, those of the smaller dims are in Prefixes
        model = two_tower.from_towers(built, config.model.logit_scale, num_scales, with_bias)
        self.engine = Engine(
            model,
            optim.build(model, built.model_cfg, config.optim),
            config.engine,
            config.optim.clip_norm,
            config.train.batch_size // world.size // prepared.accumulation,
        )
        teacher, tokenise = open_teacher(config.teacher, self.engine, built.tokenise)
        self.stream = Stream(
            prepared.reader,
            config.train.batch_size // world.size,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=prepared.workers,
            image=built.image_spec,
            text=tokenise,
            config=config.data,
            pin_memory=world.device.type == "cuda",
            micro_batch=config.train.micro_batch,
            prefetch=prepared.prefetch,
            lost_after_s=config.engine.lost_after_seconds,
            second=config.loss.second_members,
            sides=config.model.sides,
        )
        self._feed = BatchFeed(self.stream, prepared.accumulation, self.engine)
        self.ema = None if config.train.ema is None else MovingAverage(model, config.train.ema)
        self._prefixes = None
        if learns_rotation:
            log_scale_1 = self.engine.full_model.log_logit_scale
            self._prefixes = Prefixes(prepared.nested, log_scale_1, config.optim, config.train.ema, world.device)
        averaged: Any = None if self.ema is None else self.ema.module
        self._trained = bundle.make_bundle(averaged or self.engine.full_model, built, dims)
        """The weights in training, or their moving average."""
        self._final_rotation_DD: torch.Tensor | None = None
        self.encoder = self._trained
        """What is evaluated and saved."""
        if learns_rotation or config.nesting.rotate_at_end or config.model.lora:
            self.encoder = folding.share_weights(self._trained, len(dims) if learns_rotation else None)
        self.checkpoints = Checkpoints(
            Path(config.run), config.checkpoint.keep, lambda line: print_line(self.console, line)
        )
        self.schedule = self._schedule()
        self._train_step = TrainStep(
            config, prepared.nested, self.engine, self.schedule, self.ema, self._prefixes, teacher
        )
        self.step_done = 0
        self.best = -math.inf
        self._evaluations_since_best, self._stopped_early = 0, False
        self._scores: dict[str, Any] | None = None
        rows_per_epoch = self.stream.batches_per_epoch * config.train.batch_size
        self._bad_samples = BadSamples(config.run, prepared.reader, rows_per_epoch, config.data.max_bad_fraction)
        if prepared.resume_from is not None:
            self._resume(prepared.resume_from)

    def run(self, stop: StopRequest) -> None:
        """Steps, logs, evaluates and saves until the last step or a signal. Collective."""
        if self.step_done >= self.schedule.total or (self._stopped_early and self._is_out_of_patience()):
            if self.world.is_rank_0:
                longer = "evaluation.patience" if self._stopped_early else "train.duration"
                print_line(self.console, f"This run is finished: {self.config.run} (a larger {longer} lengthens it)")
            return
        self._stop = stop
        log = TrainingLog(
            self.config,
            self.prepared,
            self.world,
            self.engine,
            self.stream,
            self.schedule,
            self._bad_samples,
            self.step_done,
            self.console,
        )
        with log, contextlib.closing(self.checkpoints):
            log.start()
            self._loop(log)
            log.end()

    def _loop(self, log: TrainingLog) -> None:
        config, total = self.config, self.schedule.total
        save_every = max(1, self._steps(config.checkpoint.every))
        evaluate_every = max(1, self._steps(config.evaluation.every))
        is_new = self.prepared.resume_from is None  # a checkpoint of step 0 is rotated and evaluated already
        if config.nesting.rotate_at_start and is_new:
            log.lines(f"before the first step: {self._rotate_at_start()}")
        if config.evaluation.at_start and is_new and self.evaluate(log):
            self._save(log, is_best=True)
        clock, epoch = ThroughputMeter(self.step_done), self._feed.epoch
        trace = Trace(Path(config.run) / "profile", self.world.rank, config.tracking.profile)
        while self.step_done < total:
            self._report("loading data")
            micro_batches = self._feed.take()
            self._report("training")
            result = self.step(micro_batches)
            trace.step()
            if self._feed.epoch != epoch:
                epoch = self._feed.epoch
                log.bad_samples(self.step_done)
                log.epoch(epoch)
            last = self.step_done == total
            log.advance(self.step_done)
            if last or self.step_done % config.tracking.log_every == 0:
                log.step(self.step_done, result, clock.steps_per_second(self.step_done) * config.train.batch_size)
            with clock.paused():
                is_best, stop_code = False, result.stopping
                if not last and self.step_done % evaluate_every == 0:  # a request during the step is not known yet
                    mine = torch.tensor([float(self._stop.code())], device=self.world.device)
                    stop_code = int(comm.all_reduce_max(mine).item())
                if last or (self.step_done % evaluate_every == 0 and not stop_code):
                    is_best, last = self._evaluate_or_end(log, last)
                if last or stop_code or is_best or self.step_done % save_every == 0:
                    self._report("saving")
                    self._save(log, is_best)
            if stop_code and not last:
                self.checkpoints.finish()
                raise RunStopped(
                    f"Stopped by {self._stop.describe(stop_code)} at step {self.step_done:,} of {total:,}; all is "
                    "saved. Resume with the same command and resume=auto."
                )
            if last:
                break
        trace.stop()
        self.checkpoints.finish()

    def step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Trains one step on this process's share of a global batch, given as micro-batches. Collective.

        Raises:
            RunStopped: the loss or the gradient norm is not finite.
        """
        is_last = self.step_done + 1 >= self.schedule.total
        meanwhile = (lambda: None) if is_last else self._feed.load_ahead
        try:
            result = self._train_step(self.step_done, micro_batches, self._stop.code, meanwhile)
        except NonFiniteError as error:
            self.checkpoints.finish()
            last = self.checkpoints.last()
            remedy = (
                f"The last good checkpoint is {last}; resume from it with resume=auto 'resume_allow=[optim.lr]' and a "
                "lower optim.lr"
                if last
                else "No checkpoint was written before it; lower optim.lr or lengthen optim.warmup"
            )
            raise RunStopped(f"Step {self.step_done + 1:,}: {error}. {remedy}.") from None
        self.step_done += 1
        for batch in micro_batches:
            self._bad_samples.add(batch)
        return result

    def _evaluate_or_end(self, log: TrainingLog, last: bool) -> tuple[bool, bool]:
        """Evaluates; rotates the encoder before the last evaluation if the config says so. Collective.

        Returns: whether `evaluation.best` improved; whether the run ends, also because it is out of patience.
        """
        rotates, is_best = self.config.nesting.rotate_at_end, False
        if not last or not rotates:
            is_best = self.evaluate(log)
        if not last and self._is_out_of_patience():
            last = self._stopped_early = True
            log.lines(
                f"Stopped at step {self.step_done:,} of {self.schedule.total:,}: the last "
                f"{self._evaluations_since_best} evaluations were not better (evaluation.patience)."
            )
        if last and rotates:
            log.lines(f"after the last step: {self._rotate_at_end()}")
            count = self._evaluations_since_best
            is_best = self.evaluate(log) or is_best
            self._evaluations_since_best = count  # a better score of the rotated encoder does not continue the run
        return is_best, last

    def evaluate(self, log: TrainingLog) -> bool:
        """Scores every evaluation set and logs the results. Collective.

        Returns: whether `evaluation.best` improved.
        """
        self._report("evaluating")
        pictures: dict[str, Image.Image] = {}
        results = self.score_sets(pictures if self.config.tracking.has_board and self.world.is_rank_0 else None)
        best, improved = self.config.evaluation.best, False
        if results:
            self._scores = {"step": self.step_done, **sets.as_retrieval_json(results)}
            log.evaluation(self.step_done, results, self._scores, pictures)
        if best and results:
            score = sets.best_score(best, results)
            improved, self.best = score > self.best, max(score, self.best)
        improved = comm.any_rank(improved)
        self._evaluations_since_best = 0 if improved else self._evaluations_since_best + 1
        return improved

    def _is_out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self._evaluations_since_best >= patience

    def score_sets(self, pictures: dict[str, Image.Image] | None = None) -> dict[str, dict[str, Any]]:
        """The scores of each evaluation set at every dim, on every rank. Collective: the work is divided.

        Args:
            pictures: receives those of some queries' first results.
        """
        self._update_encoder()
        prepared = self.prepared
        model = self.encoder.model
        with self._in_evaluation(model), model.encoding_in(self.engine.precision):
            return {
                name: one.score(self.encoder, prepared.evaluation_dims, pictures)
                for name, one in prepared.evaluation_sets.items()
            }

    @contextlib.contextmanager
    def _in_evaluation(self, model: MatryoshkaCLIP) -> Iterator[None]:
        """Within, the model is in evaluation mode and on this process's device."""
        was_training, device = model.training, next(model.parameters()).device
        model.to(self.world.device).eval()
        yield
        model.train(was_training).to(device)

    def _rotate_at_start(self) -> str:
        """Rotates the model and its moving average before the first step. Collective. Returns a console line."""
        self._report("rotating the embedding")
        self.engine.gather_full_model()
        trained = self._trained
        with self._in_evaluation(trained.model):
            rotation_DD, summary = rotation_of_run(self.config.run, trained, self.prepared.reader)
        shapes = {name: value.shape for name, value in trained.model.state_dict().items()}
        rotated = bundle.rotated_state(trained, rotation_DD)
        weights = {name: value.expand(shapes[name]) for name, value in rotated.items()}
        self.engine.load(weights, {})
        if self.ema is not None:
            self.ema.module.load_state_dict(weights)
        return summary

    def _rotate_at_end(self) -> str:
        """Rotates what is saved, not what is trained. Collective. Returns a console line."""
        self._report("rotating the embedding")
        self._update_encoder()
        with self._in_evaluation(self.encoder.model):
            self._final_rotation_DD, summary = rotation_of_run(self.config.run, self.encoder, self.prepared.reader)
        return summary

    def _update_encoder(self) -> None:
        """Brings `encoder` up to date with the weights in training. Collective."""
        self.engine.gather_full_model()
        if self.encoder is self._trained:
            return
        trained_scale = self._trained.model.log_logit_scale
        rotation_DD, log_scale_K = torch.eye(self._trained.dim, dtype=torch.float64), trained_scale
        bias_K = self._trained.model.logit_bias
        if self._prefixes is not None:
            rotation_DD, log_scale_K = self._prefixes.folded(trained_scale)
        if self._final_rotation_DD is not None:
            # The prefixes before the rotation had other scales and biases.
            rotation_DD, log_scale_K = self._final_rotation_DD @ rotation_DD, trained_scale[-1:]
            bias_K = None if bias_K is None else bias_K[-1:]
        folding.fold(self._trained, self.encoder, rotation_DD, log_scale_K, bias_K)

    def _save(self, log: TrainingLog, is_best: bool) -> None:
        log.bad_samples(self.step_done)  # the stream's position is beyond them
        self._update_encoder()
        state = {
            "step": self.step_done,
            "stream": self._feed.state_dict(),
            "best": self.best if math.isfinite(self.best) else None,
            "evaluations_since_best": self._evaluations_since_best,
            "stopped_early": self._stopped_early,
            "bad": self._bad_samples.counts,
            "loss_scale": self.engine.loss_scale and dataclasses.asdict(self.engine.loss_scale),
        }
        scores = self._scores if self._scores and self._scores["step"] == self.step_done else None
        prefixes = None if self._prefixes is None else self._prefixes.state()
        self.checkpoints.save(self.step_done, self.encoder, self.engine, self.ema, prefixes, state, is_best, scores)

    def _resume(self, checkpoint: Path) -> None:
        saved = read_checkpoint(checkpoint)
        if self._prefixes is not None and not saved.prefixes:
            raise InputError(
                f"resume: {checkpoint} has no rotation (nesting.rotation): an earlier version wrote it; train anew."
            )
        self.engine.load(saved.training_weights, saved.moments)
        state = saved.state
        self.stream.load_state_dict(state["stream"])
        self.step_done = state["step"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self._evaluations_since_best = state.get("evaluations_since_best", 0)
        self._stopped_early = state.get("stopped_early", False)
        if self._prefixes is not None:
            self._prefixes.load(saved.prefixes)
        self._bad_samples.restore(state["bad"], self.step_done * self.config.train.batch_size // self.world.size)
        if self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(**state["loss_scale"])
        if self.ema is not None:
            average = self.ema.module
            average.load_state_dict({name: saved.average_weights[name] for name in average.state_dict()})
            self.ema.n_averaged.fill_(self.step_done)

    def _report(self, activity: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.report_progress(self.step_done, activity)

    def _schedule(self) -> Schedule:
        config = self.config
        total = max(1, self._steps(config.train.duration))
        rise = self._steps(config.nesting.prefix_gradient.duration or total)
        return Schedule(total, self._steps(config.optim.warmup), self._steps(config.optim.cooldown), max(1, rise))

    def _steps(self, duration: int | str) -> int:
        return durations.to_steps(duration, self.config.train.batch_size, self.stream.batches_per_epoch)
