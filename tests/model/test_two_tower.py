import math

import torch

from mmrl.model.two_tower import clamp_outward


def test_the_clamp_keeps_limits_and_drops_outward_gradients_only() -> None:
    low, high = math.log(0.01), math.log(100)
    x = torch.tensor([low - 2, low, 1.0, high, high + 2], requires_grad=True)
    y = clamp_outward(x, low, high)
    torch.testing.assert_close(y.exp(), torch.tensor([0.01, 0.01, math.e, 100.0, 100.0]))
    (raising,) = torch.autograd.grad(y.sum().neg(), x, retain_graph=True)  # descent would raise the scale
    assert raising.tolist() == [-1, -1, -1, 0, 0]
    (lowering,) = torch.autograd.grad(y.sum(), x)
    assert lowering.tolist() == [0, 0, 1, 1, 1]
