"""The nearest wrong captions and images of samples: exact search in tiles, without false negatives.

A caption is wrong for a sample if no sample of its group has it; an image is wrong if its sample has no such caption.
A sample without a group is a group of its own.

Shapes: N samples, C distinct captions, d dims; q queries, k results of each, x pairs of a query and an excluded row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mmrl.data import draws
from mmrl.evaluate.ranking.tiles import exact_products

_SAMPLE_DRAW = 1 << 26
# Samples, and pairs of them with excluded items, that are searched at a time; rows of the gallery in a tile.
_CPU_SAMPLES, _GPU_SAMPLES, _PAIRS = 512, 2048, 1 << 21
_CPU_TILE, _GPU_TILE = 4096, 1 << 15
# A sample's captions are all near each other: results are sought for this many of them at most.
_MOST_CAPTIONS = 10


@dataclass(frozen=True)
class Lists:
    """Lists of integers, end to end: list i is `values[starts[i] : starts[i + 1]]`."""

    starts: np.ndarray
    values: np.ndarray

    @classmethod
    def of_pairs(cls, rows: np.ndarray, values: np.ndarray, count: int) -> "Lists":
        """The distinct values of each row 0 … count - 1, ascending."""
        width = int(values.max()) + 1
        row, value = np.divmod(np.unique(rows * width + values), width)
        return cls(np.searchsorted(row, np.arange(count + 1)), value)

    def lengths(self) -> np.ndarray:
        """The length of each list."""
        return np.diff(self.starts)

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values of these lists, each with the index in `rows` of its list."""
        lengths = self.lengths()[rows]
        index = np.repeat(np.arange(len(rows)), lengths)
        first = np.repeat(np.cumsum(lengths) - lengths, lengths)
        return index, self.values[self.starts[rows][index] + np.arange(len(index)) - first]


@dataclass(frozen=True)
class Bounds:
    """Which candidates are not negatives, and how many are kept."""

    num: int
    margin: float
    relative_margin: float

    def ceiling(self, score: np.ndarray) -> np.ndarray:
        """The highest score of a negative, given the matching pair's."""
        return np.minimum(score - self.margin, score - self.relative_margin * np.abs(score))


@dataclass
class Negatives:
    """Negatives of some samples, sorted by sample and by descending score."""

    sample: np.ndarray
    """The sample that they belong to."""
    negative: np.ndarray
    """The wrong sample."""
    caption: np.ndarray
    """Its caption."""
    score: np.ndarray
    skipped: dict[str, int]
    """Numbers of better candidates that each bound skipped: group, caption, margin."""


