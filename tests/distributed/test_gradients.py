"""The reduction of gradients during the backward pass. tests/train/test_trainer.py compares two processes with one."""

from typing import Any

import pytest
import torch
from torch import nn

from mmrl.distributed import comm, gradients
from mmrl.distributed.gradients import GradientReducer


@pytest.fixture
def model() -> nn.Sequential:
    comm.start()
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).to(comm.world().device)


def test_a_bucket_is_reduced_while_the_first_layers_are_still_to_come(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[list[bool]] = []
    real = gradients.dist.all_reduce

    def all_reduce(flat: torch.Tensor, **options: Any) -> Any:
        computed.append([layer.weight.grad is not None for layer in model])  # pyright: ignore[reportAttributeAccessIssue]
        return real(flat, **options)

    monkeypatch.setattr(gradients.dist, "all_reduce", all_reduce)
    reducer = GradientReducer(model.parameters(), bucket_elements=20)  # one layer
    x = torch.ones(2, 4, device=comm.world().device)
    model(x).sum().backward()
    assert not computed, "a micro-batch before the last one only accumulates"
    model.zero_grad()
    reducer.start()
    model(x).sum().backward()
    assert computed == [[False, False, True], [False, True, True], [True, True, True]]
    reducer.finish()
    assert len(computed) == 3


def test_gradients_are_those_of_all_backward_passes_whatever_their_parts(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that come after their bucket was reduced, and those of parameters that take no part."""
    monkeypatch.setattr(gradients.comm, "world", lambda: comm.World(size=2))  # one process is the sum of both
    unused = nn.Parameter(torch.ones(3, device=comm.World().device))
    reducer = GradientReducer([*model.parameters(), unused], bucket_elements=7)
    x = torch.ones(2, 4, device=unused.device)
    losses = [lambda: model(x).sum(), lambda: model(2 * x).square().sum(), lambda: model[:2](x).sum()]
    losses[0]().backward()
    reducer.start()
    losses[1]().backward()
    losses[2]().backward()
    reducer.finish()
    expected = torch.autograd.grad([one() for one in losses], list(model.parameters()))
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad / 2)
    assert torch.equal(unused.grad, torch.zeros_like(unused))  # pyright: ignore[reportArgumentType]
