"""A perceptual hash: images that look alike have similar hashes, whatever their size, file format and compression.

It is a difference hash (N. Krawetz 2013, "Kind of Like That"): the image is shrunk, and each bit says whether a pixel
is brighter than its neighbour. Here it is taken of each colour channel, along rows and along columns, and a difference
must exceed a tolerance, so that noise in even areas sets no bits.

Shapes: C colour channels, H and W the image's size, N and M images.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from mmrl.images.decode import to_pil

NO_HASH = np.zeros(8, np.uint64)
"""The hash of an image without edges, which is similar to no other."""
_SIDE, _BIT_WORDS = 9, 7
# The limits on differing bits, as a share of both images' set bits, and on the mean colours. Measured: of copies of 300
# drawings, 99 % of those re-encoded (JPEG 40), halved or brightened by 10 % stay below 0.18; different photos have at
# least 0.55.
_MAX_DISTANCE, _MAX_COLOUR_DIFFERENCE = 0.18, 40
_ROWS, _COLUMNS = 64, 4096


def perceptual_hash(image_CHW: torch.Tensor) -> np.ndarray:
    """The hash of a uint8 RGB image: (8,) uint64, 7 of bits and one of the mean colour."""
    small = np.asarray(to_pil(image_CHW).resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=3.0), np.int16)
    tolerance = max(2.0, 0.2 * float(small.std((0, 1)).max()))
    bits = np.packbits(np.concatenate([(np.diff(small, axis=axis) > tolerance).ravel() for axis in (0, 1)]))
    if not bits.any():
        return NO_HASH
    colour = small.mean((0, 1)).round().astype(np.uint8)
    return np.frombuffer(bits.tobytes().ljust(8 * _BIT_WORDS, b"\0") + colour.tobytes().ljust(8, b"\0"), np.uint64)


def most_similar(query_N8: np.ndarray, other_M8: np.ndarray, on_rows: Callable[[int], None]) -> np.ndarray:
    """The row of the most similar of `other_M8` for each query, -1 if none looks alike: (N,). Memory: a few MB.

    `on_rows` is called with numbers of finished queries, for a progress bar.
    """
    result, least = np.full(len(query_N8), -1), np.full(len(query_N8), np.inf)
    count_N, count_M = (np.bitwise_count(x[:, :_BIT_WORDS]).sum(1, np.float32) for x in (query_N8, other_M8))
    for start in range(0, len(query_N8), _ROWS):
        query = query_N8[start : start + _ROWS]
        for first in range(0, len(other_M8), _COLUMNS):
            other = other_M8[first : first + _COLUMNS].T.copy()
            differing = np.zeros((len(query), other.shape[1]), np.uint16)
            for word in range(_BIT_WORDS):
                differing += np.bitwise_count(query[:, word, None] ^ other[word])
            limit_M = _MAX_DISTANCE * count_M[first : first + _COLUMNS]
            n, m = np.nonzero(differing <= _MAX_DISTANCE * count_N[start : start + _ROWS, None] + limit_M)
            distance = differing[n, m] / np.maximum(count_N[start + n] + count_M[first + m], 1)
            n, m = start + n, first + m
            colours = _colour(query_N8[n]), _colour(other_M8[m])
            alike = (count_N[n] > 0) & (np.abs(colours[0] - colours[1]).max(1, initial=0) <= _MAX_COLOUR_DIFFERENCE)
            for i in np.flatnonzero(alike & (distance < least[n])):
                if distance[i] < least[n[i]]:
                    result[n[i]], least[n[i]] = m[i], distance[i]
        on_rows(len(query))
    return result


def _colour(hash_N8: np.ndarray) -> np.ndarray:
    """The mean colours: (N, 3)."""
    return np.ascontiguousarray(hash_N8[:, _BIT_WORDS:]).view(np.uint8)[:, :3].astype(np.int16)
