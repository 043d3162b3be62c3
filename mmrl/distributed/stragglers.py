"""Which process is off: the one that makes the others wait, and the one whose embeddings are no numbers.

Shapes: b pairs of this process, D the embedding's width.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mmrl.distributed import comm

# A process is called slow when its own part of a step takes so many times that of the median one, and so much longer.
_SLOW, _SLOW_S = 1.5, 0.05


def not_finite(image_bD: torch.Tensor, text_bD: torch.Tensor, keys: Sequence[str]) -> str:
    """Whose embeddings of which samples hold NaN or infinity; empty where none do, or all, as when the weights are the
    cause. Called on every process."""
    rows = (~(image_bD.isfinite().all(1) & text_bD.isfinite().all(1))).nonzero().flatten().tolist()
    found = comm.all_gather_objects((comm.host(), len(rows), [keys[row] for row in rows[:2]]))
    if not any(count for _, count, _ in found) or all(count == len(keys) for _, count, _ in found):
        return ""
    shown = [
        f"{count} of {len(keys)} embeddings of rank {rank} on host {host} are (samples {', '.join(names)})"
        for rank, (host, count, names) in enumerate(found)
        if count
    ]
    return "NaN or infinite: " + "; ".join(shown[:3]) + (f"; {len(shown) - 3} more ranks" if len(shown) > 3 else "")


@dataclass(frozen=True)
class Own:
    """What one process spent on a step."""

    host: str
    seconds: Mapping[str, float]
    """By part of the step, as timing.StepClock has them."""
    peak_memory: int = 0

    @property
    def alone(self) -> float:
        """On its own, waiting for nobody: data and towers. What comes after, from the loss on, is lockstep: there a
        fast process waits for a slow one, and both take the same time. (Under ZeRO stage 3 the towers wait for the
        others' weights too.)"""
        return self.seconds.get("data", 0.0) + self.seconds.get("towers", 0.0)


def mean_seconds(owns: Sequence[Own]) -> dict[str, float]:
    """Where a step's time goes, the mean over processes."""
    parts = sorted({part for own in owns for part in own.seconds})
    return {part: sum(own.seconds.get(part, 0.0) for own in owns) / len(owns) for part in parts}


def straggler(owns: Sequence[Own]) -> str | None:
    """A sentence that names the slowest process, where it keeps the others waiting."""
    if len(owns) < 2:
        return None
    rank, slowest = max(enumerate(owns), key=lambda pair: pair[1].alone)
    others = statistics.median(one.alone for number, one in enumerate(owns) if number != rank)
    if slowest.alone < _SLOW * others or slowest.alone - others < _SLOW_S:
        return None
    data, towers = (slowest.seconds.get(part, 0.0) for part in ("data", "towers"))
    return (
        f"rank {rank} on host {slowest.host} makes the others wait: {slowest.alone:.2f} s a step of its own "
        f"({data:.2f} s for data, {towers:.2f} s in the towers), others {others:.2f} s"
    )
