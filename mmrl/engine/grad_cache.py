"""One step's loss and gradients on a batch larger than memory: micro-batches that are all each other's negatives.

GradCache (Gao et al. 2021, arXiv 2101.06983, section 3): every micro-batch is embedded without a graph, one loss over
all embeddings gives their gradients, and each micro-batch is then embedded again, now with a graph, and pulled back.
The gradient is that of the whole batch; the price is a second forward, the memory that of one micro-batch and all
embeddings.

Shapes: m pairs of a micro-batch, b of this process in all, D the embedding's width.
"""

from collections.abc import Callable, Sequence

import torch

from mmrl.engine.engine import Engine
from mmrl.losses.inputs import NestedLoss

MicroBatch = tuple[torch.Tensor, torch.Tensor]
"""uint8 (m, C, H, W) pictures, (m, L) token ids."""
LossOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], NestedLoss]
"""The loss of what the model returns: (b, D), (b, D), the scale, the bias or None."""


def backward(
    engine: Engine, micro_batches: Sequence[MicroBatch], loss_of: LossOf, seed: Callable[[int], None]
) -> NestedLoss:
    """The loss over all micro-batches of all processes; its gradients are left in the engine.

    Args:
        seed: sets the random numbers of a micro-batch, so that dropout is the same both times.
    """
    if len(micro_batches) == 1:
        seed(0)
        loss = loss_of(*engine(*micro_batches[0]))
        engine.backward(loss.total, last=True)
        return loss
    image_bD, text_bD, scale, bias = _embedded(engine, micro_batches, seed)
    leaves = [x.requires_grad_() for x in (image_bD, text_bD, scale, bias) if x is not None]
    loss = loss_of(image_bD, text_bD, scale, bias)
    image_grad_bD, text_grad_bD, *small_grads = torch.autograd.grad(loss.total, leaves)
    start = 0
    with engine.accumulating():
        for number, (image_mCHW, text_mL) in enumerate(micro_batches):
            rows = slice(start, start + len(text_mL))
            start = rows.stop
            seed(number)
            # A locked tower has no gradient, so its first pass was enough.
            image_mD, text_mD, *small = engine(
                image_mCHW if engine.trains("image") else None, text_mL if engine.trains("text") else None
            )
            # Its gradient is the one wanted. The scale's is divided evenly: DeepSpeed wants a part of it every time.
            pull = scale.new_zeros(())
            for x, grad in ((image_mD, image_grad_bD[rows]), (text_mD, text_grad_bD[rows])):
                pull = pull if x is None else pull + (x * grad).sum()
            for x, grad in zip((x for x in small if x is not None), small_grads, strict=True):
                pull = pull + (x * grad).sum() / len(micro_batches)
            engine.backward(pull, last=number == len(micro_batches) - 1)
    return loss


@torch.no_grad()
def _embedded(
    engine: Engine, micro_batches: Sequence[MicroBatch], seed: Callable[[int], None]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    images, texts, scale, bias = [], [], None, None
    for number, micro_batch in enumerate(micro_batches):
        seed(number)
        image_mD, text_mD, scale, bias = engine(*micro_batch)
        images.append(image_mD)
        texts.append(text_mD)
    assert scale is not None
    return torch.cat(images), torch.cat(texts), scale.clone(), None if bias is None else bias.clone()
