"""Named evaluation sets: their config, embedding, scores at every dim, and retrieval.json.

Shapes: N images, M texts, D the embedding's width.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from mmrl.data.captions import caption_key
from mmrl.data.index import Problem
from mmrl.data.samples import FieldsConfig
from mmrl.data.sequential import BATCH_SIZE, ImageReader, SequentialBatch, read_sequential
from mmrl.data.workers import LoaderMemory
from mmrl.distributed import comm
from mmrl.durations import Duration
from mmrl.errors import InputError
from mmrl.evaluate.directions import (
    CLASSIFICATION,
    CROSS_MODAL,
    SAME_MODAL,
    is_classification,
    main_directions,
    modalities,
    of_towers,
)
from mmrl.evaluate.ranking.ranks import KS, OnRows, PerQuery, is_better_lower, rank_both, rank_queries
from mmrl.evaluate.ranking.retrieval import (
    chance,
    check_embeddings,
    check_ks,
    fill_missing_groups,
    fold_rows,
    mean_over_folds,
    scores_by_dim,
)
from mmrl.images.image_spec import ImageSpec
from mmrl.inference.evaluated import EvaluatedEncoder
from mmrl.model.bundle import Bundle
from mmrl.output.files import write_atomic
from mmrl.settings import Settings, machine_field

# Of the host's memory, at most: the workers of the training stream are there at the same time, with up to a half.
DECODING_SHARE = 0.25


class SetConfig(Settings):
    """One evaluation set."""

    shards: str | list[str]
    """The set's shards, in any form that data.train takes."""
    captions: int | None = Field(default=None, ge=1)
    """Captions per sample used as queries, the plain one first (default: all)."""
    classes: str | None = None
    """Makes this a zero-shot classification set: a file with one class name per line, or imagenet. The index of a
    sample's class is in KEY.cls."""
    templates: str | None = None
    """Prompts of the classes: imagenet (80), simple (7, the default), or a file with one template per line, with {c}
    for the class name."""
    fields: FieldsConfig | None = None
    """Names of the fields of a sample (default: those of the training data). With classes, only `image` is used."""


class BestConfig(Settings):
    """The validation score that selects the best checkpoint. Do not use test data for it."""

    set: str
    """Name of an evaluation set."""
    dim: int
    """One of the evaluated dims."""
    direction: Literal["image_to_text", "text_to_image", "image_to_image", "text_to_text"] = "text_to_image"
    """Direction of the retrieval; without effect for a classification set."""
    metric: str = "R@10"
    """A retrieval metric, e.g. R@10 or mAP; for a classification set top1, top5 or mean_per_class."""


class EvaluationConfig(Settings):
    """Evaluation during training and at its end."""

    sets: dict[str, SetConfig] = Field(default={})
    """Evaluation sets by name (default: none)."""
    every: Duration = machine_field("1 epochs")
    """Interval between evaluations. The last step is always evaluated."""
    at_start: bool = machine_field(False)
    """Also evaluate before the first step, e.g. to score a pretrained model."""
    dims: list[int] | None = None
    """Dims to score, trained or not (default: the nested dims)."""
    most_samples: int | None = Field(default=20_000, ge=1)
    """A larger set is subsampled: random whole shards, always the same, until they hold this many samples. null: use
    the whole set."""
    best: BestConfig | None = None
    """The score that selects the best checkpoint (default: no best checkpoint is kept)."""
    patience: int | None = machine_field(None, ge=1)
    """Stop after this many evaluations in a row without a better evaluation.best (default: never)."""


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a whole set, not normalised, on every process."""

    keys: list[str]
    captions: list[str]
    image_ND: torch.Tensor
    text_MD: torch.Tensor
    image_of_text_M: torch.Tensor
    image_group_N: torch.Tensor
    """Images of equal group are positives of each other; a sample without a group gets one that no other has."""
    bad: list[Problem]
    sample_indices: list[int]
    """The reader's index of each image."""
    second: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """"image" and "text" -> the second images or texts (S, D), such as the answers to questions, and the rows (S,) of
    their samples. They are the gallery of image_to_image or text_to_text."""
    second_texts: list[str] = field(default_factory=list)
    """Those of `second`; empty if they are not known, as of embeddings that come without."""

    @property
    def sides(self) -> tuple[str, ...]:
        """What is embedded."""
        return tuple(side for side, x in (("image", self.image_ND), ("text", self.text_MD)) if x.shape[1])

    @property
    def text_group_M(self) -> torch.Tensor:
        """The group of each text: that of its image."""
        return self.image_group_N[self.image_of_text_M]


