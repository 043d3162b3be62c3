"""Fused Triton kernels for the elementwise operations of InfoNCE: one kernel per tile instead of a dozen passes.

The dot products come from torch.mm (cuBLAS). Forward, `add_exp_sums` reads each dot product once and adds up the
exponentials; backward, `write_product_grads` turns dot products into their gradients. They support the plain InfoNCE
in float32, with or without masked groups. Everything else uses the PyTorch operations in softmax.py and backward.py,
with which the tests compare these kernels. Sums use atomic adds, so their last bits differ between runs.

Triton comes with PyTorch on Linux. With TRITON_INTERPRET=1 the kernels run on a CPU, for tests.

Shapes: I rows and J columns of a tile, K dims, G keys of a group.
"""

# Triton's language is not typed Python: its compiler reads the source of the functions under `triton.jit`.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN202, E741

import os

import torch
import triton
import triton.language as tl

_BLOCK = 64


def can_run_on(device: torch.device) -> bool:
    """Whether the kernels can run on this device."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def add_exp_sums(
    product_IJ: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    shift: float | tuple[torch.Tensor, torch.Tensor],
    groups: tuple[torch.Tensor, torch.Tensor] | None,
    diagonal: int,
    row_sum_I: torch.Tensor,
    column_sum_J: torch.Tensor,
) -> None:
    """Add one dim's sums of 2^(logit - shift) of a tile to `row_sum_I` and `column_sum_J`.

    Args:
        factors: row factors (I,) and column factors (J,); logit = dot product * row factor * column factor.
        groups: of the rows (G, I) and of the columns (G, J), with unit stride of the last axis; non-matching pairs of
            one group (any key equal) are masked.
        diagonal: row i matches column i + diagonal.
    """
    I, J = product_IJ.shape
    shared = not isinstance(shift, tuple)
    row_shift, column_shift = (row_sum_I, column_sum_J) if isinstance(shift, float | int) else shift
    row_group, column_group = groups or (row_sum_I[None], column_sum_J[None])
    with torch.cuda.device_of(product_IJ):  # Triton launches on the current device
        _exp_sums_kernel[_grid(I, J)](
            product_IJ, I, J, diagonal, *factors, shift if shared else 0.0, row_shift, column_shift,
            row_group, row_group.stride(0), column_group, column_group.stride(0), row_sum_I, column_sum_J,
            SHARED=shared, KEYS=0 if groups is None else len(row_group), BLOCK=_BLOCK,
        )  # fmt: skip


def write_product_grads(
    products_KIJ: torch.Tensor,
    out_KIJ: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    lse: tuple[torch.Tensor, torch.Tensor],
    grad_scale_K: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor] | None,
    diagonal: int,
    norm_grads: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Write the gradients with respect to a tile's dot products, summed over dims, and add to `norm_grads`.

    `factors`, `lse` and `norm_grads` are of the rows (K, I) and of the columns (K, J), with unit stride of the last
    axis.

    Args:
        products_KIJ: dot products of all dims; may share its memory with `out_KIJ`.
        out_KIJ: for index k, receives the sum over dims k … K-1 of the gradient with respect to the dot products.
        lse: log-sum-exps of the logits, base 2.
        grad_scale_K: dot product gradient = grad_scale * (probability - target) * row factor * column factor.
        norm_grads: receive the sums of logit * (probability - target).
    """
    K, I, J = products_KIJ.shape
    row_group, column_group = groups or (grad_scale_K[None], grad_scale_K[None])
    with torch.cuda.device_of(products_KIJ):
        _product_grads_kernel[_grid(I, J)](
            products_KIJ, products_KIJ.stride(0), out_KIJ, out_KIJ.stride(0), I, J, diagonal, grad_scale_K,
            factors[0], factors[0].stride(0), factors[1], factors[1].stride(0),
            lse[0], lse[0].stride(0), lse[1], lse[1].stride(0),
            norm_grads[0], norm_grads[0].stride(0), norm_grads[1], norm_grads[1].stride(0),
            row_group, row_group.stride(0), column_group, column_group.stride(0),
            K=K, KEYS=0 if groups is None else len(row_group), BLOCK=_BLOCK,
        )  # fmt: skip


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, _BLOCK), triton.cdiv(columns, _BLOCK)


