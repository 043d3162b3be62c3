"""Training: what preflight.py lets through is built in the order below, then stepped, scored and saved.

Shapes: b pairs of this process, C channels, H and W the image's size, L tokens, D the embedding's width, K dims.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmrl import durations, turn
from mmrl.config import Config
from mmrl.data import draws
from mmrl.data.stream import Batch, Stream, killed_worker
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.distributed.heartbeat import Heartbeat
from mmrl.distributed.stragglers import Own, mean_seconds, not_finite, straggler
from mmrl.engine import checkpoint as checkpoints
from mmrl.engine import grad_cache, optim
from mmrl.engine.checkpoint import Checkpoints
from mmrl.engine.engine import Engine
from mmrl.engine.loss_scale import LossScale
from mmrl.engine.timing import Pacer, Trace, peak_memory
from mmrl.engine.tracking import Tracker
from mmrl.errors import RunStopped
from mmrl.evaluate import sets
from mmrl.evaluate.report import write as report
from mmrl.hardware import peak_flops
from mmrl.losses.config import nested_loss
from mmrl.losses.inputs import NestedLoss
from mmrl.model import bundle, footprint, towers, two_tower
from mmrl.model.bundle import Bundle
from mmrl.model.two_tower import MatryoshkaCLIP
from mmrl.train import host_checks
from mmrl.train.bad_samples import Skipped
from mmrl.train.preflight import Plan, prepare
from mmrl.train.signals import Stop, stop_on_signals

_DROPOUT_DRAW, _DIMS_DRAW = 1 << 21, 1 << 23


def train(config: Config, console: Console | None = None) -> Path:
    """Carries out a run, or the rest of one; returns its folder.

    Raises:
        InputError: a mistake in the config or the data, before any long work starts.
        RunStopped: the run could not go on; the message says how to resume.
    """
    console = console or Console()
    world = comm.start(config.engine.timeout_minutes * 60)
    with Heartbeat(world, config.engine.lost_after_seconds) as heartbeat:
        host_checks.check(config, world, console)
        plan = prepare(config, world)
        with stop_on_signals() as stop:
            trainer = Trainer(config, plan, world, console, heartbeat)
            try:
                trainer.run(stop)
            except RuntimeError as error:
                stopped = killed_worker(error)
                if stopped is None:
                    raise
                raise stopped from None
    return Path(config.run)


class Trainer:
    """Model, engine, stream and their step."""

    def __init__(
        self, config: Config, plan: Plan, world: World, console: Console, heartbeat: Heartbeat | None = None
    ) -> None:
        self.config, self.plan, self.world, self.console = config, plan, world, console
        self._heartbeat = heartbeat
        torch.manual_seed(config.seed)
        built = towers.build(config.model)
        with_bias = config.loss.name == "sigmoid"
        model = two_tower.from_towers(built, config.model.logit_scale, len(plan.nested.dims), with_bias)
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
            pin_memory=world.device.type == "cuda",
            micro_batch=config.train.micro_batch,
        )
        self.engine = Engine(
            model,
            optim.build(model, built.model_cfg, config.optim),
            config.engine,
            config.optim.clip_norm,
            config.train.batch_size // world.size // plan.accumulation,
        )
        self.ema = None if config.train.ema is None else _ema(model, config.train.ema)
        self.encoder: Bundle = bundle.of_towers(self._best_known(), built, plan.nested.dims)
        self.checkpoints = Checkpoints(Path(config.run), config.checkpoint.keep)
        self.total = max(1, self._steps(config.train.duration))
        self.warmup, self.cooldown = self._steps(config.optim.warmup), self._steps(config.optim.cooldown)
        # The step before which the embedding is turned and its prefixes join; beyond the last, all ends with the turn.
        self.nests_from = None if config.nesting.start is None else int(config.nesting.start * self.total)
        self.save_every = max(1, self._steps(config.checkpoint.every))
        self.evaluate_every = max(1, self._steps(config.evaluation.every))
        self._least_seconds = self._at_the_peak()
        self._utilisation: float | None = None
        self.step_done = 0
        self.best = -math.inf
        self._skipped = Skipped(config.run, plan.reader.problems, config.data.max_bad_fraction)
        if plan.resume_from is not None:
            self._resume(plan.resume_from)
        self._logged = self.step_done
        self._told_skipped = 0 if self.engine.loss_scale is None else self.engine.loss_scale.skipped

    def run(self, stop: Stop) -> None:
        """Step, log, evaluate, save; until the end or a signal."""
        if not self.world.is_rank_0:
            self._loop(None, stop)
            return
        if self.step_done >= self.total:
            self.console.print(f"This run is finished: {self.config.run}", soft_wrap=True, highlight=False)
            return
        config = self.config
        with Tracker(Path(config.run), config.tracking, self.step_done, self.total, self.console) as tracker:
            self._introduce(tracker)
            self._loop(tracker, stop)
            which = "best" if config.evaluation.best else "last"
            share = "" if self._utilisation is None else f"; model FLOPs utilisation {100 * self._utilisation:.1f} %"
            tracker.say(f"Done: the encoder is {config.run}/checkpoints/{which}{share}")

    def _loop(self, tracker: Tracker | None, stop: Stop) -> None:
        if self.config.evaluation.at_start and not self.step_done and self.evaluate(tracker):
            self._save(tracker, is_best=True)
        clock, batches, epoch = Pacer(self.step_done), self.stream.forever(), self.stream.epoch
        trace = Trace(Path(self.config.run) / "profile", self.world.rank, self.config.tracking.profile)
        while self.step_done < self.total:
            if self.step_done == self.nests_from:
                self._turn(tracker, clock)
            self._at("loading data")
            with self.engine.clock.part("data"):
                parts = list(islice(batches, self.plan.accumulation))
            self._at("training")
            loss, norm, rate = self.step(parts)
            trace.step()
            if self.stream.epoch != epoch:
                epoch = self.stream.epoch
                self._skipped.tell(tracker, self.step_done)
                self._skipped.sum_up(tracker, epoch)
            last = self.step_done == self.total
            if tracker:
                tracker.advance(self.step_done)
            if last or self.step_done % self.config.tracking.log_every == 0:
                speed = clock.steps_per_second(self.step_done) * self.config.train.batch_size
                self._log(tracker, loss, norm, rate, speed)
            if last and self.nests_from == self.total:
                self._turn(tracker, clock)
            with clock.paused():
                stopping = comm.any_rank(stop.asked)
                is_best = False
                if last or (self.step_done % self.evaluate_every == 0 and not stopping):
                    self._at("evaluating")
                    is_best = self.evaluate(tracker)
                if last or stopping or is_best or self.step_done % self.save_every == 0:
                    self._at("saving")
                    self._save(tracker, is_best)
            if stopping and not last:
                self.checkpoints.finish()
                raise RunStopped(
                    f"Stopped by {stop.name} at step {self.step_done:,} of {self.total:,}; all is saved. "
                    "Go on with the same command and resume=auto."
                )
        trace.stop()
        self.checkpoints.finish()

    def _at(self, doing: str) -> None:
        if self._heartbeat is not None:
            self._heartbeat.at(self.step_done, doing)

    def step(self, parts: Sequence[Batch]) -> tuple[NestedLoss, float, float]:
        """One optimiser step on one global batch, given as micro-batches; the only place where the model learns.

        Returns: the loss, the gradient's norm, the learning rate.
        """
        rate = optim.set_lr(
            self.engine.optimizer,
            optim.lr_factor(self.config.optim, self.step_done, self.total, self.warmup, self.cooldown),
        )
        group_b = torch.cat([part.group for part in parts]).to(self.engine.device)
        self._keys = [key for part in parts for key in part.keys]
        micro_batches = [(part.image, part.text) for part in parts]
        loss = grad_cache.backward(self.engine, micro_batches, partial(self._loss, group_b), self._seed_dropout)
        norm = self.engine.step()
        if self.engine.loss_scale is None or self.engine.loss_scale.is_exhausted:
            self._stop_unless_finite("the gradient's norm", norm)
        if self.ema is not None:
            self.ema.update_parameters(self.engine.model)
        self.step_done += 1
        for part in parts:
            self._skipped.meet(part)
        return loss, norm, rate

    def _loss(
        self,
        group_b: torch.Tensor,
        image_bD: torch.Tensor,
        text_bD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> NestedLoss:
        """The loss of the global batch, on the dims of this step. It stops the run where it is not finite."""
        self._scale, self._bias = scale.detach(), None if bias is None else bias.detach()
        nested = self.plan.nested
        places = self._trained_places()
        if len(places) < len(nested.dims):
            nested = nested.only(places)
            scale = scale if len(scale) == 1 else scale[places]
            bias = bias if bias is None or len(bias) == 1 else bias[places]
        with self.engine.clock.part("loss"):
            loss = nested_loss(self.config.loss, image_bD, text_bD, scale, bias, nested, group_b)
            value = loss.total.item()
        if not math.isfinite(value):
            where = not_finite(image_bD, text_bD, self._keys)
            self._stop_unless_finite("the loss", value, f" ({where})" if where else "")
        return loss

    def _trained_places(self) -> list[int]:
        """Which of the dims this step trains."""
        count, drawn = len(self.plan.nested.dims), self.config.nesting.dims_per_step
        if self.nests_from is not None and self.step_done < self.nests_from:
            return [count - 1]
        if drawn is None:
            return list(range(count))
        return sorted(draws.permutation(count, self.config.seed, self.step_done, _DIMS_DRAW)[:drawn].tolist())

    def _turn(self, tracker: Tracker | None, clock: Pacer) -> None:
        """From here on the prefixes are trained. A checkpoint of this step holds the encoder as it was before, but for
        the last one, which the turn has shaped."""
        self._at("turning the embedding")
        with clock.paused():
            self.engine.refresh()
            training = dataclasses.replace(self.encoder, model=self.engine.whole_model)
            with self._evaluating(training.model):
                found = turn.find(self.config.run, training, self.plan.reader)
            turn.apply(self.engine, training, self.encoder, found.rotation_DD)
        if tracker:
            tracker.say(f"step {self.step_done:,}  {found.told()}")

    def _seed_dropout(self, part: int) -> None:
        """Dropout, where a tower has any, is a function of (seed, step, rank, micro-batch): it is the same in both
        forwards of a step, and in a step that is repeated after a resume."""
        names = (self.config.seed, self.step_done, self.world.rank, part, _DROPOUT_DRAW)
        torch.manual_seed(int(draws.bits(*names) >> 1))

    def _stop_unless_finite(self, what: str, value: float, where: str = "") -> None:
        """Before anything is saved; the values are the same on every process, so all of them stop."""
        if math.isfinite(value):
            return
        self.checkpoints.finish()
        last = self.checkpoints.last()
        remedy = f"The last good checkpoint is {last}" if last else "No checkpoint was written before it"
        raise RunStopped(
            f"Step {self.step_done + 1:,}: {what} is {value}{where}. {remedy}; lower optim.lr or lengthen optim.warmup."
        )

    def evaluate(self, tracker: Tracker | None) -> bool:
        """Scores every named set, shows and stores the result; True if it is the best so far."""
        results = self.score_sets()
        best, improved = self.config.evaluation.best, False
        if tracker and results:
            self._show(tracker, results)
        if best and results:
            score = sets.best_score(best, results)
            improved, self.best = score > self.best, max(score, self.best)
        return comm.any_rank(improved)

    def score_sets(self) -> dict[str, dict[str, Any]]:
        """Each named set's scores at every dim, on every process; all of them embed and rank."""
        self.engine.refresh()
        encoder, model = self.encoder, self.encoder.model
        results: dict[str, dict[str, Any]] = {}
        with self._evaluating(model):
            for name, reader in self.plan.evaluation_readers.items():
                captions = self.config.evaluation.sets[name].captions
                embedded = sets.embed(reader, model, encoder.image_spec, encoder.tokenise, captions=captions)
                results[name] = sets.score(embedded, self.plan.evaluation_dims, over_ranks=True)
                if len(reader) < self.plan.evaluation_samples[name]:
                    results[name]["drawn"] = {"samples": len(reader), "of": self.plan.evaluation_samples[name]}
        return results

    @contextlib.contextmanager
    def _evaluating(self, model: MatryoshkaCLIP) -> Iterator[None]:
        """A model in use, and where the data goes, for a while."""
        was_training, home = model.training, next(model.parameters()).device
        model.to(self.world.device).eval()
        yield
        model.train(was_training).to(home)

    def _show(self, tracker: Tracker, results: dict[str, dict[str, Any]]) -> None:
        folder = Path(self.config.run)
        sets.write_retrieval_json(folder, {"step": self.step_done, **sets.as_retrieval_json(results)})
        if self.step_done == self.total:
            tracker.say(*(report.table(name, result) for name, result in results.items()))
            tracker.say(f"Picture: {report.write(folder / 'report', folder.name, results)}")
            return
        for name, result in results.items():
            shown = "  ".join(
                f"{dim}d {100 * scores['text_to_image']['R@10']:.1f}" for dim, scores in result["dims"].items()
            )
            tracker.say(f"step {self.step_done:,}  {name}, text→image R@10: {shown}")

    def _save(self, tracker: Tracker | None, is_best: bool) -> None:
        self._skipped.tell(tracker, self.step_done)  # the stream's position goes beyond them
        self.engine.refresh()
        state = {
            "step": self.step_done,
            "stream": self.stream.state_dict(),
            "best": self.best if math.isfinite(self.best) else None,
            "bad": self._skipped.counts,
            "loss_scale": self.engine.loss_scale and dataclasses.asdict(self.engine.loss_scale),
        }
        self.checkpoints.save(self.step_done, self.encoder, self.engine, state, is_best)

    def _resume(self, checkpoint: Path) -> None:
        saved = checkpoints.read(checkpoint)
        self.engine.load(saved.training_weights, saved.moments)
        state = saved.state
        self.stream.load_state_dict(state["stream"])
        self.step_done = state["step"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self._skipped.resume(state["bad"], self.step_done * self.config.train.batch_size // self.world.size)
        if self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(**state["loss_scale"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.encoder_weights)
            self.ema.n_averaged.fill_(self.step_done)

    def _log(self, tracker: Tracker | None, loss: NestedLoss, norm: float, rate: float, speed: float) -> None:
        self._skipped.tell(tracker, self.step_done)
        measured = self._measured()
        slow = straggler(measured)
        self._tell_skipped(tracker)
        if tracker and slow:
            tracker.say(f"Step {self.step_done:,}: {slow}.")
        if self._least_seconds is not None:
            self._utilisation = self._least_seconds * speed / self.config.train.batch_size
        if tracker:
            scales, bias, scaled = self._scale.tolist(), self._bias, self.engine.loss_scale
            tracker.log(
                {
                    "step": self.step_done,
                    "samples": self.step_done * self.config.train.batch_size,
                    "epoch": self.step_done / self.stream.batches_per_epoch,
                    "loss": loss.total.item(),
                    "loss_by_dim": {str(dim): value.item() for dim, value in loss.by_dim.items()},
                    "logit_scale": scales[0] if len(scales) == 1 else scales,
                    **({} if bias is None else {"logit_bias": bias.tolist()}),
                    "lr": rate,
                    "grad_norm": norm if math.isfinite(norm) else None,
                    **({} if scaled is None else {"loss_scale": scaled.value, "skipped_steps": scaled.skipped}),
                    "samples_per_second": speed,
                    **({} if self._utilisation is None else {"model_flops_utilisation": self._utilisation}),
                    "seconds_per_step": mean_seconds(measured),
                    "peak_memory": max(one.peak_memory for one in measured),
                    "bad_samples": self._skipped.counts.total(),
                }
            )
        self._skipped.stop_if_too_many()

    def _tell_skipped(self, tracker: Tracker | None) -> None:
        scaled = self.engine.loss_scale
        if scaled is None or scaled.skipped == self._told_skipped:
            return
        since, self._told_skipped = scaled.skipped - self._told_skipped, scaled.skipped
        if tracker:
            tracker.say(
                f"Step {self.step_done:,}: fp16's gradients overflowed in {since} step(s), which were skipped "
                f"({scaled.skipped} so far); the loss scale is now {scaled.value:,g}."
            )

    def _measured(self) -> list[Own]:
        """What each process spent since the last line, in the order of ranks."""
        steps, self._logged = max(self.step_done - self._logged, 1), self.step_done
        seconds = {part: spent / steps for part, spent in self.engine.clock.take().items()}
        return comm.all_gather_objects(Own(comm.host(), seconds, peak_memory(self.engine.device)))

    def _at_the_peak(self) -> float | None:
        """Seconds of a step that uses all processes' devices to the full, where it is known what they can do."""
        peak = peak_flops(self.world.device, self.engine.precision)
        if peak is None:
            return None
        return footprint.model_flops(self.config.model, self.config.train.batch_size) / (peak * self.world.size)

    def _introduce(self, tracker: Tracker) -> None:
        count = sum(p.numel() for p in self.engine.whole_model.parameters())
        tail = self.stream.samples % self.stream.global_batch_size
        tracker.say(
            f"{self.config.model.name}: {count / 1e6:.1f} M parameters, nested dims {list(self.plan.nested.dims)}",
            f"{self.stream.samples:,} pairs, {self.stream.batches_per_epoch:,} steps an epoch of "
            f"{self.config.train.batch_size:,} (another {tail} left out each epoch), {self.total:,} steps; "
            f"{self.world.size} process(es) on {self.world.device.type}, {self.engine.precision}",
        )
        if self.nests_from and self.step_done < self.nests_from:
            then = "at its end" if self.nests_from == self.total else f"after step {self.nests_from:,}"
            tracker.say(f"The full dim is trained alone, and the embedding turned {then}: until then cuts lose much.")
        for name, reader in self.plan.evaluation_readers.items():
            if len(reader) < (whole := self.plan.evaluation_samples[name]):
                tracker.say(
                    f"{name}: evaluated on {len(reader):,} of its {whole:,} samples, in shards drawn at random "
                    "(evaluation.most_samples)"
                )
        problems = self.plan.reader.problems
        if problems:
            tracker.say(f"{len(problems)} problems in the shards, such as {problems[0].shard}: {problems[0].reason}")
        if self.warmup >= self.total:
            tracker.say(f"Note: optim.warmup is {self.warmup:,} of {self.total:,} steps; the peak is never left.")
        if self.engine.precision == "fp16" and self.world.device.type == "cpu":
            tracker.say("Note: fp16 is many times slower than fp32 on a CPU; take engine.precision=auto.")
        if self.step_done:
            tracker.say(f"Resumed after step {self.step_done:,}.")

    def _warn_of_batch_norm(self, model: MatryoshkaCLIP) -> None:
        kinds = {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
        if kinds and self.world.is_rank_0 and self.world.size > 1:
            self.console.print(
                f"Note: this tower has {', '.join(sorted(kinds))}, which mixes the samples of one process: "
                "what is learnt depends on the number of processes."
            )

    def _best_known(self) -> MatryoshkaCLIP:
        """The weights to evaluate and to store: the moving average where there is one."""
        return self.engine.whole_model if self.ema is None else self.ema.module  # pyright: ignore[reportReturnType]

    def _steps(self, duration: int | str) -> int:
        return durations.steps(duration, self.config.train.batch_size, self.stream.batches_per_epoch)


def _ema(model: MatryoshkaCLIP, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