@torch.inference_mode()
def embed(
    reader: ImageReader,
    encoder: Bundle | EvaluatedEncoder,
    *,
    captions: int | None = None,
    texts: bool = True,
    directions: Sequence[str] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Embedded:
    """Embeds a set in float32, by the towers that the encoder has; the samples are divided over the processes.

    Args:
        encoder: the mode of its model (train or eval) is not changed.
        captions: captions per sample at most, the plain one first; None uses all.
        texts: False embeds the images only; `text_MD` then has no columns, as has that of an absent tower.
        directions: those that are to be scored, as in `score`: only image_to_image and text_to_text need the second
            members.
        on_batch: called with the number of samples after each batch, for a progress bar.

    Raises:
        InputError: every sample is bad.
    """
    world, model = comm.world(), encoder.model
    device = next(model.parameters()).device
    sides = [side for side in model.sides if texts or side == "image"]
    directions = main_directions(of_towers(model.sides)) if directions is None else directions
    second = [side for side in sides if f"{side}_to_{side}" in directions]
    local: list[tuple[SequentialBatch, torch.Tensor, torch.Tensor]] = []
    bad = list(reader.problems) if world.is_rank_0 else []
    batches = read_sequential(
        reader,
        encoder.image_spec if "image" in sides else None,
        encoder.tokenise if "text" in sides else _no_tokens,
        captions=captions,
        rank=world.rank,
        world_size=world.size,
        workers=decoding_workers(device, encoder.image_spec, 1 + ("image" in second)),
        second=second,
    )
    encode: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "image": lambda x: model.encode_image(x.to(device)).float().cpu(),
        "text": lambda x: model.encode_text(x.to(device)).float().cpu(),
    }
    for batch in batches:
        bad += batch.bad
        if on_batch:
            on_batch(len(batch.keys) + len(batch.bad))
        if not batch.keys:
            continue
        image_BD = encode["image"](batch.image_BCHW) if "image" in sides else batch.image_BCHW
        text_MD = encode["text"](batch.text_ML) if "text" in sides else batch.text_ML.float()
        batch.second = {side: (encode[side](x), row_S) for side, (x, row_S) in batch.second.items()}
        batch.image_BCHW = batch.text_ML = torch.zeros(0)  # frees the memory, which a slice would keep
        local.append((batch, image_BD, text_MD))
    gathered = comm.all_gather_objects((local, bad))
    return _concatenate(
        [batch for batches, _ in gathered for batch in batches], [problem for _, bad in gathered for problem in bad]
    )


def decoding_workers(device: torch.device, spec: ImageSpec, images: int = 1) -> int:
    """Processes that read and decode this number of images per sample while a GPU embeds; a CPU that embeds has no core
    to spare. Collective."""
    if device.type != "cuda":
        return 0
    memory = decoding_memory(images * 3 * spec.height * spec.width, comm.all_hosts().count(comm.host()))
    return memory.default_workers(DECODING_SHARE)


def decoding_memory(sample_bytes: int, processes: int) -> LoaderMemory:
    """The memory of these workers, for this number of processes of a host."""
    return LoaderMemory(sample_bytes, BATCH_SIZE, BATCH_SIZE, processes)


def _no_tokens(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 0, dtype=torch.int64)


def _concatenate(batches: Sequence[tuple[SequentialBatch, torch.Tensor, torch.Tensor]], bad: list[Problem]) -> Embedded:
    if not batches:
        raise InputError(f"shards: every sample is bad, such as {bad[0].shard} {bad[0].key}: {bad[0].reason}.")
    rows, image_of_text = 0, []
    seconds: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for batch, _, _ in batches:
        image_of_text.append(batch.row_of_text_M + rows)
        for side, (x_SD, row_S) in batch.second.items():
            seconds[side][0].append(x_SD)
            seconds[side][1].append(row_S + rows)
        rows += len(batch.keys)
    return Embedded(
        keys=[key for batch, _, _ in batches for key in batch.keys],
        captions=[caption for batch, _, _ in batches for caption in batch.captions],
        image_ND=torch.cat([image_BD for _, image_BD, _ in batches]),
        text_MD=torch.cat([text_MD for _, _, text_MD in batches]),
        image_of_text_M=torch.cat(image_of_text),
        image_group_N=fill_missing_groups(torch.cat([batch.group_B for batch, _, _ in batches])),
        bad=bad,
        sample_indices=[index for batch, _, _ in batches for index in batch.indices],
        second={side: (torch.cat(x), torch.cat(row)) for side, (x, row) in seconds.items()},
        second_texts=[text for batch, _, _ in batches for text in batch.second_texts],
    )


