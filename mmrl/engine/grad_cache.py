"""GradCache: loss and gradients of a batch larger than memory, in micro-batches that are negatives of each other.

Gao et al. 2021 (arXiv 2101.06983, section 3): embed every micro-batch without a graph; compute one loss over all
embeddings and its gradient with respect to them; then embed each micro-batch again with a graph and backpropagate that
gradient. The result is the gradient of the whole batch. It costs a second forward pass, and needs the memory of one
micro-batch and of all embeddings.

Shapes: m pairs of a micro-batch, b pairs of this rank, D the embedding's width.
"""

from collections.abc import Callable, Sequence

import torch

from mmrl.engine.engine import Engine
from mmrl.losses.inputs import NestedLoss

MicroBatch = tuple[torch.Tensor, torch.Tensor]
"""uint8 images (m, C, H, W), token ids (m, L)."""
LossFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], NestedLoss]
"""(image (b, D), text (b, D), logit scale, logit bias or None) -> loss."""


def backward(
    engine: Engine, micro_batches: Sequence[MicroBatch], loss_function: LossFunction, seed: Callable[[int], None]
) -> NestedLoss:
    """The loss over all micro-batches of all ranks; accumulates its gradients in the engine.

    Args:
        seed: seeds the random number generator for micro-batch i, so that dropout is the same in both forward passes.
    """
    if len(micro_batches) == 1:
        seed(0)
        loss = loss_function(*engine(*micro_batches[0]))
        engine.backward(loss.total, last=True)
        return loss
    image_bD, text_bD, scale, bias = _embed(engine, micro_batches, seed)
    leaves = [x.requires_grad_() for x in (image_bD, text_bD, scale, bias) if x is not None]
    loss = loss_function(image_bD, text_bD, scale, bias)
    image_grad_bD, text_grad_bD, *scalar_grads = torch.autograd.grad(loss.total, leaves)
    start = 0
    with engine.accumulating():
        for index, (image_mCHW, text_mL) in enumerate(micro_batches):
            rows = slice(start, start + len(text_mL))
            start = rows.stop
            seed(index)
            # A locked tower has no gradient, so it needs no second forward pass.
            image_mD, text_mD, *scalars = engine(
                image_mCHW if engine.trains("image") else None, text_mL if engine.trains("text") else None
            )
            # A surrogate whose gradient is that of the loss. DeepSpeed requires a gradient of every trained
            # parameter in every backward pass, so that of logit scale and bias is divided evenly.
            surrogate = scale.new_zeros(())
            for x, grad in ((image_mD, image_grad_bD[rows]), (text_mD, text_grad_bD[rows])):
                surrogate = surrogate if x is None else surrogate + (x * grad).sum()
            for x, grad in zip((x for x in scalars if x is not None), scalar_grads, strict=True):
                surrogate = surrogate + (x * grad).sum() / len(micro_batches)
            engine.backward(surrogate, last=index == len(micro_batches) - 1)
    return loss


@torch.no_grad()
def _embed(
    engine: Engine, micro_batches: Sequence[MicroBatch], seed: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    images, texts, scale, bias = [], [], None, None
    for index, micro_batch in enumerate(micro_batches):
        seed(index)
        image_mD, text_mD, scale, bias = engine(*micro_batch)
        images.append(image_mD)
        texts.append(text_mD)
    assert scale is not None
    return torch.cat(images), torch.cat(texts), scale.clone(), None if bias is None else bias.clone()
