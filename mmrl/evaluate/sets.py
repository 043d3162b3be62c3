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

from mmrl.data.index import Problem
from mmrl.data.samples import FieldsConfig
from mmrl.data.sequential import PictureReader, WholeBatch, read_whole
from mmrl.distributed import comm
from mmrl.durations import Duration
from mmrl.errors import InputError
from mmrl.evaluate.ranking.ranks import KS, OnRows, PerQuery, is_better_lower, rank_both, rank_queries
from mmrl.evaluate.ranking.retrieval import as_json, chance, check_ks, checked, fold_rows, mean_of, of_directions
from mmrl.images.image_spec import ImageSpec
from mmrl.inference.evaluated import Tokenise
from mmrl.settings import Settings, machine

CROSS = ("image_to_text", "text_to_image")
SAME = ("image_to_image", "text_to_text")
DIRECTIONS = CROSS + SAME


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
    direction: Literal["image_to_text", "text_to_image"] = "text_to_image"
    metric: str = "R@10"


class EvaluationConfig(Settings):
    """What is measured during training and at its end."""

    sets: dict[str, SetConfig] = Field(default={})
    every: Duration = machine("1 epochs")
    at_start: bool = machine(False)
    """Also before the first step: where a pretrained model stands."""
    dims: list[int] | None = None
    """Dims to score, trained or not; the nested dims when left out."""
    most_samples: int | None = Field(default=20_000, ge=1)
    """Of a larger set, shards drawn at random (the same each time) until they hold so many; all of it when null."""
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
    numbers: list[int]
    """Which samples of the set the N images are."""

    @property
    def text_group_M(self) -> torch.Tensor:
        """The group of each text: that of its image."""
        return self.image_group_N[self.image_of_text_M]


@torch.inference_mode()
def embed(
    reader: PictureReader,
    model: Any,
    image_spec: ImageSpec,
    tokenise: Tokenise,
    *,
    captions: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Embedded:
    """Embeds a set, divided over the processes, in float32.

    Args:
        model: has encode_image and encode_text; it is used as it is, in the mode that it is in.
        on_batch: told the number of images after each batch, for a progress bar.
    """
    world = comm.world()
    device = next(model.parameters()).device
    mine: list[tuple[WholeBatch, torch.Tensor, torch.Tensor]] = []
    bad = list(reader.problems) if world.is_rank_0 else []
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
    shares = comm.all_gather_objects((mine, bad))
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
        numbers=[number for batch, _, _ in parts for number in batch.numbers],
    )


def score(
    embedded: Embedded,
    dims: Sequence[int],
    ks: Sequence[int] = KS,
    directions: Sequence[str] = CROSS,
    folds: int = 1,
    on_rows: OnRows | None = None,
    over_ranks: bool = False,
) -> dict[str, Any]:
    """One set's part of retrieval.json. `folds`, `on_rows` and `over_ranks` are as `retrieval` has them.

    Args:
        directions: those that the set has no right answers in are left out: image_to_image wants two pictures of one
            group, text_to_text two captions.

    Raises:
        InputError: a NaN or nothing to retrieve; folds that do not fit.
    """
    check_ks(ks)
    checked("images", embedded.image_ND)
    checked("texts", embedded.text_MD)
    parts = [
        _Part.of(embedded, images, texts)
        for images, texts in fold_rows(embedded.image_group_N, embedded.text_group_M, folds)
    ]
    present = [way for way in directions if all(part.has(way) for part in parts)]
    if not present:
        raise InputError(f"directions: the set has no right answers in {', '.join(directions)}.")
    scores = [of_directions(part.ranks(dims, present, on_rows, over_ranks), ks) for part in parts]
    chances = [{way: chance(*part.groups(way), ks, way in SAME) for way in present} for part in parts]
    return {
        "dims": as_json(mean_of(scores)),
        "num_images": len(embedded.keys),
        "num_texts": len(embedded.captions),
        "num_bad": len(embedded.bad),
        "chance": mean_of([{0: one} for one in chances])[0],
        **({"folds": folds} if folds > 1 else {}),
    }


def num_rows(embedded: Embedded, directions: Sequence[str]) -> int:
    """What `score` tells `on_rows` in all, at most."""
    rows = {"image": len(embedded.image_ND), "text": len(embedded.text_MD)}
    return sum(rows[way.partition("_")[0]] for way in directions)


@dataclass(frozen=True)
class _Part:
    """What is ranked together: a set, or a fold of it."""

    image_ND: torch.Tensor
    text_MD: torch.Tensor
    image_group_N: torch.Tensor
    text_group_M: torch.Tensor
    distinct_M: torch.Tensor
    """False for a text that repeats another of its group word for word, which would be its own right answer."""

    @classmethod
    def of(cls, embedded: Embedded, images: slice | torch.Tensor, texts: slice | torch.Tensor) -> "_Part":
        """The part that holds those images and texts."""
        text_group_M = embedded.text_group_M[texts]
        numbers = torch.arange(len(embedded.captions))[texts].tolist()
        seen: set[tuple[int, str]] = set()
        distinct = []
        for group, number in zip(text_group_M.tolist(), numbers, strict=True):
            said = (group, embedded.captions[number])
            distinct.append(said not in seen)
            seen.add(said)
        return cls(
            embedded.image_ND[images],
            embedded.text_MD[texts],
            embedded.image_group_N[images],
            text_group_M,
            torch.tensor(distinct),
        )

    def groups(self, way: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The groups of a direction's queries and of its gallery."""
        of = {
            "image": self.image_group_N,
            "text": self.text_group_M[self.distinct_M] if way == "text_to_text" else self.text_group_M,
        }
        query, _, gallery = way.split("_")
        return of[query], of[gallery]

    def has(self, way: str) -> bool:
        """Whether any query has a right answer."""
        query, gallery = self.groups(way)
        if way in SAME:
            return len(query.unique()) < len(query)
        return bool(torch.isin(query, gallery).any())

    def ranks(
        self, dims: Sequence[int], ways: Sequence[str], on_rows: OnRows | None, over_ranks: bool
    ) -> dict[str, dict[int, PerQuery]]:
        """The ranks of each direction's queries."""
        image, text = self.image_ND, self.text_MD
        image_group, text_group = self.image_group_N, self.text_group_M
        result: dict[str, dict[int, PerQuery]] = {}
        if set(CROSS) <= set(ways):
            both = rank_both(image, text, image_group, text_group, dims, on_rows=on_rows, over_ranks=over_ranks)
            result = dict(zip(CROSS, both, strict=True))
        vectors = {"image": image, "text": text}
        for way in ways:
            if way not in result:
                query, _, gallery = way.split("_")
                x, y = vectors[query], vectors[gallery]
                if way == "text_to_text":
                    x = y = text[self.distinct_M]
                result[way] = rank_queries(
                    x, y, *self.groups(way), dims, same_rows=way in SAME, on_rows=on_rows, over_ranks=over_ranks
                )
        return {way: result[way] for way in ways}


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
    return -value if is_better_lower(config.metric) else value
