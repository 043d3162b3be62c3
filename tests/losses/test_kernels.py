"""The Triton kernels against the same loss in PyTorch operations, in Triton's interpreter; and their compilation."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch only on Linux")

from mmrl.errors import InputError
from mmrl.losses import sweep
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS = torch.tensor([3, -1, 3, 7, -1, 7, 7, 1, 2]).repeat(10)[:80]


@pytest.mark.parametrize("tile", [(80, 80), (70, 33)], ids=str)
@pytest.mark.parametrize("keys", [0, 1, 2])
@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_equal_those_of_pytorch_operations(
    tile: tuple[int, int], keys: int, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "tile_shape", lambda *_: tile)
    generator = torch.Generator().manual_seed(0)
    image_BD = torch.randn(80, 24, generator=generator)
    # Half of the matching pairs are anti-aligned; at scale 100 their logits need per-row shifts.
    text_BD = torch.where(torch.arange(80)[:, None] % 2 == 0, image_BD, -image_BD)
    text_BD = text_BD + 0.5 * torch.randn(80, 24, generator=generator)
    image_BD, text_BD = (x.to(DEVICE, dtype).requires_grad_() for x in (image_BD, text_BD))
    scale_1 = torch.tensor([scale], device=DEVICE, requires_grad=True)
    two_keys = torch.stack([GROUPS, GROUPS.roll(7)], 1).to(DEVICE)
    groups = (None, two_keys[:, 0], two_keys)[keys]
    results = []
    for kernels in ("triton", "torch"):
        options = InfoNCEOptions(kernels=kernels)
        loss = nested_info_nce(image_BD, text_BD, scale_1, [3, 16, 24], [1, 2, 1], groups, options)
        grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale_1])
        results.append((loss.total, loss.by_dim, grads))
    tolerance: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    )
    torch.testing.assert_close(results[0], results[1], **tolerance)


def test_gradients_of_aligned_pairs_are_as_exact_as_by_pytorch_operations() -> None:
    """With a small loss, gradients are differences of near-equal numbers: backward must recompute bit-equal logits."""
    generator = torch.Generator().manual_seed(0)
    image_BD = torch.randn(128, 24, generator=generator)
    text_BD = image_BD + 0.3 * torch.randn(128, 24, generator=generator)
    pair = image_BD.to(DEVICE).requires_grad_(), text_BD.to(DEVICE).requires_grad_()
    double = pair[0].detach().double().requires_grad_(), pair[1].detach().double().requires_grad_()
    true_grads = torch.autograd.grad(nested_info_nce(*double, 100.0, [8, 24]).total, double)
    errors = {}
    for kernels in ("triton", "torch"):
        loss = nested_info_nce(*pair, 100.0, [8, 24], options=InfoNCEOptions(kernels=kernels))
        grads = torch.autograd.grad(loss.total, pair)
        errors[kernels] = max((grad - true).abs().max().item() for grad, true in zip(grads, true_grads, strict=True))
    assert errors["triton"] <= 4 * errors["torch"]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (InfoNCEOptions(kernels="triton", label_smoothing=0.1), torch.float32),
        (InfoNCEOptions(kernels="triton", distillation=0.1), torch.float32),
        (InfoNCEOptions(kernels="triton"), torch.float64),
    ],
)
def test_unsupported_options_raise(options: InfoNCEOptions, dtype: torch.dtype) -> None:
    x_BD = torch.eye(4, dtype=dtype, device=DEVICE)
    with pytest.raises(InputError, match="triton supports only the plain loss in float32"):
        nested_info_nce(x_BD, x_BD, 10.0, [2, 4], options=options)


def test_triton_without_a_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="triton needs an NVIDIA GPU"):
        nested_info_nce(torch.eye(4), torch.eye(4), 10.0, [4], options=InfoNCEOptions(kernels="triton"))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmrl.losses import kernels

floats = {name: "*fp32" for name in (
    "product row_factor column_factor row_shift column_shift row_sum column_sum products out grad_scale "
    "row_lse column_lse row_norm_grad column_norm_grad").split()}
integers = {name: "i32" for name in (
    "I J diagonal product_stride out_stride row_factor_stride column_factor_stride row_lse_stride column_lse_stride "
    "row_norm_grad_stride column_norm_grad_stride row_group_stride column_group_stride").split()}
types = floats | integers | {"shift": "fp32", "row_group": "*i64", "column_group": "*i64"}
for capability in (80, 90):
    for shared in (True, False):
        for keys in (0, 1, 2):
            for kernel in (kernels._exp_sums_kernel, kernels._product_grads_kernel):
                constants = {"SHARED": shared, "KEYS": keys, "BLOCK": kernels._BLOCK, "K": 5}
                names = kernel.arg_names
                signature = {name: types.get(name, "constexpr") for name in names}
                fixed = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
                source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
                assert compiled.asm["cubin"], kernel
                assert compiled.metadata.shared <= 48 * 1024, compiled.metadata
print("compiled")
"""


def test_kernels_compile_for_a100_and_h100() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
