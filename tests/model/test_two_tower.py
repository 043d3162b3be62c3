import math

import torch

from mmrl.model.two_tower import clamp_outward


def test_the_clamp_holds_and_lets_the_scale_come_back() -> None:
    least, most = math.log(0.01), math.log(100)
    x = torch.tensor([least - 2, least, 1.0, most, most + 2], requires_grad=True)
    y = clamp_outward(x, least, most)
    torch.testing.assert_close(y.exp(), torch.tensor([0.01, 0.01, math.e, 100.0, 100.0]))
    (raising,) = torch.autograd.grad(y.sum().neg(), x, retain_graph=True)  # descent would raise the scale
    assert raising.tolist() == [-1, -1, -1, 0, 0]
    (lowering,) = torch.autograd.grad(y.sum(), x)
    assert lowering.tolist() == [0, 0, 1, 1, 1]
