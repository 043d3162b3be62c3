"""Readers of evaluation sets: shards, folders of images with captions, data sets in CLIP_benchmark's layout.

CLIP_benchmark's layout is a folder with `test/0.tar, test/1.tar, …` and, for classification, `classnames.txt` and
`zeroshot_classification_templates.txt`, with the index of a sample's class in KEY.cls; for retrieval,
`dataset_type.txt` with the word retrieval, and one caption per line in KEY.txt.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmrl.data import draws
from mmrl.data.folder import CAPTION_KEYS, ImageFolder, is_image_folder
from mmrl.data.parsing import BOTH
from mmrl.data.samples import BadSample, FieldsConfig, Sample, SampleReader
from mmrl.data.sequential import ImageReader
from mmrl.data.sources import open_reader
from mmrl.errors import InputError
from mmrl.evaluate.zeroshot import Classes, class_index, read_classes

_NAMES, _TEMPLATES, _TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
LABEL = "cls"
"""The field of a sample with the index of its class."""
_SHARD_SEED = 1 << 25
# Samples of a set of which one must have a caption or a class, before any is embedded.
_PREFLIGHT = 64


@dataclass(frozen=True)
class OpenSet:
    """An evaluation set, ready to be read."""

    reader: ImageReader
    classes: Classes | None = None
    """For zero-shot classification; the only caption of a sample is then the index of its class."""


def open_set(spec: str, classes: Classes | None = None, sides: Collection[str] = BOTH) -> OpenSet:
    """Opens the evaluation set that SHARDS names; with `classes`, samples are read with their classes, not captions.
    The towers of the model, `sides`, decide what a sample must have. Raises InputError: there is no such set, or it has
    neither captions nor classes."""
    folder = Path(spec)
    if len(sides) == 1:
        is_folder = "image" in sides and is_image_folder(folder)
        return OpenSet(ImageFolder(folder, argument="shards") if is_folder else open_reader(spec, required=sides))
    if any((folder / name).is_file() for name in (_NAMES, _TYPE)):
        return _open_benchmark(folder, classes)
    if classes is not None:
        return OpenSet(_open_labelled(spec, classes), classes)
    return OpenSet(_open_folder(folder) if is_image_folder(folder) else open_reader(spec))


def _open_benchmark(folder: Path, classes: Classes | None) -> OpenSet:
    file = folder / _TYPE
    kind = file.read_text(errors="replace").strip().lower() if file.is_file() else "classification"
    split = next((folder / name for name in ("test", "val", "train") if (folder / name).is_dir()), folder)
    if kind == "retrieval" and classes is None:
        return OpenSet(_CaptionPerLine(open_reader(str(split))))
    if classes is None:
        if not (folder / _NAMES).is_file():
            raise InputError(f"shards: {folder} has no {_NAMES}; name the classes with --classes.")
        templates = folder / _TEMPLATES
        classes = read_classes(str(folder / _NAMES), str(templates) if templates.is_file() else None)
    return OpenSet(_open_labelled(str(split), classes), classes)


def _open_labelled(spec: str, classes: Classes) -> SampleReader:
    reader = open_reader(spec, FieldsConfig(text=LABEL))
    check_labels(reader, classes)
    return reader


def check_labels(reader: SampleReader, classes: Classes) -> None:
    """Raises InputError if none of the first samples has the index of a class."""
    count, last, reason = min(_PREFLIGHT, len(reader)), len(classes.names) - 1, ""
    for index in range(count):
        try:
            sample = reader.read(index)
        except BadSample as error:
            reason = reason or f"{error.problem.key}: {error}"
            continue
        if class_index(sample.captions[0], len(classes.names)) >= 0:
            return
        reason = reason or f"{sample.name}: {sample.captions[0]!r}"
    raise InputError(
        f"shards: none of the first {count} samples has the index of a class, 0 to {last}, in KEY.{LABEL} ({reason}); "
        "give classes in the order of the indices."
    )


class _CaptionPerLine:
    """A set whose text files hold one caption per line."""

    def __init__(self, inner: SampleReader) -> None:
        self._inner, self.problems = inner, inner.problems

    def __len__(self) -> int:
        return len(self._inner)

    def read_image(self, number: int) -> tuple[Sample, torch.Tensor]:
        sample, image = self._inner.read_image(number)
        lines = [line.strip() for caption in sample.captions for line in caption.splitlines()]
        return replace(sample, captions=list(dict.fromkeys(line for line in lines if line))), image


def _open_folder(folder: Path) -> ImageFolder:
    """Opens a folder of images with captions. Raises InputError: the folder holds no images, or none of its first ones
    has a caption."""
    reader = ImageFolder(folder, require_captions=True, argument="shards")
    count, reason = min(_PREFLIGHT, len(reader)), ""
    for number in range(count):
        try:
            reader.image_file(number)
        except BadSample as error:
            reason = reason or f"{error.problem.key}: {error}"
        else:
            return reader
    raise InputError(
        f"shards: none of the first {count} images in {folder} has a usable caption ({reason}); add NAME.txt, or "
        f"NAME.json with {CAPTION_KEYS[0]!r}, next to NAME.jpg."
    )


def draw_shards(reader: SampleReader, most: int | None) -> SampleReader:
    """The set, or random whole shards of it that hold `most` samples or more; the same shards at each call."""
    if most is None or len(reader) <= most:
        return reader
    indices = [(s, shard) for s, source in enumerate(reader.sources) for shard in range(len(source.shards))]
    chosen: set[tuple[int, int]] = set()
    samples = 0
    for drawn in draws.permutation(len(indices), _SHARD_SEED).tolist():
        if samples >= most:
            break
        s, shard = indices[drawn]
        chosen.add((s, shard))
        samples += reader.sources[s].shards[shard].samples
    sources = [
        replace(source, shards=[shard for i, shard in enumerate(source.shards) if (s, i) in chosen])
        for s, source in enumerate(reader.sources)
    ]
    return SampleReader([source for source in sources if source.shards], reader.cache, reader.required)
