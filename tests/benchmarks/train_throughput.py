"""Training throughput of `mmrl train` compared with open_clip's own trainer:

    pip install --no-deps --target /tmp/extras 'webdataset<=0.2.86' pandas python-dateutil pytz tzdata six
    python tests/benchmarks/train_throughput.py --extras /tmp/extras [--batch 128] [--steps 40] [--repeats 3] …

(open_clip's trainer fails with the webdataset >= 1 that mmrl requires, and needs pandas; the extras serve it only.)

Both sides use the same shards (starter:train), towers (mmrl-starter, registered in open_clip), batch size, precision,
data workers, threads, AdamW settings, gradient clipping and logging interval. Both do their ordinary work: read webp
from tars, augment, tokenise, forward, backward, step, log. Evaluation and checkpoints are off.

Augmentation: open_clip uses its default, a RandomResizedCrop of 0.9 to 1.0 of the area. mmrl has three rows: the same
crop (the fair comparison), none, and that of configs/quickstart.yaml (rotation, zoom, shift, colours; no crop).

Each run is a process of its own, started as a user starts it. It is timed by the arrival of its log lines, without the
first ones, and killed after the last one that is needed, so that no end of an epoch is timed. The runs of a repetition
follow each other in alternating order, and ratios are taken within a repetition. The column `foreign` is the number of
cores that other processes used meanwhile: above about 0.1, trust only the ratios.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmrl.config import load_config
from mmrl.data.shards import expand
from mmrl.model.registry import OWN_CONFIGS

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MODEL = "mmrl-starter"
SHARDS = "starter:train"
LOG_EVERY = 10
WARM_UP_STEPS = 20
# No run gets this far: neither the schedule nor the data may end within the timed part.
NEVER_STEPS = 100_000

OPEN_CLIP_MAIN = """\
import sys
import open_clip
from open_clip_train.main import main
open_clip.add_model_config({folder!r})
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@dataclass(frozen=True)
class Trainer:
    """How the trainer of one row is started, and how the step is read from its log lines."""

    command: Callable[[argparse.Namespace, Path], list[str]]
    step_of: Callable[[str, int], int | None]
    """(line, batch) -> the last step done, or None."""
    wants_extras: bool = False


@dataclass(frozen=True)
class Measured:
    """The timed part of one run."""

    samples_per_second: float
    cpu_ms_per_sample: float
    foreign_cores: float


@dataclass(frozen=True)
class Moment:
    """The clocks at a log line, in seconds."""

    step: int
    wall: float
    cpu_of_run: float
    cpu_of_all: float


