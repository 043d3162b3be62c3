"""nested_sigmoid against helpers/reference.py, in one process; tests/distributed/test_comm.py has several processes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from open_clip.loss import SigLipLoss
from torch.autograd import gradcheck

from mmrl.errors import InputError
from mmrl.losses import sweep
from mmrl.losses.nested_sigmoid import nested_sigmoid

pytestmark = pytest.mark.usefixtures("bf16_grad_products")

GROUPS = torch.tensor([3, -1, 3, 7, -1, 7, 7, 1, 2])
TEXT_GROUPS = torch.tensor([3, 3, -1, 7, 5, -1, 7, 1, 1])
DIMS, WEIGHTS = [3, 8, 16], [0.5, 1.0, 2.0]


def arguments(dtype: torch.dtype, per_dim: bool = False) -> list[torch.Tensor]:
    """Both embeddings, the scale and the bias."""
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(9, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    scale, bias = ([10.0, 20.0, 30.0], [-10.0, -5.0, -2.0]) if per_dim else ([10.0], [-10.0])
    scale_and_bias = [torch.tensor(values, dtype=sweep.accumulation_dtype(dtype)) for values in (scale, bias)]
    return [x.requires_grad_() for x in (*embeddings, *scale_and_bias)]


@pytest.mark.parametrize("tile", [None, (4, 2), (3, 5)])
@pytest.mark.parametrize("per_dim", [False, True])
@pytest.mark.parametrize(
    "groups",
    [None, GROUPS, (GROUPS, TEXT_GROUPS), torch.stack([GROUPS, TEXT_GROUPS], 1)],
    ids=["-", "groups", "pair", "two keys"],
)
@pytest.mark.parametrize("same_group", ["mask", "positive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_the_plain_formula(
    tile: tuple[int, int] | None,
    per_dim: bool,
    groups: reference.Groups | None,
    same_group: reference.SameGroup,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tile is not None:
        monkeypatch.setattr(sweep, "tile_shape", lambda *_: tile)
    given = arguments(dtype, per_dim)
    loss = nested_sigmoid(*given, dims=DIMS, weights=WEIGHTS, groups=groups, same_group=same_group)
    grads = torch.autograd.grad(loss.total, given)
    true = [x.detach().double().requires_grad_() for x in given]
    total, by_dim = reference.nested_sigmoid(*true, dims=DIMS, weights=WEIGHTS, groups=groups, same_group=same_group)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss.total.double(), total.detach(), **close)
    for dim, value in by_dim.items():
        torch.testing.assert_close(loss.by_dim[dim].double(), value.detach(), **close)
    for grad, true_grad in zip(grads, torch.autograd.grad(total, true), strict=True):
        if grad.dtype == torch.bfloat16:  # the logit gradients are rounded to bfloat16, and the result
            close = {"rtol": 0, "atol": 2**-7 * true_grad.abs().max().item()}
        torch.testing.assert_close(grad.double(), true_grad, **close)


def test_one_dim_equals_open_clip() -> None:
    image_BD, text_BD, scale, bias = arguments(torch.float32)
    ours = nested_sigmoid(image_BD, text_BD, scale, bias, [16]).total
    theirs = SigLipLoss()(F.normalize(image_BD, dim=-1), F.normalize(text_BD, dim=-1), scale, bias)
    torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    def total(*given: torch.Tensor) -> torch.Tensor:
        return nested_sigmoid(*given, dims=[2, 5, 11], weights=[1, 0, 2], groups=GROUPS, same_group="positive").total

    assert gradcheck(total, arguments(torch.float64, per_dim=True))


def test_large_logits_give_finite_gradients() -> None:
    image_BD, _, _, bias = arguments(torch.float32)
    loss = nested_sigmoid(image_BD, -image_BD, 1000.0, bias, [16])
    total, _ = reference.nested_sigmoid(image_BD.double(), -image_BD.double(), torch.tensor(1000.0), bias, [16])
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss.total, [image_BD, bias]))


def test_invalid_arguments_raise() -> None:
    image_BD, text_BD, scale, _ = arguments(torch.float32)
    with pytest.raises(InputError, match="logit_bias: 2 values for 3 dims"):
        nested_sigmoid(image_BD, text_BD, scale, torch.zeros(2), DIMS)
    with pytest.raises(InputError, match="same_group: 'postive'; allowed: 'mask', 'positive'"):
        nested_sigmoid(image_BD, text_BD, scale, 0.0, DIMS, same_group="postive")  # pyright: ignore[reportArgumentType]


def test_autocast_does_not_change_the_loss() -> None:
    given = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nested_sigmoid(*given, dims=DIMS).total
    assert torch.equal(inside, nested_sigmoid(*given, dims=DIMS).total)
