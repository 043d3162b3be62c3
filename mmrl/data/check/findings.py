"""Combines the results of all shards: totals of each set, problems by kind, duplicates over all sets.

The fields of CheckResult and of all that it holds are the keys of `--json`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmrl.data.check.shard import NOT_INDEXED, ImageSize, ShardFacts, Tally, TokenCounter
from mmrl.data.index import Problem
from mmrl.data.opening import open_shards, read_index
from mmrl.data.parsing import IMAGE, TEXT
from mmrl.data.samples import NO_GROUP
from mmrl.data.stores import ShardCache
from mmrl.data.stream import Stream
from mmrl.errors import InputError
from mmrl.images.perceptual_hash import most_similar

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
    """Lengths of the captions and second texts in tokens."""

    lengths: Spread | None
    context_length: int
    """Tokens that the model reads."""
    cut: int
    """Texts that are longer, and are truncated."""
    max_characters: int | None
    """Characters of a text that are tokenised; None for all."""
    beyond: int
    """Texts that are longer; their tokens are counted up to there."""


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
    split_groups: int
    """Groups whose samples are in several shards."""
    captions: int
    captions_of_sample: Spread | None
    second_texts: int
    """Samples with a second text of their own (fields.second_text)."""
    second_images: int
    characters: Spread | None
    """Per caption or second text."""
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
        of_shards = np.concatenate([np.unique(facts.group_N) for facts in shards])
        unique, shards_of_group = np.unique(of_shards[of_shards != NO_GROUP], return_counts=True)
        cut = beyond = 0
        if tokens:
            cut = sum(count for length, count in tally.tokens.items() if length > tokens.context_length)
        if tokens and (most := tokens.max_characters) is not None:
            beyond = sum(count for length, count in tally.characters.items() if length > most)
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
            groups=len(unique),
            split_groups=int((shards_of_group > 1).sum()),
            captions=sum(captions * samples for captions, samples in tally.captions_of_sample.items()),
            captions_of_sample=Spread.of(tally.captions_of_sample),
            second_texts=tally.seconds[TEXT],
            second_images=tally.seconds[IMAGE],
            characters=Spread.of(tally.characters),
            tokens=TokenFacts(Spread.of(tally.tokens), tokens.context_length, cut, tokens.max_characters, beyond)
            if tokens
            else None,
            decoded=tally.shorter_sides.total(),
            shorter_side=Spread.of(tally.shorter_sides),
            smallest_picture=tally.smallest,
            largest_picture=tally.largest,
            least_side=least_side,
            small_pictures=sum(count for side, count in tally.shorter_sides.items() if side < least_side),
        )


@dataclass(frozen=True)
class Duplicates:
    """Repeated images and captions, over all sets together."""

    pictures: int
    """Samples whose image has the same bytes as another sample's; the first of each is not counted."""
    pictures_apart: int
    """Those that share no group with it: in one batch they are each other's negatives."""
    picture_examples: list[list[str]]
    captions_apart: int
    """Samples with a caption or second text of another sample that shares no group with them."""
    caption_examples: list[list[str]]


@dataclass(frozen=True)
class Overlap:
    """The samples of another set, e.g. for validation, whose image the checked set has too."""

    against: str
    """The other set."""
    samples: int
    """Of the other set."""
    bad: int
    """Samples of it that could not be compared."""
    identical: int
    """Those whose image has the same bytes as one of the checked set."""
    identical_examples: list[list[str]]
    alike: int
    """Those whose image looks like one of the checked set: resized, re-encoded or slightly cropped or brightened."""
    alike_examples: list[list[str]]


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

    @classmethod
    def of(cls, stream: Stream, world_size: int, loader_workers: int, shards: int) -> "RunEstimate":
        """The run that reads a stream."""
        batch, steps, loaders = stream.global_batch_size, stream.batches_per_epoch, world_size * max(loader_workers, 1)
        used = steps * batch
        left_out, per_rank = stream.samples - used, used // world_size
        return cls(batch, world_size, loader_workers, stream.samples, steps, left_out, per_rank, shards, loaders)


@dataclass(frozen=True)
class CheckResult:
    """The result of `mmrl check`."""

    ok: bool
    sets: list[SetFacts]
    duplicates: Duplicates
    overlap: Overlap | None
    """Only with `--against`."""
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


class Findings:
    """Accumulates the results of the shards. Memory: 24 bytes per sample and 16 per caption."""

    def __init__(self, shards_of_set: Sequence[int], repeats: Sequence[float], list_file: Path | None) -> None:
        self._repeats = list(repeats)
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
        """Bad samples as a fraction of all, including those that the index leaves out. A set counts as often as an
        epoch repeats it."""
        bad = samples = 0.0
        for repeat, facts_of_shards, tally in zip(self._repeats, self.of_set, self.tallies, strict=True):
            not_indexed = sum(tally.bad[kind] for kind in NOT_INDEXED)
            bad += repeat * tally.bad.total()
            samples += repeat * (sum(facts.samples for facts in facts_of_shards) + not_indexed)
        return bad / samples if samples else 0.0


