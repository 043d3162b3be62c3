"""How sure is a score? Bootstrap intervals and paired tests over the queries of a set.

Queries of one item (its captions, its photos) rise and fall together, so whole items are drawn, not queries: the
cluster bootstrap (Field and Welsh 2007). Every statistic is taken on the same draws, so that the difference of two
methods is that of a pair. Nothing is ranked again: the cost is that of a few small matrix products.

Shapes: Q queries, C clusters (items, or random sets of items where there are very many), R resamples, S statistics.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

RESAMPLES, LEVEL = 2000, 0.95
# More items than this are put together at random into as many sets, whose means vary like those of the items: so
# half a million queries cost no more than four thousand.
_MOST_CLUSTERS = 4096
_DRAWS_AT_A_TIME = 200


@dataclass(frozen=True)
class Interval:
    """An estimate and the range that holds it in 95 of 100 samples of queries."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """As retrieval.json has it."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Bootstrap:
    """Resamples of the items that queries ask for."""

    def __init__(self, cluster_Q: torch.Tensor, resamples: int = RESAMPLES, seed: int = 0) -> None:
        """Args: cluster_Q: int64; queries of an equal number are drawn together."""
        _, member_Q = torch.as_tensor(cluster_Q).unique(return_inverse=True)
        self.items = int(member_Q.max()) + 1
        self._rng = np.random.default_rng(seed)
        self._member_Q = member_Q.numpy()
        if self.items > _MOST_CLUSTERS:
            place = self._rng.permutation(self.items) % _MOST_CLUSTERS
            self._member_Q = place[self._member_Q]
        self._clusters = min(self.items, _MOST_CLUSTERS)
        self._resamples = resamples

    @cached_property
    def _weight_RC(self) -> np.ndarray:
        """How often each cluster is drawn in each resample."""
        weight_RC = np.empty((self._resamples, self._clusters), np.float32)
        for row_C in weight_RC:
            drawn = self._rng.integers(0, self._clusters, self._clusters)
            row_C[:] = np.bincount(drawn, minlength=self._clusters)
        return weight_RC

    def means(self, value_QS: torch.Tensor) -> np.ndarray:
        """The mean over the queries of each resample: (Q, S) -> (R, S)."""
        sum_CS = self._sums(value_QS)
        count_C = np.bincount(self._member_Q, minlength=self._clusters).astype(np.float64)
        return (self._weight_RC @ sum_CS) / (self._weight_RC @ count_C)[:, None]

    def _sums(self, value_QS: torch.Tensor) -> np.ndarray:
        value_QS = torch.as_tensor(value_QS, dtype=torch.float64)
        sums = torch.zeros(self._clusters, value_QS.shape[1], dtype=torch.float64)
        return sums.index_add_(0, torch.as_tensor(self._member_Q), value_QS).numpy()

    def intervals(self, value_QS: torch.Tensor) -> list[Interval]:
        """The mean of each column with its percentile interval.

        Where all queries have one value (every one hits, or none), no resample differs from another; the interval is
        then the exact binomial one (Clopper and Pearson) of so many items of which all, or none, hit.
        """
        value_QS = torch.as_tensor(value_QS, dtype=torch.float64)
        means_RS = self.means(value_QS)
        value_S = value_QS.mean(0).numpy()
        low_S, high_S = _percentiles(means_RS)
        slack = self._unseen()
        result = []
        for s, value in enumerate(value_S.tolist()):
            low, high = min(low_S[s], value), max(high_S[s], value)
            if (value_QS[:, s] == value_QS[0, s]).all():
                low, high = max(0.0, value - slack), min(1.0, value + slack)
            result.append(Interval(value, float(low), float(high)))
        return result

    def difference(self, a_Q: torch.Tensor, b_Q: torch.Tensor, relative: bool = False) -> Interval:
        """As `differences`, of one pair."""
        return self.differences(torch.as_tensor(a_Q)[:, None], torch.as_tensor(b_Q)[:, None], relative)[0]

    def differences(self, a_QS: torch.Tensor, b_QS: torch.Tensor, relative: bool = False) -> list[Interval]:
        """mean(a) - mean(b), as a share of mean(a) where `relative`, with its interval over pairs, column by column.

        Where the two agree on every query, the interval is what so many items without a disagreement allow.
        """
        a_QS, b_QS = torch.as_tensor(a_QS, dtype=torch.float64), torch.as_tensor(b_QS, dtype=torch.float64)
        a_RS, b_RS = self.means(a_QS), self.means(b_QS)
        base_RS = np.maximum(a_RS, 1e-12) if relative else np.ones_like(a_RS)
        base_S = a_QS.mean(0).clamp(min=1e-12).numpy() if relative else np.ones(a_QS.shape[1])
        value_S = (a_QS.mean(0) - b_QS.mean(0)).numpy() / base_S
        low_S, high_S = _percentiles((a_RS - b_RS) / base_RS)
        slack_S = np.broadcast_to(np.minimum(1, self._unseen() / base_S), value_S.shape)
        same_S = (a_QS == b_QS).all(0).numpy()
        low_S = np.where(same_S, -slack_S, np.minimum(low_S, value_S))
        high_S = np.where(same_S, slack_S, np.maximum(high_S, value_S))
        return [Interval(*triple) for triple in zip(value_S.tolist(), low_S.tolist(), high_S.tolist(), strict=True)]

    def paired_p(self, a_Q: torch.Tensor, b_Q: torch.Tensor) -> float:
        """Two-sided p of no difference between two methods: the sign-flip test of Fisher, over items.

        If the methods were exchangeable, each item's difference would be as likely the other way round. All ways are
        counted where there are few items that differ, else as many random ones as there are resamples. For single
        queries and hits of 0 and 1 this is McNemar's exact test.
        """
        difference_C = self._sums((torch.as_tensor(a_Q).double() - torch.as_tensor(b_Q).double())[:, None])[:, 0]
        difference_C = difference_C[np.abs(difference_C) > 1e-12]
        if not len(difference_C):
            return 1.0
        seen = abs(difference_C.sum()) - 1e-9
        if len(difference_C) <= 12:
            ways = np.arange(1 << len(difference_C))[:, None] >> np.arange(len(difference_C)) & 1
            return float((np.abs((2 * ways - 1) @ difference_C) >= seen).mean())
        rng = np.random.default_rng(1)
        as_far = 0
        for _ in range(0, self._resamples, _DRAWS_AT_A_TIME):
            signs = 2.0 * rng.integers(0, 2, (_DRAWS_AT_A_TIME, len(difference_C)), dtype=np.int8) - 1
            as_far += int((np.abs(signs @ difference_C) >= seen).sum())
        draws = -(-self._resamples // _DRAWS_AT_A_TIME) * _DRAWS_AT_A_TIME
        return (1 + as_far) / (1 + draws)

    def _unseen(self) -> float:
        """The greatest share of items that may be otherwise when none of those seen is, at the level of LEVEL."""
        return 1 - ((1 - LEVEL) / 2) ** (1 / self.items)


def _percentiles(means_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means_RS, [tail, 100 - tail], axis=0)
    return low, high
