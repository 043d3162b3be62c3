"""The contract of a small encoder: its vector equals the renormalised prefix of the large one's. Measured on real
samples with the tool that a format is for, twice: on equal pixels and token ids, where only the order of sums may
differ, and from picture and text to vector, where the tool fits pictures and reads texts in its own way.

Shapes: N samples, B of a batch, C channels, H and W the picture's size, L tokens, d the small encoder's dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrl import nesting
from mmrl.data.samples import BadSample
from mmrl.data.sources import open_reader
from mmrl.errors import InputError, RunStopped
from mmrl.images.decode import to_picture
from mmrl.model.bundle import Bundle

STARTER = "starter:val-pictures"
_SAMPLES = 32
# The greatest mean cosine error, over the samples, of a tool that fits pictures and cleans texts in its own way.
_END_TO_END = 0.02


@dataclass(frozen=True)
class Samples:
    """Pictures as they were decoded, with a caption each."""

    name: str
    pictures: list[Image.Image]
    texts: list[str]


@dataclass(frozen=True)
class Reopened:
    """A written folder, opened by the tool that it is for. All return (N, d), not necessarily of length 1."""

    tool: str
    """Its name and version."""
    pixels: Callable[[torch.Tensor], np.ndarray]
    """uint8 (B, C, H, W) ->"""
    tokens: Callable[[torch.Tensor], np.ndarray]
    """int64 (B, L) of our tokenizer ->"""
    images: Callable[[list[Image.Image]], np.ndarray]
    texts: Callable[[list[str]], np.ndarray]


def read_samples(shards: str | None) -> Samples:
    """Samples evenly spread over a set; of the starter set's held-out pictures where none is named.

    Raises:
        InputError: there are no such shards, or none of the samples can be used.
    """
    name = shards or STARTER
    reader = open_reader(name)
    pictures, texts = [], []
    for number in np.linspace(0, len(reader) - 1, min(_SAMPLES, len(reader))).astype(int):
        try:
            sample, picture_CHW = reader.read_picture(int(number))
        except BadSample:
            continue
        pictures.append(to_picture(picture_CHW))
        texts.append(sample.captions[0])
    if not pictures:
        raise InputError(f"check-shards: no sample of {name} can be used; mmrl check {name} tells why.")
    return Samples(name, pictures, texts)


class Source:
    """What the source's encoder says of the samples."""

    def __init__(self, whole: Bundle, samples: Samples) -> None:
        self.samples = samples
        self.full_dim = whole.dim
        self.pixels_BCHW = torch.stack([whole.image_spec.pixels(picture) for picture in samples.pictures])
        self.tokens_BL = whole.tokenise(samples.texts)
        with torch.inference_mode():
            self._image_BD = whole.model.encode_image(self.pixels_BCHW)
            self._text_BD = whole.model.encode_text(self.tokens_BL)

    def prefix(self, dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Its vectors, cut and renormalised: (B, dim) of the pictures and of the texts."""
        return nesting.cut(self._image_BD, dim).numpy(), nesting.cut(self._text_BD, dim).numpy()

    def check(self, folder: Reopened, dim: int, allowed: float) -> dict[str, Any]:
        """The manifest's contract for a format computed in float32.

        Raises:
            RunStopped: the worst number on equal inputs differs by more than `allowed`, or the vectors from picture
                and text are others than the source's.
        """
        image_Bd, text_Bd = self.prefix(dim)
        differences = [
            np.abs(unit(folder.pixels(self.pixels_BCHW)) - image_Bd),
            np.abs(unit(folder.tokens(self.tokens_BL)) - text_Bd),
        ]
        worst = float(max(difference.max() for difference in differences))
        if not worst <= allowed:  # so that NaN fails
            raise RunStopped(
                f"{folder.tool} gives vectors that differ from the source's prefix by {worst:.1e}, more than the "
                f"{allowed:.0e} allowed; nothing was written."
            )
        whole_way = {
            "image": cosine_error(folder.images(self.samples.pictures), image_Bd),
            "text": cosine_error(folder.texts(self.samples.texts), text_Bd),
        }
        for side, error in whole_way.items():
            if not error["mean"] <= _END_TO_END:
                raise RunStopped(
                    f"{folder.tool} reads {side}s otherwise than the source: a mean cosine error of "
                    f"{error['mean']:.1e}, more than the {_END_TO_END} allowed; nothing was written."
                )
        return {
            "equals": f"the renormalised first {dim} of the source's {self.full_dim} numbers",
            "checked_by": folder.tool,
            "samples": {"set": self.samples.name, "count": len(self.samples.texts)},
            "worst_absolute_difference": worst,
            "allowed": allowed,
            "end_to_end_cosine_error": {**whole_way, "allowed_mean": _END_TO_END},
        }

    def errors(self, folder: Reopened, dim: int, allowed: float) -> dict[str, Any]:
        """The cosine errors of a variant of lower precision, on equal inputs.

        Raises:
            RunStopped: their mean is above `allowed`.
        """
        image_Bd, text_Bd = self.prefix(dim)
        errors = {
            "image": cosine_error(folder.pixels(self.pixels_BCHW), image_Bd),
            "text": cosine_error(folder.tokens(self.tokens_BL), text_Bd),
        }
        for side, error in errors.items():
            if not error["mean"] <= allowed:
                raise RunStopped(
                    f"The {side} tower loses too much: a mean cosine error of {error['mean']:.1e}, more than the "
                    f"{allowed} allowed; export it without --quantize. Nothing was written."
                )
        return {**errors, "allowed_mean": allowed}


def cosine_error(vectors_Nd: np.ndarray, wanted_Nd: np.ndarray) -> dict[str, float]:
    """1 - cosine of the rows: its mean and its worst, not below 0."""
    # In float64, since half of the squared distance is this to the last digit where the cosine rounds to 1.
    difference = unit(vectors_Nd).astype(np.float64) - wanted_Nd.astype(np.float64)
    error_N = (difference**2).sum(1) / 2
    return {"mean": float(error_N.mean()), "worst": float(error_N.max())}


def unit(vectors_Nd: np.ndarray) -> np.ndarray:
    """Rows of length 1, as float32."""
    return nesting.cut(torch.from_numpy(np.ascontiguousarray(vectors_Nd)).float(), vectors_Nd.shape[1]).numpy()
