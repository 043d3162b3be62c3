"""Finds the rank that slows a run down, and the ranks whose embeddings are NaN or infinite.

Shapes: b pairs of this rank, D the embedding's width.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mmrl.distributed import comm

# A rank is slow if its local time is at least _SLOW_RATIO times the median of the other ranks, and _SLOW_S more.
_SLOW_RATIO, _SLOW_S = 1.5, 0.05


def describe_non_finite(embeddings: Sequence[torch.Tensor], keys: Sequence[str]) -> str:
    """Names the ranks and samples whose embeddings are NaN or infinite. Collective.

    Empty if there are none, or if all are: then the weights are the cause, not the samples.

    Args:
        embeddings: of the b pairs, (b, D), and those of their hard negatives, with any equal number per pair.
        keys: of the pairs.
    """
    is_finite_b = torch.stack([x.isfinite().all(1).view(len(keys), -1).all(1) for x in embeddings]).all(0)
    rows = (~is_finite_b).nonzero().flatten().tolist()
    found = comm.all_gather_objects((comm.host(), len(rows), [keys[row] for row in rows[:2]]))
    if not any(count for _, count, _ in found) or all(count == len(keys) for _, count, _ in found):
        return ""
    ranks = [
        f"{count} of {len(keys)} embeddings of rank {rank} on host {host} (samples {', '.join(names)})"
        for rank, (host, count, names) in enumerate(found)
        if count
    ]
    return "NaN or infinite: " + "; ".join(ranks[:3]) + (f"; {len(ranks) - 3} more ranks" if len(ranks) > 3 else "")


@dataclass(frozen=True)
class StepTimings:
    """Time and memory of one rank's steps."""

    host: str
    seconds: Mapping[str, float]
    """Mean seconds per step by phase, as timed by engine.timing.StepTimer."""
    peak_memory: int = 0
    """Bytes."""

    @property
    def local_seconds(self) -> float:
        """Seconds that do not depend on other ranks: data loading and towers.

        The later phases contain collectives, in which a fast rank waits for a slow one, so that both take equally
        long. Under ZeRO stage 3 the towers contain all-gathers of the weights too.
        """
        return self.seconds.get("data", 0.0) + self.seconds.get("towers", 0.0)


def mean_seconds(timings: Sequence[StepTimings]) -> dict[str, float]:
    """Seconds per step by phase, averaged over ranks."""
    phases = sorted({phase for one in timings for phase in one.seconds})
    return {phase: sum(one.seconds.get(phase, 0.0) for one in timings) / len(timings) for phase in phases}


def describe_straggler(timings: Sequence[StepTimings]) -> str | None:
    """A sentence about the slowest rank, or None if no rank slows the others down. `timings` is in rank order."""
    if len(timings) < 2:
        return None
    rank, slowest = max(enumerate(timings), key=lambda pair: pair[1].local_seconds)
    others = statistics.median(one.local_seconds for index, one in enumerate(timings) if index != rank)
    if slowest.local_seconds < _SLOW_RATIO * others or slowest.local_seconds - others < _SLOW_S:
        return None
    data, towers = (slowest.seconds.get(phase, 0.0) for phase in ("data", "towers"))
    return (
        f"rank {rank} on host {slowest.host} slows all ranks down: {slowest.local_seconds:.2f} s per step "
        f"({data:.2f} s loading data, {towers:.2f} s in the towers), median of the other ranks {others:.2f} s"
    )
