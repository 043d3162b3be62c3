"""The `loss` section of a config, and the loss it selects.

Shapes: b local pairs (of this rank), D embedding width, K dims, G keys of a group.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator

from mmrl.losses.inputs import NestedLoss
from mmrl.losses.nested_infonce import nested_info_nce
from mmrl.losses.nested_sigmoid import nested_sigmoid
from mmrl.losses.terms import HardNegatives, InfoNCEOptions, SecondMembers, Teacher
from mmrl.nesting import Nesting


class LossConfig(InfoNCEOptions):
    """The loss and its options."""

    name: Literal["infonce", "sigmoid"] = "infonce"
    """Symmetric InfoNCE (CLIP), or the sigmoid loss with a learned bias (SigLIP)."""

    @property
    def second_members(self) -> frozenset[str]:
        """What the second members of pairs need: "image", "text", both or neither."""
        return frozenset(side for side, weight in (("image", self.image_image), ("text", self.text_text)) if weight)

    @model_validator(mode="after")
    def _check_options_of_sigmoid(self) -> Self:
        if self.name == "sigmoid" and (self.label_smoothing or self.distillation):
            raise ValueError("label_smoothing and distillation require name: infonce; leave them out")
        if self.name == "sigmoid" and self.term_weights != {"image_text": 1, "image_image": 0, "text_text": 0}:
            raise ValueError("image_text, image_image and text_text require name: infonce; leave them out")
        if not any(self.term_weights.values()):
            raise ValueError("at least one of image_text, image_image and text_text must be above 0")
        if self.name == "sigmoid" and self.kernels == "triton":
            raise ValueError("kernels: triton requires name: infonce; leave kernels out")
        return self


def nested_loss(
    config: LossConfig,
    image_bD: torch.Tensor | None,
    text_bD: torch.Tensor | None,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    nested: Nesting,
    group_bG: torch.Tensor,
    second: SecondMembers | None = None,
    negatives: HardNegatives | None = None,
    teacher: Teacher | None = None,
) -> NestedLoss:
    """Compute the configured loss. `scale` and `bias` are (1,) or (K,)."""
    if config.name == "infonce":
        more = {"second": second, "negatives": negatives, "teacher": teacher}
        return nested_info_nce(image_bD, text_bD, scale, nested.dims, nested.weights, group_bG, config, **more)
    assert image_bD is not None
    assert text_bD is not None
    assert bias is not None
    return nested_sigmoid(
        image_bD, text_bD, scale, bias, nested.dims, nested.weights, group_bG, same_group=config.same_group
    )
