"""The turn in the middle of a run (`nesting.start`): the embedding's principal directions come first.

Until then the full dim was trained alone, and what it learnt lies anywhere. One orthogonal matrix is multiplied into
both projections: no similarity changes, so the full dim's loss goes on where it was, and each prefix begins with as
much of the embedding as so many numbers can hold, instead of from nothing.

The optimiser's state turns along: the mean of the gradients as the weights do; the mean of their squares, of which Adam
keeps those of single numbers alone, by the matrix of squares, as if the gradients of two numbers were uncorrelated.
"""

from dataclasses import dataclass

import torch
from rich.console import Console

from mmrl import distributed, nesting
from mmrl.data.samples import SampleReader
from mmrl.engine import Engine
from mmrl.export import moments
from mmrl.model import bundle
from mmrl.model.bundle import Bundle

_SAMPLES_PER_DIM = 20  # twice what `mmrl rotate` takes for enough


@dataclass(frozen=True)
class Turn:
    """One orthogonal matrix, and what it was found from."""

    rotation_DD: torch.Tensor
    images: int
    texts: int
    effective_rank: float


def find(run: str, encoder: Bundle, reader: SampleReader) -> Turn:
    """By a part of the training set, spread evenly over it and divided over the processes, as `mmrl rotate` does.

    Raises:
        InputError: a vector is not finite, or the part has nothing but bad samples.
    """
    found = moments.of_set(run, encoder, reader, _SAMPLES_PER_DIM * encoder.dim, None, Console(quiet=True))
    moment_DD = distributed.from_main(found.moment_DD)  # one matrix, whatever the machines round
    rotation_DD = nesting.principal_rotation(moment_DD)
    return Turn(rotation_DD, found.images, found.texts, nesting.effective_rank(moment_DD))


def apply(engine: Engine, training: Bundle, averaged: Bundle, rotation_DD: torch.Tensor) -> None:
    """Turns what the engine trains, its optimiser's state, and the moving average where there is one; called on every
    process. Where each dim has a logit scale, all begin with the full dim's."""
    axes = bundle.embedding_axes(training.model_cfg)
    state = distributed.from_main(engine.moments(of=axes))
    for label, value in state.items():
        kind, _, name = label.partition("/")
        if name:
            matrix_DD = rotation_DD.square() if kind == "exp_avg_sq" else rotation_DD
            state[label] = nesting.turned(value, axes[name], matrix_DD)
    engine.load(_turned(training, rotation_DD), state)
    if averaged.model is not training.model:
        averaged.model.load_state_dict(_turned(averaged, rotation_DD))


def _turned(encoder: Bundle, rotation_DD: torch.Tensor) -> dict[str, torch.Tensor]:
    """The model's weights, turned, in the shapes that it has."""
    shapes = {name: value.shape for name, value in encoder.model.state_dict().items()}
    return {name: value.expand(shapes[name]) for name, value in bundle.rotated_state(encoder, rotation_DD).items()}
