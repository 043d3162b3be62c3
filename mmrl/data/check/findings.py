"""The findings of all shards put together: totals of each set, problems by kind, duplicates over everything."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.data.check.shard import LEFT_OUT, Picture, ShardFacts, Tally, Tokens
from mmrl.data.index import Problem
from mmrl.data.opening import open_shards
from mmrl.data.samples import NO_GROUP
from mmrl.data.stores import Store
from mmrl.errors import InputError

# So many problems of a kind, and pairs of duplicates, are named.
_EXAMPLES = 3


@dataclass(frozen=True)
class Spread:
    """Some numbers, briefly."""

    smallest: int
    median: int
    """The lower one of two."""
    largest: int

    @classmethod
    def of(cls, count_of: Mapping[int, int]) -> "Spread | None":
        """The numbers are given as number -> how often; None of none."""
        total, seen = sum(count_of.values()), 0
        for number in sorted(count_of):
            seen += count_of[number]
            if 2 * seen >= total > 0:
                return cls(min(count_of), number, max(count_of))
        return None


@dataclass(frozen=True)
class TokenFacts:
    """How long the captions are to the tokenizer."""

    lengths: Spread | None
    context_length: int
    """So many tokens are read."""
    cut: int
    """Captions that are longer."""


@dataclass(frozen=True)
class SetFacts:
    """What one set of shards holds."""

    name: str
    """The source's, where a config has several."""
    shards: int
    samples: int
    bytes: int
    samples_of_shard: Spread | None
    bytes_of_shard: Spread | None
    smallest_shard: str | None
    """By samples, as the largest."""
    largest_shard: str | None
    extensions: dict[str, int]
    """Samples that have each."""
    formats: dict[str, int]
    """Of the pictures, by their first bytes."""
    grouped_samples: int
    groups: int
    captions: int
    captions_of_sample: Spread | None
    characters: Spread | None
    """Of a caption."""
    tokens: TokenFacts | None
    decoded: int
    """Pictures; their sizes are in pixels."""
    shorter_side: Spread | None
    smallest_picture: Picture | None
    largest_picture: Picture | None
    least_side: int
    small_pictures: int
    """With a shorter side below least_side."""

    @classmethod
    def of(
        cls, name: str, shards: Sequence[ShardFacts], tally: Tally, least_side: int, tokens: Tokens | None
    ) -> "SetFacts":
        """Sums up one set."""
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
    """What is there more than once, over all sets together."""

    keys: int
    """Samples whose key an earlier shard has as well; harmless, since a sample's name begins with its shard."""
    key_examples: list[list[str]]
    pictures: int
    """Samples whose picture, byte for byte, another sample shows as well: beyond the first."""
    pictures_apart: int
    """Those of them that share no group with it: in one batch they are each other's negatives."""
    picture_examples: list[list[str]]


@dataclass(frozen=True)
class Plan:
    """What a training would make of the set."""

    batch_size: int
    """The global one."""
    world_size: int
    loader_workers: int
    samples_per_epoch: int
    steps_per_epoch: int
    left_out_per_epoch: int
    """The tail that fills no batch; another one each epoch."""
    samples_per_rank: int
    """In an epoch."""
    shards: int
    loaders: int
    """Ranks x workers."""


@dataclass(frozen=True)
class CheckResult:
    """Everything that was found."""

    ok: bool
    sets: list[SetFacts]
    duplicates: Duplicates
    problems: dict[str, int]
    """How many of each kind."""
    examples: list[Problem]
    """The first few of each kind."""
    bad_samples: int
    """Skipped by training, or left out of the index: second copies of a key, samples that a cut tar ends in."""
    bad_share: float
    max_bad_fraction: float
    plan: Plan | None
    stops: list[str]
    """What would stop or spoil a training, a sentence each."""
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)


class Findings:
    """What the shards' facts add up to, in flat memory but for 32 bytes a sample."""

    def __init__(self, shards_of_set: Sequence[int], list_file: Path | None) -> None:
        self.of_set: list[list[ShardFacts]] = [[] for _ in shards_of_set]
        self.tallies = [Tally() for _ in shards_of_set]
        self.kinds: Counter[str] = Counter()
        self.examples: list[Problem] = []
        self.bad: Counter[str] = Counter()
        """Samples that training does without, by kind."""
        self._left = list(shards_of_set)
        self._list_file = list_file

    def add(self, facts: ShardFacts) -> None:
        """The facts of the next shard; they come in the order of the sets and their shards."""
        which = next(number for number, left in enumerate(self._left) if left)
        self._left[which] -= 1
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
        """Of all samples, with those that the index leaves out."""
        samples = sum(facts.samples for some in self.of_set for facts in some)
        samples += sum(self.bad[kind] for kind in LEFT_OUT)
        return self.bad.total() / max(samples, 1)


def find_duplicates(shards: Sequence[ShardFacts], store: Store) -> Duplicates:
    """By hashes of 64 bits for keys (of 10^8, two meet by chance in one set of 4,000) and 128 bits for pictures."""
    name = _Names(shards, store)
    key_N, picture_N2, group_N = (
        np.concatenate([getattr(facts, array) for facts in shards]) for array in ("key_N", "picture_N2", "group_N")
    )
    order = np.argsort(key_N, kind="stable")
    first, again = _neighbours(order, key_N[order][1:] == key_N[order][:-1])
    has = np.flatnonzero(picture_N2.any(axis=1))
    # Ordered by group among equal pictures, so that those of one group are neighbours.
    order = has[np.lexsort((group_N[has], picture_N2[has, 1], picture_N2[has, 0]))]
    same = (picture_N2[order[1:]] == picture_N2[order[:-1]]).all(axis=1)
    shown, too = _neighbours(order, same)
    apart = (group_N[shown] != group_N[too]) | (group_N[too] == NO_GROUP)
    # The harmful ones are named first, in the order of the shards.
    ranked = np.lexsort((shown, ~apart))
    return Duplicates(
        keys=len(again),
        key_examples=[[name(int(first[i])), name(int(again[i]))] for i in np.argsort(first, kind="stable")[:_EXAMPLES]],
        pictures=len(too),
        pictures_apart=int(apart.sum()),
        picture_examples=[[name(int(shown[i])), name(int(too[i]))] for i in ranked[:_EXAMPLES]],
    )


def _neighbours(order: np.ndarray, equal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that are equal to the one before them in this order: (that one, itself)."""
    return order[:-1][equal], order[1:][equal]


class _Names:
    """Row over all shards -> "shard/key", by the shard's index."""

    def __init__(self, shards: Sequence[ShardFacts], store: Store) -> None:
        self._shards, self._store = shards, store
        self._ends = np.cumsum([facts.samples for facts in shards])

    def __call__(self, row: int) -> str:
        which = int(np.searchsorted(self._ends, row, side="right"))
        facts = self._shards[which]
        within = int(row - self._ends[which] + facts.samples)
        try:
            (shard,) = open_shards([facts.location], self._store)
            return f"{facts.location}/{shard.load().key(within)}"
        except (InputError, OSError):  # it has gone in the meantime; that is no reason to lose what was found
            return f"{facts.location}, sample {within + 1:,}"
