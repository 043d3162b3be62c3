"""Zero-shot classification at every dim: a picture's class is the one whose prompts it is nearest to.

A class's vector at a dim is the mean of its prompts' renormalised prefixes, renormalised: what the exported encoder of
that dim would give.

Shapes: N images, C classes, D the embedding's width, d one dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.data.index import Problem
from mmrl.data.sequential import PictureReader, read_whole
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.evaluate.ranking.ranks import rank_queries
from mmrl.images.image_spec import ImageSpec
from mmrl.model import towers
from mmrl.nesting import cut

Scores = dict[str, float]
_PLACE = "{c}"


@dataclass(frozen=True)
class Classes:
    """Names of classes, in the order of their numbers, and what is said of a picture of one: "a photo of a {c}."."""

    names: list[str]
    templates: list[str]

    def prompts(self, number: int) -> list[str]:
        """The texts of one class."""
        return [template.replace(_PLACE, self.names[number]) for template in self.templates]


def read_classes(names: str, templates: str | None = None) -> Classes:
    """Classes by name or from a file.

    Args:
        names: `imagenet`, or a file with a name a line.
        templates: `imagenet` (open_clip's 80), `simple` (its 7, also when left out), or a file with a template a line;
            {c} (or {}) stands for the name.

    Raises:
        InputError: no such file, an empty one, a template without a place for the name.
    """
    named = towers.imagenet_classes() if names == "imagenet" else _lines("classes", names)
    if templates in (None, "imagenet", "simple"):
        return Classes(named, towers.imagenet_templates(_PLACE, simple=templates != "imagenet"))
    lines = [line.replace("{}", _PLACE) for line in _lines("templates", templates)]
    for line in lines:
        if _PLACE not in line:
            raise InputError(f"templates: {line!r} in {templates} has no {_PLACE}, where the class's name goes.")
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
        raise InputError(f"{option}: {path} is empty; give one a line.")
    return lines


@dataclass(frozen=True)
class Labelled:
    """A set's pictures with their classes, whole, on every process; not normalised."""

    image_ND: Tensor
    label_N: Tensor
    bad: list[Problem]


@torch.inference_mode()
def embed_labelled(
    reader: PictureReader,
    model: Any,
    image_spec: ImageSpec,
    num_classes: int,
    on_batch: Callable[[int], None] | None = None,
) -> Labelled:
    """Embeds the pictures of a set whose captions are numbers of classes, divided over the processes.

    Raises:
        InputError: no sample can be used.
    """
    world = comm.world()
    device = next(model.parameters()).device
    images, labels = [], []
    bad = list(reader.problems) if world.is_rank_0 else []
    for batch in read_whole(reader, image_spec, _no_tokens, captions=1, rank=world.rank, world_size=world.size):
        bad += batch.bad
        label_B = torch.tensor([_label(caption, num_classes) for caption in batch.captions], dtype=torch.int64)
        wrong = (label_B < 0).nonzero()[:, 0].tolist()
        bad += [Problem("", batch.keys[b], f"no class from 0 to {num_classes - 1}: {batch.captions[b]}") for b in wrong]
        if len(wrong) < len(batch.keys):
            image_BD = model.encode_image(batch.image_BCHW[label_B >= 0].to(device)).float().cpu()
            images.append(image_BD)
            labels.append(label_B[label_B >= 0])
        if on_batch:
            on_batch(len(batch.keys) + len(batch.bad))
    shares = comm.all_gather_objects((images, labels, bad))
    images, labels, bad = ([one for share in shares for one in share[part]] for part in range(3))
    if not images:
        raise InputError(f"shards: every sample is bad, such as {bad[0].shard} {bad[0].key}: {bad[0].reason}.")
    return Labelled(torch.cat(images), torch.cat(labels), bad)


def _no_tokens(texts: list[str]) -> Tensor:
    return torch.zeros(len(texts), 0, dtype=torch.int64)


def _label(text: str, num_classes: int) -> int:
    """The class, or -1 where the text is none."""
    return int(text) if text.isdecimal() and int(text) < num_classes else -1


@torch.inference_mode()
def class_vectors(
    classes: Classes, model: Any, tokenise: Callable[[list[str]], Tensor], dims: Sequence[int]
) -> dict[int, Tensor]:
    """The vectors of all classes at each dim, (C, d); the classes are divided over the processes."""
    world = comm.world()
    device = next(model.parameters()).device
    count = len(classes.names)
    first, last = (count * r // world.size for r in (world.rank, world.rank + 1))
    mine: dict[int, list[Tensor]] = {dim: [] for dim in dims}
    for number in range(first, last):
        prompt_TD = model.encode_text(tokenise(classes.prompts(number)).to(device)).float().cpu()
        for dim in dims:
            mine[dim].append(cut(cut(prompt_TD, dim).mean(0), dim))
    shares = comm.all_gather_objects(mine)
    return {dim: torch.stack([row for share in shares for row in share[dim]]) for dim in dims}


def score_labelled(labelled: Labelled, vectors: dict[int, Tensor], over_ranks: bool = False) -> dict[str, Any]:
    """One set's part of retrieval.json: {"dims": {"512": {"classification": {"top1": …}}}, …}, shares in 0..1.

    The true class's place is 1 + the number of other classes that score as high or higher. `mean_per_class` is top1
    averaged over the classes that the set has.
    """
    label_N, result = labelled.label_N, {}
    for dim in sorted(vectors, reverse=True):
        numbers = torch.arange(len(vectors[dim]))
        ranks = rank_queries(labelled.image_ND[:, :dim], vectors[dim], label_N, numbers, [dim], over_ranks=over_ranks)
        rank_N = ranks[dim].rank_Q
        hits_C = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, label_N, (rank_N <= 1).double())
        of_C = label_N.bincount(minlength=len(numbers))
        result[str(dim)] = {
            "classification": {
                "top1": float((rank_N <= 1).double().mean()),
                "top5": float((rank_N <= 5).double().mean()),
                "mean_per_class": float((hits_C / of_C)[of_C > 0].mean()),
            }
        }
    count = len(next(iter(vectors.values())))
    return {
        "dims": result,
        "num_images": len(label_N),
        "num_classes": count,
        "num_bad": len(labelled.bad),
        "chance": {"classification": {"top1": 1 / count, "top5": min(5 / count, 1.0), "mean_per_class": 1 / count}},
    }
