"""Counts in a tile equal the plain formula, by listing and by comparing."""

import threading

import pytest
import torch
from torch import Tensor

from mmrl.evaluate.ranking import counting
from mmrl.evaluate.ranking.counting import Counter, ListingBackoff, TileQueries, slightly_below

ROWS, COLUMNS = 192, 128


def thresholds_at(score_QG: Tensor, quantiles: list[float]) -> Tensor:
    """Ascending (P, Q): each is a score of the query's row; infinite for the last query, which has no positive."""
    ascending_QG = score_QG.nan_to_num(nan=-9.0).sort(dim=1).values
    chosen = [int(quantile * (score_QG.shape[1] - 1)) for quantile in quantiles]
    threshold_PQ = ascending_QG[:, chosen].T.contiguous()
    threshold_PQ[:, -1] = torch.inf
    return threshold_PQ


@pytest.mark.parametrize("max_listed", [0, 1])
@pytest.mark.parametrize("quantiles", [[0.999], [0.9, 0.95, 0.999], [0.0, 0.5]])
@pytest.mark.parametrize("kind", ["usual", "many ties", "tiny", "huge"])
def test_counting_is_exact_by_listing_and_by_comparing(
    monkeypatch: pytest.MonkeyPatch, max_listed: int, quantiles: list[float], kind: str
) -> None:
    monkeypatch.setattr(counting, "_MAX_LISTED", max_listed)
    rng = torch.Generator().manual_seed(len(quantiles))
    product_IJ = torch.randn(ROWS, COLUMNS, generator=rng)
    norms = [torch.rand(size, generator=rng) + 0.5 for size in (ROWS, COLUMNS)]
    if kind == "many ties":
        product_IJ, norms = product_IJ.round(), [torch.ones(size) for size in (ROWS, COLUMNS)]
    elif kind == "tiny":  # zero vectors, and products and norms at the limit of normal floats
        product_IJ *= 1e-38
        norms = [torch.full((size,), 1e-12) for size in (ROWS, COLUMNS)]
        product_IJ[::3] = 0
    elif kind == "huge":
        product_IJ *= 1e30
    for norm in norms:
        norm[-5:] = torch.nan  # as in the padding
    sides, expected = [], []
    for axis in (0, 1):
        product_QG, norm_G = (product_IJ, norms[1]) if axis == 0 else (product_IJ.T, norms[0])
        score_QG = product_QG * (1 / norm_G)
        threshold_PQ = thresholds_at(score_QG, quantiles)
        at_least_PQ = torch.full(threshold_PQ.shape, 7, dtype=torch.int32)
        below_Q = slightly_below(threshold_PQ[0]).nan_to_num_(nan=torch.inf)
        lock, backoff = threading.Lock(), ListingBackoff()
        sides.append(TileQueries(axis, threshold_PQ, below_Q, norm_G, 1 / norm_G, at_least_PQ, lock, backoff))
        expected.append(7 + (score_QG >= threshold_PQ[:, :, None]).sum(2))
    counter = Counter(product_IJ)
    counter.count(sides)
    assert all(torch.equal(side.at_least_PQ, wanted.int()) for side, wanted in zip(sides, expected, strict=True))
    counter.count(sides)  # by comparing, if listing failed
    again = [2 * wanted - 7 for wanted in expected]
    assert all(torch.equal(side.at_least_PQ, wanted.int()) for side, wanted in zip(sides, again, strict=True))


def test_listing_backs_off_after_a_failed_attempt() -> None:
    backoff = ListingBackoff()
    assert backoff.should_try()
    assert backoff.should_try()
    backoff.failed()
    tried = [backoff.should_try() for _ in range(20)]
    assert tried.index(True) == counting._BACKOFF_TILES
