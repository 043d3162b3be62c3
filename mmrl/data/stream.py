"""The stream: shards -> batches whose members are a pure function of (seed, epoch, position).

World size, rank, workers and the place where a run was stopped decide only who loads which rows. One unit of work is
the rows of one batch that fall to one process; a worker is handed (epoch, position) and needs to know nothing else.

Shapes: B rows of this process, M captions, C channels, H and W the image's size, L tokens of a text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, Field
from torch.utils.data import DataLoader, Dataset, Sampler

from mmrl.data import draws
from mmrl.data.samples import BadSample, FieldsConfig, Sample, SampleReader
from mmrl.data.shards import EpochOrder, Problem, expand, index_shards
from mmrl.data.transforms import Augmentation, AugmentConfig
from mmrl.errors import InputError
from mmrl.image_spec import ImageSpec
from mmrl.settings import Settings, machine

Tokenise = Callable[[list[str]], torch.Tensor]
# A sample, and its picture where one is wanted.
_Loaded = tuple[Sample, Image.Image | None]
_CAPTION_DRAW = 1 << 20
# A bad sample's place goes to the same row of the next batch; after so many in turn the data is at fault.
_MOST_REPLACEMENTS = 100


def _check_probabilities(values: list[float] | None) -> list[float] | None:
    if values is not None and (not values or min(values) < 0 or sum(values) <= 0):
        raise ValueError("probabilities must not be negative, and not all zero")
    return values


class DataConfig(Settings):
    """Where the training samples come from, and how they become batches."""

    train: str | list[str]
    """Shards: a tar, a brace pattern, a folder, a list file (@shards.txt), `starter:train`, or a list of these."""
    fields: FieldsConfig = FieldsConfig()
    captions: Annotated[list[float] | None, AfterValidator(_check_probabilities)] = None
    """Probabilities of a sample's first, second, … caption; those beyond the list share the last one's. Uniform when
    left out. Drawn anew each epoch."""
    augment: AugmentConfig = AugmentConfig()
    shuffle_window: int = Field(default=16384, ge=1)
    """Samples are shuffled within windows of so many, across neighbouring shards."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Training stops when more than this share of the samples seen is bad; the first 1,000 count as if all seen."""
    cache: bool = machine(False)
    """Keep decoded pictures in memory, each loader its own: for sets that fit there and are seen many times."""
    workers: int = machine(0, ge=0)
    """Worker processes that load ahead, for each training process; 0 loads in the training process itself."""


@dataclass
class Batch:
    """One process's rows of a batch."""

    keys: list[str]
    """"shard/key" of each row."""
    image: Any
    """uint8 (B, C, H, W) where the stream has an ImageSpec; else a list of the callable's results, or bytes."""
    text: Any
    """(B, L) token ids where the stream tokenises; else a list of str."""
    group: torch.Tensor
    """int64 (B,): equal numbers are the same item; -1 is no group, not even with another -1."""
    bad: list[Problem] = field(default_factory=list)
    """What was skipped to fill these rows."""


