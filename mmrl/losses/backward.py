"""The backward pass of the tiled losses: recompute each tile's logits and accumulate the embedding gradients.

Dim k's logit is the dot product of two prefixes, times a row factor, times a column factor (the inverse norms and the
logit scale). With probabilities p (a softmax or a sigmoid) and targets t, the gradients are:

- of a logit: grad_scale * (p - t)
- of a dot product: that, times both factors. A block of the embeddings is part of the prefixes of its own dim and of
  all larger dims, so its gradient is a product with the sum of theirs.
- of the log of a factor: the sum over its row (or column) of logit * logit gradient, called `norm_grad` here.

Shapes: as in sweep.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from mmrl.losses.sweep import LOG2_E, NORM_EPS, EmbeddingBlocks, LogitMatrix, LogitTile, LogitTiles, Targets


class ProbFunction(Protocol):
    """Computes a tile's probabilities: the gradient of the loss with respect to its logits, before targets."""

    def __call__(
        self, k: int, tile: LogitTile, logits_IJ: torch.Tensor, out: torch.Tensor, spare: torch.Tensor
    ) -> torch.Tensor:
        """Write dim k's probabilities to `out`, zero for masked pairs. Called from the largest dim to the smallest."""
        ...


@dataclass
class Gradients:
    """The result of the backward pass."""

    row_nD: torch.Tensor
    """With respect to the row embeddings, without a teacher's."""
    column_mD: torch.Tensor
    """With respect to the column embeddings."""
    log_scale_K: torch.Tensor
    """With respect to the logarithm of each logit scale."""


