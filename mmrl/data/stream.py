"""The stream: shards -> batches whose members are a pure function of (seed, epoch, position).

World size, rank, workers and the place where a run was stopped decide only who loads which rows. One unit of work is
the rows of one batch that fall to one process; a worker is handed (epoch, position) and needs to know nothing else.

Shapes: B rows of this process, M captions, C channels, H and W the image's size, L tokens of a text.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from mmrl.data import draws
from mmrl.data.index import Problem
from mmrl.data.order import EpochOrder
from mmrl.data.samples import BadSample, Sample, SampleReader
from mmrl.data.shards import Spec
from mmrl.data.sources import DataConfig, open_training_set
from mmrl.data.transforms import Augmentation
from mmrl.errors import InputError, RunStopped
from mmrl.images.decode import to_picture
from mmrl.images.image_spec import ImageSpec
from mmrl.settings import learning_values

Tokenise = Callable[[list[str]], torch.Tensor]
# A sample, and its picture, uint8 (C, H, W) of its own size, where one is wanted.
_Loaded = tuple[Sample, torch.Tensor | None]
_CAPTION_DRAW = 1 << 20
# A bad sample's place goes to the same row of the next batch; after so many in turn the data is at fault.
_MOST_REPLACEMENTS = 100


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

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU copies from without waiting; DataLoader asks for it."""
        image, text = (x.pin_memory() if isinstance(x, torch.Tensor) else x for x in (self.image, self.text))
        return replace(self, image=image, text=text, group=self.group.pin_memory())


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
        pin_memory: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        self.global_batch_size = batch_size * world_size
        if batch_size < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: want batch_size >= 1, rank < world."
            )
        self.samples = sum(share.per_epoch for share in reader.shares)
        if self.samples < self.global_batch_size:
            raise InputError(
                f"batch_size: the shards hold {self.samples} samples, fewer than one global batch of "
                f"{self.global_batch_size}; lower train.batch_size or add shards."
            )
        self.seed, self.epoch, self.position = seed, 0, 0
        self._workers, self._pin_memory = num_workers, pin_memory
        self._parts = batch_size // (micro_batch or batch_size)
        config = config or DataConfig()
        self._data = f"{reader.fingerprint}-{_fingerprint(config)}"
        self._work = _BatchWork(reader, batch_size, self._parts, rank, world_size, seed, image, text, config)
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
        """Epoch after epoch, without a pause of the workers in between; with `micro_batch`, each batch in so many
        parts."""
        yield from self._batches(epochs=None)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last batch that it gave: small, JSON, the same on all ranks.

        It holds no rank, world size or number of workers, and another world may go on from it.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "samples": self.samples,
            "global_batch_size": self.global_batch_size,
            "data": self._data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
        if state["data"] != self._data:
            raise InputError(
                "stream: the shards, or how they are shuffled, captioned or augmented, are not as when this state was "
                "saved; resume with the same data."
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
                pin_memory=self._pin_memory,
                worker_init_fn=_leave_signals_to_the_trainer,
            )
        step, usable = self.global_batch_size, self.batches_per_epoch * self.global_batch_size
        self._plan.start(self.epoch, self.position, step, usable, epochs, self._parts)
        for number, batch in enumerate(self._watched(iter(self._loader)), start=1):
            if isinstance(batch, InputError):
                raise batch
            if number % self._parts == 0:
                self.position += step
            if self.position >= usable:
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def _watched(self, batches: Iterator[Batch | InputError]) -> Iterator[Batch | InputError]:
        """Says in one sentence that a worker was killed, which DataLoader tells in a traceback."""
        try:
            yield from batches
        except RuntimeError as error:
            stopped = killed_worker(error)
            if stopped is None:
                raise
            self._loader = None
            raise stopped from None