def score(
    embedded: Embedded,
    dims: Sequence[int],
    ks: Sequence[int] = KS,
    directions: Sequence[str] | None = None,
    folds: int = 1,
    on_rows: OnRows | None = None,
    over_ranks: bool = False,
) -> dict[str, Any]:
    """One set's entry in retrieval.json. `folds`, `on_rows` and `over_ranks` are those of `retrieval`.

    Args:
        directions: those of absent towers and those without positives in this set are left out: image_to_image needs
            two images of one group or second images, text_to_text two captions or second texts. Default: the main ones.

    Raises:
        InputError: embeddings that are not finite, no direction with positives, folds that do not divide the images.
    """
    check_ks(ks)
    for side in embedded.sides:
        check_embeddings(f"{side}s", embedded.image_ND if side == "image" else embedded.text_MD)
    allowed = of_towers(embedded.sides)
    directions = [one for one in (main_directions(allowed) if directions is None else directions) if one in allowed]
    fold_list = [
        _Fold.of(embedded, images, texts, ks)
        for images, texts in fold_rows(embedded.image_group_N, embedded.text_group_M, folds)
    ]
    present = [direction for direction in directions if all(fold.has_positives(direction) for fold in fold_list)]
    if not present:
        raise InputError(f"directions: this set has no positives in {', '.join(directions or allowed)}.")
    limits = [
        {0: {way: one for way, one in fold.ceiling.items() if way in {*present, *CROSS_MODAL}}} for fold in fold_list
    ]
    ranked = [fold.ranks(dims, present, on_rows, over_ranks) for fold in fold_list]
    scores = [scores_by_dim(one, ks) for one in ranked]
    chances = [
        {direction: chance(*fold.groups(direction), ks, fold.is_among_itself(direction)) for direction in present}
        for fold in fold_list
    ]
    return {
        "dims": {str(dim): by_direction for dim, by_direction in mean_over_folds(scores).items()},
        "num_images": len(embedded.keys),
        "num_texts": len(embedded.captions),
        "num_bad": len(embedded.bad),
        "num_queries": {way: sum(len(one[way][dims[0]].query_Q) for one in ranked) for way in present},
        "chance": mean_over_folds([{0: one} for one in chances])[0],
        **({"ceiling": mean_over_folds(limits)[0]} if limits[0][0] else {}),
        **({"folds": folds} if folds > 1 else {}),
    }


def recall_ceiling(
    captions: Sequence[str], text_group_M: torch.Tensor, image_group_N: torch.Tensor, ks: Sequence[int]
) -> dict[str, dict[str, float]]:
    """The recall of a perfect model: {direction: {"R@1": share}}. Below 1 if groups share captions, word for word.

    The texts of a caption have one embedding. As queries, those of at most K groups can find an own image among the
    first K. In the gallery, those of other groups tie with those of an image's own group, and ties count against it; so
    an image needs a caption that fewer than K texts of other groups repeat.
    """
    groups_of: dict[str, Counter[int]] = defaultdict(Counter)
    for caption, group in zip(captions, text_group_M.tolist(), strict=True):
        groups_of[caption][group] += 1
    ties_of: dict[int, int] = {}
    for groups in groups_of.values():
        for group, count in groups.items():
            ties = groups.total() - count
            ties_of[group] = min(ties, ties_of.get(group, ties))
    ties_N = [ties_of.get(group, len(captions)) for group in image_group_N.tolist()]
    found: dict[str, dict[str, float]] = {"image_to_text": {}, "text_to_image": {}}
    for k in ks:
        texts = sum(count for groups in groups_of.values() for _, count in groups.most_common(k))
        found["image_to_text"][f"R@{k}"] = sum(ties < k for ties in ties_N) / len(ties_N)
        found["text_to_image"][f"R@{k}"] = texts / len(captions)
    return found


def num_rows(embedded: Embedded, directions: Sequence[str]) -> int:
    """The greatest total that `score` passes to `on_rows`."""
    rows = {"image": len(embedded.image_ND), "text": len(embedded.text_MD)}
    return sum(rows[modalities(direction)[0]] for direction in directions)


