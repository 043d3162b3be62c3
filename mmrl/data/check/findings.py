"""Combines the results of all shards: totals of each set, problems by kind, duplicates over all sets.

The fields of CheckResult and of all that it holds are the keys of `--json`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.data.check.shard import NOT_INDEXED, ImageSize, ShardFacts, Tally, TokenCounter
from mmrl.data.index import Problem
from mmrl.data.opening import open_shards
from mmrl.data.samples import NO_GROUP
from mmrl.data.stores import ShardCache
from mmrl.errors import InputError

# Problems named per kind, and pairs of duplicates.
_EXAMPLES = 3


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of some integers."""

    smallest: int
    median: int
    """The lower of the two middle ones if their count is even."""
    largest: int

    @classmethod
    def of(cls, counts: Mapping[int, int]) -> "Spread | None":
        """Of integers given as value -> number of times it occurs; None if there are none."""
        total, seen = sum(counts.values()), 0
        for value in sorted(counts):
            seen += counts[value]
            if 2 * seen >= total > 0:
                return cls(min(counts), value, max(counts))
        return None


@dataclass(frozen=True)
class TokenFacts:
    """Lengths of the captions in tokens."""

    lengths: Spread | None
    context_length: int
    """Tokens that the model reads."""
    cut: int
    """Captions that are longer, and are truncated."""


@dataclass(frozen=True)
class SetFacts:
    """Statistics of one set of shards."""

    name: str
    """The source's name if a config has several, else empty."""
    shards: int
    samples: int
    bytes: int
    samples_of_shard: Spread | None
    bytes_of_shard: Spread | None
    smallest_shard: str | None
    """The shard with the fewest samples."""
    largest_shard: str | None
    extensions: dict[str, int]
    """Extension -> number of samples that have it."""
    formats: dict[str, int]
    """Format of the images, by their first bytes -> number of images."""
    grouped_samples: int
    groups: int
    captions: int
    captions_of_sample: Spread | None
    characters: Spread | None
    """Per caption."""
    tokens: TokenFacts | None
    decoded: int
    """Decoded images. The sizes below are in pixels."""
    shorter_side: Spread | None
    smallest_picture: ImageSize | None
    largest_picture: ImageSize | None
    least_side: int
    small_pictures: int
    """Images whose shorter side is below least_side."""

    @classmethod
    def of(
        cls, name: str, shards: Sequence[ShardFacts], tally: Tally, least_side: int, tokens: TokenCounter | None
    ) -> "SetFacts":
        """The statistics of a set from the results of its shards."""
        usable = [facts for facts in shards if facts.usable]
        ranked = sorted(usable, key=lambda facts: facts.samples)
        groups = np.concatenate([facts.group_N for facts in shards])
        groups = groups[groups != NO_GROUP]
        cut = sum(count for length, count in tally.tokens.items() if tokens and length > tokens.context_length)
        return cls(
            name=name,
            shards=len(shards),
            samples=sum(facts.samples for facts in shards),
            bytes=sum(facts.size for facts in shards),
            samples_of_shard=Spread.of(Counter(facts.samples for facts in usable)),
            bytes_of_shard=Spread.of(Counter(facts.size for facts in usable)),
            smallest_shard=ranked[0].location if ranked else None,
            largest_shard=ranked[-1].location if ranked else None,
            extensions=dict(sorted(tally.extensions.items())),
            formats=dict(tally.formats.most_common()),
            grouped_samples=len(groups),
            groups=len(np.unique(groups)),
            captions=tally.characters.total(),
            captions_of_sample=Spread.of(tally.captions_of_sample),
            characters=Spread.of(tally.characters),
            tokens=TokenFacts(Spread.of(tally.tokens), tokens.context_length, cut) if tokens else None,
            decoded=tally.shorter_sides.total(),
            shorter_side=Spread.of(tally.shorter_sides),
            smallest_picture=tally.smallest,
            largest_picture=tally.largest,
            least_side=least_side,
            small_pictures=sum(count for side, count in tally.shorter_sides.items() if side < least_side),
        )


@dataclass(frozen=True)
class Duplicates:
    """Repeated keys and images, over all sets together."""

    keys: int
    """Samples whose key an earlier shard has too; harmless, since a sample's full name starts with its shard."""
    key_examples: list[list[str]]
    pictures: int
    """Samples whose image has the same bytes as another sample's; the first of each is not counted."""
    pictures_apart: int
    """Those that share no group with it: in one batch they are each other's negatives."""
    picture_examples: list[list[str]]


@dataclass(frozen=True)
class RunEstimate:
    """Steps and samples of a training run on the data."""

    batch_size: int
    """Global."""
    world_size: int
    loader_workers: int
    samples_per_epoch: int
    steps_per_epoch: int
    left_out_per_epoch: int
    """Samples that fill no batch; different ones each epoch."""
    samples_per_rank: int
    """Per epoch."""
    shards: int
    loaders: int
    """Ranks × loader workers."""


