"""Ranking all dims in one walk, beside one dim by the same code and beside CLIP_benchmark's functions; run by hand:

    python tests/benchmarks/evaluate.py [--images 20000] [--repeats 3] [--peer-images 2000]

Five captions an image, D = 512, dims 32 … 512. The embeddings are like trained ones: the first numbers carry the most,
and a caption lies near its image; `--noise 50` makes them all but random, the worst case, since then most scores have
to be counted against every positive of a query.

Rows run in turns; each shows its median time and the median of its ratios to the first within the same turn, by the
clock and by the processor time of this process, which other work on the machine disturbs less. Memory: what a process
of its own needs at its peak, imports and embeddings among it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

from mmrl.engine.timing import peak_memory
from mmrl.evaluate.ranking.ranks import rank_both
from mmrl.nesting import truncate

WIDTH, CAPTIONS = 512, 5
DIMS = (512, 256, 128, 64, 32)
KS = (1, 5, 10)
Embeddings = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def embeddings(images: int, noise: float) -> Embeddings:
    """Images, texts, and the groups of both."""
    rng = torch.Generator().manual_seed(0)
    size_D = (1 + torch.arange(WIDTH)) ** -0.25
    image_ND = torch.randn(images, WIDTH, generator=rng) * size_D
    image_of_text_M = torch.arange(images * CAPTIONS) // CAPTIONS
    text_MD = torch.randn(images * CAPTIONS, WIDTH, generator=rng).mul_(size_D * noise)
    for text_mD, image_of_text_m in zip(text_MD.split(4096), image_of_text_M.split(4096), strict=True):
        text_mD += image_ND[image_of_text_m]  # by parts, or this would be the peak of the memory
    return image_ND, text_MD, torch.arange(images), image_of_text_M


def ours(given: Embeddings, dims: tuple[int, ...]) -> dict[str, float]:
    """All metrics in both directions; returns the recalls at the widest dim."""
    by_image, by_text = rank_both(*given, dims)
    found = {"i": by_image[dims[0]].scores(KS), "t": by_text[dims[0]].scores(KS)}
    return {f"{way}{k}": scores[f"R@{k}"] for way, scores in found.items() for k in KS}


def clip_benchmarks(given: Embeddings, dim: int) -> dict[str, float]:
    """Recall at one dim, as CLIP_benchmark's evaluate() computes it from embeddings."""
    image_ND, text_MD, _, image_of_text_M = given
    score_MN = truncate(text_MD, dim) @ truncate(image_ND, dim).T
    positive_MN = torch.zeros_like(score_MN, dtype=torch.bool)
    positive_MN[torch.arange(len(score_MN)), image_of_text_M] = True
    result = {}
    for way, score, positive in (("t", score_MN, positive_MN), ("i", score_MN.T, positive_MN.T)):
        for k in KS:
            found = batchify(recall_at_k, score, positive, 64, "cpu", k=k)
            result[f"{way}{k}"] = (found > 0).float().mean().item()
    return result


def in_turns(rows: dict[str, Callable[[], object]], repeats: int) -> None:
    """Prints each row's medians."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, row in rows.items():
            clock, processor = time.perf_counter(), time.process_time()
            row()
            seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    first = seconds[next(iter(rows))]
    for name, taken in seconds.items():
        median = [statistics.median(one[part] for one in taken) for part in (0, 1)]
        ratio = [statistics.median(a[part] / b[part] for a, b in zip(taken, first, strict=True)) for part in (0, 1)]
        print(
            f"  {name:42} {median[0]:8.2f} s  x {ratio[0]:.2f}    processor {median[1]:8.2f} s  x {ratio[1]:.2f}",
            flush=True,
        )


def peak_megabytes(*arguments: str) -> int:
    """The peak of a process that does this file's --only."""
    command = [sys.executable, __file__, "--only", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def only(options: argparse.Namespace) -> None:
    """Ranks once and prints the peak of this process, in MB."""
    given = embeddings(options.images, options.noise)
    if options.one_group:
        given = given[0], given[1][: options.images], given[2] * 0, given[3][: options.images] * 0
    rank_both(*given, DIMS)
    print(peak_memory(torch.device("cpu")) // 10**6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--peer-images", type=int, default=2000, help="CLIP_benchmark's rows are (images, k, texts)")
    parser.add_argument("--noise", type=float, default=1.7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-group", action="store_true", help="with --only: all are each other's positives")
    parser.add_argument("--only", action="store_true", help="print the peak of one ranking, in MB")
    options = parser.parse_args()
    if options.only:
        only(options)
        return
    print(f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    small = embeddings(options.peer_images, options.noise)
    theirs, mine = clip_benchmarks(small, 64), ours(small, (64,))
    assert all(abs(theirs[name] - mine[name]) < 1e-6 for name in theirs), (theirs, mine)
    print(f"{len(small[0]):,} x {len(small[1]):,}, both directions:")
    in_turns(
        {
            "one dim, all metrics": lambda: ours(small, (WIDTH,)),
            "CLIP_benchmark, one dim, recall@1, 5, 10": lambda: clip_benchmarks(small, WIDTH),
        },
        options.repeats,
    )
    given = embeddings(options.images, options.noise)
    print(f"{len(given[0]):,} x {len(given[1]):,}, both directions:")
    in_turns(
        {"one dim": lambda: ours(given, (WIDTH,)), "five dims": lambda: ours(given, DIMS)},
        options.repeats,
    )
    noise = str(options.noise)
    print(f"peak of the process: {peak_megabytes('--images', str(options.images), '--noise', noise):,} MB, of them")
    print(
        f"  {sum(x.nbytes for x in given[:2]) // 10**6:,} MB embeddings, {peak_megabytes('--images', '64')} MB imports"
    )
    print(f"one group of 10,000 images and 10,000 texts: {peak_megabytes('--images', '10000', '--one-group'):,} MB")


if __name__ == "__main__":
    main()
