"""Check an exported encoder: its embeddings must equal the source's, truncated and renormalised.

Measured with the tool that the format is for: on equal pixels and token ids of real samples, where only the order of
float32 sums may differ; and end to end on the samples and on the inputs of hard_inputs.py, because the tool resizes
images and tokenises texts in its own way.

Shapes: N samples, B of a batch, C channels, H and W the image's size, L tokens, d the exported encoder's dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrl import nesting
from mmrl.data.samples import BadSample
from mmrl.data.sources import open_reader
from mmrl.errors import InputError, RunStopped
from mmrl.export import hard_inputs, tokenizer_json
from mmrl.images.decode import to_pil
from mmrl.images.upright import upright
from mmrl.model.bundle import Bundle
from mmrl.output.console import without_secrets

STARTER = "starter:val-pictures"
_MAX_SAMPLES = 32
# Maximum mean cosine error end to end: tools resize images and clean texts differently.
_END_TO_END = 0.02
# Hard texts that are embedded even if the tool tokenises them as training did.
_TEXTS_EMBEDDED = 8


@dataclass(frozen=True)
class Samples:
    """Decoded images and captions, one of each per sample."""

    name: str
    """The shards that they come from."""
    images: list[Image.Image]
    """Empty for an encoder without an image tower, as are `texts` without a text tower."""
    texts: list[str]


@dataclass(frozen=True)
class Reopened:
    """An exported folder, opened by the tool that it is for. Each function returns (N, d), not always unit vectors."""

    tool: str
    """Name and version."""
    pixels: Callable[[torch.Tensor], np.ndarray]
    """Embeds uint8 (B, C, H, W)."""
    tokens: Callable[[torch.Tensor], np.ndarray]
    """Embeds int64 (B, L) of mmrl's tokenizer."""
    images: Callable[[list[Image.Image]], np.ndarray]
    texts: Callable[[list[str]], np.ndarray]
    token_ids: Callable[[list[str]], list[list[int]]]
    """The tool's token ids, with or without padding at their end."""

    @classmethod
    def of_torch(
        cls,
        tool: str,
        encode_image: Callable[[torch.Tensor], torch.Tensor],
        encode_text: Callable[[torch.Tensor], torch.Tensor],
        normalise: Callable[[torch.Tensor], torch.Tensor],
        prepare: Callable[[Image.Image], torch.Tensor],
        tokenise: Callable[[list[str]], torch.Tensor],
    ) -> "Reopened":
        """A torch model: `encode_image` takes what `normalise` makes of uint8 pixels, or `prepare` of an image."""

        @torch.inference_mode()
        def run(encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> np.ndarray:
            return encode(inputs).numpy()

        return cls(
            tool,
            pixels=lambda pixels_BCHW: run(encode_image, normalise(pixels_BCHW)),
            tokens=lambda tokens_BL: run(encode_text, tokens_BL),
            images=lambda images: run(encode_image, torch.stack([prepare(image) for image in images])),
            texts=lambda texts: run(encode_text, tokenise(texts)),
            token_ids=lambda texts: tokenise(texts).tolist(),
        )


def read_samples(shards: str | None, sides: Sequence[str]) -> Samples:
    """Reads the images and texts, of the towers `sides`, of samples evenly spread over a set, by default over the
    starter set's validation images. Raises InputError: no such shards, or all samples are bad."""
    name = shards or STARTER
    reader = open_reader(name, required=sides)
    images, texts = [], []
    for index in np.linspace(0, len(reader) - 1, min(_MAX_SAMPLES, len(reader))).astype(int):
        try:
            sample = reader.read(int(index))
            images += [to_pil(reader.decode(int(index), sample.image))] if "image" in sides else []
        except BadSample:
            continue
        texts += sample.captions[:1] if "text" in sides else []
    if not images and not texts:
        raise InputError(f"check-shards: all {_MAX_SAMPLES} samples read from {name} are bad; run mmrl check {name}.")
    return Samples(without_secrets(name), images, texts)


class Reference:
    """The source encoder's embeddings of the samples, and comparisons with them."""

    def __init__(self, full: Bundle, samples: Samples) -> None:
        self._samples = samples
        self._inputs: dict[str, torch.Tensor] = {}
        """"image" and "text", of the towers that there are -> pixels (B, C, H, W), token ids (B, L)."""
        self._embedded: dict[str, torch.Tensor] = {}
        """Likewise -> embeddings (B, D)."""
        with torch.inference_mode():
            if "image" in full.model.sides:
                self._inputs["image"] = torch.stack([full.image_spec.pixels(image) for image in samples.images])
                self._embedded["image"] = full.model.encode_image(self._inputs["image"])
            if "text" in full.model.sides:
                self._inputs["text"] = full.tokenise(samples.texts)
                self._embedded["text"] = full.model.encode_text(self._inputs["text"])
        self._full, self._pad_id = full, tokenizer_json.pad_id(full)
        self._hard_texts = hard_inputs.texts()
        self._hard_images = hard_inputs.images(full.image_spec.height, full.image_spec.width)

    def _prefixes(self, dim: int) -> dict[str, np.ndarray]:
        """{side: embeddings, truncated and renormalised, (B, dim)}"""
        return {side: nesting.truncate(x_BD, dim).numpy() for side, x_BD in self._embedded.items()}

    def _on_equal_inputs(self, folder: Reopened) -> dict[str, np.ndarray]:
        """{side: the tool's embeddings of the source's pixels and token ids}"""
        encode = {"image": folder.pixels, "text": folder.tokens}
        return {side: encode[side](inputs) for side, inputs in self._inputs.items()}

    def check(self, folder: Reopened, dim: int, tolerance: float) -> dict[str, Any]:
        """Checks a format computed in float32; returns the manifest's `contract`. Raises RunStopped: an embedding
        differs by more than `tolerance` on equal inputs, or by too much end to end."""
        expected, found = self._prefixes(dim), self._on_equal_inputs(folder)
        worst = float(max(np.abs(unit(found[side]) - expected[side]).max() for side in expected))
        if not worst <= tolerance:  # so that NaN fails
            raise RunStopped(
                f"{folder.tool} gives embeddings that differ from the source's prefix by {worst:.1e}, more than the "
                f"tolerance of {tolerance:.0e}; nothing was written."
            )
        samples, embedded, hard = self._samples, {}, {}
        if "image" in expected:
            embedded["image"] = folder.images(samples.images)
            hard["hard_images_cosine_error"] = self._hard_image_errors(folder, dim)
        if "text" in expected:
            embedded["text"] = folder.texts(samples.texts)
            hard["hard_texts"] = self._hard_text_errors(folder, dim)
        problem = f"{folder.tool} preprocesses {{}}s differently from the source"
        return {
            "equals": f"the renormalised first {dim} of the source's {self._full.dim} numbers",
            "checked_by": folder.tool,
            "samples": {"set": samples.name, "count": len(samples.images or samples.texts)},
            "worst_absolute_difference": worst,
            "allowed": tolerance,
            "end_to_end_cosine_error": self._cosine_errors(embedded, dim, _END_TO_END, problem),
            **hard,
        }

    @torch.inference_mode()
    def _hard_text_errors(self, folder: Reopened, dim: int) -> dict[str, Any]:
        """How many hard texts the tool tokenises differently, and the worst cosine error of any."""
        texts, tokenise = self._hard_texts, self._full.tokenise
        own = _without_padding(tokenise(texts).tolist(), self._pad_id)
        found = _without_padding(folder.token_ids(texts), self._pad_id)
        different = [text for text, a, b in zip(texts, own, found, strict=True) if a != b]
        embedded = [*different, *(text for text in texts[:_TEXTS_EMBEDDED] if text not in different)]
        expected_Nd = nesting.truncate(self._full.model.encode_text(tokenise(embedded)), dim).numpy()
        error_N = cosine_errors(folder.texts(embedded), expected_Nd)
        return {
            "count": len(texts),
            "tokenised_differently": different,
            "worst_cosine_error": float(error_N.max()),
            "worst": embedded[int(error_N.argmax())],
        }

    @torch.inference_mode()
    def _hard_image_errors(self, folder: Reopened, dim: int) -> dict[str, float | None]:
        """{kind of image: its cosine error}; None if the tool cannot read it."""
        errors: dict[str, float | None] = {}
        for kind, image in self._hard_images.items():
            pixels_CHW = self._full.image_spec.pixels(upright(image))
            expected_1d = nesting.truncate(self._full.model.encode_image(pixels_CHW[None]), dim).numpy()
            try:
                errors[kind] = float(cosine_errors(folder.images([image]), expected_1d)[0])
            except Exception:  # of any kind: it is another library's
                errors[kind] = None
        return errors

    def errors(self, folder: Reopened, dim: int, max_error: float) -> dict[str, Any]:
        """The cosine errors of a variant of lower precision, on equal inputs. Raises RunStopped: the mean error is
        above `max_error`."""
        problem = "Export without --quantize: the {} tower loses too much precision"
        return self._cosine_errors(self._on_equal_inputs(folder), dim, max_error, problem)

    def _cosine_errors(
        self, embedded: dict[str, np.ndarray], dim: int, max_error: float, problem: str
    ) -> dict[str, Any]:
        """The cosine errors by modality; raises RunStopped with `problem` ({}: the modality) beyond `max_error`."""
        errors: dict[str, Any] = {"allowed_mean": max_error}
        for modality, expected_Bd in self._prefixes(dim).items():
            error_B = cosine_errors(embedded[modality], expected_Bd)
            errors[modality] = {"mean": float(error_B.mean()), "worst": float(error_B.max())}
            if not error_B.mean() <= max_error:  # so that NaN fails
                raise RunStopped(
                    f"{problem.format(modality)}: mean cosine error {error_B.mean():.1e}, more than the {max_error} "
                    "allowed; nothing was written."
                )
        return errors


def cosine_errors(vectors_Nd: np.ndarray, expected_Nd: np.ndarray) -> np.ndarray:
    """1 - cosine of each row with its expected unit vector: float64 (N,)."""
    # As half of the squared distance in float64: 1 - cosine itself would round to 0 for small errors.
    difference = unit(vectors_Nd).astype(np.float64) - expected_Nd.astype(np.float64)
    return (difference**2).sum(1) / 2


def _without_padding(ids: list[list[int]], pad_id: int) -> list[list[int]]:
    return [row[: max((i + 1 for i, one in enumerate(row) if one != pad_id), default=0)] for row in ids]


def unit(vectors_Nd: np.ndarray) -> np.ndarray:
    """L2-normalises the rows, in float32."""
    return nesting.truncate(torch.from_numpy(np.ascontiguousarray(vectors_Nd)).float(), vectors_Nd.shape[1]).numpy()
