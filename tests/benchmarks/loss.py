"""Time and memory of the nested loss, compared with open_clip, the plain nested formula and sentence-transformers:

    pip install --no-deps --target /tmp/extras sentence-transformers scipy scikit-learn joblib
    pip install --no-deps --target /tmp/extras cloudpickle threadpoolctl narwhals
    PYTHONPATH=/tmp/extras python tests/benchmarks/loss.py [--batch 8192] [--repeats 5] [--device cuda]

(Without sentence-transformers its row is skipped.) Each row computes the loss and the gradients of both embeddings, on
random 512-d embeddings whose matching pairs are correlated. Time: the rows run in rounds, in alternating order; each
shows its median and the median of its per-round ratios to open_clip's single loss. `foreign` is the mean number of
cores that other processes used meanwhile: above about 0.1, trust only the ratios.

Memory: the peak beyond the embeddings and their gradients, each row in its own process. `--large 65536` measures only
our loss at that batch size: its time, and the peak memory of the whole process.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from mmrl.losses.nested_infonce import nested_info_nce

WIDTH = 512
DIMS = (32, 64, 128, 256, 512)
EIGHT_DIMS = (4, 8, 16, 32, 64, 128, 256, 512)
SCALE = 30.0
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def open_clip_single(image_BD: torch.Tensor, text_BD: torch.Tensor) -> torch.Tensor:
    """open_clip's loss at the full dim, on normalised embeddings as in its trainer."""
    return _clip_loss(image_BD, text_BD)


def plain_nested(image_BD: torch.Tensor, text_BD: torch.Tensor) -> torch.Tensor:
    """The mean of open_clip's loss over the renormalised prefixes: the plain implementation."""
    losses = [_clip_loss(image_BD[:, :dim], text_BD[:, :dim]) for dim in DIMS]
    return torch.stack(losses).mean()


def _clip_loss(image_Bd: torch.Tensor, text_Bd: torch.Tensor) -> torch.Tensor:
    loss: Any = ClipLoss()(F.normalize(image_Bd, dim=-1), F.normalize(text_Bd, dim=-1), _scale(image_Bd))
    return loss


