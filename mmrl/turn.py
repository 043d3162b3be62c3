"""The turn of a run (`nesting.start`): what tells pairs apart comes first in the embedding.

Until then the full dim was trained alone, and what it learnt lies anywhere. One orthogonal matrix is multiplied into
both projections: no similarity changes, so the full dim's loss goes on where it was, and each prefix begins with what
so many numbers can do, instead of from nothing. The matrix begins as the principal directions, and is learnt by the
nested loss on vectors of the training set (rotation/learned.py).

The optimiser's state turns along: the mean of the gradients as the weights do; the mean of their squares, of which Adam
keeps those of single numbers alone, by the matrix of squares, as if the gradients of two numbers were uncorrelated.
"""

from dataclasses import dataclass

import torch
from rich.console import Console

from mmrl import nesting
from mmrl.data.samples import SampleReader
from mmrl.distributed import comm
from mmrl.engine.engine import Engine
from mmrl.model import bundle
from mmrl.model.bundle import Bundle
from mmrl.rotation import learned, moments
from mmrl.rotation.learned import LearnedRotation


@dataclass(frozen=True)
class Turn:
    """What was found."""

    rotation_DD: torch.Tensor
    """Orthogonal, float64 (D, D), on the CPU."""
    images: int
    texts: int
    effective_rank: float
    learnt: LearnedRotation | None

    def told(self) -> str:
        """For the user."""
        by = f"turned by {self.images:,} pictures and {self.texts:,} texts"
        learnt = f"; {self.learnt.summary()}" if self.learnt else ""
        return f"{by}, effective rank {self.effective_rank:.1f} of {len(self.rotation_DD)}{learnt}"


def find(run: str, encoder: Bundle, reader: SampleReader) -> Turn:
    """By a part of the training set, spread evenly over it and divided over the processes, as `mmrl rotate` does.

    Raises:
        InputError: a vector is not finite, or the part has nothing but bad samples.
    """
    samples, console = moments.max_images(encoder.dim), Console(quiet=True)
    found = moments.compute_moments(run, encoder, reader, samples, None, console, with_pairs=True)
    scale = encoder.model.logit_scale[-1].item()
    rotation_DD, learnt = learned.find_rotation(found.moment_DD, found.pairs, scale, encoder.nested_dims)
    return Turn(rotation_DD, found.images, found.texts, nesting.effective_rank(found.moment_DD), learnt)


def apply(engine: Engine, training: Bundle, averaged: Bundle, rotation_DD: torch.Tensor) -> None:
    """Turns what the engine trains, its optimiser's state, and the moving average where there is one; called on every
    process. Where each dim has a logit scale, all begin with the full dim's."""
    axes = bundle.embedding_axes(training.model_cfg)
    state = comm.broadcast_object(engine.moments(of=axes))
    for label, value in state.items():
        kind, _, name = label.partition("/")
        if name:
            matrix_DD = rotation_DD.square() if kind == "exp_avg_sq" else rotation_DD
            state[label] = nesting.rotate_weight(value, axes[name], matrix_DD)
    engine.load(_turned(training, rotation_DD), state)
    if averaged.model is not training.model:
        averaged.model.load_state_dict(_turned(averaged, rotation_DD))


def _turned(encoder: Bundle, rotation_DD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's weights, turned, in the shapes that it has."""
    shapes = {name: value.shape for name, value in encoder.model.state_dict().items()}
    return {name: value.expand(shapes[name]) for name, value in bundle.rotated_state(encoder, rotation_DD).items()}
