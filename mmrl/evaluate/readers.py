"""What can be evaluated on: shards, folders of pictures with captions beside them, data sets of CLIP_benchmark's form.

A data set of CLIP_benchmark's form is a folder with `test/0.tar, test/1.tar, …` and either `classnames.txt` and
`zeroshot_classification_templates.txt`, each sample's class being its number in KEY.cls, or `dataset_type.txt` with the
word retrieval, each line of KEY.txt being a caption.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmrl.data import draws
from mmrl.data.index import Problem
from mmrl.data.pack.pairs import CAPTION_COLUMNS, FolderPairs, Pair
from mmrl.data.samples import NO_GROUP, BadSample, FieldsConfig, Sample, SampleReader, group_number
from mmrl.data.sequential import PictureReader
from mmrl.data.sources import open_reader
from mmrl.errors import InputError
from mmrl.evaluate.zeroshot import Classes, read_classes
from mmrl.images.decode import decode_pixels

_NAMES, _TEMPLATES, _TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
_SHARDS_DRAW = 1 << 25
# How many pictures of a folder are looked at for a caption before any is embedded.
_PREFLIGHT = 64


@dataclass(frozen=True)
class OpenSet:
    """A set, ready to be read."""

    reader: PictureReader
    classes: Classes | None = None
    """For zero-shot classification, where the set is one for it: a sample's only caption is then its class's number."""


def open_set(spec: str, classes: Classes | None = None) -> OpenSet:
    """The set that SHARDS names; with `classes`, its samples' classes are asked for and not their captions.

    Raises:
        InputError: there is none, or it has neither captions nor classes.
    """
    folder = Path(spec)
    if any((folder / name).is_file() for name in (_NAMES, _TYPE)):
        return _open_benchmark(folder, classes)
    if classes is not None:
        return OpenSet(_labelled(spec), classes)
    if folder.is_dir() and next(folder.rglob("*.tar"), None) is None:
        return OpenSet(FolderReader(folder))
    return OpenSet(open_reader(spec))


def _open_benchmark(folder: Path, classes: Classes | None) -> OpenSet:
    kind = (folder / _TYPE).read_text().strip().lower() if (folder / _TYPE).is_file() else "classification"
    split = next((folder / name for name in ("test", "val", "train") if (folder / name).is_dir()), folder)
    if kind == "retrieval" and classes is None:
        return OpenSet(_CaptionALine(open_reader(str(split))))
    if classes is None:
        if not (folder / _NAMES).is_file():
            raise InputError(f"shards: {folder} has no {_NAMES}; name the classes by --classes.")
        templates = folder / _TEMPLATES
        classes = read_classes(str(folder / _NAMES), str(templates) if templates.is_file() else None)
    return OpenSet(_labelled(str(split)), classes)


def _labelled(spec: str) -> SampleReader:
    return open_reader(spec, FieldsConfig(text="cls"))


class _CaptionALine:
    """A set whose text files hold a caption a line."""

    def __init__(self, inner: SampleReader) -> None:
        self._inner, self.problems = inner, inner.problems

    def __len__(self) -> int:
        return len(self._inner)

    def read_picture(self, number: int) -> tuple[Sample, torch.Tensor]:
        sample, picture = self._inner.read_picture(number)
        lines = [line.strip() for caption in sample.captions for line in caption.splitlines()]
        return replace(sample, captions=list(dict.fromkeys(line for line in lines if line))), picture


class FolderReader:
    """A folder's pictures, with the captions and groups that lie beside them as KEY.txt and KEY.json.

    Raises:
        InputError: the folder holds no picture, or none with a caption.
    """

    def __init__(self, folder: Path) -> None:
        fields = FieldsConfig()
        keys = dict.fromkeys((fields.captions, *CAPTION_COLUMNS))
        found = list(FolderPairs(folder, list(keys), fields.group).after(0))
        self.problems = [one for one in found if isinstance(one, Problem)]
        self._folder, self._pairs = folder, [one for one in found if isinstance(one, Pair)]
        if not any(_captions(pair) for pair in self._pairs[:_PREFLIGHT]):
            raise InputError(
                f"shards: none of {min(_PREFLIGHT, len(self._pairs))} pictures in {folder} has a caption beside it; "
                f"write KEY.txt, or KEY.json with {fields.captions!r}."
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def read_picture(self, number: int) -> tuple[Sample, torch.Tensor]:
        """Sample `number` and its picture, uint8 (C, H, W).

        Raises:
            BadSample: no caption, or a picture that cannot be read.
        """
        pair = self._pairs[number]
        captions = _captions(pair)
        if not captions:
            raise BadSample(Problem(str(self._folder), pair.key, "no caption"))
        try:
            data = Path(pair.image).read_bytes()
            picture = decode_pixels(data)
        except (ValueError, OSError) as error:
            raise BadSample(Problem(str(self._folder), pair.key, str(error))) from None
        group = NO_GROUP if pair.group is None else group_number(pair.group)
        return Sample(pair.key, data, captions, group), picture


def _captions(pair: Pair) -> list[str]:
    stripped = (caption.strip() for caption in pair.captions)
    return list(dict.fromkeys(caption for caption in stripped if caption))


def draw_shards(reader: SampleReader, most: int | None) -> SampleReader:
    """The set, or whole shards of it, drawn at random but always the same, until they hold `most` samples."""
    if most is None or len(reader) <= most:
        return reader
    places = [(s, number) for s, source in enumerate(reader.sources) for number in range(len(source.shards))]
    chosen: set[tuple[int, int]] = set()
    held = 0
    for place in draws.permutation(len(places), _SHARDS_DRAW).tolist():
        if held >= most:
            break
        s, number = places[place]
        chosen.add((s, number))
        held += reader.sources[s].shards[number].samples
    sources = [
        replace(source, shards=[shard for number, shard in enumerate(source.shards) if (s, number) in chosen])
        for s, source in enumerate(reader.sources)
    ]
    return SampleReader([source for source in sources if source.shards], reader.store)