@dataclass(frozen=True)
class _Fold:
    """Images and texts that are ranked together: the whole set, or one fold of it."""

    image_ND: torch.Tensor
    text_MD: torch.Tensor
    image_group_N: torch.Tensor
    text_group_M: torch.Tensor
    distinct_M: torch.Tensor
    """False for a text that repeats another of its group, but for case and spaces: it would be a trivial positive."""
    second: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """"image" and "text" -> second members (S, D) and their groups (S,)."""
    ceiling: dict[str, dict[str, float]]
    """See `recall_ceiling`; of text_to_text with second texts alone, which captions of other groups may repeat."""

    @classmethod
    def of(
        cls, embedded: Embedded, images: slice | torch.Tensor, texts: slice | torch.Tensor, ks: Sequence[int]
    ) -> "_Fold":
        image_group_N, text_group_M = embedded.image_group_N[images], embedded.text_group_M[texts]
        captions = [embedded.captions[row] for row in torch.arange(len(embedded.captions))[texts].tolist()]
        keys = [*zip(text_group_M.tolist(), map(caption_key, captions), strict=True)]
        first_of = {key: row for row, key in reversed([*enumerate(keys)])}
        is_in_fold_N = torch.zeros(len(embedded.keys), dtype=torch.bool)
        is_in_fold_N[images] = True
        second = {
            side: (x_SD[is_in_fold_N[row_S]], embedded.image_group_N[row_S[is_in_fold_N[row_S]]])
            for side, (x_SD, row_S) in embedded.second.items()
        }
        ceiling = {} if len(embedded.sides) < 2 else recall_ceiling(captions, text_group_M, image_group_N, ks)
        if embedded.second_texts:
            is_in_fold_S = is_in_fold_N[embedded.second["text"][1]].tolist()
            second_texts = [text for text, is_in in zip(embedded.second_texts, is_in_fold_S, strict=True) if is_in]
            group_S = second["text"][1]
            query_group_Q = text_group_M[torch.isin(text_group_M, group_S)]
            if len(query_group_Q):
                ceiling["text_to_text"] = recall_ceiling(second_texts, group_S, query_group_Q, ks)["image_to_text"]
        return cls(
            embedded.image_ND[images],
            embedded.text_MD[texts],
            image_group_N,
            text_group_M,
            torch.tensor([first_of[key] == row for row, key in enumerate(keys)], dtype=torch.bool),
            second,
            ceiling,
        )

    def compared(self, direction: str) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """The embeddings and groups of the queries, and those of the gallery."""
        sides = {"image": (self.image_ND, self.image_group_N), "text": (self.text_MD, self.text_group_M)}
        query, gallery = modalities(direction)
        if direction not in SAME_MODAL:
            return sides[query], sides[gallery]
        if query in self.second:
            return sides[query], self.second[query]
        x, groups = sides[query]
        if query == "text":
            x, groups = x[self.distinct_M], groups[self.distinct_M]
        return (x, groups), (x, groups)

    def is_among_itself(self, direction: str) -> bool:
        """Whether the queries are the gallery."""
        return direction in SAME_MODAL and modalities(direction)[0] not in self.second

    def groups(self, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
        (_, query), (_, gallery) = self.compared(direction)
        return query, gallery

    def has_positives(self, direction: str) -> bool:
        query, gallery = self.groups(direction)
        if self.is_among_itself(direction):
            return len(query.unique()) < len(query)
        return bool(torch.isin(query, gallery).any())

    def ranks(
        self, dims: Sequence[int], directions: Sequence[str], on_rows: OnRows | None, over_ranks: bool
    ) -> dict[str, dict[int, PerQuery]]:
        """{direction: {dim: metrics of each query}}."""
        how: Any = {"on_rows": on_rows, "over_ranks": over_ranks}
        result: dict[str, dict[int, PerQuery]] = {}
        if set(CROSS_MODAL) <= set(directions):
            both = rank_both(self.image_ND, self.text_MD, self.image_group_N, self.text_group_M, dims, **how)
            result = dict(zip(CROSS_MODAL, both, strict=True))
        for direction in directions:
            if direction not in result:
                (x, x_groups), (y, y_groups) = self.compared(direction)
                same_rows = self.is_among_itself(direction)
                result[direction] = rank_queries(x, y, x_groups, y_groups, dims, same_rows=same_rows, **how)
        return {direction: result[direction] for direction in directions}


def as_retrieval_json(scores_of_set: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of retrieval.json: the first retrieval set's entry at the top level (or the first set's, if all are
    for classification), and every set's entry under "sets"."""
    entries = list(scores_of_set.values())
    first = next((entry for entry in entries if not is_classification(entry)), entries[0])
    return {**first, "sets": dict(scores_of_set)}


def write_retrieval_json(folder: Path, result: dict[str, Any]) -> None:
    """Writes FOLDER/retrieval.json atomically."""
    write_atomic(folder / "retrieval.json", json.dumps(result, indent=2) + "\n")


def best_score(config: BestConfig, scores_of_set: Mapping[str, dict[str, Any]]) -> float:
    """The value of the score that `evaluation.best` names, negated if lower is better."""
    result = scores_of_set[config.set]
    direction = CLASSIFICATION if is_classification(result) else config.direction
    value = result["dims"][str(config.dim)][direction][config.metric]
    return -value if is_better_lower(config.metric) else value
