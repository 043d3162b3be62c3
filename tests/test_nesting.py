import pytest
import torch
import torch.nn.functional as F

from mmrl.errors import InputError
from mmrl.nesting import cut, nesting


def test_dims_are_sorted_with_their_weights() -> None:
    nested = nesting([64, 8, 32], [1, 2, 1], 64)
    assert nested.dims == (8, 32, 64)
    assert nested.shares == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("dims", "weights", "says"),
    [
        ([8, 128], None, "128 is out of range; this embedding has dims 1 to 64"),
        ([0], None, "0 is out of range"),
        ([8, 8], None, "8 is given twice"),
        ([], None, "empty"),
        ([8, 16], [1], "1 given for 2 dims"),
        ([8, 16], [0, 0], "not all zero"),
        ([8, 16], [1, -1], "not negative"),
        ([8, 16], [1, float("nan")], "finite"),
    ],
)
def test_unfit_dims_and_weights_are_named(dims: list[int], weights: list[float] | None, says: str) -> None:
    with pytest.raises(InputError, match=says):
        nesting(dims, weights, 64)


def test_cut_renormalises_the_prefix_in_float32() -> None:
    x_ND = torch.randn(5, 16).bfloat16()
    assert torch.equal(cut(x_ND, 4), F.normalize(x_ND.float()[:, :4], dim=-1))
    assert torch.equal(cut(torch.zeros(1, 4), 2), torch.zeros(1, 2))
