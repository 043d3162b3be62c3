"""What is counted of a tile equals the plain formula, whichever way it is counted."""

import threading

import pytest
import torch
from torch import Tensor

from mmrl.evaluate.ranking import counting
from mmrl.evaluate.ranking.counting import Asked, Attempt, Counter, nearly

ROWS, COLUMNS = 192, 128


def bounds_at(score_QG: Tensor, places: list[float]) -> Tensor:
    """Ascending (P, Q): each a score that the query's row really has; infinite of the last, which asks nothing."""
    ascending_QG = score_QG.nan_to_num(nan=-9.0).sort(dim=1).values
    chosen = [int(place * (score_QG.shape[1] - 1)) for place in places]
    bound_PQ = ascending_QG[:, chosen].T.contiguous()
    bound_PQ[:, -1] = torch.inf
    return bound_PQ


@pytest.mark.parametrize("few", [0, 1])
@pytest.mark.parametrize("places", [[0.999], [0.9, 0.95, 0.999], [0.0, 0.5]])
@pytest.mark.parametrize("kind", ["usual", "many ties", "tiny", "huge"])
def test_both_ways_to_count_are_exact(
    monkeypatch: pytest.MonkeyPatch, few: int, places: list[float], kind: str
) -> None:
    monkeypatch.setattr(counting, "_FEW", few)
    rng = torch.Generator().manual_seed(len(places))
    product_IJ = torch.randn(ROWS, COLUMNS, generator=rng)
    norms = [torch.rand(size, generator=rng) + 0.5 for size in (ROWS, COLUMNS)]
    if kind == "many ties":
        product_IJ, norms = product_IJ.round(), [torch.ones(size) for size in (ROWS, COLUMNS)]
    elif kind == "tiny":  # vectors of zeros, and products and norms at the limit of what is normal
        product_IJ *= 1e-38
        norms = [torch.full((size,), 1e-12) for size in (ROWS, COLUMNS)]
        product_IJ[::3] = 0
    elif kind == "huge":
        product_IJ *= 1e30
    for norm in norms:
        norm[-5:] = torch.nan  # as where a strip is padded
    asked, expected = [], []
    for axis in (0, 1):
        product_QG, norm_G = (product_IJ, norms[1]) if axis == 0 else (product_IJ.T, norms[0])
        score_QG = product_QG * (1 / norm_G)
        bound_PQ = bounds_at(score_QG, places)
        at_least_PQ = torch.full(bound_PQ.shape, 7, dtype=torch.int32)
        lower_Q = nearly(bound_PQ[0]).nan_to_num_(nan=torch.inf)
        asked.append(Asked(axis, bound_PQ, lower_Q, norm_G, 1 / norm_G, at_least_PQ, threading.Lock(), Attempt()))
        expected.append(7 + (score_QG >= bound_PQ[:, :, None]).sum(2))
    counter = Counter(product_IJ)
    counter.count(asked)
    assert all(torch.equal(one.at_least_PQ, wanted.int()) for one, wanted in zip(asked, expected, strict=True))
    counter.count(asked)  # now the other way, where the first led nowhere
    again = [2 * wanted - 7 for wanted in expected]
    assert all(torch.equal(one.at_least_PQ, wanted.int()) for one, wanted in zip(asked, again, strict=True))


def test_listing_rests_where_it_leads_nowhere() -> None:
    attempt = Attempt()
    assert attempt.is_due()
    assert attempt.is_due()
    attempt.failed()
    due = [attempt.is_due() for _ in range(20)]
    assert due.index(True) == counting._REST
