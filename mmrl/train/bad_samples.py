"""The samples that a run could not use: counted over all ranks, listed with their reasons, and bounded."""

import dataclasses
from collections import Counter
from typing import Any

from mmrl.data.batches import Batch
from mmrl.data.check.shard import NOT_INDEXED
from mmrl.data.index import BAD_SAMPLES, Problem, printable, summarise_problems
from mmrl.data.samples import SampleReader
from mmrl.distributed import comm
from mmrl.errors import RunStopped

# The share is measured per epoch, or per this number of samples if an epoch is longer: the bad samples of fewer can be
# those of one bad shard.
_LONGEST_SPAN = 1_000_000


class BadSamples:
    """Each rank keeps what it has seen since the last `gather`; the counts are the same on all ranks."""

    def __init__(self, run: str, reader: SampleReader, rows_per_epoch: int, max_fraction: float) -> None:
        """Args:
        reader: the samples, with the problems that every rank found when it opened the shards.
        rows_per_epoch: the rows of all batches of an epoch, which leaves some samples out.
        max_fraction: the largest share of bad samples that a run may have.
        """
        self._path, self._max_fraction = f"{run}/{BAD_SAMPLES}", max_fraction
        self._pending: list[Problem] = list(reader.problems) if comm.world().is_rank_0 else []
        self._known, self._seen = len(reader.problems), 0
        self._rows_per_epoch, self._per_epoch = rows_per_epoch, sum(share.per_epoch for share in reader.shares)
        # Samples that no epoch draws, since the index lacks them.
        repeats = {printable(shard.location): source.repeat for source in reader.sources for shard in source.shards}
        lacking = (problem.shard for problem in reader.problems if problem.kind in NOT_INDEXED)
        self._not_indexed = sum(repeats[shard] for shard in lacking)
        self.counts: Counter[str] = Counter()

    def restore(self, counts: dict[str, int], seen: int) -> None:
        """Continues the counts of a checkpoint. The problems before it are in the list already.

        Args:
            seen: the samples that this rank had read.
        """
        self._pending, self._seen, self.counts = [], seen, Counter(counts)
        self._known = min(self._known, self.counts.total())

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

    @property
    def share(self) -> float:
        """The least share of bad samples in the set that those seen so far prove, 0 to 1: samples of an epoch that are
        still to come count as good. After an epoch it is the share that `mmrl check` reports.

        Each bad sample counts once per epoch, and fills one row of a batch, however many replacements were tried.
        """
        is_short = self._per_epoch <= _LONGEST_SPAN
        rows, samples = (self._rows_per_epoch, self._per_epoch) if is_short else (_LONGEST_SPAN, _LONGEST_SPAN)
        spans, rest = divmod(self._seen * comm.world().size, rows)
        drawn = (self.counts.total() - self._known) / max(spans * rows + (samples if rest else 0), 1)
        return (self._not_indexed + drawn * self._per_epoch) / (self._not_indexed + self._per_epoch)

    def stop_if_too_many(self) -> None:
        """Raises RunStopped, on every rank, if more than the allowed share of samples was bad."""
        if self.share > self._max_fraction:
            raise RunStopped(
                f"At least {self.share:.2%} of the samples are bad, more than data.max_bad_fraction "
                f"{self._max_fraction:.2%} allows: {summarise_problems(self.counts)}. {self._path} lists them with "
                "their reasons."
            )
