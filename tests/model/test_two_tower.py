import math

import torch

from mmrl.model.two_tower import clamp_outward


def test_the_clamp_holds_and_lets_the_scale_come_back() -> None:
    most = math.log(100)
    x = torch.tensor([1.0, most, most + 2], requires_grad=True)
    y = clamp_outward(x, most)
    torch.testing.assert_close(y.exp(), torch.tensor([math.e, 100.0, 100.0]))
    (outward,) = torch.autograd.grad(y.sum().neg(), x, retain_graph=True)  # descent would raise the scale
    assert outward.tolist() == [-1, 0, 0]
    (inward,) = torch.autograd.grad(y.sum(), x)
    assert inward.tolist() == [1, 1, 1]