def killed_worker(error: RuntimeError) -> RunStopped | None:
    """What to tell where DataLoader found one of its processes dead, which it says by a RuntimeError at whatever line
    the main process is; None for any other error."""
    if isinstance(error, RunStopped) or "DataLoader worker" not in str(error):
        return None
    return RunStopped(
        f"data: a loader process was killed from outside ({str(error).splitlines()[0]}); most often memory ran out: "
        "lower data.workers or train.batch_size, then resume."
    )


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """Ctrl-C, and SIGTERM in many batch systems, reach the whole process group; the trainer still wants a batch for its
    last step, and ends its workers itself: by SIGTERM, which therefore is not ignored."""
    os.setsid()


def _fingerprint(config: DataConfig) -> str:
    """Of all that decides what a batch of the same shards holds."""
    facts = learning_values(config)
    # The shards and their shares are in the reader's own; how much may be bad changes no batch.
    decisive = {name: value for name, value in facts.items() if name not in ("train", "sources", "max_bad_fraction")}
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=6).hexdigest()


class _Plan(Sampler[tuple[int, int, int]]):
    """Which batches come next: (epoch, position) of the first sample of each, and the part of it."""

    def start(self, epoch: int, position: int, step: int, usable: int, epochs: int | None, parts: int) -> None:
        self._first, self._step, self._usable, self._parts = (epoch, position), step, usable, parts
        self._last_epoch = None if epochs is None else epoch + epochs - 1

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch, position = self._first
        while self._last_epoch is None or epoch <= self._last_epoch:
            yield from ((epoch, p, n) for p in range(position, self._usable, self._step) for n in range(self._parts))
            epoch, position = epoch + 1, 0


class _BatchWork(Dataset[Batch | InputError]):
    """(epoch, position, part) -> that part of this process's rows of the batch. The same in every worker."""

    def __init__(
        self,
        reader: SampleReader,
        batch_size: int,
        parts: int,
        rank: int,
        world_size: int,
        seed: int,
        image: ImageSpec | Callable[[Image.Image], Any] | None,
        text: Tokenise | None,
        config: DataConfig,
    ) -> None:
        self._reader, self._seed, self._config = reader, seed, config
        self._rows_of_part = (np.arange(batch_size) + rank * batch_size).reshape(parts, -1)
        self._global_batch_size = batch_size * world_size
        self._image, self._text = image, text
        self._augmentation = Augmentation(config.augment, image) if isinstance(image, ImageSpec) else None
        self._order: tuple[int, EpochOrder] | None = None
        self._least = self._augmentation.least_source() if self._augmentation and config.scaled_decode else None
        self._cache: dict[int, _Loaded] = {}
        self._asked_ahead: tuple[int, int] | None = None

    def __getitem__(self, request: tuple[int, int, int]) -> Batch | InputError:
        """An error is handed over as a value: raised in a worker, its sentence would come wrapped in a traceback."""
        try:
            return self._batch(*request)
        except InputError as error:
            return error

    def _batch(self, epoch: int, position: int, part: int) -> Batch:
        bad: list[Problem] = []
        self._fetch_ahead(epoch, position)
        numbers_B, loaded = self._fill(epoch, position + self._rows_of_part[part], bad)
        texts = self._choose_captions(epoch, numbers_B, [sample.captions for sample, _ in loaded])
        return Batch(
            keys=[sample.name for sample, _ in loaded],
            image=self._finish_images(epoch, numbers_B, loaded),
            text=texts if self._text is None else self._text(texts),
            group=torch.tensor([sample.group for sample, _ in loaded]),
            bad=bad,
        )

    def _fill(self, epoch: int, places_B: np.ndarray, bad: list[Problem]) -> tuple[np.ndarray, list[_Loaded]]:
        """The numbers at these positions and their samples; in the place of a bad one, that of the same row of a
        later batch.

        So it is filled without asking another process, and seldom by a sample of this batch.
        """
        order, loaded = self._epoch_order(epoch), []
        numbers_B = order.numbers(places_B)
        for row in range(len(numbers_B)):
            for attempt in range(1, _MOST_REPLACEMENTS + 1):
                one = self._load(int(numbers_B[row]) % len(self._reader), bad)
                if one is not None:
                    loaded.append(one)
                    break
                reserve = self._place_of_reserve(places_B[row], attempt, order.length)
                numbers_B[row] = order.numbers(np.array([reserve]))[0]
            else:
                raise InputError(
                    f"data: {_MOST_REPLACEMENTS} samples in a row are bad, lastly {bad[-1].shard} {bad[-1].key}: "
                    f"{bad[-1].reason}. Check the shards."
                )
        return numbers_B, loaded

    def _fetch_ahead(self, epoch: int, position: int) -> None:
        if not self._reader.is_remote:
            return
        order = self._epoch_order(epoch)
        window = order.window_of(position)
        if self._asked_ahead != (epoch, window):
            self._asked_ahead = epoch, window
            self._reader.fetch_ahead(order.ahead(position, self._config.remote.read_ahead) % len(self._reader))

    def _place_of_reserve(self, place: int, attempt: int, length: int) -> int:
        """Batch after batch; one further after each time round the epoch, so that every sample has its turn."""
        ahead = attempt * self._global_batch_size
        return place + ahead + ahead // length

    def _load(self, number: int, bad: list[Problem]) -> _Loaded | None:
        """Sample `number` and its picture, decoded if that is wanted; None, and a line in `bad`, if it is bad."""
        if number in self._cache:
            return self._cache[number]
        try:
            if self._image is None:
                return self._reader.read(number), None
            sample, picture = self._reader.read_picture(number, self._least)
        except BadSample as error:
            bad.append(error.problem)
            return None
        if self._config.cache:
            self._cache[number] = replace(sample, image=b""), picture
        return sample, picture

    def _finish_images(self, epoch: int, numbers_B: np.ndarray, loaded: list[_Loaded]) -> Any:
        if self._image is None:
            return [sample.image for sample, _ in loaded]
        pictures = [picture_CHW for _, picture_CHW in loaded if picture_CHW is not None]
        if self._augmentation is None:
            assert callable(self._image)
            return [self._image(to_picture(picture_CHW)) for picture_CHW in pictures]
        drawn_BP = self._augmentation.draw(self._seed, epoch, numbers_B)
        fitted = [
            self._augmentation.pixels(picture_CHW, drawn_P)
            for picture_CHW, drawn_P in zip(pictures, drawn_BP, strict=True)
        ]
        return self._augmentation.change(torch.stack(fitted), drawn_BP)

    def _choose_captions(self, epoch: int, numbers_B: np.ndarray, captions: list[list[str]]) -> list[str]:
        drawn_B = draws.uniform(self._seed, epoch, numbers_B, _CAPTION_DRAW)
        return [
            choices[pick_caption(len(choices), self._config.captions, drawn)]
            for choices, drawn in zip(captions, drawn_B, strict=True)
        ]

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            window = self._config.shuffle_window
            self._order = epoch, EpochOrder(self._reader.shares, self._seed, epoch, window)
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


