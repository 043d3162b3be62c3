"""Divides the pairs of a source into a training and a validation part that share no group, no text and no image.

Pairs that have one of these in common are kept together, also through other pairs. Which of them are held out is a
function of their captions, groups and images, and of the seed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from mmrl.data.captions import caption_key
from mmrl.data.index import Problem
from mmrl.data.pack.grouped import GroupedPairs
from mmrl.data.pack.pairs import FolderPairs, Pair, TablePairs
from mmrl.data.texts import clean_captions
from mmrl.errors import InputError
from mmrl.output.progress import progress_bar


def parse_holdout(text: str) -> float | int:
    """The share (below 1) or the number of pairs of an option such as 5%, 0.05 or 500.

    Raises:
        InputError: anything else.
    """
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / 100 if number != text.strip() else float(number)
    except ValueError:
        value = 0.0
    if 0 < value < 1:
        return value
    if value >= 1 and number.isdecimal() and number == text.strip():
        return int(number)
    raise InputError(f"holdout: {text!r} is no share and no number of pairs; give e.g. 5% or 500.")


class HeldOutPairs:
    """The pairs of a source, those that are held out first. Memory: about 400 bytes per pair."""

    def __init__(
        self, pairs: FolderPairs | TablePairs | GroupedPairs, holdout: str, seed: int, console: Console
    ) -> None:
        """Reads all pairs once, without their images, and shows a progress bar on `console`.

        Raises:
            InputError: `holdout` is no share and no number; no pair can be held out, or none would be left.
        """
        self._pairs, self._share, self._seed = pairs, parse_holdout(holdout), seed
        self.wanted = 0
        """How many pairs were to be held out."""
        self.columns = pairs.columns
        self._is_held_out = self._choose(holdout, console)
        self.held_out = sum(self._is_held_out)
        """How many pairs are held out: the first ones of `after`."""

    def __len__(self) -> int:
        return len(self._pairs)

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed pack recognises its source and what is held out."""
        return {**self._pairs.fingerprint(), "holdout": self._share, "holdout-seed": self._seed}

    def after(self, position: int) -> Iterator[Pair | Problem]:
        """All but the first `position` pairs."""
        for is_held_out, skipped in ((True, position), (False, max(0, position - self.held_out))):
            for pair, here in zip(self._pairs.after(0), self._is_held_out, strict=True):
                if here == is_held_out:
                    if skipped <= 0:
                        yield pair
                    skipped -= 1

    def _choose(self, holdout: str, console: Console) -> bytearray:
        """1 for each pair that is held out, else 0."""
        parents, label_of, usable = list[int](), dict[int, int](), bytearray()

        def root_of(row: int) -> int:
            while parents[row] != row:
                parents[row] = row = parents[parents[row]]
            return row

        first_row_of: dict[int, int] = {}
        with progress_bar(console) as bar:
            pairs = bar.track(self._pairs.after(0), total=len(self._pairs), description="Choosing held-out pairs")
            for row, pair in enumerate(pairs):
                parents.append(row)
                links = [] if isinstance(pair, Problem) else _links(pair)
                usable.append(bool(links))
                label_of[row] = min((_hash(f"{self._seed} {link}") for link in links), default=0)
                for link in links:
                    one, other = root_of(row), root_of(first_row_of.setdefault(link, row))
                    if one != other:
                        parents[one], label_of[other] = other, min(label_of[one], label_of[other])
        sizes = Counter(root_of(row) for row, is_usable in enumerate(usable) if is_usable)
        total = sizes.total()
        self.wanted = wanted = self._share if isinstance(self._share, int) else max(1, round(self._share * total))
        if wanted >= total:
            raise InputError(f"holdout: {holdout} of {total:,} usable pairs leaves none to train on; give less.")
        chosen, remaining = set[int](), wanted
        for root in sorted(sizes, key=lambda root: (label_of[root], root)):
            if sizes[root] <= remaining:
                chosen.add(root)
                remaining -= sizes[root]
        if not chosen:
            raise InputError(
                f"holdout: {holdout} of {total:,} usable pairs are {wanted:,}, and any fewer share a group, a caption "
                f"or an image with others (the smallest set that does not has {min(sizes.values()):,}); give more."
            )
        return bytearray(bool(usable[row]) and root_of(row) in chosen for row in range(len(parents)))


def _links(pair: Pair) -> list[int]:
    """Hashes of what links a pair with others: its group, its texts and its images. None if it is unusable."""
    try:
        names = [f"caption {caption_key(text)}" for text in clean_captions([*pair.captions, pair.second_text])]
    except UnicodeEncodeError:
        return []
    for image in pair.images:
        if image is not None:
            names.append(f"image {hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image}")
    names += [] if pair.group is None else [f"group {pair.group}"]
    return [_hash(name) for name in names]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())
