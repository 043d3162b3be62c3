"""rotated_nested_info_nce against two backward passes through helpers/reference.py: who descends what."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reference
from torch.nn import functional as F

from mmrl.errors import InputError
from mmrl.losses.nested_infonce import InfoNCEOptions
from mmrl.losses.rotated import rotated_nested_info_nce
from mmrl.model.rotation import NestedRotation

DIMS, WEIGHTS = [4, 16, 8], [1.0, 3.0, 0.5]
GROUPS = torch.tensor([[3, 5], [-1, 5], [3, -1], [7, -1], [-1, 8], [7, 8], [7, 2], [1, 2], [2, -1]])
CLOSE: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-3, "atol": 1e-5},
}


def embeddings(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(9, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    return pair[0].requires_grad_(), pair[1].requires_grad_()


def orthogonal_matrix(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q.to(dtype).requires_grad_()


def expected(
    pair: tuple[torch.Tensor, torch.Tensor], scale: torch.Tensor, rotation_DD: torch.Tensor, a: float, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor], dict[int, torch.Tensor]]:
    """Total, gradients of (image, text, scale, rotation) and each dim's loss, in float64, by two backward passes."""
    given = [x.detach().double().requires_grad_() for x in (*pair, scale, rotation_DD)]
    image_BD, text_BD, scale, rotation_DD = given
    full, prefixes, by_dim = reference.rotated_nested_info_nce(
        image_BD, text_BD, scale, DIMS, rotation_DD, WEIGHTS, **options
    )
    of_full = torch.autograd.grad(full, given, retain_graph=True, allow_unused=True)
    of_prefixes = torch.autograd.grad(prefixes, given)
    # The towers receive a of the prefixes' gradient; scales and rotation receive theirs whole.
    factors = (a, a, 1.0, 1.0)
    grads = [
        (0.0 if one is None else one) + factor * other
        for one, factor, other in zip(of_full, factors, of_prefixes, strict=True)
    ]
    assert of_full[3] is None, "the full dim's loss does not see the rotation"
    return (full + prefixes).detach(), grads, {dim: value.detach() for dim, value in by_dim.items()}


