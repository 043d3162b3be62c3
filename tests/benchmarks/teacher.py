"""What a small model gains from a large teacher: the recipe of configs/starter_student.yaml.

    python tests/benchmarks/teacher.py [--seeds 0,1,2] [--jobs 2] [--cache runs/teacher]
        [--out tests/benchmarks/teacher.md]

The teacher is trained once, by configs/quickstart.yaml with the first seed. The students have smaller towers, for
images of 32 pixels and with one text layer (claims_towers.json), and learn from the same data for claims.py's steps:

    alone           configs/quickstart.yaml: the smaller dims learn from the full dim (loss.distillation)
    live teacher    the teacher encodes each batch: the augmented images, enlarged to its 64 pixels
    stored teacher  the teacher's embeddings of the training set by `mmrl embed --texts`: the images as they are

It writes a Markdown page: R@1 by dim on the held-out artist, the mean of both directions and of the seeds. Resumable.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from claims_embed import load_tests, train_and_embed
from claims_runs import RECIPE, Plan, full_plan, plan_runs
from claims_scores import quick_recall
from rich.console import Console

from mmrl.config import load_config
from mmrl.search.embed import embed_images
from mmrl.train.trainer import train

ALONE, LIVE, STORED = "alone", "live teacher", "stored teacher"
WEIGHT = 1.0


class TeacherPlan(Plan):
    """Students without a teacher and with one."""

    def arms(self) -> dict[str, list[str]]:
        model = self.cache / "teacher"
        teacher = f"model: {model}, weight: {WEIGHT}"
        return {
            ALONE: [],
            LIVE: [f"teacher={{{teacher}}}", "loss.distillation=0"],
            STORED: [f"teacher={{{teacher}, embeddings: {self.cache / 'embedded'}}}", "loss.distillation=0"],
        }


def train_teacher(cache: Path, seed: int) -> None:
    """Trains the teacher and embeds the training set, unless that is done."""
    config = load_config(RECIPE, [f"run={cache / 'teacher'}", f"seed={seed}", "resume=auto"])
    train(config, Console(quiet=True))
    if not (cache / "embedded" / "embeddings.parquet").exists():
        model, out = str(cache / "teacher"), cache / "embedded"
        embed_images(model, str(config.data.train), out, precisions=["fp32"], texts=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("runs/teacher"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "teacher.md")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    train_teacher(given.cache, seeds[0])
    plan = TeacherPlan(**vars(full_plan(Path(), given.cache, seeds, ["starter"])))
    runs = plan_runs(plan)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for one in as_completed([pool.submit(train_and_embed, run) for run in runs if not run.is_done]):
            print(one.result(), flush=True)
    lines = [f"| | {' | '.join(f'{dim}-d' for dim in plan.dims)} |", f"|---|{'---:|' * len(plan.dims)}"]
    for arm in plan.arms():
        found = load_tests([run for run in runs if run.arm == arm], "test-artist")
        lines.append(f"| {arm} | {' | '.join(f'{100 * quick_recall(found, dim, 1):.1f}' for dim in plan.dims)} |")
    head = (
        f"# A small model and a large teacher\n\nR@1 in % on the starter set's held-out artist, the mean of both "
        f"directions and of {len(seeds)} seeds. Written by tests/benchmarks/teacher.py.\n"
    )
    given.out.write_text("\n".join([head, *lines]) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