def stream(
    shards: Spec | DataConfig,
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
        shards: a tar, a brace pattern, a folder, a list file (`@shards.txt`), an address of one of these, or a list of
            these; or a DataConfig, which has all that a training run's `data:` section can say.
        batch_size: rows of this process; the global batch is batch_size * world_size.
        image: an ImageSpec gives uint8 (B, C, H, W); a callable takes each RGB picture; None leaves the bytes.
        text: a callable on a caption; None leaves the strings.

    Each `iter(stream)` is one epoch of `Batch`. `state_dict()` after any batch, `load_state_dict()` on a new stream,
    and the new one gives the very next batch.

    Raises:
        InputError: shards missing, empty or no tar; fields that no sample has; fewer samples than one batch.
    """
    if not isinstance(shards, DataConfig):
        shards = DataConfig(train=str(shards) if isinstance(shards, str | Path) else [str(one) for one in shards])
    return Stream(
        open_training_set(shards),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        image=image,
        text=None if text is None else _EachText(text),
        config=shards,
    )


class _EachText:
    """A callable on one caption, made one on a list; stacked where it gives tensors. (A class: workers pickle it.)"""

    def __init__(self, function: Callable[[str], Any]) -> None:
        self._function = function

    def __call__(self, texts: list[str]) -> Any:
        values = [self._function(text) for text in texts]
        return torch.stack(values) if isinstance(values[0], torch.Tensor) else values
