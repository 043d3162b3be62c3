"""The Triton kernels against the same loss in PyTorch operations, in Triton's interpreter; and their compilation."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch only on Linux")

from mmrl.errors import InputError
from mmrl.losses import kernels, sweep, triton_probe
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce
from mmrl.losses.terms import HardNegatives, Teacher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS = torch.tensor([3, -1, 3, 7, -1, 7, 7, 1, 2]).repeat(10)[:80]


OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "positive": {"same_group": "positive", "label_smoothing": 0.1},
    "distillation": {"distillation": 0.7},
    "all": {"same_group": "positive", "label_smoothing": 0.2, "distillation": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tile", [(80, 80), (70, 33)], ids=str)
@pytest.mark.parametrize("keys", [0, 1, 4])
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_value_and_gradients_equal_those_of_pytorch_operations(
    tile: tuple[int, int], keys: int, scale: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "tile_shape", lambda *_: tile)
    dtype = torch.bfloat16 if tile == (80, 80) and keys == 1 else torch.float32
    generator = torch.Generator().manual_seed(0)
    image_BD = torch.randn(80, 24, generator=generator)
    # Half of the matching pairs are anti-aligned; at scale 100 their logits need per-row shifts.
    text_BD = torch.where(torch.arange(80)[:, None] % 2 == 0, image_BD, -image_BD)
    text_BD = text_BD + 0.5 * torch.randn(80, 24, generator=generator)
    image_BD, text_BD = (x.to(DEVICE, dtype).requires_grad_() for x in (image_BD, text_BD))
    scale_1 = torch.tensor([scale], device=DEVICE, requires_grad=True)
    group_BG = torch.stack([GROUPS.roll(7 * number) for number in range(4)], 1).to(DEVICE)
    groups = {0: None, 1: group_BG[:, 0], 4: group_BG}[keys]
    results = []
    for kind in ("triton", "torch"):
        given = InfoNCEOptions(kernels=kind, **options)
        loss = nested_info_nce(image_BD, text_BD, scale_1, [3, 16, 24], [1, 2, 1], groups, given)
        grads = torch.autograd.grad(loss.total, [image_BD, text_BD, scale_1])
        results.append((loss.total, loss.by_dim, loss.distillation_by_dim, grads))
    tolerance: dict[str, Any] = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-3}
    )
    torch.testing.assert_close(results[0], results[1], **tolerance)


@pytest.mark.parametrize("case", ["negatives", "teacher"])
def test_hard_negatives_and_a_teacher(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "tile_shape", lambda *_: (33, 70))
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(rows, 24, generator=generator).to(DEVICE).requires_grad_() for rows in (40, 40, 80, 80)]
    valid_n, keys = (torch.arange(80) % 3 > 0).to(DEVICE), GROUPS.to(DEVICE)
    named: dict[str, Any] = {"negatives": HardNegatives(x[2], x[3], keys, valid_n, valid_n)}
    if case == "teacher":
        image_BT, text_BT = torch.nn.functional.normalize(torch.stack([x[0], x[1]]), dim=-1)
        named = {"teacher": Teacher(image_BT, text_BT, 100.0, 0.5)}
    results = []
    for kind in ("triton", "torch"):
        options = InfoNCEOptions(kernels=kind, label_smoothing=0.1)
        loss = nested_info_nce(x[0], x[1], 100.0, [3, 16, 24], [1, 2, 1], keys[:40], options, **named)
        grads = torch.autograd.grad(loss.total, x if case == "negatives" else x[:2])
        results.append((loss.total, loss.by_dim, loss.distillation_by_dim, grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_gradients_of_aligned_pairs_are_as_exact_as_by_pytorch_operations() -> None:
    """With a small loss, gradients are differences of near-equal numbers: backward must recompute bit-equal logits."""
    generator = torch.Generator().manual_seed(0)
    image_BD = torch.randn(128, 24, generator=generator)
    text_BD = image_BD + 0.3 * torch.randn(128, 24, generator=generator)
    pair = image_BD.to(DEVICE).requires_grad_(), text_BD.to(DEVICE).requires_grad_()
    double = pair[0].detach().double().requires_grad_(), pair[1].detach().double().requires_grad_()
    true_grads = torch.autograd.grad(nested_info_nce(*double, 100.0, [8, 24]).total, double)
    errors = {}
    for kind in ("triton", "torch"):
        loss = nested_info_nce(*pair, 100.0, [8, 24], options=InfoNCEOptions(kernels=kind))
        grads = torch.autograd.grad(loss.total, pair)
        errors[kind] = max((grad - true).abs().max().item() for grad, true in zip(grads, true_grads, strict=True))
    assert errors["triton"] <= 4 * errors["torch"]


def test_float64_raises() -> None:
    x_BD = torch.eye(4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(InputError, match="triton supports only float32 or narrower embeddings"):
        nested_info_nce(x_BD, x_BD, 10.0, [2, 4], options=InfoNCEOptions(kernels="triton"))


def test_triton_without_a_gpu_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_probe, "triton_problem", triton_probe.triton_problem.__wrapped__)
    with pytest.raises(InputError, match=r"triton cannot be used \(they need an NVIDIA GPU\)"):
        nested_info_nce(torch.eye(4), torch.eye(4), 10.0, [4], options=InfoNCEOptions(kernels="triton"))


def test_the_probe_finds_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = triton_probe.triton_problem.__wrapped__
    assert probe(DEVICE) is None
    monkeypatch.setattr(kernels, "add_logit_gaps", lambda *_: None)  # a kernel that computes something else
    assert "not close" in str(probe(DEVICE))

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore lines")

    monkeypatch.setattr(kernels, "add_exp_sums", fails)
    assert probe(DEVICE) == "Failed to find C compiler. Please specify via CC"
    monkeypatch.setattr(triton_probe, "triton_problem", probe)
    with pytest.raises(InputError, match=r"triton cannot be used \(Failed to find C compiler"):
        triton_probe.require_triton(DEVICE)


COMPILE = """
import itertools
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmrl.losses import kernels

def type_of(name):
    if name in ("shift", "distillation"):
        return "fp32"
    if name in ("I", "J", "diagonal", "num_matching") or name.endswith("_stride"):
        return "i32"
    return "*i64" if name.endswith("_group") else "*fp32"

NAMES = ("SHARED", "KEYS", "SMOOTHS", "POSITIVE", "TEACHES")
PLAIN, ALL = (True, 0, False, False, False), (False, 2, True, True, True)
WARPS = {kernels._exp_sums_kernel: 4, kernels._logit_gaps_kernel: 8, kernels._product_grads_kernel: 8}
for (capability, case), (kernel, warps) in itertools.product(((80, ALL), (90, PLAIN), (90, ALL)), WARPS.items()):
    constants = dict(zip(NAMES, case)) | {"BLOCK": kernels._BLOCK, "K": 5}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    fixed = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"], kernel
    assert compiled.metadata.shared <= 48 * 1024, compiled.metadata
    # An ordered atomic add would be surrounded by fences of the whole memory.
    adds = re.findall(r"(?:atom|red)[.][a-z0-9.]*add[a-z0-9.]*", compiled.asm["ptx"])
    assert adds and all("relaxed" in add for add in adds), adds
print("compiled")
"""


def test_kernels_compile_for_a100_and_h100() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