class Stream:
    """Batches of a set of shards; see `stream`."""

    def __init__(
        self,
        reader: SampleReader,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        image: ImageSpec | Callable[[Image.Image], Any] | None = None,
        text: Tokenise | None = None,
        config: DataConfig | None = None,
    ) -> None:
        self.global_batch_size = batch_size * world_size
        if batch_size < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: want batch_size >= 1, rank < world."
            )
        if len(reader) < self.global_batch_size:
            raise InputError(
                f"batch_size: the shards hold {len(reader)} samples, fewer than one global batch of "
                f"{self.global_batch_size}; lower train.batch_size or add shards."
            )
        self.seed, self.epoch, self.position = seed, 0, 0
        self.samples = len(reader)
        self._workers = num_workers
        self._work = _BatchWork(reader, batch_size, rank, world_size, seed, image, text, config or DataConfig(train=""))
        self._loader: DataLoader[Batch | InputError] | None = None
        self._plan = _Plan()

    @property
    def batches_per_epoch(self) -> int:
        """Equal on all ranks. The tail that fills no batch is left out, another one each epoch."""
        return self.samples // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch: all of it, unless it was left or loaded in the middle."""
        yield from self._batches(epochs=1)

    def forever(self) -> Iterator[Batch]:
        """Epoch after epoch, without a pause of the workers in between."""
        yield from self._batches(epochs=None)

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands after the last batch that it gave: small, JSON, the same on all ranks.

        It holds no rank, world size or number of workers, and another world may go on from it.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "samples": self.samples,
            "global_batch_size": self.global_batch_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after the batch at which `state` was taken.

        Raises:
            InputError: the state is of another seed, batch size or set of samples, whose order would differ.
        """
        for name in ("seed", "samples", "global_batch_size"):
            if state[name] != getattr(self, name):
                raise InputError(
                    f"stream: {name} was {state[name]} when this state was saved and is {getattr(self, name)} now; "
                    "resume with the same shards, seed and global batch size."
                )
        self.epoch, self.position = state["epoch"], state["position"]

    def _batches(self, epochs: int | None) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = DataLoader(
                self._work,
                sampler=self._plan,
                batch_size=None,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                prefetch_factor=4 if self._workers else None,
            )
        step, usable = self.global_batch_size, self.batches_per_epoch * self.global_batch_size
        self._plan.start(self.epoch, self.position, step, usable, epochs)
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise batch
            self.position += step
            if self.position >= usable:
                self.epoch, self.position = self.epoch + 1, 0
            yield batch


class _Plan(Sampler[tuple[int, int]]):
    """Which batches come next: (epoch, position) of the first sample of each."""

    def start(self, epoch: int, position: int, step: int, usable: int, epochs: int | None) -> None:
        self._first, self._step, self._usable = (epoch, position), step, usable
        self._last_epoch = None if epochs is None else epoch + epochs - 1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, position = self._first
        while self._last_epoch is None or epoch <= self._last_epoch:
            yield from ((epoch, p) for p in range(position, self._usable, self._step))
            epoch, position = epoch + 1, 0


class _BatchWork(Dataset[Batch | InputError]):
    """(epoch, position) -> this process's rows of that batch. The same in every worker."""

    def __init__(
        self,
        reader: SampleReader,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        image: ImageSpec | Callable[[Image.Image], Any] | None,
        text: Tokenise | None,
        config: DataConfig,
    ) -> None:
        self._reader, self._seed, self._config = reader, seed, config
        self._rows = np.arange(batch_size) + rank * batch_size
        self._global_batch_size = batch_size * world_size
        self._image, self._text = image, text
        self._augmentation = Augmentation(config.augment, image) if isinstance(image, ImageSpec) else None
        self._order: tuple[int, EpochOrder] | None = None
        self._cache: dict[int, _Loaded] = {}

    def __getitem__(self, request: tuple[int, int]) -> Batch | InputError:
        """An error is handed over as a value: raised in a worker, its sentence would come wrapped in a traceback."""
        try:
            return self._batch(*request)
        except InputError as error:
            return error

    def _batch(self, epoch: int, position: int) -> Batch:
        bad: list[Problem] = []
        samples_B, loaded = self._fill(epoch, position, bad)
        texts = self._choose_captions(epoch, samples_B, [sample.captions for sample, _ in loaded])
        return Batch(
            keys=[sample.name for sample, _ in loaded],
            image=self._finish_images(epoch, samples_B, loaded),
            text=texts if self._text is None else self._text(texts),
            group=torch.tensor([sample.group for sample, _ in loaded]),
            bad=bad,
        )

    def _fill(self, epoch: int, position: int, bad: list[Problem]) -> tuple[np.ndarray, list[_Loaded]]:
        """The samples at our rows' positions; in the place of a bad one, that of the same row of a later batch.

        So it is filled without asking another process, and not by a sample of this batch where there are others.
        """
        order, places_B, loaded = self._epoch_order(epoch), position + self._rows, []
        samples_B = order.samples(places_B)
        for row in range(len(samples_B)):
            for attempt in range(1, _MOST_REPLACEMENTS + 1):
                one = self._load(int(samples_B[row]), bad)
                if one is not None:
                    loaded.append(one)
                    break
                samples_B[row] = order.samples(np.array([self._place_of_reserve(places_B[row], attempt)]))[0]
            else:
                raise InputError(
                    f"data: {_MOST_REPLACEMENTS} samples in a row are bad, lastly {bad[-1].shard} {bad[-1].key}: "
                    f"{bad[-1].reason}. Check the shards."
                )
        return samples_B, loaded

    def _place_of_reserve(self, place: int, attempt: int) -> int:
        """Batch after batch; one further after each time round the epoch, so that every sample has its turn."""
        step, length = self._global_batch_size, len(self._reader)
        ahead = attempt * step
        return place + ahead + ahead // length

    def _load(self, number: int, bad: list[Problem]) -> _Loaded | None:
        """Sample `number` and its picture, decoded if that is wanted; None, and a line in `bad`, if it is bad."""
        if number in self._cache:
            return self._cache[number]
        try:
            if self._image is None:
                return self._reader.read(number), None
            sample, picture = self._reader.read_picture(number)
        except BadSample as error:
            bad.append(error.problem)
            return None
        if self._config.cache:
            self._cache[number] = replace(sample, image=b""), picture
        return sample, picture

    def _finish_images(self, epoch: int, samples_B: np.ndarray, loaded: list[_Loaded]) -> Any:
        if self._image is None:
            return [sample.image for sample, _ in loaded]
        pictures = [picture for _, picture in loaded if picture is not None]
        if self._augmentation is None:
            assert callable(self._image)
            return [self._image(picture) for picture in pictures]
        drawn_BP = self._augmentation.draw(self._seed, epoch, samples_B)
        fitted = [
            self._augmentation.pixels(picture, drawn_P) for picture, drawn_P in zip(pictures, drawn_BP, strict=True)
        ]
        return self._augmentation.change(torch.stack(fitted), drawn_BP)

    def _choose_captions(self, epoch: int, samples_B: np.ndarray, captions: list[list[str]]) -> list[str]:
        drawn_B = draws.uniform(self._seed, epoch, samples_B, _CAPTION_DRAW)
        return [
            choices[pick_caption(len(choices), self._config.captions, drawn)]
            for choices, drawn in zip(captions, drawn_B, strict=True)
        ]

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            window = self._config.shuffle_window
            self._order = epoch, EpochOrder(self._reader.samples_of_shard, self._seed, epoch, window)
        return self._order[1]


