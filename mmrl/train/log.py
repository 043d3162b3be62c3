"""What a run prints, and what it writes to metrics.jsonl."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from PIL import Image
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

from mmrl.config import Config
from mmrl.data.index import summarise_problems
from mmrl.data.stream import Stream
from mmrl.distributed import comm
from mmrl.distributed.comm import World
from mmrl.distributed.stragglers import StepTimings, describe_straggler, mean_seconds
from mmrl.engine.engine import Engine
from mmrl.engine.timing import peak_memory
from mmrl.engine.tracking import Tracker
from mmrl.evaluate import sets
from mmrl.evaluate.directions import main_directions, of_towers
from mmrl.evaluate.report.tables import brief_tables, changes, one_line, score_notes
from mmrl.evaluate.report.write import write_report
from mmrl.hardware import peak_flops
from mmrl.model import footprint
from mmrl.output.next_steps import after_train
from mmrl.train.bad_samples import BadSamples
from mmrl.train.preflight import PreparedRun
from mmrl.train.step import Schedule, StepResult


class TrainingLog:
    """Console and metrics of a run. Rank 0 writes; every rank calls `step`, which gathers timings and bad samples."""

    def __init__(
        self,
        config: Config,
        prepared: PreparedRun,
        world: World,
        engine: Engine,
        stream: Stream,
        schedule: Schedule,
        bad_samples: BadSamples,
        first_step: int,
        console: Console,
    ) -> None:
        self._config, self._prepared, self._world = config, prepared, world
        self._engine, self._stream, self._schedule, self._bad_samples = engine, stream, schedule, bad_samples
        self._folder = Path(config.run)
        self._logged_step = self._first_step = first_step
        self._logged_skips = 0 if engine.loss_scale is None else engine.loss_scale.skipped
        self._seconds_at_peak = self._step_seconds_at_peak()
        self._utilisation: float | None = None
        self._tracker: Tracker | None = None
        if world.is_rank_0:
            self._tracker = Tracker(self._folder, config.tracking, first_step, schedule.total, console)

    def __enter__(self) -> Self:
        if self._tracker:
            self._tracker.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracker:
            self._tracker.__exit__(*error)

    def lines(self, *lines: Any) -> None:
        """Prints lines, or tables, above the progress bar."""
        if self._tracker:
            self._tracker.print_lines(*lines)

    def start(self) -> None:
        """Prints what is about to be trained, and what a user may want to change before it is."""
        config, engine, stream, schedule = self._config, self._engine, self._stream, self._schedule
        parameters = [*engine.full_model.parameters()]
        count, trained = (sum(p.numel() for p in parameters if all_of or p.requires_grad) for all_of in (True, False))
        tail = stream.samples % stream.global_batch_size
        self.lines(
            f"{config.model.name}: {count / 1e6:.1f} M parameters, "
            f"{f'{trained / 1e6:.3g} M of them train, ' * (trained < count)}"
            f"nested dims {list(self._prepared.nested.dims)}",
            f"{stream.samples:,} pairs, {stream.batches_per_epoch:,} steps per epoch of {config.train.batch_size:,} "
            f"(each epoch leaves out another {tail}), {schedule.total:,} steps; "
            f"{self._world.size} process(es) on {self._world.device.type}, {engine.precision}",
        )
        if config.nesting.learns_rotation:
            factor = config.nesting.prefix_gradient
            self.lines(
                "Every step trains all dims; the factor on the smaller dims' gradient into the towers "
                f"{'rises to' if factor.power else 'is'} {factor.end:g} (nesting.prefix_gradient)."
            )
        for name, one in self._prepared.evaluation_sets.items():
            if len(one.reader) < one.samples:
                self.lines(
                    f"{name}: evaluated on {len(one.reader):,} of its {one.samples:,} samples, in randomly drawn "
                    "shards (evaluation.most_samples)"
                )
        problems = self._prepared.reader.problems
        if problems:
            counts = summarise_problems(Counter(problem.kind for problem in problems))
            first = f"{problems[0].shard} {problems[0].key}: {problems[0].reason}"
            self.lines(f"{len(problems):,} problems in the shards ({counts}), e.g. {first}")
        self.lines(*self._prepared.reader.notes)
        if schedule.warmup >= schedule.total:
            self.lines(
                f"Note: optim.warmup is {schedule.warmup:,} of {schedule.total:,} steps, so the learning rate never "
                "decays; shorten it."
            )
        norms = {type(one).__name__ for one in engine.full_model.modules() if isinstance(one, _BatchNorm)}
        if norms and self._world.size > 1:
            self.lines(
                f"Note: this tower has {', '.join(sorted(norms))}, which mixes the samples of one process: the result "
                "depends on the number of processes."
            )
        if engine.precision == "fp16" and self._world.device.type == "cpu":
            self.lines("Note: fp16 is many times slower than fp32 on a CPU; use engine.precision=auto.")
        if self._first_step:
            self.lines(f"Resumed after step {self._first_step:,}.")

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step` completed steps."""
        if self._tracker:
            self._tracker.advance(step)

    def step(self, step: int, result: StepResult, samples_per_second: float) -> None:
        """Logs one step: the line of metrics.jsonl, bad samples, skipped fp16 steps, a slow process. Collective.

        Raises:
            RunStopped: more samples were bad than data.max_bad_fraction allows.
        """
        self.bad_samples(step)
        timings = self._timings(step)
        self._log_skipped_steps(step)
        if slow := describe_straggler(timings):
            self.lines(f"Step {step:,}: {slow}.")
        if self._seconds_at_peak is not None:
            self._utilisation = self._seconds_at_peak * samples_per_second / self._config.train.batch_size
        if self._tracker:
            self._tracker.log(self._record(step, result, samples_per_second, timings))
        self._bad_samples.stop_if_too_many()

    def bad_samples(self, step: int) -> None:
        """Appends the bad samples seen since the last call to bad_samples.jsonl. Collective."""
        records = self._bad_samples.gather()
        if self._tracker:
            self._tracker.bad_samples(step, records)

    def epoch(self, epochs: int) -> None:
        """Prints how many samples were skipped so far, if any were."""
        if summary := self._bad_samples.summary():
            self.lines(f"End of epoch {epochs:,}; {summary}")

    def evaluation(
        self,
        step: int,
        results: Mapping[str, dict[str, Any]],
        retrieval: dict[str, Any],
        pictures: Mapping[str, Image.Image],
    ) -> None:
        """Logs an evaluation: retrieval.json, evaluations.jsonl, the boards, one console line per set."""
        if not self._tracker:
            return
        sets.write_retrieval_json(self._folder, retrieval)
        record = {"step": step, "samples": step * self._config.train.batch_size, "sets": results}
        self._tracker.evaluation(record, pictures)
        for name, result in results.items():
            self.lines(f"step {step:,}  {name}, {one_line(result)}")

    def end(self) -> None:
        """Prints the scores of the trained encoder and where it is, and writes the report."""
        evaluations = self._tracker.evaluations() if self._tracker else []
        encoder = self._folder / "checkpoints" / ("best" if self._config.evaluation.best else "last")
        step = encoder.resolve().name
        for one in evaluations[::-1]:
            if f"step-{one['step']}" == step:
                name, scores = next(iter(one["sets"].items()))
                directions = main_directions(of_towers(self._config.model.sides))
                notes = (f"{name}: {note}." for note in score_notes(scores, directions))
                self.lines(*brief_tables(one["sets"]), *notes)
                if evaluations[0]["step"] == 0:  # evaluation.at_start
                    self.lines(*changes(evaluations[0]["sets"], one["sets"]))
                break
        if evaluations:
            self.lines(f"Plot: {write_report(self._folder / 'report', self._folder.name, evaluations)}")
        used = "" if self._utilisation is None else f"; model FLOPs utilisation {100 * self._utilisation:.1f} %"
        self.lines(f"Done: the encoder is {encoder} ({step}){used}")
        sets = {name: one.shards for name, one in self._config.evaluation.sets.items() if one.classes is None}
        self.lines(after_train(self._folder, sets, self._folder / "eval"))

    def _record(self, step: int, result: StepResult, speed: float, timings: list[StepTimings]) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        scales, loss_scale = result.logit_scale, self._engine.loss_scale
        used = self._utilisation
        return {
            "step": step,
            "samples": step * self._config.train.batch_size,
            "epoch": step / self._stream.batches_per_epoch,
            **self._losses(result),
            "logit_scale": scales[0] if len(scales) == 1 else scales,
            **({"logit_bias": result.logit_bias} if result.logit_bias else {}),
            "lr": result.lr,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            **({} if loss_scale is None else {"loss_scale": loss_scale.value, "skipped_steps": loss_scale.skipped}),
            "samples_per_second": speed,
            **({} if used is None else {"model_flops_utilisation": used}),
            "seconds_per_step": mean_seconds(timings),
            "peak_memory": max(one.peak_memory for one in timings),
            "bad_samples": self._bad_samples.counts.total(),
        }

    def _losses(self, result: StepResult) -> dict[str, Any]:
        """`loss` is the weighted mean of all dims' losses, whatever the towers receive of it."""
        nested, by_dim = self._prepared.nested, result.loss_by_dim
        record: dict[str, Any] = {
            "loss": sum(weight * by_dim[dim] for dim, weight in zip(nested.dims, nested.weights, strict=True)),
            "loss_by_dim": {str(dim): value for dim, value in by_dim.items()},
        }
        for name, values in result.other_terms.items():
            record[f"{name}_by_dim"] = {str(dim): value for dim, value in values.items()}
        if result.distillation_by_dim:
            record["distillation_by_dim"] = {str(dim): kl for dim, kl in result.distillation_by_dim.items()}
        if result.distillation_by_dim or result.other_terms:
            record["tower_loss"] = result.loss
        if result.prefix_gradient is not None:
            weights, full_dim = self._config.loss.term_weights, nested.dims[-1]
            main, *_ = (name for name, weight in weights.items() if weight)
            full = sum(weights[name] * term[full_dim] for name, term in ({main: by_dim} | result.other_terms).items())
            if self._config.teacher is not None:
                full += weights[main] * self._config.teacher.weight * result.distillation_by_dim[full_dim]
            record["prefix_gradient"] = result.prefix_gradient
            record["prefix_loss"] = result.loss - full  # P
            record["tower_loss"] = full + result.prefix_gradient * record["prefix_loss"]  # L_D + a P
        return record

    def _log_skipped_steps(self, step: int) -> None:
        loss_scale = self._engine.loss_scale
        if loss_scale is None or loss_scale.skipped == self._logged_skips:
            return
        new, self._logged_skips = loss_scale.skipped - self._logged_skips, loss_scale.skipped
        self.lines(
            f"Step {step:,}: skipped {new} step(s) whose fp16 gradients overflowed ({loss_scale.skipped} so far); "
            f"the loss scale is now {loss_scale.value:,g}."
        )

    def _timings(self, step: int) -> list[StepTimings]:
        """Mean seconds per step of each rank since the last call, in the order of ranks. Collective."""
        steps, self._logged_step = max(step - self._logged_step, 1), step
        seconds = {phase: spent / steps for phase, spent in self._engine.timer.pop_seconds().items()}
        return comm.all_gather_objects(StepTimings(comm.host(), seconds, peak_memory(self._engine.device)))

    def _step_seconds_at_peak(self) -> float | None:
        """Seconds per step if every device ran at its peak FLOP/s; None if that peak is not known."""
        peak = peak_flops(self._world.device, self._engine.precision)
        if peak is None:
            return None
        config = self._config
        flops = footprint.model_flops(config.model, config.train.batch_size, config.sweeps, config.rows_per_pair)
        return flops / (peak * self._world.size)
