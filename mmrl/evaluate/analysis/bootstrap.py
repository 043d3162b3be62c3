"""Bootstrap confidence intervals and paired tests over the queries of a set.

Queries of one item (its captions, its images) are correlated, so whole items are resampled: the cluster bootstrap
(Field and Welsh 2007). Every statistic uses the same resamples, so differences between methods are paired. Nothing is
ranked again: the cost is a few small matrix products.

Shapes: Q queries, C clusters (items, or random unions of items if there are very many), R resamples, S statistics.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

RESAMPLES, LEVEL = 2000, 0.95
# More items than this are merged at random into this many clusters, whose means vary like those of the items. So half a
# million queries cost no more than four thousand.
_MAX_CLUSTERS = 4096
_SIGN_CHUNK = 200


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """The form of retrieval.json."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Bootstrap:
    """Resamples of the items that the queries belong to."""

    def __init__(self, cluster_Q: torch.Tensor, resamples: int = RESAMPLES, seed: int = 0) -> None:
        """Args: cluster_Q: int64; queries of equal value belong to one item."""
        _, member_Q = torch.as_tensor(cluster_Q).unique(return_inverse=True)
        self.items = int(member_Q.max()) + 1
        self._rng = np.random.default_rng(seed)
        self._member_Q = member_Q.numpy()
        if self.items > _MAX_CLUSTERS:
            cluster_of_item = self._rng.permutation(self.items) % _MAX_CLUSTERS
            self._member_Q = cluster_of_item[self._member_Q]
        self._clusters = min(self.items, _MAX_CLUSTERS)
        self._resamples = resamples

    @cached_property
    def _weight_RC(self) -> np.ndarray:
        """How often each resample draws each cluster."""
        weight_RC = np.empty((self._resamples, self._clusters), np.float32)
        for row_C in weight_RC:
            drawn = self._rng.integers(0, self._clusters, self._clusters)
            row_C[:] = np.bincount(drawn, minlength=self._clusters)
        return weight_RC

    def means(self, value_QS: torch.Tensor) -> np.ndarray:
        """The mean over the queries of each resample: (Q, S) -> (R, S)."""
        count_C1 = self._sums(torch.ones(len(value_QS), 1))
        return (self._weight_RC @ self._sums(value_QS)) / (self._weight_RC @ count_C1)

    def _sums(self, value_QS: torch.Tensor) -> np.ndarray:
        value_QS = torch.as_tensor(value_QS, dtype=torch.float64)
        sums = torch.zeros(self._clusters, value_QS.shape[1], dtype=torch.float64)
        return sums.index_add_(0, torch.as_tensor(self._member_Q), value_QS).numpy()

    def intervals(self, value_QS: torch.Tensor) -> list[Interval]:
        """The mean of each column with its percentile interval.

        If all queries have the same value (all hit, or none), all resamples are equal. The interval is then the exact
        binomial one (Clopper and Pearson) for this number of items.
        """
        value_QS = torch.as_tensor(value_QS, dtype=torch.float64)
        value_S, bound = value_QS.mean(0).numpy(), self._zero_event_bound()
        low_S, high_S = _percentiles(self.means(value_QS))
        same_S = (value_QS == value_QS[0]).all(0).numpy()
        low_S = np.where(same_S, np.maximum(0, value_S - bound), np.minimum(low_S, value_S))
        high_S = np.where(same_S, np.minimum(1, value_S + bound), np.maximum(high_S, value_S))
        return [Interval(*triple) for triple in zip(value_S.tolist(), low_S.tolist(), high_S.tolist(), strict=True)]

    def difference(self, a_Q: torch.Tensor, b_Q: torch.Tensor, relative: bool = False) -> Interval:
        """`differences` of one pair of columns."""
        return self.differences(torch.as_tensor(a_Q)[:, None], torch.as_tensor(b_Q)[:, None], relative)[0]

    def differences(self, a_QS: torch.Tensor, b_QS: torch.Tensor, relative: bool = False) -> list[Interval]:
        """mean(a) - mean(b) of each column with its paired interval; with `relative`, divided by mean(a).

        If a and b are equal for every query, the interval is the exact binomial one for zero disagreements among this
        number of items.
        """
        a_QS, b_QS = torch.as_tensor(a_QS, dtype=torch.float64), torch.as_tensor(b_QS, dtype=torch.float64)
        a_RS, b_RS = self.means(a_QS), self.means(b_QS)
        base_RS = np.maximum(a_RS, 1e-12) if relative else np.ones_like(a_RS)
        base_S = a_QS.mean(0).clamp(min=1e-12).numpy() if relative else np.ones(a_QS.shape[1])
        value_S = (a_QS.mean(0) - b_QS.mean(0)).numpy() / base_S
        low_S, high_S = _percentiles((a_RS - b_RS) / base_RS)
        bound_S = np.broadcast_to(np.minimum(1, self._zero_event_bound() / base_S), value_S.shape)
        same_S = (a_QS == b_QS).all(0).numpy()
        low_S = np.where(same_S, -bound_S, np.minimum(low_S, value_S))
        high_S = np.where(same_S, bound_S, np.maximum(high_S, value_S))
        return [Interval(*triple) for triple in zip(value_S.tolist(), low_S.tolist(), high_S.tolist(), strict=True)]

    def paired_p(self, a_Q: torch.Tensor, b_Q: torch.Tensor) -> float:
        """Two-sided p-value of "no difference between a and b": Fisher's sign-flip test over items.

        Under the null hypothesis, the sign of each item's difference is random. All sign patterns are enumerated if at
        most 12 items differ, otherwise as many random ones are drawn as there are resamples. With one query per item
        and values 0 and 1 this is McNemar's exact test.
        """
        difference_C = self._sums((torch.as_tensor(a_Q).double() - torch.as_tensor(b_Q).double())[:, None])[:, 0]
        difference_C = difference_C[np.abs(difference_C) > 1e-12]
        if not len(difference_C):
            return 1.0
        observed = abs(difference_C.sum()) - 1e-9
        if len(difference_C) <= 12:
            signs = np.arange(1 << len(difference_C))[:, None] >> np.arange(len(difference_C)) & 1
            return float((np.abs((2 * signs - 1) @ difference_C) >= observed).mean())
        rng = np.random.default_rng(1)
        as_extreme = 0
        for _ in range(0, self._resamples, _SIGN_CHUNK):
            signs = 2.0 * rng.integers(0, 2, (_SIGN_CHUNK, len(difference_C)), dtype=np.int8) - 1
            as_extreme += int((np.abs(signs @ difference_C) >= observed).sum())
        draws = -(-self._resamples // _SIGN_CHUNK) * _SIGN_CHUNK
        return (1 + as_extreme) / (1 + draws)

    def _zero_event_bound(self) -> float:
        """The upper confidence bound of a share of which no event was seen among the items."""
        return 1 - ((1 - LEVEL) / 2) ** (1 / self.items)


def _percentiles(means_RS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means_RS, [tail, 100 - tail], axis=0)
    return low, high