@dataclass(frozen=True)
class MiningSet:
    """The unit vectors of N samples' images and of their C distinct captions, and which sample has which."""

    image_Nd: np.ndarray
    text_Cd: np.ndarray
    group_N: np.ndarray
    """From 0, consecutive; each sample without a group has its own."""
    captions_of: Lists
    """By sample; none is empty."""

    @cached_property
    def samples_of(self) -> Lists:
        """By caption."""
        sample, caption = self.captions_of.take(np.arange(len(self.group_N)))
        return Lists.of_pairs(caption, sample, len(self.text_Cd))

    @cached_property
    def captions_of_group(self) -> Lists:
        """By group."""
        sample, caption = self.captions_of.take(np.arange(len(self.group_N)))
        return Lists.of_pairs(self.group_N[sample], caption, int(self.group_N.max()) + 1)

    @cached_property
    def _pairs_N(self) -> np.ndarray:
        """The number of pairs that excluding takes for each sample."""
        group, caption = self.captions_of_group.take(np.arange(int(self.group_N.max()) + 1))
        return self.captions_of.lengths() * np.bincount(group, self.samples_of.lengths()[caption])[self.group_N]

    def chunks(self, first: int, last: int, device: torch.device) -> Iterator[np.ndarray]:
        """Samples `first` … `last` - 1 in chunks that take bounded memory."""
        most = _CPU_SAMPLES if device.type == "cpu" else _GPU_SAMPLES
        pairs = np.cumsum(self._pairs_N[first:last])
        start = 0
        while start < last - first:
            before = pairs[start - 1] if start else 0
            end = min(start + most, int(np.searchsorted(pairs, before + _PAIRS, side="right")))
            end = max(end, start + 1)
            yield np.arange(first + start, first + end)
            start = end

    def nearest_captions(self, sample_n: np.ndarray, bounds: Bounds, device: torch.device) -> Negatives:
        """The nearest wrong captions of these samples' images. The wrong sample is one of those that have the caption,
        chosen at random, the same in every run."""
        image_nd = np.array(self.image_Nd[sample_n])
        row, caption = self.captions_of.take(sample_n)
        match_n = np.full(len(sample_n), -np.inf, np.float32)
        np.maximum.at(match_n, row, np.einsum("xd,xd->x", image_nd[row], self.text_Cd[caption]))
        row_x, caption_x, sample_x = self._related(sample_n)
        found = _Search(self, sample_n, image_nd, self.text_Cd, match_n, bounds, device)
        row, caption, score, skipped = found.run(row_x, caption_x, sample_x)
        count = self.samples_of.lengths()[caption]
        chosen = (draws.bits(_SAMPLE_DRAW, sample_n[row], caption) % count.astype(np.uint64)).astype(np.int64)
        wrong = self.samples_of.values[self.samples_of.starts[caption] + chosen]
        return Negatives(sample_n[row], wrong, caption, score, skipped)

    def nearest_images(self, sample_n: np.ndarray, bounds: Bounds, device: torch.device) -> Negatives:
        """The nearest wrong images of these samples' captions; the caption is the wrong sample's first one."""
        row, caption = self.captions_of.take(sample_n)
        query_q, text_qd = sample_n[row], np.array(self.text_Cd[caption])
        match_q = np.einsum("qd,qd->q", text_qd, self.image_Nd[query_q])
        row_x, _, sample_x = self._related(query_q)
        count = len(self.group_N)
        row_x, sample_x = np.divmod(np.unique(row_x * count + sample_x), count)
        found = _Search(self, query_q, text_qd, self.image_Nd, match_q, bounds, device)
        row, wrong, score, skipped = found.run(row_x, sample_x, sample_x)
        first = self.captions_of.values[self.captions_of.starts[wrong]]
        return Negatives(query_q[row], wrong, first, score, skipped)

    def _related(self, sample_q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All captions of each sample's group with all samples that have them: row of `sample_q`, caption, sample."""
        row_y, caption_y = self.captions_of_group.take(self.group_N[sample_q])
        y_x, sample_x = self.samples_of.take(caption_y)
        return row_y[y_x], caption_y[y_x], sample_x


@dataclass(frozen=True)
class _Search:
    """The search of one direction for some queries."""

    items: MiningSet
    sample_q: np.ndarray
    """The sample of each query."""
    query_qd: np.ndarray
    gallery_Gd: np.ndarray
    match_q: np.ndarray
    """The score of the matching pair."""
    bounds: Bounds
    device: torch.device

    def run(
        self, row_x: np.ndarray, column_x: np.ndarray, sample_x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
        """(query, row of the gallery, score, what the bounds skipped) of the nearest that are not excluded. `row_x` and
        `column_x` are the excluded pairs of a query and a row of the gallery, `sample_x` the sample of each."""
        rows = len(self.gallery_Gd)
        pair_p, index_x = np.unique(column_x * len(self.query_qd) + row_x, return_inverse=True)  # by column
        column_p, row_p = np.divmod(pair_p, len(self.query_qd))
        captions = min(int(self.items.captions_of.lengths().max()), _MOST_CAPTIONS)
        k = min(self.bounds.num * captions, rows)
        with torch.inference_mode(), exact_products(self.device):
            score_qk, column_qk, excluded_p, above = self._scan(row_p, column_p, k)
        found_qk, kth_q = score_qk > -np.inf, score_qk[:, min(self.bounds.num, k) - 1]
        others_x = (excluded_p[index_x] >= kth_q[row_x]) & (sample_x != self.sample_q[row_x])
        same_x = self.items.group_N[sample_x] == self.items.group_N[self.sample_q[row_x]]
        skipped = {"group": int((others_x & same_x).sum()), "caption": int((others_x & ~same_x).sum()), "margin": above}
        row, _ = np.nonzero(found_qk)
        return row, column_qk[found_qk], score_qk[found_qk], skipped

    def _scan(self, row_p: np.ndarray, column_p: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """The k best scores of each query and their rows (q, k), the scores of the excluded pairs, and the number of
        other scores above the ceiling. The pairs are sorted by column."""
        to = self.device
        query_qd = torch.from_numpy(self.query_qd).to(to)
        ceiling_q1 = torch.from_numpy(self.bounds.ceiling(self.match_q)[:, None]).to(to)
        score_qk = torch.full((len(query_qd), k), -torch.inf, device=to)
        column_qk = torch.zeros(score_qk.shape, dtype=torch.int64, device=to)
        excluded_p, above = torch.zeros(len(row_p)), 0
        tile = _CPU_TILE if to.type == "cpu" else _GPU_TILE
        for start in range(0, len(self.gallery_Gd), tile):
            rows_td = torch.from_numpy(np.array(self.gallery_Gd[start : start + tile])).to(to)
            score_qt = query_qd @ rows_td.T
            pairs = slice(*np.searchsorted(column_p, (start, start + len(rows_td))))
            index = torch.from_numpy(row_p[pairs]).to(to), torch.from_numpy(column_p[pairs] - start).to(to)
            excluded_p[pairs] = score_qt[index].cpu()
            score_qt[index] = -torch.inf
            above_qt = score_qt > ceiling_q1
            above += int(above_qt.sum())
            score_qt.masked_fill_(above_qt, -torch.inf)
            new_score_qk, new_column_qk = score_qt.topk(min(k, len(rows_td)))
            score_qk, best_qk = torch.cat([score_qk, new_score_qk], dim=1).topk(k)
            column_qk = torch.cat([column_qk, new_column_qk + start], dim=1).gather(1, best_qk)
        return score_qk.cpu().numpy(), column_qk.cpu().numpy(), excluded_p.numpy(), above


def best(parts: list[Negatives], num: int, by_caption: bool) -> Negatives:
    """The `num` best negatives of each sample, no wrong sample twice; with `by_caption`, no caption twice."""
    columns = [(part.sample, part.negative, part.caption, part.score) for part in parts]
    sample, negative, caption, score = map(np.concatenate, zip(*columns, strict=True))
    order = np.lexsort((negative, -score, sample))
    item = caption if by_caption else negative
    pairs = sample * (int(item.max(initial=0)) + 1) + item
    order = order[np.sort(np.unique(pairs[order], return_index=True)[1])]
    position = np.arange(len(order)) - np.searchsorted(sample[order], sample[order])
    order = order[position < num]
    skipped = {bound: sum(part.skipped[bound] for part in parts) for bound in parts[0].skipped}
    return Negatives(sample[order], negative[order], caption[order], score[order], skipped)