@triton.jit
def _unmasked_pairs(
    i, j, in_i, in_j, diagonal, row_group, row_group_stride, column_group, column_group_stride, KEYS: tl.constexpr
):
    unmasked = in_i[:, None] & in_j[None, :]
    for key in tl.static_range(KEYS):
        row = tl.load(row_group + key * row_group_stride + i, mask=in_i, other=-1)
        column = tl.load(column_group + key * column_group_stride + j, mask=in_j, other=-2)
        unmasked = unmasked & ((row[:, None] != column[None, :]) | (j[None, :] == i[:, None] + diagonal))
    return unmasked


@triton.jit
def _exp_sums_kernel(
    product, I, J, diagonal, row_factor, column_factor, shift, row_shift, column_shift,
    row_group, row_group_stride, column_group, column_group_stride, row_sum, column_sum,
    SHARED: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_i, in_j = i < I, j < J
    unmasked = _unmasked_pairs(
        i, j, in_i, in_j, diagonal, row_group, row_group_stride, column_group, column_group_stride, KEYS
    )
    logits = tl.load(product + i[:, None] * J + j[None, :], mask=in_i[:, None] & in_j[None, :], other=0.0)
    logits *= tl.load(column_factor + j, mask=in_j, other=0.0)[None, :]
    logits *= tl.load(row_factor + i, mask=in_i, other=0.0)[:, None]
    if SHARED:
        row_exp = tl.where(unmasked, tl.exp2(logits - shift), 0.0)
        column_exp = row_exp
    else:
        row_exp = tl.exp2(logits - tl.load(row_shift + i, mask=in_i, other=0.0)[:, None])
        column_exp = tl.exp2(logits - tl.load(column_shift + j, mask=in_j, other=0.0)[None, :])
        row_exp, column_exp = tl.where(unmasked, row_exp, 0.0), tl.where(unmasked, column_exp, 0.0)
    tl.atomic_add(row_sum + i, tl.sum(row_exp, 1), mask=in_i)
    tl.atomic_add(column_sum + j, tl.sum(column_exp, 0), mask=in_j)


@triton.jit
def _product_grads_kernel(
    products, product_stride, out, out_stride, I, J, diagonal, grad_scale,
    row_factor, row_factor_stride, column_factor, column_factor_stride,
    row_lse, row_lse_stride, column_lse, column_lse_stride,
    row_norm_grad, row_norm_grad_stride, column_norm_grad, column_norm_grad_stride,
    row_group, row_group_stride, column_group, column_group_stride,
    K: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_i, in_j = i < I, j < J
    inside = in_i[:, None] & in_j[None, :]
    unmasked = _unmasked_pairs(
        i, j, in_i, in_j, diagonal, row_group, row_group_stride, column_group, column_group_stride, KEYS
    )
    target = tl.where(inside & (j[None, :] == i[:, None] + diagonal), 2.0, 0.0)
    offsets = i[:, None] * J + j[None, :]
    product_grad = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in tl.static_range(K):
        k = K - 1 - step
        rows = tl.load(row_factor + k * row_factor_stride + i, mask=in_i, other=0.0)
        columns = tl.load(column_factor + k * column_factor_stride + j, mask=in_j, other=0.0)
        logits = tl.load(products + tl.cast(k, tl.int64) * product_stride + offsets, mask=inside, other=0.0)
        # Multiplied in the same order as in the forward kernel, so that the logits are bit-equal to those in the sums.
        logits = logits * columns[None, :] * rows[:, None]
        row_prob = tl.exp2(logits - tl.load(row_lse + k * row_lse_stride + i, mask=in_i, other=0.0)[:, None])
        column_prob = tl.exp2(logits - tl.load(column_lse + k * column_lse_stride + j, mask=in_j, other=0.0)[None, :])
        diff = tl.where(unmasked, row_prob + column_prob, 0.0) - target
        tl.atomic_add(row_norm_grad + k * row_norm_grad_stride + i, tl.sum(logits * diff, 1), mask=in_i)
        tl.atomic_add(column_norm_grad + k * column_norm_grad_stride + j, tl.sum(logits * diff, 0), mask=in_j)
        product_grad += diff * columns[None, :] * rows[:, None] * tl.load(grad_scale + k)
        tl.store(out + tl.cast(k, tl.int64) * out_stride + offsets, product_grad, mask=inside)