@pytest.mark.usefixtures("bf16_grad_products")
@pytest.mark.parametrize("a", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("distillation", [0.0, 1.0])
@pytest.mark.parametrize("scale", [[14.0], [5.0, 30.0, 10.0]], ids=["one scale", "a scale per dim"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_part_descends_what_it_should(
    dtype: torch.dtype, scale: list[float], distillation: float, a: float
) -> None:
    pair, rotation_DD = embeddings(dtype), orthogonal_matrix(dtype)
    scale_K = torch.tensor(scale, dtype=dtype, requires_grad=True)
    options = InfoNCEOptions(distillation=distillation, label_smoothing=0.1)
    loss = rotated_nested_info_nce(
        *pair, scale_K, DIMS, lambda x: F.linear(x, rotation_DD), a, WEIGHTS, GROUPS, options
    )
    grads = torch.autograd.grad(loss.total, [*pair, scale_K, rotation_DD])
    total, true_grads, by_dim = expected(
        pair, scale_K, rotation_DD, a, groups=GROUPS, distillation=distillation, label_smoothing=0.1
    )
    rotated = [(x.detach().double() @ rotation_DD.detach().double().T) for x in pair]
    kl_by_dim = reference.distillation_by_dim(rotated[0], rotated[1], scale_K.detach().double(), DIMS, GROUPS)
    torch.testing.assert_close(loss.total.double(), total, **CLOSE[dtype])
    assert list(loss.by_dim) == sorted(DIMS)
    for dim, value in loss.by_dim.items():
        torch.testing.assert_close(value.double(), by_dim[dim], **CLOSE[dtype])
    assert list(loss.distillation_by_dim) == ([4, 8] if distillation else [])
    for dim, value in loss.distillation_by_dim.items():
        torch.testing.assert_close(value.double(), kl_by_dim[dim], **CLOSE[dtype])
    for grad, true_grad in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(grad.double(), true_grad, **CLOSE[dtype])


@pytest.mark.usefixtures("bf16_grad_products")
@pytest.mark.parametrize("a", [0.01, 1.0])
def test_bfloat16_embeddings_err_by_their_rounding_alone(a: float) -> None:
    """Two sweeps, so the gradient of the prefixes does not drown in the rounding of the full dim's when a is small."""
    pair, rotation_DD = embeddings(torch.bfloat16), orthogonal_matrix(torch.float32)
    scale_K = torch.tensor([10.0], requires_grad=True)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), rotation_DD).to(x.dtype)

    loss = rotated_nested_info_nce(*pair, scale_K, DIMS, rotate, a, WEIGHTS)
    grads = torch.autograd.grad(loss.total, [*pair, scale_K, rotation_DD])
    _, true_grads, _ = expected(pair, scale_K, rotation_DD, a)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert (grad.double() - true_grad).norm() < 0.03 * true_grad.norm()


def test_the_full_dim_must_be_among_the_dims() -> None:
    image_BD, text_BD = embeddings(torch.float32)
    with pytest.raises(InputError, match=r"dims: \[4, 8\] must include the full dim, 16"):
        rotated_nested_info_nce(image_BD, text_BD, 10.0, [4, 8], lambda x: x, 0.3)
    with pytest.raises(InputError, match=r"prefix_gradient: 1\.5 is out of range"):
        rotated_nested_info_nce(image_BD, text_BD, 10.0, [16, 8], lambda x: x, 1.5)


@pytest.mark.parametrize(("dims", "weights"), [([16], None), ([8, 16], [0.0, 1.0])])
def test_without_smaller_dims_it_is_the_plain_loss(dims: list[int], weights: list[float] | None) -> None:
    image_BD, text_BD = embeddings(torch.float64)
    loss = rotated_nested_info_nce(image_BD, text_BD, 10.0, dims, lambda x: x, 0.3, weights)
    plain = reference.info_nce(F.normalize(image_BD), F.normalize(text_BD), torch.tensor(10.0))
    torch.testing.assert_close(loss.total, plain)


def test_a_rotation_alone_learns_to_put_shared_directions_first() -> None:
    """Images and texts share 4 of 16 directions, hidden by a random rotation; the towers are fixed (a = 0)."""
    torch.manual_seed(0)
    basis_DD = torch.linalg.qr(torch.randn(16, 16)).Q
    shared, image_noise, text_noise = torch.randn(256, 4), 1.5 * torch.randn(256, 12), 1.5 * torch.randn(256, 12)
    image_BD = torch.cat([image_noise, shared], 1) @ basis_DD
    text_BD = torch.cat([text_noise, shared], 1) @ basis_DD
    rotation = NestedRotation(16)
    optimizer = torch.optim.Adam(rotation.parameters(), lr=3e-2)
    losses = []
    for _ in range(150):
        loss = rotated_nested_info_nce(image_BD, text_BD, 10.0, [4, 16], rotation, 0.0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.by_dim)
    assert losses[-1][4] < 0.5 * losses[0][4]
    assert losses[-1][4] < losses[-1][16]
    assert losses[-1][16] == pytest.approx(losses[0][16].item(), rel=1e-6), "the full dim does not see the rotation"


def test_the_loops_in_the_readme_run_and_fold() -> None:
    readme = (Path(__file__).parents[2] / "mmrl/losses/README.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL):
        exec(block, names)  # noqa: S102 (our own README)
    image_BD, text_BD = (projection(x) for projection, x in zip(names["projections"], names["features"], strict=True))
    matrix_DD = names["rotation"].matrix()
    assert (matrix_DD - torch.eye(512)).abs().max() > 1e-3
    # Folded: the prefixes are those of the rotated embedding, so the loss of the next step continues.
    following = reference.nested_info_nce(image_BD, text_BD, names["log_scales"].exp(), names["dims"])[1]
    assert following[64] < names["loss"].by_dim[64]
