"""The elementwise half of the sweep on a GPU, fused: one kernel a tile where PyTorch takes a dozen passes over memory.

The products stay with the vendor's matrix multiplication. What lies between them, from products to sums of
exponentials forward and from products to the weights of the gradient backward, reads each number once here. It serves
the plain InfoNCE with or without masked groups, in float32; all else takes the passes of softmax.py and sweep.py, which
these kernels are held to. Sums are added up atomically, so that their last bits differ from run to run.

Needs Triton, which PyTorch brings along on Linux; with TRITON_INTERPRET=1 the kernels run on a CPU, for tests.

Shapes: I rows and J columns of a tile, K dims.
"""

# Triton's language is no typed Python: its compiler reads the source of what follows `triton.jit`.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN202, E741

import os

import torch
import triton
import triton.language as tl

_BLOCK = 64


def usable(device: torch.device) -> bool:
    """Whether the kernels run where these tensors lie."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def add_sums(
    product_IJ: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    shift: float | tuple[torch.Tensor, torch.Tensor],
    groups: tuple[torch.Tensor, torch.Tensor] | None,
    own: int,
    row_sum_I: torch.Tensor,
    column_sum_J: torch.Tensor,
) -> None:
    """Adds one dim's sums of 2^(logit - shift) over the columns and over the rows of a tile.

    Args:
        factors: of the rows (I,) and of the columns (J,), which turn products into logits.
        groups: of the rows and the columns; pairs of one group are left out, but for own pairs.
        own: row i's own pair is column i + own.
    """
    I, J = product_IJ.shape
    shared = not isinstance(shift, tuple)
    row_shift, column_shift = (row_sum_I, column_sum_J) if isinstance(shift, float | int) else shift
    row_group, column_group = groups or (row_sum_I, column_sum_J)
    with torch.cuda.device_of(product_IJ):  # Triton launches on the current device
        _sums_kernel[_grid(I, J)](
            product_IJ, I, J, own, *factors, shift if shared else 0.0, row_shift, column_shift, row_group,
            column_group, row_sum_I, column_sum_J, SHARED=shared, MASKED=groups is not None, BLOCK=_BLOCK,
        )  # fmt: skip


def write_weights(
    products_KIJ: torch.Tensor,
    out_KIJ: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor],
    log_sums: tuple[torch.Tensor, torch.Tensor],
    slope_K: torch.Tensor,
    groups: tuple[torch.Tensor, torch.Tensor] | None,
    own: int,
    pulls: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Writes what each block of the embeddings is multiplied with for its gradient, and adds to what norms receive.

    Args:
        products_KIJ: of all dims; its memory may be `out_KIJ`'s.
        out_KIJ: for block k the sum over dims k … K-1 of the loss's gradient of the products.
        factors, log_sums, pulls: of the rows (K, I) and of the columns (K, J), views with unit stride of the last axis;
            log-sum-exps in base 2; pulls are sums of logit times slope less target.
        slope_K: the factor from slope less target, times both factors, to the product's gradient.
    """
    K, I, J = products_KIJ.shape
    row_group, column_group = groups or (slope_K, slope_K)
    with torch.cuda.device_of(products_KIJ):
        _weights_kernel[_grid(I, J)](
            products_KIJ, products_KIJ.stride(0), out_KIJ, out_KIJ.stride(0), I, J, own, slope_K,
            factors[0], factors[0].stride(0), factors[1], factors[1].stride(0),
            log_sums[0], log_sums[0].stride(0), log_sums[1], log_sums[1].stride(0),
            pulls[0], pulls[0].stride(0), pulls[1], pulls[1].stride(0),
            row_group, column_group, K=K, MASKED=groups is not None, BLOCK=_BLOCK,
        )  # fmt: skip


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(rows, _BLOCK), triton.cdiv(columns, _BLOCK)


@triton.jit
def _kept_pairs(i, j, in_i, in_j, own, row_group, column_group, MASKED: tl.constexpr):
    kept = in_i[:, None] & in_j[None, :]
    if MASKED:
        row = tl.load(row_group + i, mask=in_i, other=-1)
        column = tl.load(column_group + j, mask=in_j, other=-2)
        kept = kept & ((row[:, None] != column[None, :]) | (j[None, :] == i[:, None] + own))
    return kept


@triton.jit
def _sums_kernel(
    product, I, J, own, row_factor, column_factor, shift, row_shift, column_shift,
    row_group, column_group, row_sum, column_sum,
    SHARED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_i, in_j = i < I, j < J
    kept = _kept_pairs(i, j, in_i, in_j, own, row_group, column_group, MASKED)
    logits = tl.load(product + i[:, None] * J + j[None, :], mask=in_i[:, None] & in_j[None, :], other=0.0)
    logits *= tl.load(column_factor + j, mask=in_j, other=0.0)[None, :]
    logits *= tl.load(row_factor + i, mask=in_i, other=0.0)[:, None]
    if SHARED:
        by_row = tl.where(kept, tl.exp2(logits - shift), 0.0)
        by_column = by_row
    else:
        by_row = tl.exp2(logits - tl.load(row_shift + i, mask=in_i, other=0.0)[:, None])
        by_column = tl.exp2(logits - tl.load(column_shift + j, mask=in_j, other=0.0)[None, :])
        by_row, by_column = tl.where(kept, by_row, 0.0), tl.where(kept, by_column, 0.0)
    tl.atomic_add(row_sum + i, tl.sum(by_row, 1), mask=in_i)
    tl.atomic_add(column_sum + j, tl.sum(by_column, 0), mask=in_j)


@triton.jit
def _weights_kernel(
    products, product_stride, out, out_stride, I, J, own, slope,
    row_factor, row_factor_stride, column_factor, column_factor_stride,
    row_lse, row_lse_stride, column_lse, column_lse_stride,
    row_pull, row_pull_stride, column_pull, column_pull_stride,
    row_group, column_group,
    K: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_i, in_j = i < I, j < J
    inside = in_i[:, None] & in_j[None, :]
    kept = _kept_pairs(i, j, in_i, in_j, own, row_group, column_group, MASKED)
    target = tl.where(inside & (j[None, :] == i[:, None] + own), 2.0, 0.0)
    places = i[:, None] * J + j[None, :]
    weight = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in tl.static_range(K):
        k = K - 1 - step
        rows = tl.load(row_factor + k * row_factor_stride + i, mask=in_i, other=0.0)
        columns = tl.load(column_factor + k * column_factor_stride + j, mask=in_j, other=0.0)
        logits = tl.load(products + tl.cast(k, tl.int64) * product_stride + places, mask=inside, other=0.0)
        # In the order of the forward kernel, so that the logits are the very numbers whose exponentials were summed.
        logits = logits * columns[None, :] * rows[:, None]
        by_row = tl.exp2(logits - tl.load(row_lse + k * row_lse_stride + i, mask=in_i, other=0.0)[:, None])
        by_column = tl.exp2(logits - tl.load(column_lse + k * column_lse_stride + j, mask=in_j, other=0.0)[None, :])
        part = tl.where(kept, by_row + by_column, 0.0) - target
        tl.atomic_add(row_pull + k * row_pull_stride + i, tl.sum(logits * part, 1), mask=in_i)
        tl.atomic_add(column_pull + k * column_pull_stride + j, tl.sum(logits * part, 0), mask=in_j)
        weight += part * columns[None, :] * rows[:, None] * tl.load(slope + k)
        tl.store(out + tl.cast(k, tl.int64) * out_stride + places, weight, mask=inside)
