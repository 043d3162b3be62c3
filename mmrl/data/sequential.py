"""Read a whole set once, in shard order, with all captions: for evaluation, rotation and embedding.

Shapes: B images of a batch, M their captions in all, C channels, H and W the image size, L tokens of a text.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from mmrl.data.batches import Tokenise
from mmrl.data.index import Problem
from mmrl.data.parsing import IMAGE, TEXT
from mmrl.data.samples import BadSample, Sample, SampleReader
from mmrl.data.workers import LostBatchWatch, start_new_session
from mmrl.errors import InputError, RunStopped
from mmrl.images.image_spec import ImageSpec

BATCH_SIZE = 256


class ImageReader(Protocol):
    """Random access to the samples of a set: a SampleReader, or another class with its methods."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What is unusable and therefore has no index."""
        ...

    def __len__(self) -> int: ...

    def read_image(self, index: int, /) -> tuple[Sample, torch.Tensor]:
        """Reads sample `index` and decodes its image, uint8 (C, H, W); raises BadSample."""
        ...


@dataclass
class SequentialBatch:
    """Consecutive samples of a set with all their captions."""

    keys: list[str]
    image_BCHW: torch.Tensor
    """(B, 0) if images are not read."""
    text_ML: torch.Tensor
    captions: list[str]
    row_of_text_M: torch.Tensor
    """The row in image_BCHW that each caption belongs to."""
    group_B: torch.Tensor
    indices: list[int]
    """The index in the set of each of the B samples."""
    second: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """IMAGE and TEXT -> the second images (S, C, H, W) or texts (S, L) of samples that have one, and the samples' rows
    (S,)."""
    second_texts: list[str] = field(default_factory=list)
    """The second texts before tokenisation."""
    bad: list[Problem] = field(default_factory=list)


class _Batches(Dataset[SequentialBatch | InputError | RunStopped]):
    """Maps a range of indices to their batch. An error is returned, since DataLoader would wrap a raised one in a
    traceback."""

    def __init__(
        self,
        reader: ImageReader,
        image: ImageSpec | None,
        text: Tokenise,
        captions: int | None,
        second: Collection[str],
    ) -> None:
        self._reader, self._image, self._text, self._captions, self._second = reader, image, text, captions, second

    def __getitem__(self, wanted: range) -> SequentialBatch | InputError | RunStopped:
        try:
            return self._read(wanted)
        except (InputError, RunStopped) as error:
            return error

    def _read(self, wanted: range) -> SequentialBatch:
        keys, indices, images, groups, texts, rows = [], [], [], [], [], []
        seconds: dict[str, list[tuple[Any, int]]] = {IMAGE: [], TEXT: []}
        bad: list[Problem] = []
        for index in wanted:
            try:
                sample, pixels = self._read_one(index)
            except BadSample as error:
                bad.append(error.problem)
                continue
            images += pixels[:1]
            seconds[IMAGE] += [(one, len(keys)) for one in pixels[1:]]
            if sample.second_text and TEXT in self._second:
                seconds[TEXT].append((sample.second_text, len(keys)))
            chosen = sample.captions[: self._captions]
            texts += chosen
            rows += [len(keys)] * len(chosen)
            keys.append(sample.name)
            indices.append(index)
            groups.append(sample.group)
        if not keys:  # an empty batch, for its list of bad samples
            empty = torch.zeros(0, dtype=torch.int64)
            return SequentialBatch([], empty[:, None], empty[:, None], [], empty, empty, [], bad=bad)
        row_of_text_M, group_B = torch.tensor(rows, dtype=torch.int64), torch.tensor(groups)
        image_BCHW = torch.stack(images) if images else torch.zeros(len(keys), 0)
        make: dict[str, Callable[[list[Any]], torch.Tensor]] = {IMAGE: torch.stack, TEXT: self._text}
        second = {
            kind: (make[kind]([x for x, _ in found]), torch.tensor([row for _, row in found]))
            for kind, found in seconds.items()
            if found
        }
        tokens, second_texts = self._text(texts), [text for text, _ in seconds[TEXT]]
        return SequentialBatch(
            keys, image_BCHW, tokens, texts, row_of_text_M, group_B, indices, second, second_texts, bad
        )

    def _read_one(self, index: int) -> tuple[Sample, list[torch.Tensor]]:
        """A sample, and the pixels of its image and, if it is wanted, of its second image."""
        if self._image is None:
            assert isinstance(self._reader, SampleReader), "only shards have samples without images"
            return self._reader.read(index, with_image=False), []
        sample, image_CHW = self._reader.read_image(index)
        pixels = [self._image.pixels(image_CHW)]
        if sample.second_image and IMAGE in self._second:
            assert isinstance(self._reader, SampleReader)
            pixels.append(self._image.pixels(self._reader.decode(index, sample.second_image)))
        return sample, pixels


def read_sequential(
    reader: ImageReader,
    image: ImageSpec | None,
    text: Tokenise,
    *,
    batch_size: int = BATCH_SIZE,
    captions: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    second: Collection[str] = (),
) -> Iterator[SequentialBatch]:
    """Yields this rank's contiguous share of the set in batches; bad samples are left out and listed in `bad`.

    Args:
        image: None for texts without images.
        captions: at most this many captions per sample, the plain one first; None for all.
        workers: processes that read and decode, each one batch ahead; 0 for this process.
        second: IMAGE, TEXT or both: the second members that are read. A sample with a damaged one is then bad.
    """
    first, last = (len(reader) * r // world_size for r in (rank, rank + 1))
    ranges = [range(start, min(start + batch_size, last)) for start in range(first, last, batch_size)]
    yield from read_ranges(reader, image, text, ranges, captions, workers, second)


def read_ranges(
    reader: ImageReader,
    image: ImageSpec | None,
    text: Tokenise,
    ranges: Sequence[range],
    captions: int | None = None,
    workers: int = 0,
    second: Collection[str] = (),
) -> Iterator[SequentialBatch]:
    """Yields one batch for each range of indices; the rest as `read_sequential`."""
    batches, workers = _Batches(reader, image, text, captions, second), min(workers, len(ranges))
    in_workers = workers and len(ranges) > 1
    for batch in _in_workers(batches, ranges, workers) if in_workers else map(batches.__getitem__, ranges):
        if not isinstance(batch, SequentialBatch):
            raise batch
        yield batch


def _in_workers(
    batches: _Batches, ranges: Sequence[range], workers: int
) -> Iterator[SequentialBatch | InputError | RunStopped]:
    loader = DataLoader(
        batches,
        sampler=ranges,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1,
        worker_init_fn=start_new_session,
    )
    iterator: Any = iter(loader)
    with LostBatchWatch(iterator._workers, progress=lambda: None, lost_after_s=60) as watch:
        while True:
            try:
                with watch.awaiting():
                    batch = next(iterator, None)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise RunStopped(
                    f"shards: a worker that decodes images was killed ({reason}), most likely because memory ran out; "
                    "give the container more memory, then run this again."
                ) from None
            if batch is None:
                return
            yield batch
