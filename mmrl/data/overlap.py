"""Whether the images of two sets of local shards are the same, in seconds: by the sizes and some bytes of the members.

`mmrl check --against` compares all images, also those that only look alike.
"""

import os
from dataclasses import dataclass

import numpy as np

from mmrl.data.opening import Shard
from mmrl.data.samples import SampleReader
from mmrl.data.stores import is_remote

# Limits: samples whose sizes are compared, bytes of an image that are, and comparisons.
_SAMPLES, _BYTES, _COMPARISONS = 2_000_000, 4096, 4096


@dataclass(frozen=True)
class _Images:
    """Where the images of a set are."""

    shards: list[Shard]
    shard_N: np.ndarray
    offset_N: np.ndarray
    size_N: np.ndarray

    @classmethod
    def of(cls, reader: SampleReader) -> "_Images":
        """Those of the local shards, up to _SAMPLES samples, whole shards spread evenly over the set."""
        sources = [(shard, source) for source in reader.sources for shard in source.shards]
        sources = [(shard, source) for shard, source in sources if not is_remote(shard.location)]
        total = sum(shard.samples for shard, _ in sources)
        sources = sources[:: max(1, -(-total // _SAMPLES))]
        shard_N, offset_N, size_N = [], [], []
        for number, (shard, source) in enumerate(sources):
            try:
                index = shard.load()
            except OSError:  # the shard has changed; whoever reads it will say so
                continue
            kinds = [n for n, one in enumerate(index.extensions) if one in source.fields.image_extensions]
            rows = np.flatnonzero(np.isin(index.kind, kinds))
            shard_N.append(np.full(len(rows), number))
            offset_N.append(index.offset[rows])
            size_N.append(index.size[rows])
        empty = np.empty(0, np.int64)
        return cls([shard for shard, _ in sources], *(np.concatenate([empty, *x]) for x in (shard_N, offset_N, size_N)))

    def read(self, row: int) -> bytes | None:
        """Bytes from the middle of an image; None if its shard cannot be read."""
        length = min(int(self.size_N[row]), _BYTES)
        try:
            file = os.open(self.shards[self.shard_N[row]].location, os.O_RDONLY)
        except OSError:
            return None
        try:
            return os.pread(file, length, int(self.offset_N[row]) + (int(self.size_N[row]) - length) // 2)
        finally:
            os.close(file)


def shared_images(train: SampleReader, other: SampleReader) -> tuple[int, int]:
    """How many images of `other` are images of `train` too, and how many were compared.

    Those with the fewest training images of equal size are compared, up to _COMPARISONS pairs. Of a larger training
    set, as many whole shards are compared as have 2,000,000 samples.
    """
    ours, theirs = _Images.of(train), _Images.of(other)
    order = np.argsort(ours.size_N, kind="stable")
    sizes = ours.size_N[order]
    first_N, end_N = (np.searchsorted(sizes, theirs.size_N, side=side) for side in ("left", "right"))
    shared = compared = comparisons = 0
    for row in np.argsort(end_N - first_N, kind="stable"):
        comparisons += int(end_N[row] - first_N[row])
        if comparisons > _COMPARISONS:
            break
        compared += 1
        data = theirs.read(row) if end_N[row] > first_N[row] else None
        shared += data is not None and any(ours.read(one) == data for one in order[first_N[row] : end_N[row]])
    return shared, compared


def overlap_note(name: str, train: SampleReader, other: SampleReader) -> str:
    """A sentence if an evaluation set, called `name`, has images of the training set; else empty."""
    shared, compared = shared_images(train, other)
    if not shared:
        return ""
    return (
        f"evaluation.sets.{name}: {shared:,} of {compared:,} compared images are training images too, so its scores "
        "are not those of new data. mmrl check --against lists them; mmrl pack --holdout keeps sets apart."
    )
