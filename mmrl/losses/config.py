"""Which loss a run trains with.

Shapes: b pairs of this process, D the embedding's width, K dims.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator

from mmrl.losses.inputs import NestedLoss
from mmrl.losses.nested_infonce import InfoNCEOptions, nested_info_nce
from mmrl.losses.nested_sigmoid import nested_sigmoid
from mmrl.nesting import Nesting


class LossConfig(InfoNCEOptions):
    """The loss, and its departures from the plain form."""

    name: Literal["infonce", "sigmoid"] = "infonce"
    """The symmetric InfoNCE, or SigLIP's sigmoid with a learnt bias."""

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.name == "sigmoid" and (self.label_smoothing or self.distillation):
            raise ValueError("label_smoothing and distillation belong to name: infonce; leave them out")
        if self.name == "sigmoid" and self.kernels == "triton":
            raise ValueError("the Triton kernels serve name: infonce; leave kernels out")
        return self


def nested_loss(
    config: LossConfig,
    image_bD: torch.Tensor,
    text_bD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    nested: Nesting,
    group_b: torch.Tensor,
) -> NestedLoss:
    """The configured loss; scale and bias are (1,) or (K,)."""
    if config.name == "infonce":
        return nested_info_nce(image_bD, text_bD, scale, nested.dims, nested.shares, group_b, config)
    assert bias is not None
    return nested_sigmoid(
        image_bD, text_bD, scale, bias, nested.dims, nested.shares, group_b, same_group=config.same_group
    )