def main() -> None:
    """Measures and prints the table."""
    arguments = _arguments()
    print(f"batch {arguments.batch}, {arguments.precision}, {arguments.workers} worker(s), {arguments.threads} threads")
    print(f"{arguments.steps} timed steps after {WARM_UP_STEPS}, {arguments.repeats} repetitions")
    measured: dict[str, list[Measured]] = defaultdict(list)
    for repeat in range(arguments.repeats):
        for name in arguments.rows[:: -1 if repeat % 2 else 1]:
            load = os.getloadavg()[0]
            measured[name].append(_measure(TRAINERS[name], arguments))
            one = measured[name][-1]
            print(
                f"  repetition {repeat + 1}, load average before {load:4.2f}: {name:24} "
                f"{one.samples_per_second:7.1f} samples/s, foreign {one.foreign_cores:.2f} cores",
                flush=True,
            )
    _print_table({name: measured[name] for name in arguments.rows})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="bf16 is open_clip's amp_bf16")
    parser.add_argument("--workers", type=int, default=1, help="data workers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="OMP_NUM_THREADS")
    parser.add_argument("--extras", type=Path, help="packages for open_clip's process only; see the head of this file")
    parser.add_argument("--rows", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    arguments = parser.parse_args()
    if arguments.steps % LOG_EVERY:
        parser.error(f"--steps: {arguments.steps} is not a multiple of {LOG_EVERY}, the logging interval")
    return arguments


def _measure(trainer: Trainer, arguments: argparse.Namespace) -> Measured:
    """Starts a trainer, reads the clocks at its log lines, and kills it after the last one that is needed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "PYTHONUNBUFFERED": "1"}
    if trainer.wants_extras and arguments.extras:
        environment["PYTHONPATH"] = str(arguments.extras.resolve())
    moments: list[Moment] = []
    tail: deque[str] = deque(maxlen=30)
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            trainer.command(arguments, Path(folder)),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                tail.append(line)
                step = trainer.step_of(line, arguments.batch)
                if step is not None and step >= WARM_UP_STEPS:
                    moments.append(Moment(step, time.perf_counter(), _cpu_of_run(process.pid), _cpu_of_all()))
                    if step >= moments[0].step + arguments.steps:
                        break
            else:
                raise SystemExit(f"The trainer ended early:\n{''.join(tail)}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    first, last = moments[0], moments[-1]
    wall, samples = last.wall - first.wall, (last.step - first.step) * arguments.batch
    cpu_of_run = last.cpu_of_run - first.cpu_of_run
    return Measured(
        samples_per_second=samples / wall,
        cpu_ms_per_sample=1000 * cpu_of_run / samples,
        foreign_cores=(last.cpu_of_all - first.cpu_of_all - cpu_of_run) / wall,
    )


def _print_table(measured: dict[str, list[Measured]]) -> None:
    print(f"\n{'':24} {'samples/s':>9} {'CPU ms/sample':>13} {'foreign':>7}  ratio to open_clip (each repetition)")
    for name, runs in measured.items():
        speed = statistics.median(run.samples_per_second for run in runs)
        cpu = statistics.median(run.cpu_ms_per_sample for run in runs)
        foreign = statistics.median(run.foreign_cores for run in runs)
        ratios = [
            ours.samples_per_second / theirs.samples_per_second
            for ours, theirs in zip(runs, measured.get("open_clip", []), strict=False)
        ]
        shown = f"{statistics.median(ratios):.3f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})" if ratios else ""
        print(f"{name:24} {speed:9.1f} {cpu:13.2f} {foreign:7.2f}  {shown}")
    print("Load average at the end: " + ", ".join(f"{load:.2f}" for load in os.getloadavg()))


def _mmrl(dims: list[int] | None = None, augment: dict[str, object] | None = None) -> Trainer:
    """`mmrl train` with the quickstart's recipe; None keeps its value."""

    def command(arguments: argparse.Namespace, folder: Path) -> list[str]:
        overrides = {
            "run": str(folder / "run"),
            "data.train": SHARDS,
            "data.workers": arguments.workers,
            "train.batch_size": arguments.batch,
            "train.duration": NEVER_STEPS,
            "optim.warmup": 0,
            "engine.precision": arguments.precision,
            "evaluation": {},
            "checkpoint.every": NEVER_STEPS,
            "tracking.log_every": LOG_EVERY,
        }
        if dims is not None:
            overrides["nesting.dims"] = dims
        if augment is not None:
            overrides["data.augment"] = augment
        program = str(Path(sys.executable).with_name("mmrl"))
        return [program, "train", str(RECIPE), *(f"{key}={json.dumps(value)}" for key, value in overrides.items())]

    def step_of(line: str, _batch: int) -> int | None:
        found = re.match(r"step ([\d,]+)/", line)
        return int(found[1].replace(",", "")) if found else None

    return Trainer(command, step_of)


def _open_clip() -> Trainer:
    def command(arguments: argparse.Namespace, folder: Path) -> list[str]:
        main_file = folder / "open_clip_main.py"
        main_file.write_text(OPEN_CLIP_MAIN.format(folder=str(OWN_CONFIGS)))
        optim = load_config(RECIPE).optim
        flags = {
            "model": MODEL,
            "train-data": "::".join(str(path) for path in expand(SHARDS)),
            "dataset-type": "webdataset",
            "train-num-samples": NEVER_STEPS * arguments.batch,
            "epochs": 1,
            "workers": arguments.workers,
            "batch-size": arguments.batch,
            "precision": {"fp32": "fp32", "bf16": "amp_bf16"}[arguments.precision],
            "lr": optim.lr,
            "beta1": optim.betas[0],
            "beta2": optim.betas[1],
            "eps": optim.eps,
            "wd": optim.weight_decay,
            "warmup": 0,
            "log-every-n-steps": LOG_EVERY,
            "logs": folder / "logs",
        }
        if optim.clip_norm is not None:
            flags["grad-clip-norm"] = optim.clip_norm
        return [sys.executable, str(main_file), *(f"--{name}={value}" for name, value in flags.items())]

    def step_of(line: str, batch: int) -> int | None:
        found = re.search(r"Train Epoch: \d+ \[\s*(\d+)/", line)
        return int(found[1]) // batch if found else None

    return Trainer(command, step_of, wants_extras=True)


THEIR_CROP: dict[str, object] = {"random_resized_crop": [0.9, 1.0]}
WIDTH: int = json.loads((OWN_CONFIGS / f"{MODEL}.json").read_text())["embed_dim"]
TRAINERS = {
    "nested": _mmrl(augment=THEIR_CROP),
    "plain": _mmrl(dims=[WIDTH], augment=THEIR_CROP),
    "open_clip": _open_clip(),
    "nested-no-augment": _mmrl(augment={}),
    "nested-recipe-augment": _mmrl(),
}


def _cpu_of_run(group: int) -> float:
    """CPU seconds used by a process group, including all workers (Linux; NaN elsewhere)."""
    if not Path("/proc/stat").exists():
        return float("nan")
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_of_all() -> float:
    """CPU seconds used by all processes of this machine (Linux; NaN elsewhere)."""
    if not Path("/proc/stat").exists():
        return float("nan")
    user, nice, system, _idle, _wait, irq, soft_irq, *_ = Path("/proc/stat").read_text().split()[1:]
    return sum(map(int, (user, nice, system, irq, soft_irq))) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