def gradients(
    matrix: LogitMatrix,
    prob: ProbFunction,
    grad_scale_K: torch.Tensor,
    targets: Targets,
    width: int,
    distillation: float = 0.0,
    triton_lse: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Gradients:
    """Gradients of the loss with respect to embeddings and logit scales.

    Args:
        grad_scale_K: the gradient of a logit (base e) is this times (probability - target).
        width: number of embedding dims D; dims beyond the largest nested dim get zero gradient.
        distillation: its weight, for kernels.py.
        triton_lse: log-sum-exps (base 2) of rows and columns; if given, kernels.py replaces `prob`.
    """
    K, like = len(grad_scale_K), matrix.rows.inverse_norm_Kn
    row_blocks, column_blocks = ([torch.zeros_like(b) for b in side.blocks] for side in (matrix.rows, matrix.columns))
    norm_grads = torch.zeros_like(like), torch.zeros_like(matrix.columns.inverse_norm_Kn)
    # The logits are in base 2; dividing by log2 e gives gradients for base e.
    grad_scale_K1 = grad_scale_K[:, None] / LOG2_E
    tiles = LogitTiles(matrix, targets, num_buffers=K + (3 if triton_lse is None else 0))
    if triton_lse is None:
        product_grads = _product_grads(tiles, prob, grad_scale_K1, targets, norm_grads)
    else:
        product_grads = _product_grads_by_triton(tiles, triton_lse, grad_scale_K1, norm_grads, distillation)
    for tile, k, product_grad_IJ in product_grads:
        if matrix.has_teacher and k == K - 1:
            continue
        x, y = matrix.rows.low_precision_blocks[k][tile.rows], matrix.columns.low_precision_blocks[k][tile.columns]
        product_grad_IJ = product_grad_IJ.to(x.dtype)
        _add_matmul(row_blocks[k][tile.rows], product_grad_IJ, y)
        _add_matmul(column_blocks[k][tile.columns], product_grad_IJ.T, x)
    for norm_grad_Kn in norm_grads:
        norm_grad_Kn *= grad_scale_K1
    students = slice(0, K - 1 if matrix.has_teacher else K)
    return Gradients(
        _embedding_gradient(matrix.rows, row_blocks[students], norm_grads[0][students], width),
        _embedding_gradient(matrix.columns, column_blocks[students], norm_grads[1][students], width),
        norm_grads[0][students].sum(1),
    )


_ProductGrads = Iterator[tuple[LogitTile, int, torch.Tensor]]
"""For each tile and k = K-1 … 0: the sum over dims k … K-1 of the gradient with respect to the dot products. The tensor
is valid until the next iteration."""


def _product_grads(
    tiles: LogitTiles,
    prob: ProbFunction,
    grad_scale_K1: torch.Tensor,
    targets: Targets,
    norm_grads: tuple[torch.Tensor, torch.Tensor],
) -> _ProductGrads:
    K, scaled_row_factor_Kn = len(grad_scale_K1), tiles.row_factor_Kn * grad_scale_K1
    for tile in tiles:
        rows, columns = tile.rows, tile.columns
        for _ in tile.products():
            pass
        sum_IJ, grad_IJ, spare_IJ = tile.buffers[K:]
        for k in reversed(range(K)):
            logits_IJ = tile.logits(k, tile.buffers[k], out=tile.buffers[k])
            # The largest dim comes first and starts the sum.
            prob_IJ = prob(k, tile, logits_IJ, sum_IJ if k == K - 1 else grad_IJ, spare_IJ)
            _subtract_targets(prob_IJ, tile, targets)
            logits_IJ.mul_(prob_IJ)
            norm_grads[0][k, rows] += logits_IJ.sum(1)
            norm_grads[1][k, columns] += logits_IJ.sum(0)
            prob_IJ.mul_(tiles.column_factor_Km[k, columns]).mul_(scaled_row_factor_Kn[k, rows, None])
            if k < K - 1:
                sum_IJ.add_(prob_IJ)
            yield tile, k, sum_IJ


def _product_grads_by_triton(
    tiles: LogitTiles,
    lse: tuple[torch.Tensor, torch.Tensor],
    grad_scale_K1: torch.Tensor,
    norm_grads: tuple[torch.Tensor, torch.Tensor],
    distillation: float,
) -> _ProductGrads:
    from mmrl.losses import kernels

    K = len(grad_scale_K1)
    for tile in tiles:
        rows, columns = tile.rows, tile.columns
        for _ in tile.products():
            pass
        kernels.write_product_grads(
            tile,
            tile.stacked_buffers,
            tile.stacked_buffers,
            factors=(tiles.row_factor_Kn[:, rows], tiles.column_factor_Km[:, columns]),
            lse=(lse[0][:, rows], lse[1][:, columns]),
            grad_scale_K=grad_scale_K1[:, 0],
            norm_grads=(norm_grads[0][:, rows], norm_grads[1][:, columns]),
            distillation=distillation,
        )
        yield from ((tile, k, tile.buffers[k]) for k in reversed(range(K)))


def _subtract_targets(prob_IJ: torch.Tensor, tile: LogitTile, targets: Targets) -> None:
    if tile.target_IJ is not None:
        prob_IJ.sub_(tile.target_IJ)
    matching = tile.matching_pairs(prob_IJ)
    if matching is not None:
        matching[1].sub_(targets.matching_n[matching[0]])


def _add_matmul(into_Id: torch.Tensor, grad_IJ: torch.Tensor, block_Jd: torch.Tensor) -> None:
    """into += grad @ block: multiplied in the dtype of `block`, added in the dtype of `into`."""
    if block_Jd.dtype == into_Id.dtype:
        into_Id.addmm_(grad_IJ, block_Jd)
    else:
        into_Id.add_(grad_IJ @ block_Jd)


def _embedding_gradient(
    embeddings: EmbeddingBlocks, grad_blocks: list[torch.Tensor], norm_grad_Kn: torch.Tensor, width: int
) -> torch.Tensor:
    """The gradient with respect to embeddings, (n, D). `grad_blocks` has it for constant norms, and is overwritten.

    The gradient of log(1 / norm) with respect to x is -x / norm². A norm at its lower bound is a constant.
    """
    inverse_Kn = embeddings.inverse_norm_Kn[: len(grad_blocks)]
    norm_grad_Kn = torch.where(inverse_Kn * NORM_EPS < 1, norm_grad_Kn * inverse_Kn.square(), 0)
    # A block is part of the norms of its own dim and of all larger dims.
    norm_grad_Kn = norm_grad_Kn.flip(0).cumsum(0).flip(0)
    for grad, x, norm_grad_n in zip(grad_blocks, embeddings.blocks, norm_grad_Kn, strict=False):
        grad.addcmul_(x, norm_grad_n[:, None], value=-1)
    beyond = width - sum(grad.shape[1] for grad in grad_blocks)
    zeros = [grad_blocks[0].new_zeros(len(embeddings), beyond)] if beyond else []
    return torch.cat([*grad_blocks, *zeros], dim=1)
