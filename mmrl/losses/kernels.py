"""Fused Triton kernels for the elementwise operations of InfoNCE: one kernel per tile instead of a dozen passes.

The dot products come from torch.mm (cuBLAS). Forward, `add_exp_sums` reads each dot product once and adds up the
exponentials, and `add_logit_gaps` what distillation needs; backward, `write_product_grads` turns dot products into
their gradients. They compute in float32 and support every option of the loss. Embeddings in float64 use the PyTorch
operations in softmax.py and backward.py, with which the tests compare these kernels. Sums use atomic adds, so their
last bits differ between runs; the adds are relaxed, since nothing is read before the kernel ends.

Triton comes with PyTorch on Linux. With TRITON_INTERPRET=1 the kernels run on a CPU, for tests.

Shapes: I rows and J columns of a tile, K dims, G keys of a group.
"""

# Triton's language is not typed Python: its compiler reads the source of the functions under `triton.jit`.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN202, E741

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from mmrl.losses.sweep import LogitTile

_BLOCK = 64
Pair = tuple[torch.Tensor, torch.Tensor]
"""Values of a tile's rows and of its columns, with unit stride of the last axis."""


def can_run_on(device: torch.device) -> bool:
    """Whether the kernels can run on this device."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def add_exp_sums(
    tile: LogitTile,
    product_IJ: torch.Tensor,
    factors: Pair,
    shift: float | Pair,
    sums: Pair,
    target_logit_I: torch.Tensor,
) -> None:
    """Add one dim's sums of 2^(logit - shift) to `sums`, and its row sums of target * logit to `target_logit_I`; logit
    = dot product * row factor * column factor."""
    shared = not isinstance(shift, tuple)
    with torch.cuda.device_of(product_IJ):  # Triton launches on the current device
        _exp_sums_kernel[_grid(tile)](
            product_IJ, *product_IJ.shape, tile.diagonal, tile.num_matching, *factors, shift if shared else 0.0,
            *(sums if shared else shift), *_group_arguments(tile), *_target_arguments(tile), *sums, target_logit_I,
            SHARED=shared, BLOCK=_BLOCK, **_flags(tile),
        )  # fmt: skip


def add_logit_gaps(tile: LogitTile, products_KIJ: torch.Tensor, factors: Pair, shift: float | Pair, gaps: Pair) -> None:
    """Add the smaller dims' sums of 2^(teacher logit - shift) * (teacher logit - logit) to `gaps`, (K, I) and (K, J).

    The teacher is the largest dim, and `shift` is its shift. `factors` are (K, I) and (K, J).
    """
    shared = not isinstance(shift, tuple)
    K, I, J = products_KIJ.shape
    with torch.cuda.device_of(products_KIJ):
        _logit_gaps_kernel[_grid(tile)](
            products_KIJ, products_KIJ.stride(0), I, J, tile.diagonal, tile.num_matching, *_strided(factors),
            shift if shared else 0.0, *(gaps if shared else shift), *_group_arguments(tile), *_strided(gaps),
            SHARED=shared, K=K, BLOCK=_BLOCK, **_flags(tile), num_warps=8,
        )  # fmt: skip


def write_product_grads(
    tile: LogitTile,
    products_KIJ: torch.Tensor,
    out_KIJ: torch.Tensor,
    factors: Pair,
    lse: Pair,
    grad_scale_K: torch.Tensor,
    norm_grads: Pair,
    distillation: float,
) -> None:
    """Write the gradients with respect to a tile's dot products, summed over dims, and add to `norm_grads`.

    `factors`, `lse` and `norm_grads` are of the rows (K, I) and of the columns (K, J).

    Args:
        products_KIJ: dot products of all dims; may share its memory with `out_KIJ`.
        out_KIJ: for index k, receives the sum over dims k … K-1 of the gradient with respect to the dot products.
        lse: log-sum-exps of the logits, base 2.
        grad_scale_K: dot product gradient = grad_scale * (probability - target) * row factor * column factor.
        norm_grads: receive the sums of logit * (probability - target).
        distillation: its weight.
    """
    K, I, J = products_KIJ.shape
    with torch.cuda.device_of(products_KIJ):
        _product_grads_kernel[_grid(tile)](
            products_KIJ, products_KIJ.stride(0), out_KIJ, out_KIJ.stride(0), I, J, tile.diagonal, tile.num_matching,
            grad_scale_K, distillation, *_strided(factors), *_strided(lse), *_strided(norm_grads),
            *_group_arguments(tile), tile.matching_target_I, *_target_arguments(tile),
            K=K, TEACHES=distillation > 0, BLOCK=_BLOCK, **_flags(tile),
            # The accumulators of a block take too many registers for four warps.
            num_warps=8,
        )  # fmt: skip


def _grid(tile: LogitTile) -> tuple[int, int]:
    rows, columns = tile.stacked_buffers.shape[1:]
    return triton.cdiv(rows, _BLOCK), triton.cdiv(columns, _BLOCK)


def _strided(pair: Pair) -> Sequence[Any]:
    return pair[0], pair[0].stride(0), pair[1], pair[1].stride(0)


def _group_arguments(tile: LogitTile) -> Sequence[Any]:
    """The groups of rows (G, I) and columns (G, J); a kernel without keys reads none."""
    unused = tile.stacked_buffers[:, 0]
    return _strided(tile.groups or (unused, unused))


def _target_arguments(tile: LogitTile) -> Sequence[Any]:
    unused = tile.stacked_buffers[0, 0]
    return *(tile.smoothing or (unused, unused)), *(tile.same_group_targets or (unused, unused))


def _flags(tile: LogitTile) -> dict[str, Any]:
    return {
        "KEYS": 0 if tile.groups is None else len(tile.groups[0]),
        "SMOOTHS": tile.smoothing is not None,
        "POSITIVE": tile.same_group_targets is not None,
    }


@triton.jit
def _same_group(
    i, j, in_i, in_j, diagonal, num_matching, row_group, row_group_stride, column_group, column_group_stride,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Non-matching pairs of one group."""
    same = (i[:, None] < 0) & (j[None, :] < 0)
    for key in tl.static_range(KEYS):
        row = tl.load(row_group + key * row_group_stride + i, mask=in_i, other=-1)
        column = tl.load(column_group + key * column_group_stride + j, mask=in_j, other=-2)
        same = same | (row[:, None] == column[None, :])
    matching = (j[None, :] == i[:, None] + diagonal) & (i < num_matching)[:, None]
    return same & (matching == 0) & in_i[:, None] & in_j[None, :]


