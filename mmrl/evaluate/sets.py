"""Named evaluation sets: embed each once, score it at every dim, keep the result as retrieval.json has it.

Shapes: N images, M texts, D the embedding's width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from mmrl import distributed
from mmrl.data.index import Problem
from mmrl.data.samples import FieldsConfig, SampleReader
from mmrl.data.sequential import WholeBatch, read_whole
from mmrl.errors import InputError
from mmrl.evaluate.retrieval import as_json, chance, retrieval
from mmrl.image_spec import ImageSpec
from mmrl.optim import Duration
from mmrl.settings import Settings, machine

Direction = Literal["image_to_text", "text_to_image"]


class SetConfig(Settings):
    """One evaluation set."""

    shards: str | list[str]
    captions: int | None = Field(default=None, ge=1)
    """How many captions of each sample are queries, the plain one first; all when left out."""
    fields: FieldsConfig | None = None
    """Names of a sample's parts, where they differ from the training data's."""


class BestConfig(Settings):
    """The score by which the best checkpoint is chosen: on validation data, never on test data."""

    set: str
    dim: int
    direction: Direction = "text_to_image"
    metric: str = "R@10"


class EvaluationConfig(Settings):
    """What is measured during training and at its end."""

    sets: dict[str, SetConfig] = Field(default={})
    every: Duration = machine("1 epochs")
    at_start: bool = machine(False)
    """Also before the first step: where a pretrained model stands."""
    dims: list[int] | None = None
    """Dims to score, trained or not; the nested dims when left out."""
    best: BestConfig | None = None


@dataclass(frozen=True)
class Embedded:
    """A set's embeddings, whole, on every process; not normalised."""

    keys: list[str]
    captions: list[str]
    image_ND: torch.Tensor
    text_MD: torch.Tensor
    image_of_text_M: torch.Tensor
    image_group_N: torch.Tensor
    """Equal numbers are positives of each other; a sample without a group has one of its own."""
    bad: list[Problem]

    @property
    def text_group_M(self) -> torch.Tensor:
        """The group of each text: that of its image."""
        return self.image_group_N[self.image_of_text_M]


@torch.inference_mode()
def embed(
    reader: SampleReader,
    model: Any,
    image_spec: ImageSpec,
    tokenise: Callable[[list[str]], torch.Tensor],
    *,
    captions: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Embedded:
    """Embeds a set, divided over the processes, in float32.

    Args:
        model: has encode_image and encode_text; it is used as it is, in the mode that it is in.
        on_batch: told the number of images after each batch, for a progress bar.
    """
    world = distributed.world()
    device = next(model.parameters()).device
    mine: list[tuple[WholeBatch, torch.Tensor, torch.Tensor]] = []
    bad = list(reader.problems) if world.is_main else []
    for batch in read_whole(reader, image_spec, tokenise, captions=captions, rank=world.rank, world_size=world.size):
        if not batch.keys:
            bad += batch.bad
            continue
        image_BD = model.encode_image(batch.image_BCHW.to(device)).float().cpu()
        text_MD = model.encode_text(batch.text_ML.to(device)).float().cpu()
        batch.image_BCHW, batch.text_ML = batch.image_BCHW[:0], batch.text_ML[:0]  # done with
        mine.append((batch, image_BD, text_MD))
        if on_batch:
            on_batch(len(batch.keys))
    shares = distributed.gather_objects((mine, bad))
    return _join([part for parts, _ in shares for part in parts], [problem for _, bad in shares for problem in bad])


def _join(parts: Sequence[tuple[WholeBatch, torch.Tensor, torch.Tensor]], bad: list[Problem]) -> Embedded:
    if not parts:
        raise InputError(f"shards: every sample is bad, such as {bad[0].shard} {bad[0].key}: {bad[0].reason}.")
    rows, texts_of = 0, []
    for batch, _, _ in parts:
        texts_of.append(batch.row_of_text_M + rows)
        rows += len(batch.keys)
    group_N = torch.cat([batch.group_B for batch, _, _ in parts])
    alone = group_N < 0
    group_N[alone] = -2 - torch.arange(rows)[alone]
    return Embedded(
        keys=[key for batch, _, _ in parts for key in batch.keys],
        captions=[caption for batch, _, _ in parts for caption in batch.captions],
        image_ND=torch.cat([image for _, image, _ in parts]),
        text_MD=torch.cat([text for _, _, text in parts]),
        image_of_text_M=torch.cat(texts_of),
        image_group_N=group_N,
        bad=bad + [problem for batch, _, _ in parts for problem in batch.bad],
    )


def score(embedded: Embedded, dims: Sequence[int], ks: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """One set's part of retrieval.json."""
    image_group, text_group = embedded.image_group_N, embedded.text_group_M
    by_dim = retrieval(
        embedded.image_ND, embedded.text_MD, image_group_N=image_group, text_group_M=text_group, dims=dims, ks=ks
    )
    return {
        "dims": as_json(by_dim),
        "num_images": len(embedded.keys),
        "num_texts": len(embedded.captions),
        "num_bad": len(embedded.bad),
        "chance": {
            "image_to_text": chance(image_group, text_group, ks),
            "text_to_image": chance(text_group, image_group, ks),
        },
    }


def as_retrieval_json(scores_of_set: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The first set's values, and every set again by name."""
    first = next(iter(scores_of_set.values()))
    return {**first, "sets": dict(scores_of_set)}


def write_retrieval_json(folder: Path, result: dict[str, Any]) -> None:
    """Writes FOLDER/retrieval.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".retrieval.json.partial"
    beside.write_text(json.dumps(result, indent=2) + "\n")
    beside.replace(folder / "retrieval.json")


def best_score(config: BestConfig, scores_of_set: Mapping[str, dict[str, Any]]) -> float:
    """The number that `best` names; higher is better."""
    value = scores_of_set[config.set]["dims"][str(config.dim)][config.direction][config.metric]
    return -value if config.metric == "median_rank" else value
