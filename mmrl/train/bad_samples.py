"""The samples that a run could not use: counted over all ranks, listed with their reasons, and bounded."""

import dataclasses
from collections import Counter
from typing import Any

from mmrl.data.batches import Batch
from mmrl.data.index import BAD_SAMPLES, Problem, summarise_problems
from mmrl.distributed import comm
from mmrl.errors import RunStopped

_CHECKED_FROM = 1000  # samples; a share of fewer says little


class BadSamples:
    """Each rank keeps what it has seen since the last `gather`; the counts are the same on all ranks."""

    def __init__(self, run: str, known: list[Problem], max_fraction: float) -> None:
        """Args:
        known: problems that every rank found when it opened the shards.
        max_fraction: the largest share of bad samples that a run may have.
        """
        self._path, self._max_fraction = f"{run}/{BAD_SAMPLES}", max_fraction
        self._pending = list(known) if comm.world().is_rank_0 else []
        self._seen = 0
        self.counts: Counter[str] = Counter()

    def restore(self, counts: dict[str, int], seen: int) -> None:
        """Continues the counts of a checkpoint. The problems before it are in the list already.

        Args:
            seen: the samples that this rank had read.
        """
        self._pending, self._seen, self.counts = [], seen, Counter(counts)

    def add(self, batch: Batch) -> None:
        """Counts a batch of this rank."""
        self._pending += batch.bad
        self._seen += len(batch.keys)

    def gather(self) -> list[dict[str, Any]]:
        """The problems of all ranks since the last call, as records of bad_samples.jsonl. Collective."""
        problems = [problem for share in comm.all_gather_objects(self._pending) for problem in share]
        self._pending = []
        self.counts.update(problem.kind for problem in problems)
        return [dataclasses.asdict(problem) for problem in problems]

    def summary(self) -> str:
        """How many samples were skipped so far and why; empty if none were."""
        return f"skipped so far: {summarise_problems(self.counts)}; listed in {self._path}" if self.counts else ""

    def stop_if_too_many(self) -> None:
        """Raises RunStopped, on every rank, if more than the allowed share of samples was bad."""
        seen, bad = self._seen * comm.world().size, self.counts.total()
        if bad > self._max_fraction * max(seen, _CHECKED_FROM):
            raise RunStopped(
                f"{bad:,} of {seen:,} samples were bad, more than data.max_bad_fraction {self._max_fraction:.2%} "
                f"allows: {summarise_problems(self.counts)}. {self._path} lists them with their reasons."
            )
