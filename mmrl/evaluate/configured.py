"""The evaluation sets of a run's config: checked, opened, and scored during training."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmrl.data.captions import caption_key
from mmrl.data.groups import NO_GROUP
from mmrl.data.parsing import BOTH, IMAGE
from mmrl.data.samples import BadSample, FieldsConfig, SampleReader
from mmrl.data.sources import DataConfig, open_reader
from mmrl.errors import InputError, did_you_mean
from mmrl.evaluate import sets
from mmrl.evaluate.directions import main_directions, of_towers
from mmrl.evaluate.ranking.ranks import metric_names
from mmrl.evaluate.readers import LABEL, check_labels, draw_shards
from mmrl.evaluate.result_sheets import result_sheets
from mmrl.evaluate.sets import EvaluationConfig, SetConfig
from mmrl.evaluate.zeroshot import ACCURACIES, Classes, read_classes, score_zero_shot
from mmrl.model.bundle import Bundle


@dataclass(frozen=True)
class ConfiguredSet:
    """An evaluation set of a config, ready to be scored."""

    name: str
    reader: SampleReader
    samples: int
    """Samples of the whole set; `reader` may hold a random part of them (evaluation.most_samples)."""
    captions: int | None = None
    """Captions per sample at most."""
    classes: Classes | None = None

    def score(
        self, encoder: Bundle, dims: Sequence[int], pictures: dict[str, Image.Image] | None = None
    ) -> dict[str, Any]:
        """The set's entry in retrieval.json. Collective: the work is divided over the processes. `pictures` receives
        those of some queries' first results, by SET/QUERY."""
        if self.classes is None:
            embedded = sets.embed(self.reader, encoder, captions=self.captions)
            result = sets.score(embedded, dims, over_ranks=True)
            if pictures is not None and len(embedded.sides) == 2:
                pictures.update(result_sheets(self.name, embedded, self.reader, max(dims)))
        else:
            result, _ = score_zero_shot(self.reader, self.classes, encoder, dims)
        if len(self.reader) < self.samples:
            result["drawn"] = {"samples": len(self.reader), "of": self.samples}
        return result


def check_best(config: EvaluationConfig, dims: Sequence[int], sides: Collection[str] = BOTH) -> None:
    """Raises InputError unless evaluation.best names a score that is measured, and is given where it is needed.

    Args:
        dims: the evaluated dims.
        sides: the towers of the model.
    """
    best = config.best
    if best is None:
        if config.patience is not None:
            raise InputError(
                "evaluation.patience: needs evaluation.best, the score that must improve; set it or remove patience."
            )
        return
    if best.set not in config.sets:
        raise InputError(
            f"evaluation.best.set: there is no evaluation set {best.set!r}.{did_you_mean(best.set, config.sets)}"
        )
    if best.dim not in dims:
        raise InputError(f"evaluation.best.dim: {best.dim} is not evaluated; evaluated are {list(dims)}.")
    measured = main_directions(of_towers(sides))
    if config.sets[best.set].classes is None and best.direction not in measured:
        raise InputError(
            f"evaluation.best.direction: {best.direction} is not measured during training; set it to "
            f"{' or '.join(measured)}."
        )
    allowed = metric_names() if config.sets[best.set].classes is None else ACCURACIES
    if best.metric not in allowed:
        raise InputError(
            f"evaluation.best.metric: {best.metric!r} is not measured; allowed: {', '.join(allowed)} (of the set "
            f"{best.set!r})."
        )


def open_configured(
    config: EvaluationConfig, data: DataConfig, sides: Collection[str] = BOTH
) -> dict[str, ConfiguredSet]:
    """Opens the evaluation sets of a config, by name.

    Args:
        data: the training data's config; its fields are the default of the sets'.
        sides: the towers of the model.

    Raises:
        InputError: as `open_reader` and `read_classes`; keys that exclude each other; labels that are no classes; a
            set for one tower without any positives.
    """
    return {name: _open(name, one, config.most_samples, data, sides) for name, one in config.sets.items()}


def _open(name: str, config: SetConfig, most: int | None, data: DataConfig, sides: Collection[str]) -> ConfiguredSet:
    if config.classes is not None and len(sides) < 2:
        raise InputError(
            f"evaluation.sets.{name}.classes: zero-shot classification compares images with texts, and the model has "
            "one tower (model.towers); remove the set."
        )
    classes, fields = _classes(name, config), config.fields or data.fields
    if classes is not None:
        fields = FieldsConfig(image=fields.image, text=LABEL)
    whole = open_reader(config.shards, fields, data.remote, data.allow_pipe, sides)
    reader = draw_shards(whole, most)
    if classes is not None:
        check_labels(reader, classes)
    if len(sides) < 2 and not _has_positives(reader, side := next(iter(sides)), config.captions):
        raise InputError(
            f"evaluation.sets.{name}: no sample has a second {side} (fields.second_{side}) or shares its item with "
            f"another {side}, so there is nothing to find; give other shards, or remove the set."
        )
    return ConfiguredSet(name, reader, len(whole), config.captions, classes)


def _has_positives(reader: SampleReader, side: str, captions: int | None) -> bool:
    """Whether `score` finds a positive for an encoder with this tower alone. Most sets have one at their start."""
    of_item: dict[int, set[Any]] = defaultdict(set)
    for index in range(len(reader)):
        try:
            sample = reader.read(index, with_image=side == IMAGE)
        except BadSample:
            continue
        if sample.second_image if side == IMAGE else sample.second_text:
            return True
        item = -2 - index if sample.group == NO_GROUP else sample.group
        of_item[item] |= {index} if side == IMAGE else {caption_key(one) for one in sample.captions[:captions]}
        if len(of_item[item]) > 1:
            return True
    return False


def _classes(name: str, config: SetConfig) -> Classes | None:
    key = f"evaluation.sets.{name}"
    if config.classes is None:
        if config.templates is not None:
            raise InputError(f"{key}.templates: given without classes; add classes: FILE, or classes: imagenet.")
        return None
    if config.captions is not None:
        raise InputError(f"{key}.captions: a set with classes is scored by class, not by caption; remove one of both.")
    try:
        return read_classes(config.classes, config.templates)
    except InputError as error:
        raise InputError(f"{key}.{error}") from None