@dataclass(frozen=True)
class CheckResult:
    """The result of `mmrl check`."""

    ok: bool
    sets: list[SetFacts]
    duplicates: Duplicates
    problems: dict[str, int]
    """Kind -> number of problems."""
    examples: list[Problem]
    """The first few of each kind."""
    bad_samples: int
    """Samples that training skips or the index leaves out: repeated keys, samples that a truncated tar ends in."""
    bad_share: float
    max_bad_fraction: float
    plan: RunEstimate | None
    stops: list[str]
    """Reasons why a training run would fail or train on damaged data, one sentence each."""
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


class Findings:
    """Accumulates the results of the shards. Memory: 32 bytes per sample."""

    def __init__(self, shards_of_set: Sequence[int], list_file: Path | None) -> None:
        self.of_set: list[list[ShardFacts]] = [[] for _ in shards_of_set]
        self.tallies = [Tally() for _ in shards_of_set]
        self.kinds: Counter[str] = Counter()
        self.examples: list[Problem] = []
        self.bad: Counter[str] = Counter()
        """Samples that training skips, by the kind of their problem."""
        self._remaining = list(shards_of_set)
        self._list_file = list_file

    def add(self, facts: ShardFacts) -> None:
        """Adds the next shard; shards come in the order of the sets, and of the shards of each."""
        which = next(number for number, remaining in enumerate(self._remaining) if remaining)
        self._remaining[which] -= 1
        self.tallies[which].add(facts.tally)
        for problem in facts.problems:
            self.kinds[problem.kind] += 1
            if self.kinds[problem.kind] <= _EXAMPLES:
                self.examples.append(problem)
        self.bad.update(facts.tally.bad)
        if self._list_file is not None and facts.problems:
            with self._list_file.open("a") as file:
                file.writelines(json.dumps(asdict(problem)) + "\n" for problem in facts.problems)
        facts.problems, facts.tally = [], Tally()
        self.of_set[which].append(facts)

    @property
    def bad_share(self) -> float:
        """Bad samples as a fraction of all, including those that the index leaves out."""
        samples = sum(facts.samples for some in self.of_set for facts in some)
        samples += sum(self.bad[kind] for kind in NOT_INDEXED)
        return self.bad.total() / max(samples, 1)


def find_duplicates(shards: Sequence[ShardFacts], cache: ShardCache) -> Duplicates:
    """Finds repeated keys by 64-bit hashes (1 false one in 3,700 sets of 10^8 samples), images by 128-bit ones."""
    name = _SampleNames(shards, cache)
    key_N, image_N2, group_N = (
        np.concatenate([getattr(facts, array) for facts in shards]) for array in ("key_N", "image_N2", "group_N")
    )
    order = np.argsort(key_N, kind="stable")
    first, repeat = _equal_neighbours(order, key_N[order][1:] == key_N[order][:-1])
    has_image = np.flatnonzero(image_N2.any(axis=1))
    # Equal images are sorted by group, so that those of one group are neighbours.
    order = has_image[np.lexsort((group_N[has_image], image_N2[has_image, 1], image_N2[has_image, 0]))]
    same = (image_N2[order[1:]] == image_N2[order[:-1]]).all(axis=1)
    image, copy = _equal_neighbours(order, same)
    apart = (group_N[image] != group_N[copy]) | (group_N[copy] == NO_GROUP)
    # Examples without a common group come first, in the order of the shards.
    ranked = np.lexsort((image, ~apart))
    keys_ranked = np.argsort(first, kind="stable")
    return Duplicates(
        keys=len(repeat),
        key_examples=[[name(int(first[i])), name(int(repeat[i]))] for i in keys_ranked[:_EXAMPLES]],
        pictures=len(copy),
        pictures_apart=int(apart.sum()),
        picture_examples=[[name(int(image[i])), name(int(copy[i]))] for i in ranked[:_EXAMPLES]],
    )


def _equal_neighbours(order: np.ndarray, equal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (previous row, row) of the rows that equal the previous one in this order."""
    return order[:-1][equal], order[1:][equal]


class _SampleNames:
    """Row over all shards -> "shard/key", by the shard's index."""

    def __init__(self, shards: Sequence[ShardFacts], cache: ShardCache) -> None:
        self._shards, self._cache = shards, cache
        self._ends = np.cumsum([facts.samples for facts in shards])

    def __call__(self, row: int) -> str:
        which = int(np.searchsorted(self._ends, row, side="right"))
        facts = self._shards[which]
        within = int(row - self._ends[which] + facts.samples)
        try:
            (shard,) = open_shards([facts.location], self._cache)
            return f"{facts.location}/{shard.load().key(within)}"
        except (InputError, OSError):  # the shard was removed in the meantime; its duplicates are still reported
            return f"{facts.location}, sample {within + 1:,}"
