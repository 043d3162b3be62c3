"""Rotates a run's model before the first step or after the last one, by the code of `mmrl rotate`."""

import torch
from rich.console import Console

from mmrl import nesting
from mmrl.data.samples import SampleReader
from mmrl.model.bundle import Bundle
from mmrl.rotation import learned, moments


def rotation_of_run(run: str, encoder: Bundle, reader: SampleReader) -> tuple[torch.Tensor, str]:
    """A rotation for truncation to the encoder's nested dims, and a line about it for the console.

    It is computed from a part of the training set, spread evenly over it. Collective: the work is divided.

    Args:
        run: the name for error messages.

    Returns: orthogonal, float64 (D, D), on the CPU.

    Raises:
        InputError: an embedding is not finite, or the part has nothing but bad samples.
    """
    samples, console = moments.max_images(encoder.dim), Console(quiet=True)
    found = moments.compute_moments(run, encoder, reader, samples, None, console, with_pairs=True)
    scale = encoder.model.logit_scale[-1].item()
    rotation_DD, result = learned.find_rotation(found.moment_DD, found.pairs, scale, encoder.nested_dims)
    rank = nesting.effective_rank(found.moment_DD)
    summary = (
        f"rotated by {found.images:,} images and {found.texts:,} texts, effective rank {rank:.1f} of {encoder.dim}"
    )
    return rotation_DD, f"{summary}; {result.summary()}" if result else summary
