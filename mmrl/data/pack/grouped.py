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
        missing, waiting = self._sizes.tolist(), dict[int, list[tuple[Pair, dict[str, tuple[int, int]]]]]()
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as images:

            def read(offset: int, size: int) -> bytes:
                images.seek(offset)
                return images.read(size)

            for pair, group in zip(self._pairs.after(0), self._group_N.tolist(), strict=True):
                missing[group] -= 1
                if missing[group] > 0 and isinstance(pair, Pair):
                    spans = dict[str, tuple[int, int]]()
                    for name, image in zip(("image", "second_image"), pair.images, strict=True):
                        if isinstance(image, bytes):
                            spans[name] = images.seek(0, 2), images.write(image)
                    pair = replace(pair, **dict.fromkeys(spans, b""))
                    waiting.setdefault(group, []).append((pair, spans))
                    continue
                if missing[group] == 0:  # of a bad pair too, which may be the last one
                    for one, spans in waiting.pop(group, []):
                        yield replace(one, **{name: read(*span) for name, span in spans.items()})
                yield pair
