"""Time and memory of the retrieval metrics: all dims in one pass, compared with one dim and with CLIP_benchmark:

    python tests/benchmarks/evaluate.py [--images 20000] [--repeats 3] [--peer-images 2000]

Five captions per image, D = 512, dims 32 … 512. The embeddings resemble trained ones: variance falls along the dims,
and a caption lies near its image. `--noise 50` makes captions nearly independent of their images: the worst case, since
most scores are then compared with every positive of a query.

The rows run in rounds; each shows its median time and the median of its per-round ratios to the first row, by wall time
and by the CPU time of this process, which depends less on other work on the machine. Memory: the peak of a process of
its own, including imports and embeddings.
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
    """Embeddings of images and of texts, and the groups of both."""
    rng = torch.Generator().manual_seed(0)
    size_D = (1 + torch.arange(WIDTH)) ** -0.25
    image_ND = torch.randn(images, WIDTH, generator=rng) * size_D
    image_of_text_M = torch.arange(images * CAPTIONS) // CAPTIONS
    text_MD = torch.randn(images * CAPTIONS, WIDTH, generator=rng).mul_(size_D * noise)
    for text_mD, image_of_text_m in zip(text_MD.split(4096), image_of_text_M.split(4096), strict=True):
        text_mD += image_ND[image_of_text_m]  # in chunks, or this would be the memory peak
    return image_ND, text_MD, torch.arange(images), image_of_text_M


def ours(given: Embeddings, dims: tuple[int, ...]) -> dict[str, float]:
    """Compute all metrics in both directions; returns the recalls at the largest dim."""
    by_image, by_text = rank_both(*given, dims)
    found = {"i": by_image[dims[0]].scores(KS), "t": by_text[dims[0]].scores(KS)}
    return {f"{direction}{k}": scores[f"R@{k}"] for direction, scores in found.items() for k in KS}


def clip_benchmarks(given: Embeddings, dim: int) -> dict[str, float]:
    """Recall at one dim, as CLIP_benchmark's evaluate() computes it from embeddings."""
    image_ND, text_MD, _, image_of_text_M = given
    score_MN = truncate(text_MD, dim) @ truncate(image_ND, dim).T
    positive_MN = torch.zeros_like(score_MN, dtype=torch.bool)
    positive_MN[torch.arange(len(score_MN)), image_of_text_M] = True
    result = {}
    for direction, score, positive in (("t", score_MN, positive_MN), ("i", score_MN.T, positive_MN.T)):
        for k in KS:
            found = batchify(recall_at_k, score, positive, 64, "cpu", k=k)
            result[f"{direction}{k}"] = (found > 0).float().mean().item()
    return result


def in_rounds(rows: dict[str, Callable[[], object]], repeats: int) -> None:
    """Time the rows in rounds and print their medians."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, row in rows.items():
            wall, cpu = time.perf_counter(), time.process_time()
            row()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    first = seconds[next(iter(rows))]
    for name, taken in seconds.items():
        median = [statistics.median(one[clock] for one in taken) for clock in (0, 1)]
        ratio = [statistics.median(a[clock] / b[clock] for a, b in zip(taken, first, strict=True)) for clock in (0, 1)]
        print(
            f"  {name:42} {median[0]:8.2f} s  x {ratio[0]:.2f}    CPU {median[1]:8.2f} s  x {ratio[1]:.2f}",
            flush=True,
        )


def peak_megabytes(*arguments: str) -> int:
    """The peak memory of a new process of this script with --only, in MB."""
    command = [sys.executable, __file__, "--only", *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def only(options: argparse.Namespace) -> None:
    """Rank once and print the peak memory of this process, in MB."""
    given = embeddings(options.images, options.noise)
    if options.one_group:
        given = given[0], given[1][: options.images], given[2] * 0, given[3][: options.images] * 0
    rank_both(*given, DIMS)
    print(peak_memory(torch.device("cpu")) // 10**6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument(
        "--peer-images", type=int, default=2000, help="fewer, because CLIP_benchmark holds arrays of (images, k, texts)"
    )
    parser.add_argument("--noise", type=float, default=1.7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--one-group", action="store_true", help="with --only: one group, so that all pairs are positives"
    )
    parser.add_argument("--only", action="store_true", help="rank once and print the peak memory, in MB")
    options = parser.parse_args()
    if options.only:
        only(options)
        return
    print(f"{torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    small = embeddings(options.peer_images, options.noise)
    theirs, mine = clip_benchmarks(small, 64), ours(small, (64,))
    assert all(abs(theirs[name] - mine[name]) < 1e-6 for name in theirs), (theirs, mine)
    print(f"{len(small[0]):,} x {len(small[1]):,}, both directions:")
    in_rounds(
        {
            "one dim, all metrics": lambda: ours(small, (WIDTH,)),
            "CLIP_benchmark, one dim, recall@1, 5, 10": lambda: clip_benchmarks(small, WIDTH),
        },
        options.repeats,
    )
    given = embeddings(options.images, options.noise)
    print(f"{len(given[0]):,} x {len(given[1]):,}, both directions:")
    in_rounds(
        {"one dim": lambda: ours(given, (WIDTH,)), "five dims": lambda: ours(given, DIMS)},
        options.repeats,
    )
    noise = str(options.noise)
    print(f"peak of the process: {peak_megabytes('--images', str(options.images), '--noise', noise):,} MB, including")
    print(
        f"  {sum(x.nbytes for x in given[:2]) // 10**6:,} MB embeddings, {peak_megabytes('--images', '64')} MB imports"
    )
    print(f"one group of 10,000 images and 10,000 texts: {peak_megabytes('--images', '10000', '--one-group'):,} MB")


if __name__ == "__main__":
    main()