def pick_caption(count: int, probabilities: list[float] | None, drawn: float) -> int:
    """Which of a sample's `count` captions a number in [0, 1) picks."""
    if probabilities is None:
        return int(drawn * count)
    last = len(probabilities) - 1
    shares = [probabilities[min(i, last)] / (max(count - last, 1) if i >= last else 1) for i in range(count)]
    if not sum(shares):
        return 0  # all the weight is on captions that this sample lacks
    return min(int(np.searchsorted(np.cumsum(shares) / sum(shares), drawn, side="right")), count - 1)


def open_reader(shards: str | Path | Sequence[str | Path], fields: FieldsConfig | None = None) -> SampleReader:
    """The samples of a shard spec, after every check that can be made before long work starts."""
    return SampleReader(index_shards(expand(shards)), fields or FieldsConfig())


def stream(
    shards: str | Path | Sequence[str | Path],
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    image: ImageSpec | Callable[[Image.Image], Any] | None = None,
    text: Callable[[str], Any] | None = None,
) -> Stream:
    """Image-text batches from WebDataset shards, each epoch in another order, resumable at any batch.

    Args:
        shards: a tar, a brace pattern, a folder, a list file (`@shards.txt`), or a list of these.
        batch_size: rows of this process; the global batch is batch_size * world_size.
        image: an ImageSpec gives uint8 (B, C, H, W); a callable takes each RGB picture; None leaves the bytes.
        text: a callable on a caption; None leaves the strings.

    Each `iter(stream)` is one epoch of `Batch`. `state_dict()` after any batch, `load_state_dict()` on a new stream,
    and the new one gives the very next batch.

    Raises:
        InputError: shards missing, empty or no tar; fields that no sample has; fewer samples than one batch.
    """
    return Stream(
        open_reader(shards),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        image=image,
        text=None if text is None else _EachText(text),
    )


class _EachText:
    """A callable on one caption, made one on a list; stacked where it gives tensors. (A class: workers pickle it.)"""

    def __init__(self, function: Callable[[str], Any]) -> None:
        self._function = function

    def __call__(self, texts: list[str]) -> Any:
        values = [self._function(text) for text in texts]
        return torch.stack(values) if isinstance(values[0], torch.Tensor) else values
