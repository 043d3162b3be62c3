"""Zero-shot classification at every dim: an image gets the class with the most similar text embedding.

The text embedding of a class at a dim is the renormalised mean of the renormalised prefixes of its prompts, so it
equals that of the encoder exported at this dim.

Shapes: N images, C classes, T prompts of a class, D the embedding's width, d one dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.data.index import Problem
from mmrl.data.sequential import ImageReader
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.evaluate import sets
from mmrl.evaluate.directions import CLASSIFICATION
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.inference.evaluated import EvaluatedEncoder
from mmrl.model import towers
from mmrl.model.bundle import Bundle
from mmrl.nesting import truncate

ACCURACIES = ("top1", "top5", "mean_per_class")
"""The metrics of a classification set."""
_PLACEHOLDER = "{c}"


@dataclass(frozen=True)
class Classes:
    """Class names, in the order of their indices, and prompt templates such as "a photo of a {c}."."""

    names: list[str]
    templates: list[str]

    def prompts(self, index: int) -> list[str]:
        return [template.replace(_PLACEHOLDER, self.names[index]) for template in self.templates]


def read_classes(names: str, templates: str | None = None) -> Classes:
    """Reads class names and prompt templates.

    Args:
        names: `imagenet`, or a file with one class name per line.
        templates: `imagenet` (open_clip's 80), `simple` (its 7; the default), or a file with one template per line, in
            which {c} (or {}) is replaced by the class name.

    Raises:
        InputError: a file that does not exist or is empty, a template without {c}.
    """
    named = towers.imagenet_classes() if names == "imagenet" else _lines("classes", names)
    if templates in (None, "imagenet", "simple"):
        return Classes(named, towers.imagenet_templates(_PLACEHOLDER, simple=templates != "imagenet"))
    lines = [line.replace("{}", _PLACEHOLDER) for line in _lines("templates", templates)]
    for line in lines:
        if _PLACEHOLDER not in line:
            raise InputError(f"templates: {line!r} in {templates} has no {_PLACEHOLDER} for the class name.")
    return Classes(named, lines)


def _lines(option: str, path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except OSError:
        raise InputError(f"{option}: the file {path} cannot be read.") from None
    except UnicodeDecodeError:
        raise InputError(f"{option}: {path} is not UTF-8 text.") from None
    lines = [line for line in lines if line]
    if not lines:
        raise InputError(f"{option}: {path} is empty; write one entry per line.")
    return lines


def score_zero_shot(
    reader: ImageReader,
    classes: Classes,
    encoder: Bundle | EvaluatedEncoder,
    dims: Sequence[int],
    on_batch: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], list[Problem]]:
    """Embeds and scores a set whose captions are class indices: its entry in retrieval.json and its bad samples.

    Collective: the work is divided over the processes. `on_batch` is that of `sets.embed`.

    Raises:
        InputError: every sample is bad.
    """
    num_classes = len(classes.names)
    embedded = sets.embed(reader, encoder, captions=1, texts=False, on_batch=on_batch)
    label_N = torch.tensor([class_index(caption, num_classes) for caption in embedded.captions])
    labelled_N = label_N >= 0
    bad = embedded.bad + [
        Problem("", embedded.keys[n], f"no class from 0 to {num_classes - 1}: {embedded.captions[n]}")
        for n in (~labelled_N).nonzero()[:, 0].tolist()
    ]
    if not labelled_N.any():
        raise InputError(f"shards: every sample is bad, such as {bad[0].shard} {bad[0].key}: {bad[0].reason}.")
    embeddings = class_embeddings(classes, encoder, dims)
    scores = score_classification(embedded.image_ND[labelled_N], label_N[labelled_N], embeddings, over_ranks=True)
    return {**scores, "num_bad": len(bad)}, bad


def class_index(text: str, num_classes: int) -> int:
    """The class index that a text states, or -1 if it states none below `num_classes`."""
    # A number of thousands of digits is more than `int` reads.
    return int(text) if text.isdecimal() and len(text) < 20 and int(text) < num_classes else -1


@torch.inference_mode()
def class_embeddings(classes: Classes, encoder: Bundle | EvaluatedEncoder, dims: Sequence[int]) -> dict[int, Tensor]:
    """{dim: the text embedding of each class, (C, d)}. The classes are divided over the processes."""
    world, model = comm.world(), encoder.model
    device = next(model.parameters()).device
    count = len(classes.names)
    first, last = (count * r // world.size for r in (world.rank, world.rank + 1))
    local: dict[int, list[Tensor]] = {dim: [] for dim in dims}
    for index in range(first, last):
        prompt_TD = model.encode_text(encoder.tokenise(classes.prompts(index)).to(device)).float().cpu()
        for dim in dims:
            local[dim].append(truncate(truncate(prompt_TD, dim).mean(0), dim))
    gathered = comm.all_gather_objects(local)
    return {dim: torch.stack([row for of_rank in gathered for row in of_rank[dim]]) for dim in dims}


def score_classification(
    image_ND: Tensor, label_N: Tensor, class_Cd_of_dim: dict[int, Tensor], over_ranks: bool = False
) -> dict[str, Any]:
    """One set's entry in retrieval.json: {"dims": {"512": {"classification": {"top1": …}}}, …}, shares in 0..1.

    The images need not be normalised. The rank of the true class is 1 + the number of other classes that score at least
    as high. `mean_per_class` is top1 averaged over the classes that occur in the set.
    """
    result = {}
    for dim in sorted(class_Cd_of_dim, reverse=True):
        class_Cd = class_Cd_of_dim[dim]
        index_C = torch.arange(len(class_Cd))
        ranks = rank_queries(image_ND[:, :dim], class_Cd, label_N, index_C, [dim], over_ranks=over_ranks)
        rank_N = ranks[dim].rank_Q
        hits_C = torch.zeros(len(index_C), dtype=torch.float64).index_add_(0, label_N, (rank_N <= 1).double())
        images_C = label_N.bincount(minlength=len(index_C))
        result[str(dim)] = {
            CLASSIFICATION: {
                "top1": float((rank_N <= 1).double().mean()),
                "top5": float((rank_N <= 5).double().mean()),
                "mean_per_class": float((hits_C / images_C)[images_C > 0].mean()),
            }
        }
    count = len(next(iter(class_Cd_of_dim.values())))
    return {
        "dims": result,
        "num_images": len(label_N),
        "num_classes": count,
        "chance": {CLASSIFICATION: {"top1": 1 / count, "top5": min(5 / count, 1.0), "mean_per_class": 1 / count}},
    }
