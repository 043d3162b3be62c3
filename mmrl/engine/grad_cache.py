"""GradCache: loss and gradients of a batch larger than memory, in micro-batches that are negatives of each other.

Gao et al. 2021 (arXiv 2101.06983, section 3): embed every micro-batch without a graph; compute one loss over all
embeddings and its gradient with respect to them; then embed each micro-batch again with a graph and backpropagate that
gradient. The result is the gradient of the whole batch. It costs a second forward pass, and needs the memory of one
micro-batch and of all embeddings.

Shapes: m pairs of a micro-batch, b pairs of this rank, D the embedding's width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from mmrl.engine.engine import Engine, Rows
from mmrl.losses.inputs import NestedLoss
from mmrl.model.two_tower import Outputs

MicroBatch = tuple[Rows | None, Rows | None]
"""uint8 images (m, C, H, W) and token ids (m', L), e.g. of m pairs and their second texts; None for a tower without."""
LossFunction = Callable[[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None], NestedLoss]
"""(image embeddings or None, text embeddings or None, logit scale, logit bias or None) -> loss."""


def backward(
    engine: Engine, micro_batches: Sequence[MicroBatch], loss_function: LossFunction, seed: Callable[[int], None]
) -> NestedLoss:
    """The loss over all micro-batches of all ranks.

    Accumulates its gradients in the engine, and those of other leaves, such as a learnable rotation, in their `grad`.

    Args:
        seed: seeds the random number generator for micro-batch i, so that dropout is the same in both forward passes.
    """
    outputs = None
    if is_whole := len(micro_batches) == 1:
        seed(0)
        outputs = engine(*micro_batches[0])
    # The graph is cut at the embeddings, so that the engine and its loss scale see the model alone.
    image_bD, text_bD, scale, bias = _detach(outputs or _embed(engine, micro_batches, seed))
    loss = loss_function(image_bD, text_bD, scale, bias)
    with engine.timer.phase("backward"):
        loss.total.backward()
    scalar_grads = [x.grad for x in (scale, bias) if x is not None]
    starts = [0, 0]
    with nullcontext() if is_whole else engine.accumulating():
        for index, inputs in enumerate(micro_batches):
            seed(index)
            # A locked tower has no gradient, so it needs no second forward pass.
            again = outputs
            if again is None:
                trains = engine.trains("image"), engine.trains("text")
                again = engine(*(x if trained else None for x, trained in zip(inputs, trains, strict=True)))
            *embeddings, micro_scale, micro_bias = again
            # A surrogate whose gradient is that of the loss. DeepSpeed requires a gradient of every trained
            # parameter in every backward pass, so that of logit scale and bias is divided evenly.
            surrogate = scale.new_zeros(())
            for side, (x, whole) in enumerate(zip(embeddings, (image_bD, text_bD), strict=True)):
                if x is not None:
                    assert whole is not None
                    assert whole.grad is not None
                    rows = slice(starts[side], starts[side] + len(x))
                    starts[side] = rows.stop
                    surrogate = surrogate + (x * whole.grad[rows]).sum()
            for x, grad in zip((x for x in (micro_scale, micro_bias) if x is not None), scalar_grads, strict=True):
                surrogate = surrogate + (x * grad).sum() / len(micro_batches)
            engine.backward(surrogate, last=index == len(micro_batches) - 1)
    return loss


def _detach(outputs: Outputs) -> Outputs:
    """The model's outputs as leaves that collect a gradient."""
    image_bD, text_bD, scale, bias = (None if x is None else x.detach().requires_grad_() for x in outputs)
    assert scale is not None
    return image_bD, text_bD, scale, bias


@torch.no_grad()
def _embed(engine: Engine, micro_batches: Sequence[MicroBatch], seed: Callable[[int], None]) -> Outputs:
    images, texts, scale, bias = [], [], None, None
    for index, micro_batch in enumerate(micro_batches):
        seed(index)
        image_mD, text_mD, scale, bias = engine(*micro_batch)
        images.append(image_mD)
        texts.append(text_mD)
    assert scale is not None
    image_bD, text_bD = (None if parts[0] is None else torch.cat(parts) for parts in (images, texts))
    return image_bD, text_bD, scale, bias
