"""Which process is off: the one that makes the others wait, and the one whose embeddings are no numbers.

Shapes: b pairs of this process, D the embedding's width.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mmrl import distributed

# A process is called slow when its own part of a step takes so many times that of the median one, and so much longer.
_SLOW, _SLOW_S = 1.5, 0.05


def not_finite(image_bD: torch.Tensor, text_bD: torch.Tensor, keys: Sequence[str]) -> str:
    """Whose embeddings of which samples hold NaN or infinity; empty where none do, or all, as when the weights are the
    cause. Called on every process."""
    rows = (~(image_bD.isfinite().all(1) & text_bD.isfinite().all(1))).nonzero().flatten().tolist()
    found = distributed.gather_objects((distributed.host(), len(rows), [keys[row] for row in rows[:2]]))
    if not any(count for _, count, _ in found) or all(count == len(keys) for _, count, _ in found):
        return ""
    shown = [
        f"{count} of {len(keys)} embeddings of rank {rank} on host {host} are (samples {', '.join(names)})"
        for rank, (host, count, names) in enumerate(found)
        if count
    ]
    return "NaN or infinite: " + "; ".join(shown[:3]) + (f"; {len(shown) - 3} more ranks" if len(shown) > 3 else "")


@dataclass
class Own:
    """Seconds a step that one process spent on its own, waiting for nobody."""

    host: str
    data: float
    towers: float
    """From the batch to its embeddings. Under ZeRO stage 3 this waits for the others' weights too."""

    @property
    def all(self) -> float:
        """Both."""
        return self.data + self.towers


class Pace:
    """Measures this process's own part of the steps. What comes after it, from the loss on, is lockstep: there a fast
    process waits for a slow one, and both take the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._data_s = self._towers_s = 0.0
        self._steps = 0
        self._began: float | None = None

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around the wait for a step's batch."""
        began = time.monotonic()
        yield
        self._began = time.monotonic()
        self._data_s += self._began - began
        self._steps += 1

    def embedded(self) -> None:
        """The embeddings of the step's batch are there; waits for the device, which the loss's value does anyway."""
        if self._began is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._towers_s += time.monotonic() - self._began
        self._began = None

    def all(self) -> list[Own]:
        """Every process's means since this was last called, in the order of ranks; called on every process."""
        steps = max(self._steps, 1)
        own = Own(distributed.host(), self._data_s / steps, self._towers_s / steps)
        self._data_s, self._towers_s, self._steps = 0.0, 0.0, 0
        return distributed.gather_objects(own)


def straggler(owns: Sequence[Own]) -> str | None:
    """A sentence that names the slowest process, where it keeps the others waiting."""
    if len(owns) < 2:
        return None
    rank, slowest = max(enumerate(owns), key=lambda pair: pair[1].all)
    others = statistics.median(one.all for number, one in enumerate(owns) if number != rank)
    if slowest.all < _SLOW * others or slowest.all - others < _SLOW_S:
        return None
    return (
        f"rank {rank} on host {slowest.host} makes the others wait: {slowest.all:.2f} s a step of its own "
        f"({slowest.data:.2f} s for data, {slowest.towers:.2f} s in the towers), others {others:.2f} s"
    )