def find_duplicates(shards: Sequence[ShardFacts], cache: ShardCache) -> Duplicates:
    """Finds repeated images by 128-bit hashes of their bytes."""
    name = _SampleNames(shards, cache)
    image_N2, group_N = (
        np.concatenate([getattr(facts, array) for facts in shards]) for array in ("image_N2", "group_N")
    )
    has_image = np.flatnonzero(image_N2.any(axis=1))
    # Equal images are sorted by group, so that those of one group are neighbours.
    order = has_image[np.lexsort((group_N[has_image], image_N2[has_image, 1], image_N2[has_image, 0]))]
    same = (image_N2[order[1:]] == image_N2[order[:-1]]).all(axis=1)
    image, copy = order[:-1][same], order[1:][same]
    apart = (group_N[image] != group_N[copy]) | (group_N[copy] == NO_GROUP)
    # Examples without a common group come first, in the order of the shards.
    ranked = np.lexsort((image, ~apart))
    captions_apart, caption_examples = _shared_captions(shards)
    return Duplicates(
        pictures=len(copy),
        pictures_apart=int(apart.sum()),
        picture_examples=[[name(int(image[i])), name(int(copy[i]))] for i in ranked[:_EXAMPLES]],
        captions_apart=captions_apart,
        caption_examples=[[name(row) for row in rows] for rows in caption_examples],
    )


def _shared_captions(shards: Sequence[ShardFacts]) -> tuple[int, list[tuple[int, int]]]:
    """How many samples have a caption of another sample without a common group, and pairs of their rows as examples."""
    first_rows = np.cumsum([0, *(facts.samples for facts in shards)])
    rows = [facts.caption_C2[:, 0] + first for facts, first in zip(shards, first_rows, strict=False)]
    row_C, id_C = np.concatenate(rows), np.concatenate([facts.caption_C2[:, 1] for facts in shards])
    group_C = np.concatenate([facts.group_N for facts in shards])[row_C]
    item_C = np.where(group_C == NO_GROUP, -2 - row_C, group_C)  # a sample without a group is an item of its own
    order = np.lexsort((row_C, item_C, id_C))
    row_C, item_C, id_C = row_C[order], item_C[order], id_C[order]
    starts = np.flatnonzero(np.append(True, id_C[1:] != id_C[:-1]))[: len(id_C)]
    ends = np.append(starts, len(id_C))[1:]
    several = item_C[starts] != item_C[ends - 1]
    is_shared_C = np.repeat(several, ends - starts)
    pairs = sorted(
        (min(pair), max(pair)) for pair in zip(row_C[starts[several]], row_C[ends[several] - 1], strict=True)
    )
    return len(np.unique(row_C[is_shared_C])), [(int(one), int(other)) for one, other in pairs[:_EXAMPLES]]


def find_overlap(
    against: str,
    others: Sequence[ShardFacts],
    shards: Sequence[ShardFacts],
    cache: ShardCache,
    on_rows: Callable[[int], None],
) -> Overlap:
    """Compares the images of another set with those of the checked shards, by their bytes and by how they look.

    `on_rows` is called with numbers of finished samples of the other set, for a progress bar.
    """
    name, name_of_other = _SampleNames(shards, cache), _SampleNames(others, cache)
    image_N2, image_M2 = (np.concatenate([facts.image_N2 for facts in some]) for some in (others, shards))
    order = np.argsort(image_M2[:, 0], kind="stable")
    found = np.searchsorted(image_M2[order, 0], image_N2[:, 0]).clip(max=max(len(order) - 1, 0))
    is_usable = image_N2.any(axis=1)
    same = np.full(len(image_N2), -1)
    if len(order):
        same = np.where((image_M2[order[found]] == image_N2).all(axis=1) & is_usable, order[found], -1)
    look_N8, look_M8 = (
        np.concatenate([facts.look_N8 for facts in some if facts.look_N8 is not None] or [np.empty((0, 8), np.uint64)])
        for some in (others, shards)
    )
    rest, to = np.flatnonzero(look_N8.any(axis=1) & (same < 0)), np.flatnonzero(look_M8.any(axis=1))
    on_rows(len(image_N2) - len(rest))
    nearest = most_similar(look_N8[rest], look_M8[to], on_rows)
    alike = [(int(row), int(to[other])) for row, other in zip(rest, nearest, strict=True) if other >= 0]
    identical = [(int(row), int(same[row])) for row in np.flatnonzero(same >= 0)]
    return Overlap(
        against=against,
        samples=len(image_N2),
        bad=int((~is_usable).sum()),
        identical=len(identical),
        identical_examples=[[name_of_other(one), name(other)] for one, other in identical[:_EXAMPLES]],
        alike=len(alike),
        alike_examples=[[name_of_other(one), name(other)] for one, other in alike[:_EXAMPLES]],
    )


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
            return f"{facts.location}/{read_index(shard, self._cache).key(within)}"
        except (InputError, OSError):  # the shard was removed in the meantime; its duplicates are still reported
            return f"{facts.location}, sample {within + 1:,}"
