"""The second member of a pair: another sample of a row's group; a pure function of seed and epoch.

Shapes: N samples of the set.
"""

from collections.abc import Collection, Iterator
from contextlib import suppress

import numpy as np

from mmrl.data import draws
from mmrl.data.groups import NO_GROUP
from mmrl.data.order import EpochOrder
from mmrl.data.parsing import IMAGE, TEXT
from mmrl.data.samples import BadSample, SampleReader

_DRAW = 1 << 24
# Up to this number of samples, a group is also looked for in other shards, by a table of all groups in memory. It
# decides what a batch holds, so it does not depend on the machine.
_MOST_IN_TABLE = 262_144
# Samples of a source's first shard that tell whether samples have second members of their own.
_LOOKED_AT = 16


class SecondMembers:
    """Finds the other samples of a sample's group."""

    def __init__(self, reader: SampleReader, seed: int, kinds: Collection[str]) -> None:
        """Reads the groups of all shards, unless the set is too large for that, and adds what is known of them to the
        reader's notes.

        Args:
            kinds: IMAGE, TEXT or both.

        Raises:
            InputError: a shard cannot be read.
        """
        self._reader, self._seed = reader, seed
        self._table: tuple[np.ndarray, np.ndarray] | None = None
        for kind in sorted(kinds):
            if count := reader.second_counts[kind]:
                reader.notes.append(
                    f"Second members of pairs: {count} of {reader.looked_at} samples that were looked at have a "
                    f"second {kind} of their own (fields.second_{kind})."
                )
        if _have_own(reader, kinds):
            return  # where a sample has none, its group is looked for in its own shard
        if not has_table(reader, kinds):
            reader.notes.append(
                f"Second members of pairs: the set has {len(reader):,} samples, more than {_MOST_IN_TABLE:,}, so they "
                "are looked for in a sample's own shard alone, and samples whose group is in other shards only are "
                "their own; mmrl check counts them, and mmrl pack puts groups together."
            )
            return
        groups_N, shard_N = reader.all_groups()
        order_N = np.argsort(groups_N, kind="stable")
        self._table = groups_N[order_N], order_N
        alone, apart = count_split(groups_N, shard_N)
        has_partner = len(groups_N) - alone - apart
        reader.notes.append(
            f"Second members of pairs: {has_partner / len(groups_N):.1%} of the samples have another one of their "
            f"group in their shard, {apart / len(groups_N):.1%} in other shards only (used if it is in the same lane), "
            f"and {alone / len(groups_N):.1%} have none, and are their own second member."
        )

    def candidates(self, index: int, order: EpochOrder, position: int) -> Iterator[int]:
        """The other samples of the group of sample + copy * N `index`, in the order in which they are to be tried for
        this position of the epoch: those of its shard, then those of other shards that its lane reads in this epoch.
        """
        sample = index % len(self._reader)
        first, groups = self._reader.groups_of_shard(sample)
        group = groups[sample - first]
        if group == NO_GROUP:
            return
        here = first + np.flatnonzero(groups == group)
        yield from self._shuffled(here[here != sample], order.epoch, index, 0)
        if self._table is not None:
            group_N, sample_N = self._table
            found = sample_N[np.searchsorted(group_N, group) : np.searchsorted(group_N, group, side="right")]
            found = found[(found < first) | (found >= first + len(groups))]
            if len(found):
                found = found[order.lane_samples(order.lane_of(position))[found]]
            yield from self._shuffled(found, order.epoch, index, 1)

    def _shuffled(self, samples: np.ndarray, epoch: int, index: int, which: int) -> Iterator[int]:
        """The samples in a random order, of which mostly the first alone is asked for."""
        if len(samples):
            key = (self._seed, epoch, index, _DRAW, which)
            first = int(draws.uniform(*key) * len(samples))
            yield int(samples[first])
            yield from (int(samples[n]) for n in draws.permutation(len(samples), *key) if n != first)

    def uniform(self, epoch: int, indices_B: np.ndarray) -> np.ndarray:
        """The random numbers in [0, 1) by which second captions are chosen: (B,)."""
        return draws.uniform(self._seed, epoch, indices_B, _DRAW)


def has_table(reader: SampleReader, kinds: Collection[str]) -> bool:
    """Whether the groups of all shards are read before the first batch."""
    return len(reader) <= _MOST_IN_TABLE and not _have_own(reader, kinds)


def _have_own(reader: SampleReader, kinds: Collection[str]) -> bool:
    """Whether the first samples of each source all have their own second members. Not those that `second_counts`
    counts: which they are depends on the indexes that this host has, and may change until a resume."""
    found, start = False, 0
    for source in reader.sources:
        for index in range(start, start + min(_LOOKED_AT, source.shards[0].samples)):
            with suppress(BadSample):
                sample = reader.read(index, with_image=IMAGE in kinds)
                found = True
                if any(not {IMAGE: sample.second_image, TEXT: sample.second_text}[kind] for kind in kinds):
                    return False
        start += source.share.total
    return found


def count_split(group_N: np.ndarray, shard_N: np.ndarray) -> tuple[int, int]:
    """How many samples are alone in their group, or have none, and how many have others of it in other shards only."""
    has_group = group_N != NO_GROUP
    item_N = np.unique(group_N[has_group], return_inverse=True)[1]
    in_group = np.bincount(item_N)[item_N] if len(item_N) else item_N
    _, place_N, count = np.unique(
        np.stack([item_N, shard_N[has_group]]), axis=1, return_inverse=True, return_counts=True
    )
    in_shard = count[place_N.ravel()]
    return int((~has_group).sum() + (in_group == 1).sum()), int(((in_group > 1) & (in_shard == 1)).sum())
