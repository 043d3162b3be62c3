"""What a variant of lower precision costs in recall, measured on the exported graphs. Cosine errors cannot tell: on
trained weights a small one can move many neighbours, and random weights flatter 8 bits by far.
"""

from collections.abc import Sequence
from typing import Any

from mmrl.data.sources import open_reader
from mmrl.evaluate import sets
from mmrl.export.contract import Reopened
from mmrl.inference.evaluated import Graphs
from mmrl.model.bundle import Bundle

# A variant is opened by default where it loses at most this share of the recall.
ALLOWED_LOSS = 0.01
_KS = (1, 10)


class Recall:
    """The source's recall on some shards, and that of graphs beside it."""

    def __init__(self, whole: Bundle, shards: str) -> None:
        """Opens the shards.

        Raises:
            InputError: there are no such shards.
        """
        self._whole = whole
        self._shards = shards
        self._reader = open_reader(shards)
        self._source: sets.Embedded | None = None

    def of(self, folder: Reopened, dim: int) -> dict[str, Any]:
        """The manifest's `recall` of one variant: both recalls at `dim`, and the share of the source's that is lost.

        `relative_loss` is the greater of those of R@1 and R@10, each the mean of both directions; below 0 where the
        variant happens to find more.
        """
        if self._source is None:
            self._source = self._embed(self._whole.model)
        wanted = sets.score(self._source, [dim], _KS)["dims"][str(dim)]
        found = sets.score(self._embed(Graphs(folder.pixels, folder.tokens)), [dim], _KS)["dims"][str(dim)]
        losses = [1 - _mean(found, f"R@{k}") / max(_mean(wanted, f"R@{k}"), 1e-12) for k in _KS]
        return {
            "set": self._shards,
            "count": len(self._source.keys),
            "source": _kept(wanted),
            "variant": _kept(found),
            "relative_loss": max(losses),
        }

    def _embed(self, model: Any) -> sets.Embedded:
        return sets.embed(self._reader, model, self._whole.image_spec, self._whole.tokenise)


def _mean(directions: dict[str, dict[str, float]], metric: str) -> float:
    return sum(scores[metric] for scores in directions.values()) / len(directions)


def _kept(directions: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {f"R@{k}": scores[f"R@{k}"] for k in _KS} for name, scores in directions.items()}


def default_variant(variants: dict[str, dict[str, Any]], order: Sequence[str]) -> str:
    """The first of `order` that may stand for fp32: half-precision weights by their cosine error, or by measured
    recall."""
    for name in order:
        one = variants[name]
        lost = one.get("recall", {}).get("relative_loss")
        if lost is None and name == "fp16":
            worst = max(one["cosine_error"][side]["worst"] for side in ("image", "text"))
            lost = 0.0 if worst <= 1e-4 else None
        if lost is not None and lost <= ALLOWED_LOSS:
            return name
    return "fp32"
