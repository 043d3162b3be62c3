"""The samples that a run could not use: counted over all processes, listed with their reasons, and bounded."""

import dataclasses
from collections import Counter

from mmrl.data.index import BAD_SAMPLES, Problem, account
from mmrl.data.stream import Batch
from mmrl.distributed import comm
from mmrl.engine.tracking import Tracker
from mmrl.errors import RunStopped

_JUDGED_FROM = 1000  # samples; before so many, one bad sample says little


class Skipped:
    """Each process keeps what it met since the last `tell`; the counts are the same on all."""

    def __init__(self, run: str, known: list[Problem], most: float) -> None:
        """`known`: what the shards themselves lack, which every process has found alike; `most`: the share allowed."""
        self._place, self._most = f"{run}/{BAD_SAMPLES}", most
        self._unlisted = list(known) if comm.world().is_rank_0 else []
        self._seen = 0
        self.counts: Counter[str] = Counter()

    def resume(self, counts: dict[str, int], seen: int) -> None:
        """What an earlier part of the run met is in its list already; `seen` samples were this process's."""
        self._unlisted, self._seen, self.counts = [], seen, Counter(counts)

    def meet(self, batch: Batch) -> None:
        """Takes note of a batch of this process."""
        self._unlisted += batch.bad
        self._seen += len(batch.keys)

    def tell(self, tracker: Tracker | None, step: int) -> None:
        """Lists what was met since the last time; called on every process."""
        problems = [problem for share in comm.all_gather_objects(self._unlisted) for problem in share]
        self._unlisted = []
        self.counts.update(problem.kind for problem in problems)
        if tracker:
            tracker.bad_samples(step, [dataclasses.asdict(problem) for problem in problems])

    def sum_up(self, tracker: Tracker | None, epochs: int) -> None:
        """A line on the screen, where there is something to tell."""
        if tracker and self.counts:
            tracker.say(f"Epoch {epochs:,} is over; skipped so far: {account(self.counts)}; listed in {self._place}")

    def stop_if_too_many(self) -> None:
        """Raises RunStopped where more than the allowed share was bad; on every process alike."""
        seen, bad = self._seen * comm.world().size, self.counts.total()
        if bad > self._most * max(seen, _JUDGED_FROM):
            raise RunStopped(
                f"{bad:,} of {seen:,} samples were bad, more than data.max_bad_fraction {self._most:.2%} allows: "
                f"{account(self.counts)}. {self._place} lists them with their reasons."
            )