@triton.jit
def _targets(
    i, j, in_i, in_j, same, unmasked, row_smooth, column_smooth, row_positive, column_positive,
    SMOOTHS: tl.constexpr, POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All targets but those of matching pairs."""
    target = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SMOOTHS:
        rows = tl.load(row_smooth + i, mask=in_i, other=0.0)
        columns = tl.load(column_smooth + j, mask=in_j, other=0.0)
        target += tl.where(unmasked, rows[:, None] + columns[None, :], 0.0)
    if POSITIVE:
        rows = tl.load(row_positive + i, mask=in_i, other=0.0)
        columns = tl.load(column_positive + j, mask=in_j, other=0.0)
        target += tl.where(same, rows[:, None] + columns[None, :], 0.0)
    return target


@triton.jit
def _exponentials(logits, unmasked, i, j, in_i, in_j, shift, row_shift, column_shift, SHARED: tl.constexpr):
    if SHARED:
        row_exp = tl.where(unmasked, tl.exp2(logits - shift), 0.0)
        column_exp = row_exp
    else:
        row_exp = tl.exp2(logits - tl.load(row_shift + i, mask=in_i, other=0.0)[:, None])
        column_exp = tl.exp2(logits - tl.load(column_shift + j, mask=in_j, other=0.0)[None, :])
        row_exp, column_exp = tl.where(unmasked, row_exp, 0.0), tl.where(unmasked, column_exp, 0.0)
    return row_exp, column_exp


@triton.jit
def _logits(product, row_factor, column_factor, i, j, J, in_i, in_j):
    logits = tl.load(product + i[:, None] * J + j[None, :], mask=in_i[:, None] & in_j[None, :], other=0.0)
    # In the same order in all kernels, so that the logits of the backward pass are bit-equal to those in the sums.
    logits *= tl.load(column_factor + j, mask=in_j, other=0.0)[None, :]
    return logits * tl.load(row_factor + i, mask=in_i, other=0.0)[:, None]


@triton.jit
def _exp_sums_kernel(
    product, I, J, diagonal, num_matching, row_factor, column_factor, shift, row_shift, column_shift,
    row_group, row_group_stride, column_group, column_group_stride,
    row_smooth, column_smooth, row_positive, column_positive, row_sum, column_sum, target_logit,
    SHARED: tl.constexpr, KEYS: tl.constexpr, SMOOTHS: tl.constexpr, POSITIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_i, in_j = i < I, j < J
    same = _same_group(
        i, j, in_i, in_j, diagonal, num_matching, row_group, row_group_stride, column_group, column_group_stride, KEYS
    )
    unmasked = in_i[:, None] & in_j[None, :]
    if not POSITIVE:
        unmasked = unmasked & (same == 0)
    logits = _logits(product, row_factor, column_factor, i, j, J, in_i, in_j)
    if SMOOTHS or POSITIVE:
        target = _targets(
            i, j, in_i, in_j, same, unmasked, row_smooth, column_smooth, row_positive, column_positive,
            SMOOTHS, POSITIVE, BLOCK,
        )  # fmt: skip
        tl.atomic_add(target_logit + i, tl.sum(target * logits, 1), mask=in_i, sem="relaxed")
    row_exp, column_exp = _exponentials(logits, unmasked, i, j, in_i, in_j, shift, row_shift, column_shift, SHARED)
    tl.atomic_add(row_sum + i, tl.sum(row_exp, 1), mask=in_i, sem="relaxed")
    tl.atomic_add(column_sum + j, tl.sum(column_exp, 0), mask=in_j, sem="relaxed")


@triton.jit
def _logit_gaps_kernel(
    products, product_stride, I, J, diagonal, num_matching,
    row_factor, row_factor_stride, column_factor, column_factor_stride, shift, row_shift, column_shift,
    row_group, row_group_stride, column_group, column_group_stride,
    row_gap, row_gap_stride, column_gap, column_gap_stride,
    SHARED: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, SMOOTHS: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_i, in_j = i < I, j < J
    unmasked = in_i[:, None] & in_j[None, :]
    if not POSITIVE:
        same = _same_group(
            i, j, in_i, in_j, diagonal, num_matching, row_group, row_group_stride, column_group, column_group_stride,
            KEYS,
        )  # fmt: skip
        unmasked = unmasked & (same == 0)
    teacher = _logits(
        products + tl.cast(K - 1, tl.int64) * product_stride, row_factor + (K - 1) * row_factor_stride,
        column_factor + (K - 1) * column_factor_stride, i, j, J, in_i, in_j,
    )  # fmt: skip
    row_exp, column_exp = _exponentials(teacher, unmasked, i, j, in_i, in_j, shift, row_shift, column_shift, SHARED)
    for k in tl.static_range(K - 1):
        gap = teacher - _logits(
            products + tl.cast(k, tl.int64) * product_stride, row_factor + k * row_factor_stride,
            column_factor + k * column_factor_stride, i, j, J, in_i, in_j,
        )  # fmt: skip
        tl.atomic_add(row_gap + k * row_gap_stride + i, tl.sum(row_exp * gap, 1), mask=in_i, sem="relaxed")
        tl.atomic_add(column_gap + k * column_gap_stride + j, tl.sum(column_exp * gap, 0), mask=in_j, sem="relaxed")


@triton.jit
def _product_grads_kernel(
    products, product_stride, out, out_stride, I, J, diagonal, num_matching, grad_scale, distillation,
    row_factor, row_factor_stride, column_factor, column_factor_stride,
    row_lse, row_lse_stride, column_lse, column_lse_stride,
    row_norm_grad, row_norm_grad_stride, column_norm_grad, column_norm_grad_stride,
    row_group, row_group_stride, column_group, column_group_stride,
    matching_target, row_smooth, column_smooth, row_positive, column_positive,
    K: tl.constexpr, KEYS: tl.constexpr, TEACHES: tl.constexpr, SMOOTHS: tl.constexpr, POSITIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_i, in_j = i < I, j < J
    inside = in_i[:, None] & in_j[None, :]
    same = _same_group(
        i, j, in_i, in_j, diagonal, num_matching, row_group, row_group_stride, column_group, column_group_stride, KEYS
    )
    unmasked = inside
    if not POSITIVE:
        unmasked = inside & (same == 0)
    target = _targets(
        i, j, in_i, in_j, same, unmasked, row_smooth, column_smooth, row_positive, column_positive,
        SMOOTHS, POSITIVE, BLOCK,
    )  # fmt: skip
    of_matching = tl.load(matching_target + i, mask=in_i, other=0.0)[:, None]
    target += tl.where(inside & (j[None, :] == i[:, None] + diagonal), of_matching, 0.0)
    offsets = i[:, None] * J + j[None, :]
    product_grad = tl.zeros((BLOCK, BLOCK), tl.float32)
    teacher = product_grad
    for step in tl.static_range(K):
        k = K - 1 - step
        rows = tl.load(row_factor + k * row_factor_stride + i, mask=in_i, other=0.0)
        columns = tl.load(column_factor + k * column_factor_stride + j, mask=in_j, other=0.0)
        logits = _logits(
            products + tl.cast(k, tl.int64) * product_stride, row_factor + k * row_factor_stride,
            column_factor + k * column_factor_stride, i, j, J, in_i, in_j,
        )  # fmt: skip
        row_prob = tl.exp2(logits - tl.load(row_lse + k * row_lse_stride + i, mask=in_i, other=0.0)[:, None])
        column_prob = tl.exp2(logits - tl.load(column_lse + k * column_lse_stride + j, mask=in_j, other=0.0)[None, :])
        prob = tl.where(unmasked, row_prob + column_prob, 0.0)
        if TEACHES:
            if step == 0:
                teacher = prob
            else:
                prob += distillation * (prob - teacher)
        diff = prob - target
        row_norm, column_norm = tl.sum(logits * diff, 1), tl.sum(logits * diff, 0)
        tl.atomic_add(row_norm_grad + k * row_norm_grad_stride + i, row_norm, mask=in_i, sem="relaxed")
        tl.atomic_add(column_norm_grad + k * column_norm_grad_stride + j, column_norm, mask=in_j, sem="relaxed")
        product_grad += diff * columns[None, :] * rows[:, None] * tl.load(grad_scale + k)
        tl.store(out + tl.cast(k, tl.int64) * out_stride + offsets, product_grad, mask=inside)
