"""Whether a set is sorted: neighbouring samples more alike than random ones, by a permutation test on a sample of it.

Shapes: N sampled rows in the order of the set, W words of 64 bits.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from mmrl.data.captions import caption_key
from mmrl.data.samples import NO_GROUP

SAMPLES, CHARACTERS = 2048, 200
"""The sampled rows of a set, and the characters of a caption that are compared."""
# The test's permutations, none of which may reach what is observed, and the least difference that is worth a sentence.
_PERMUTATIONS, _LEAST_DIFFERENCE = 999, 0.02
_WORDS = 16


def sampled_rows(count: int, shards: int) -> set[int]:
    """Rows of a shard with `count` samples, one of `shards` of its set, evenly spaced."""
    return set(np.linspace(0, count - 1, min(count, max(1, SAMPLES // shards))).astype(int).tolist())


def order_note(neighbours: Sequence[tuple[str, int]], samples: int, window: int) -> str:
    """A sentence if the set is sorted, with the remedy; else empty.

    Args:
        neighbours: first caption and group of the sampled rows of each shard, in the order of the set.
        samples: of the set.
        window: samples that a batch is drawn from.
    """
    neighbours = neighbours[:: -(-len(neighbours) // SAMPLES) or 1]
    bits_NW = np.array([_word_bits(caption) for caption, _ in neighbours], np.uint64).reshape(-1, _WORDS)
    group_N = np.array([group for _, group in neighbours], np.int64)

    def shared_words(one: np.ndarray, other: np.ndarray) -> float:
        both = np.bitwise_count(bits_NW[one] & bits_NW[other]).sum(1)
        return float((both / np.bitwise_count(bits_NW[one] | bits_NW[other]).sum(1).clip(1)).mean())

    def same_group(one: np.ndarray, other: np.ndarray) -> float:
        return float(((group_N[one] == group_N[other]) & (group_N[one] != NO_GROUP)).mean())

    found = []
    for alike, what in ((shared_words, "of their captions' words"), (same_group, "of their groups")):
        near, apart = _compare(alike, len(neighbours))
        if near > apart:
            found.append(f"{near:.0%} {what} (random ones {apart:.0%})")
    if not found:
        return ""
    remedy = (
        "one shuffle window holds them all, so training mixes them, but shuffle them before mmrl pack if the set grows"
        if samples <= window
        else f"shuffle them before mmrl pack, or set data.shuffle_window, {window:,} here, to all {samples:,} samples"
    )
    return f"The set is sorted: neighbouring samples share {' and '.join(found)}; {remedy}."


def _compare(alike: Callable[[np.ndarray, np.ndarray], float], count: int) -> tuple[float, float]:
    """How alike neighbours and random rows are; equal values if the difference is small or may be chance."""
    if count < 2:
        return 0.0, 0.0
    rng, order = np.random.default_rng(0), np.arange(count)
    near = alike(order[:-1], order[1:])
    permuted = []
    for _ in range(_PERMUTATIONS):
        rng.shuffle(order)
        permuted.append(alike(order[:-1], order[1:]))
        if permuted[-1] >= near:
            return near, near
    apart = float(np.mean(permuted))
    return near, apart if near - apart >= _LEAST_DIFFERENCE else near


def _word_bits(caption: str) -> list[int]:
    """The set of a caption's words as bits; of its characters, if it is written without spaces."""
    key = caption_key(caption[:CHARACTERS])
    words = key.split()
    bits = 0
    for word in words if len(words) > 1 else key:
        bits |= 1 << zlib.crc32(word.encode()) % (64 * _WORDS)
    return [bits >> 64 * i & 2**64 - 1 for i in range(_WORDS)]
