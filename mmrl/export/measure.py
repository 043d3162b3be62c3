"""Recall of variants of lower precision, measured on the exported graphs.

Cosine errors do not predict it: on trained weights a small error can change many neighbours, and random weights make
int8 look far better than it is.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from mmrl.data.sources import open_reader
from mmrl.evaluate import sets
from mmrl.export.contract import Reopened
from mmrl.inference.evaluated import EvaluatedEncoder, OnnxModel
from mmrl.model.bundle import Bundle
from mmrl.model.towers import SIDES
from mmrl.output.console import without_secrets

# Maximum relative recall loss of a variant that is opened by default.
MAX_LOSS = 0.01
# Maximum cosine error of fp16 weights that are opened by default without a measured recall.
_MAX_FP16_ERROR = 1e-4
_KS = (1, 10)


class Recall:
    """The recall of the source and of ONNX graphs on some shards."""

    def __init__(self, full: Bundle, shards: str, dims: Sequence[int]) -> None:
        """Scores the source at `dims`. Raises InputError: no such shards, or they have nothing to find, such as a
        second text of a sample."""
        self._full = full
        self._shards = shards
        self._reader = open_reader(shards, required=full.model.sides)
        embedded = sets.embed(self._reader, full)
        self._count, self._source = len(embedded.keys), sets.score(embedded, dims, _KS)["dims"]

    def measure(self, folder: Reopened, dim: int) -> dict[str, Any]:
        """The manifest's `recall` of a variant: the recall of the source and of the variant at `dim`.

        `relative_loss` is the larger loss of R@1 and R@10, each averaged over the directions; negative if the variant
        has the higher recall.
        """
        source = self._source[str(dim)]
        graphs = OnnxModel(folder.pixels, folder.tokens, self._full.model.sides)
        encoder = EvaluatedEncoder(graphs, self._full.image_spec, self._full.tokenise, dim, self._full.nested_dims)
        variant = sets.score(sets.embed(self._reader, encoder), [dim], _KS)["dims"][str(dim)]
        recalls = {
            name: {direction: {f"R@{k}": one[f"R@{k}"] for k in _KS} for direction, one in scores.items()}
            for name, scores in (("source", source), ("variant", variant))
        }
        means = {name: [fmean(one[f"R@{k}"] for one in by.values()) for k in _KS] for name, by in recalls.items()}
        losses = [1 - new / max(old, 1e-12) for old, new in zip(means["source"], means["variant"], strict=True)]
        return {"set": without_secrets(self._shards), "count": self._count, **recalls, "relative_loss": max(losses)}


def default_variant(variants: dict[str, dict[str, Any]], preferred: Sequence[str]) -> str:
    """The first of `preferred` that is accurate enough to be opened by default, else fp32.

    Judged by measured recall; fp16 without one by its cosine error.
    """
    for name in preferred:
        one = variants[name]
        loss = one.get("recall", {}).get("relative_loss")
        if loss is None and name == "fp16":
            errors = one["cosine_error"]
            worst = max(errors[side]["worst"] for side in SIDES if side in errors)
            loss = 0.0 if worst <= _MAX_FP16_ERROR else None
        if loss is not None and loss <= MAX_LOSS:
            return name
    return "fp32"
