"""Whether the images of two sets of local shards are the same, in seconds: by the sizes and some bytes of the members.

`mmrl check --against` compares all images, also those that only look alike.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np

from mmrl.data.opening import read_index
from mmrl.data.samples import SampleReader
from mmrl.data.stores import is_remote
from mmrl.errors import InputError

# Limits: samples whose sizes are compared, bytes of an image that are, and comparisons.
_SAMPLES, _BYTES, _COMPARISONS = 2_000_000, 4096, 4096


class _Images:
    """Where the images of a set's local shards are; of up to _SAMPLES samples, in whole shards spread over the set."""

    def __init__(self, reader: SampleReader) -> None:
        shards = [(shard, source.fields) for source in reader.sources for shard in source.shards]
        shards = [(shard, fields) for shard, fields in shards if not is_remote(shard.location)]
        shards = shards[:: max(1, -(-sum(shard.samples for shard, _ in shards) // _SAMPLES))]
        self._locations = [shard.location for shard, _ in shards]
        found = [np.empty((3, 0), np.int64)]
        for number, (shard, fields) in enumerate(shards):
            with suppress(OSError, InputError):  # the shard has changed; whoever reads it will say so
                index = read_index(shard, reader.cache)
                kinds = [n for n, one in enumerate(index.extensions) if one in fields.image_extensions]
                rows = np.flatnonzero(np.isin(index.kind, kinds))
                found.append(np.stack([np.full(len(rows), number), index.offset[rows], index.size[rows]]))
        self._shard_N, self._offset_N, self.size_N = np.concatenate(found, axis=1)

    def read(self, row: int) -> bytes | None:
        """Bytes from the middle of an image; None if its shard cannot be read."""
        size = int(self.size_N[row])
        length = min(size, _BYTES)
        try:
            with Path(self._locations[self._shard_N[row]]).open("rb", buffering=0) as file:
                file.seek(int(self._offset_N[row]) + (size - length) // 2)
                return file.read(length)
        except OSError:
            return None


def shared_images(train: SampleReader, other: SampleReader) -> tuple[int, int]:
    """How many images of `other` are images of `train` too, and how many were compared.

    Those with the fewest training images of equal size are compared, up to _COMPARISONS pairs. Of a larger training
    set, as many whole shards are compared as have 2,000,000 samples.
    """
    ours, theirs = _Images(train), _Images(other)
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
