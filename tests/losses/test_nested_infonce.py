"""The trainer's loss against losses/reference.py, in one process; tests/test_distributed.py has several."""

from typing import Any

import pytest
import torch

from mmrl.errors import InputError
from mmrl.losses import reference
from mmrl.losses.nested_infonce import nested_info_nce

GROUPS = torch.tensor([3, -1, 3, 7, -1, 7, 7, 1, 2])


def embeddings(dtype: torch.dtype, rows: int = 9, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    return pair[0].requires_grad_(), pair[1].requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("scale", [torch.tensor(14.0), torch.tensor([100.0]), torch.tensor([1.0, 20.0, 50.0])])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 0.0]])
def test_value_and_gradients_are_the_plain_formulas(
    dtype: torch.dtype, groups: torch.Tensor | None, scale: torch.Tensor, weights: list[float] | None
) -> None:
    dims = [3, 8, 16]
    image_BD, text_BD = embeddings(dtype)
    own_scale = scale.clone().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    loss = nested_info_nce(image_BD, text_BD, own_scale, dims, weights, groups)
    grads = torch.autograd.grad(loss.total, [image_BD, text_BD, own_scale])

    # The truth is computed in float64 from the same, already rounded, numbers.
    true_image, true_text = (x.detach().double().requires_grad_() for x in (image_BD, text_BD))
    true_scale = scale.double().requires_grad_()
    total, by_dim = reference.nested_info_nce(true_image, true_text, true_scale, dims, weights, groups)
    true_grads = torch.autograd.grad(total, [true_image, true_text, true_scale])

    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loss.total.double(), total, **close)
    for dim in dims:
        torch.testing.assert_close(loss.by_dim[dim].double(), by_dim[dim].detach(), **close)
    # A bfloat16 gradient is rounded to bfloat16 at the end.
    for grad, true_grad in zip(grads, true_grads, strict=True):
        rounding: dict[str, Any] = {"rtol": 2**-7, "atol": 1e-4} if grad.dtype == torch.bfloat16 else close
        torch.testing.assert_close(grad.double(), true_grad, **rounding)


def test_one_group_masks_all_negatives() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    loss = nested_info_nce(image_BD, text_BD, 10.0, [16], groups=torch.zeros(9, dtype=torch.int64))
    assert loss.total.item() == 0


def test_a_pair_of_groups_is_accepted() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    same = nested_info_nce(image_BD, text_BD, 10.0, [8, 16], groups=GROUPS)
    pair = nested_info_nce(image_BD, text_BD, 10.0, [8, 16], groups=(GROUPS, GROUPS))
    assert torch.equal(same.total, pair.total)


def test_dims_in_any_order_keep_their_weights_and_scales() -> None:
    image_BD, text_BD = embeddings(torch.float64)
    one = nested_info_nce(image_BD, text_BD, torch.tensor([5.0, 9.0]), [4, 16], [1, 3])
    other = nested_info_nce(image_BD, text_BD, torch.tensor([9.0, 5.0]), [16, 4], [3, 1])
    torch.testing.assert_close(one.total, other.total)
    assert list(other.by_dim) == [4, 16]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dims": [32]}, "32 is out of range"),
        ({"text_BD": torch.ones(8, 16)}, r"shapes \(9, 16\) and \(8, 16\)"),
        ({"logit_scale": torch.ones(3)}, "3 values for 1 dims"),
        ({"groups": torch.zeros(4, dtype=torch.int64)}, r"groups: shape \(4,\)"),
    ],
)
def test_unfit_arguments_are_named(arguments: dict[str, object], says: str) -> None:
    image_BD, text_BD = embeddings(torch.float32)
    good = {"image_BD": image_BD, "text_BD": text_BD, "logit_scale": 1.0, "dims": [16]}
    with pytest.raises(InputError, match=says):
        nested_info_nce(**{**good, **arguments})  # pyright: ignore[reportArgumentType]
