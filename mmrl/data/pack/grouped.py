"""Puts the pairs of a group next to each other, so that their samples are in one shard."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from mmrl.data.groups import NO_GROUP
from mmrl.data.index import Problem
from mmrl.data.pack.pairs import FolderPairs, Pair, TablePairs
from mmrl.output.progress import progress_bar

# Bytes of images that wait in memory for the rest of their group; beyond, they wait in a temporary file.
_IN_MEMORY = 1 << 28


class GroupedPairs:
    """The pairs of a source, those of a group where its last one is; all others keep their order, as do groups that no
    shard can hold.

    Memory: 24 bytes per pair, and about 1,000 per pair that waits for others of its group.
    """

    def __init__(self, pairs: FolderPairs | TablePairs, samples_per_shard: int, console: Console) -> None:
        self._pairs, self.columns = pairs, pairs.columns
        with progress_bar(console) as bar:
            groups = bar.track(pairs.groups(), total=len(pairs), description="Reading groups")
            group_N = np.fromiter(groups, np.int64, len(pairs))
        unique, self._group_N, sizes = np.unique(group_N, return_inverse=True, return_counts=True)
        self._sizes = np.where((unique == NO_GROUP) | (sizes > samples_per_shard), 1, sizes)
        self.is_needed = bool((self._sizes > 1).any())

    def __len__(self) -> int:
        return len(self._pairs)

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed pack recognises its source and its order."""
        return {**self._pairs.fingerprint(), "order": "by group"}

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """All but the first `position` pairs."""
        for number, pair in enumerate(self._in_order()):
            if number >= position:
                yield pair

    def _in_order(self) -> Iterator[Pair | Problem]:
        missing, waiting = self._sizes.tolist(), dict[int, list[tuple[Pair, int, int]]]()
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as images:
            for pair, group in zip(self._pairs.after(0), self._group_N.tolist(), strict=True):
                missing[group] -= 1
                if missing[group] > 0 and isinstance(pair, Pair):
                    offset = size = 0
                    if isinstance(pair.image, bytes):
                        offset, size = images.seek(0, 2), images.write(pair.image)
                        pair = replace(pair, image=b"")
                    waiting.setdefault(group, []).append((pair, offset, size))
                    continue
                if missing[group] == 0:  # of a bad pair too, which may be the last one
                    for one, offset, size in waiting.pop(group, []):
                        images.seek(offset)
                        yield replace(one, image=images.read(size)) if size else one
                yield pair
