"""The learnable rotation: orthogonal, identity at the start, exact when it is folded."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from mmrl.model.rotation import NestedRotation


@pytest.fixture
def learned() -> NestedRotation:
    """After some large steps."""
    torch.manual_seed(0)
    rotation = NestedRotation(64)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=3e-2)
    target_DD = torch.randn(64, 64)
    for _ in range(50):
        optimizer.zero_grad()
        (rotation(torch.eye(64)) * target_DD).sum().backward()
        optimizer.step()
    return rotation


def test_it_is_the_identity_at_the_start() -> None:
    x_ND = torch.randn(3, 32)
    assert torch.equal(NestedRotation(32)(x_ND), x_ND)


def test_full_dim_similarities_do_not_change(learned: NestedRotation) -> None:
    x_ND, y_ND = torch.randn(2, 100, 64).unbind()
    assert (learned.matrix() - torch.eye(64)).abs().max() > 0.5
    before = F.normalize(x_ND) @ F.normalize(y_ND).T
    trained = F.normalize(learned(x_ND)) @ F.normalize(learned(y_ND)).T
    torch.testing.assert_close(trained, before, rtol=0, atol=1e-5)
    matrix_DD = learned.matrix()
    folded = F.normalize(x_ND.double() @ matrix_DD.T) @ F.normalize(y_ND.double() @ matrix_DD.T).T
    torch.testing.assert_close(folded, F.normalize(x_ND.double()) @ F.normalize(y_ND.double()).T, rtol=0, atol=1e-12)
    torch.testing.assert_close(learned(x_ND).double(), x_ND.double() @ matrix_DD.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_float32_under_autocast(learned: NestedRotation, dtype: torch.dtype) -> None:
    x_ND = torch.randn(5, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        rotated = learned(x_ND)
    assert rotated.dtype == dtype
    exact = (x_ND.float() @ learned.weight.T).to(dtype)
    torch.testing.assert_close(rotated, exact, rtol=0, atol=1e-6)


def test_it_resumes_from_its_state(learned: NestedRotation) -> None:
    again = NestedRotation(64)
    again.load_state_dict(learned.state_dict())
    assert torch.equal(again.matrix(), learned.matrix())


def test_it_is_torchs_parametrization_and_loads_a_state_of_it() -> None:
    """Earlier versions used it, so checkpoints and loops of users have its state."""
    linear = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.eye_(linear.weight)
    torchs = orthogonal(linear, orthogonal_map="cayley")
    state = torchs.state_dict()
    state["parametrizations.weight.original"] += torch.randn(8, 8)
    ours = NestedRotation(8)
    ours.load_state_dict({f"linear.{name}": value for name, value in state.items()})
    assert torch.equal(ours.weight, torchs.weight)  # pyright: ignore[reportArgumentType]


def test_dims_between_two_nested_dims_are_not_rotated_among_each_other() -> None:
    """Their order changes no prefix loss, so their gradient is rounding error, which Adam would amplify."""
    torch.manual_seed(0)
    rotation = copy.deepcopy(NestedRotation(12, [12, 4, 8]))
    (parameter,) = rotation.parameters()
    (rotation(torch.eye(12)) * torch.randn(12, 12)).sum().backward()
    assert parameter.grad is not None
    blocks = parameter.grad.unflatten(0, (3, 4)).unflatten(2, (3, 4)).transpose(1, 2).abs().amax((2, 3))
    assert torch.equal(blocks > 0, torch.tensor([[False, False, False], [True, False, False], [True, True, False]]))