def sentence_transformers_nested(image_BD: torch.Tensor, text_BD: torch.Tensor) -> torch.Tensor:
    """MatryoshkaLoss of the symmetric ranking loss, on a model that returns the given embeddings."""
    from sentence_transformers.sentence_transformer.losses import (  # pyright: ignore[reportMissingImports]
        MatryoshkaLoss,
        MultipleNegativesRankingLoss,
    )

    class Towers(torch.nn.Module):
        def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"sentence_embedding": features["embedding"]}

        def get_embedding_dimension(self) -> int:
            return WIDTH

    model: Any = Towers()
    ranking = MultipleNegativesRankingLoss(
        model, scale=SCALE, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    nested = MatryoshkaLoss(model, ranking, list(DIMS))
    labels = torch.zeros(len(image_BD), device=image_BD.device)
    return nested([{"embedding": image_BD}, {"embedding": text_BD}], labels)


def ours(dims: Sequence[int]) -> Loss:
    """`mmrl.nested_info_nce` at these dims."""
    return lambda image_BD, text_BD: nested_info_nce(image_BD, text_BD, _scale(image_BD), dims).total


def masked(image_BD: torch.Tensor, text_BD: torch.Tensor) -> torch.Tensor:
    """`mmrl.nested_info_nce` with two keys: a group of 4 for one pair in 10, an equal caption for one in 20."""
    rows = torch.arange(len(image_BD), device=image_BD.device)
    group = torch.where(rows % 40 < 4, rows // 40, -1)
    caption = torch.where(rows % 20 == 0, rows // 40, len(rows) + rows)
    groups = torch.stack([group, caption], dim=1)
    return nested_info_nce(image_BD, text_BD, _scale(image_BD), DIMS, groups=groups).total


def _scale(embedding_BD: torch.Tensor) -> torch.Tensor:
    return torch.tensor(SCALE, device=embedding_BD.device, requires_grad=True)


ROWS: dict[str, tuple[Loss, torch.dtype]] = {
    "open_clip, 512-d only": (open_clip_single, torch.float32),
    "plain nested (K x ClipLoss)": (plain_nested, torch.float32),
    "sentence-transformers": (sentence_transformers_nested, torch.float32),
    "mmrl, 5 dims": (ours(DIMS), torch.float32),
    "mmrl, 5 dims, masked": (masked, torch.float32),
    "mmrl, 512-d only": (ours((WIDTH,)), torch.float32),
    "mmrl, 8 dims": (ours(EIGHT_DIMS), torch.float32),
    "mmrl, 5 dims, bf16 inputs": (ours(DIMS), torch.bfloat16),
}
BASELINE, OURS = "open_clip, 512-d only", "mmrl, 5 dims"


def main() -> None:
    """Measure and print the tables."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(_peak_memory(ROWS[arguments.memory_of], arguments))
        return
    if arguments.large:
        _measure_large(arguments)
        return
    rows = [name for name in ROWS if name != "sentence-transformers" or _has_sentence_transformers()]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} threads"
    print(f"B = {arguments.batch:,}, D = {WIDTH}, dims {list(DIMS)}, {device}; {arguments.repeats} rounds")
    seconds, foreign = _time(rows, arguments)
    memory = {name: _memory_in_new_process(name, arguments) for name in rows}
    print(f"\n{'':28} {'ms':>8} {'/ open_clip':>11} {'extra MiB':>10}")
    for name in rows:
        ratio = _ratio(seconds, name, BASELINE)
        print(f"{name:28} {1e3 * statistics.median(seconds[name]):8.0f} {ratio:11.2f} {memory[name] / 2**20:10.0f}")
    _print_ratios(seconds, memory, arguments)
    print(f"foreign {foreign:.2f} cores")


def _print_ratios(seconds: dict[str, list[float]], memory: dict[str, float], arguments: argparse.Namespace) -> None:
    print("\nmedian ratios within a round")
    for of, to in (
        (OURS, BASELINE),
        (OURS, "plain nested (K x ClipLoss)"),
        (OURS, "sentence-transformers"),
        ("mmrl, 8 dims", "mmrl, 512-d only"),
        ("mmrl, 5 dims, masked", OURS),
        ("mmrl, 5 dims, bf16 inputs", OURS),
    ):
        if to in seconds:
            print(f"  time    {of:26} / {to:28} {_ratio(seconds, of, to):.2f}")
    plain = memory["plain nested (K x ClipLoss)"]
    print(f"  memory  {OURS:26} / {'plain nested (K x ClipLoss)':28} 1/{plain / max(memory[OURS], 1):.0f}")
    rate = _ratio(seconds, "matrix products only", OURS)
    flops = 8 * arguments.batch**2 * WIDTH / statistics.median(seconds["matrix products only"])
    print(f"  rate    {OURS:26} / torch.mm of the same tiles   {rate:.2f} (of {flops / 1e9:.0f} GFLOP/s)")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--large", type=int, help="measure only our loss, at this batch size")
    parser.add_argument("--memory-of", choices=list(ROWS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _embeddings(arguments: argparse.Namespace, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared_BD = torch.randn(batch, WIDTH, generator=generator)
    pair = [(shared_BD + 2 * torch.randn(batch, WIDTH, generator=generator)).to(arguments.device, dtype) for _ in "it"]
    return pair[0].requires_grad_(), pair[1].requires_grad_()


def _run(loss: Loss, embeddings: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Seconds of one loss and gradient."""
    began = time.perf_counter()
    torch.autograd.grad(loss(*embeddings), embeddings)
    if embeddings[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _products_only(arguments: argparse.Namespace) -> float:
    """Seconds of the loss's 4 B^2 D multiply-adds alone, as torch.mm of 1,024-wide tiles."""
    B, tile = arguments.batch, 1024
    x_BD, y_BD = (torch.randn(tile, WIDTH, device=arguments.device) for _ in "xy")
    out_BB = torch.empty(tile, tile, device=arguments.device)
    began = time.perf_counter()
    for _ in range((B // tile) ** 2):
        torch.mm(x_BD, y_BD.T, out=out_BB)
        torch.mm(x_BD, y_BD.T, out=out_BB)
        torch.mm(out_BB, y_BD)
        torch.mm(out_BB.T, x_BD)
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _time(rows: Sequence[str], arguments: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Seconds of each row in each round, and the mean number of cores that other processes used."""
    embeddings = {dtype: _embeddings(arguments, arguments.batch, dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[str, list[float]] = defaultdict(list)
    for name in rows:
        _run(ROWS[name][0], embeddings[ROWS[name][1]])
    began, own, system = time.perf_counter(), sum(os.times()[:2]), _system_cpu_seconds()
    for repeat in range(arguments.repeats):
        for name in rows[:: -1 if repeat % 2 else 1]:
            loss, dtype = ROWS[name]
            seconds[name].append(_run(loss, embeddings[dtype]))
        seconds["matrix products only"].append(_products_only(arguments))
    own, system = sum(os.times()[:2]) - own, _system_cpu_seconds() - system
    return seconds, (system - own) / (time.perf_counter() - began)


def _ratio(seconds: dict[str, list[float]], of: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def _memory_in_new_process(name: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--batch", str(arguments.batch)]
    command += ["--threads", str(arguments.threads), "--device", arguments.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_memory(row: tuple[Loss, torch.dtype], arguments: argparse.Namespace) -> float:
    """Peak bytes beyond the embeddings and their gradients."""
    loss, dtype = row
    small = _embeddings(arguments, 256, dtype)
    _run(loss, small)  # warm-up: threads and libraries
    embeddings = _embeddings(arguments, arguments.batch, dtype)
    gradients = sum(x.numel() * x.element_size() for x in embeddings)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(loss, embeddings)
        return torch.cuda.max_memory_allocated() - before - gradients
    before, _ = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    _run(loss, embeddings)
    _, peak = _resident()
    return peak - before - gradients


def _resident() -> tuple[int, int]:
    """Resident bytes of this process, now and at the peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    now, peak = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmRSS", "VmHWM"))
    assert now is not None and peak is not None, status  # noqa: PT018
    return int(now[1]) * 1024, int(peak[1]) * 1024


def _measure_large(arguments: argparse.Namespace) -> None:
    seconds = _run(ours(DIMS), _embeddings(arguments, arguments.large, torch.float32))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if arguments.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(f"B = {arguments.large:,}: {seconds:.1f} s, peak of the whole process {peak / 2**30:.2f} GiB")


def _has_sentence_transformers() -> bool:
    try:
        import sentence_transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def _system_cpu_seconds() -> float:
    """CPU seconds used by all processes on this machine (Linux; NaN elsewhere)."""
    if not Path("/proc/stat").exists():
        return float("nan")
    user, nice, system, _idle, _wait, irq, soft_irq, *_ = Path("/proc/stat").read_text().split()[1:]
    return sum(map(int, (user, nice, system, irq, soft_irq))) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
