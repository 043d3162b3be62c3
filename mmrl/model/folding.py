"""The encoder of a model in training: the same weights, with a rotation folded into both projections (W <- Q W) and
LoRA adapters merged into the weights that they change.

Evaluation and checkpoints use it, so that nothing downstream knows of the rotation.

Shapes: D the embedding's width, K nested dims.
"""

import copy
from dataclasses import replace

import torch
from torch import nn

from mmrl.model import bundle, lora
from mmrl.model.bundle import Bundle
from mmrl.nesting import rotate_weight


def share_weights(training: Bundle, num_scales: int | None = None) -> Bundle:
    """An encoder that shares all parameters and buffers with `training`, except projections, logit scales, biases and
    weights with LoRA adapters, which `fold` writes. It has `num_scales` logit scales; default: as many as
    `training`."""
    own = {*bundle.embedding_axes(training), bundle.SCALE, bundle.BIAS}
    model = training.model
    shared = [*model.named_parameters(), *model.named_buffers()]
    encoder = copy.deepcopy(model, {id(tensor): tensor for name, tensor in shared if name not in own})
    lora.unload(encoder)
    if num_scales is not None:
        encoder.log_logit_scale = nn.Parameter(model.log_logit_scale.detach()[-1:].repeat(num_scales))
    return replace(training, model=encoder)


@torch.no_grad()
def fold(
    training: Bundle, encoder: Bundle, rotation_DD: torch.Tensor, log_scale_K: torch.Tensor, bias_K: torch.Tensor | None
) -> None:
    """Writes the rotated projections and merged weights of `training`, logit scales and biases into `encoder`, made by
    `share_weights`.

    Args:
        rotation_DD: orthogonal, float64 (D, D), on the CPU.
        log_scale_K: the logarithms of the logit scales, in ascending order of the dims; or (1,), for all dims.
        bias_K: the biases of the sigmoid loss, likewise.
    """
    weights, folded = training.model.state_dict(), encoder.model.state_dict()
    for name, axis in bundle.embedding_axes(training).items():
        folded[name].copy_(rotate_weight(weights[name], axis, rotation_DD))
    for name, merged in lora.merged_weights(training.model):
        folded[name].copy_(merged)
    folded[bundle.SCALE].copy_(log_scale_K)
    if bias_K is not None:
        folded[bundle.BIAS].copy_(bias_K)
    # Moving a module to another device replaces its buffers, so that they are no longer shared.
    for buffer, source in zip(encoder.model.buffers(), training.model.buffers(), strict=True):
        if buffer is not source:
            buffer.copy_(source)


def unshared(model: nn.Module, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The state of `model` without the tensors that `encoder` shares with it."""
    of_encoder = encoder.state_dict(keep_vars=True)
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor is not of_encoder.get(name)
    }
