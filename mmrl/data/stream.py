"""The training stream: shards -> batches that are a pure function of (seed, epoch, position).

World size, rank, workers and the point of a resume only decide which process loads which rows. Position p is the p-th
sample of the epoch; a worker needs only (epoch, position) to load its rows of a batch.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Sampler

from mmrl.data.batches import Batch, BatchDataset, ImageTransform, Tokenise
from mmrl.data.order import lane_count
from mmrl.data.parsing import BOTH, IMAGE
from mmrl.data.samples import SampleReader
from mmrl.data.shards import ShardSpec
from mmrl.data.sources import DataConfig, data_config, open_training_set
from mmrl.data.workers import LoaderMemory, LostBatchWatch, start_new_session
from mmrl.errors import InputError, RunStopped
from mmrl.images.image_spec import ImageSpec
from mmrl.settings import hyperparameters

# The default shuffle window: this many global batches, and at least this many samples.
_BATCHES_PER_WINDOW, _SMALLEST_WINDOW = 16, 16384
_ALWAYS_HASHED = {
    *(f"fields.{name}" for name in ("image", "text", "metadata", "captions", "group")),
    *("captions", "scaled_decode", "shuffle_window"),
    *(f"augment.{name}" for name in ("random_resized_crop", "flip", "rotate", "zoom", "shift", "fill", "grey")),
    *(f"augment.{name}" for name in ("brightness", "contrast", "saturation", "channel_gain")),
}
"""The keys of the first version that are part of a state's hash."""


class Stream:
    """An endless or per-epoch iterator of batches over a set of shards, resumable at any batch; see `stream`."""

    def __init__(
        self,
        reader: SampleReader,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        image: ImageTransform | None = None,
        text: Tokenise | None = None,
        config: DataConfig | None = None,
        pin_memory: bool = False,
        micro_batch: int | None = None,
        prefetch: int | None = None,
        lost_after_s: float = 30.0,
        second: frozenset[str] = frozenset(),
        sides: Collection[str] = BOTH,
    ) -> None:
        """`batch_size` and `micro_batch` count rows of this rank; with `micro_batch`, each batch is yielded in
        batch_size / micro_batch chunks. Workers load units of at most UNIT_ROWS rows and prepare `prefetch` of them
        each in advance (default: LoaderMemory.units_ahead). If they load no sample for `lost_after_s` seconds while a
        batch is awaited, that ends the stream with RunStopped. `second` names what the second members of pairs have in
        Batch.second, "image", "text" or both; without it there are none. `sides` names what batches have.
        """
        self.global_batch_size = batch_size * world_size
        if batch_size < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"batch_size, rank: {batch_size} and rank {rank} of {world_size} are invalid; batch_size must be at "
                "least 1, and rank at least 0 and less than world_size."
            )
        self.samples = sum(share.per_epoch for share in reader.shares)
        if self.samples < self.global_batch_size:
            raise InputError(
                f"batch_size: the shards hold {self.samples} samples, fewer than one global batch of "
                f"{self.global_batch_size}; lower train.batch_size or add shards."
            )
        self.seed, self.epoch, self.position = seed, 0, 0
        self._workers, self._pin_memory = num_workers, pin_memory
        micro_batches = batch_size // (micro_batch or batch_size)
        config = config or DataConfig()
        window, lanes = window_and_lanes(config, self.global_batch_size, self.samples)
        self._config = config
        self._dataset = BatchDataset(
            reader, batch_size, micro_batches, rank, world_size, seed, image, text, config, window, lanes, second, sides
        )
        self._reader, self._micro_batches = reader, micro_batches
        memory = LoaderMemory(1, batch_size, batch_size // micro_batches, 1)
        self._prefetch = (prefetch or memory.units_ahead(num_workers)) if num_workers else None
        self._lost_after_s = lost_after_s
        self._loader: DataLoader[Batch | InputError | RunStopped] | None = None
        self._sampler = _UnitSampler()

    @property
    def _data(self) -> str:
        """A fingerprint of the shards' names and numbers of samples and of all settings that affect the contents of
        batches."""
        more = {"second": sorted(self._dataset.second), "negatives": self._dataset.negatives_identity}
        more["sides"] = [] if set(self._dataset.sides) == BOTH else sorted(self._dataset.sides)
        fingerprint = _config_fingerprint(self._config, self._dataset.window, more)
        return f"{self._reader.layout}-{fingerprint}"

    @property
    def batches_per_epoch(self) -> int:
        """Global batches per epoch, equal on all ranks. The samples left over differ each epoch."""
        return self.samples // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Yields the current epoch from its current position to its end."""
        yield from self._batches(epochs=1)

    def forever(self) -> Iterator[Batch]:
        """Yields epoch after epoch without end; workers load across the epoch's end."""
        yield from self._batches(epochs=None)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was yielded: a small JSON dict, equal on all ranks.

        It contains no rank, world size or number of workers: these may differ on resume.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "samples": self.samples,
            "global_batch_size": self.global_batch_size,
            "lanes": self._dataset.lanes,
            "data": self._data,
            "tars": self._reader.fingerprint if self._reader.is_indexed else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was saved.

        Raises:
            InputError: the state is of another seed, global batch size or set of samples, so the order would differ.
        """
        if "lanes" not in state:  # saved before there were lanes
            state, self._loader = {**state, "lanes": 1}, None
            self._dataset.lanes, self._dataset.window = 1, self._config.shuffle_window or _SMALLEST_WINDOW
        for name, value in self.state_dict().items():
            if name in ("seed", "samples", "global_batch_size", "lanes") and state[name] != value:
                raise InputError(
                    f"stream: {name} was {state[name]} when this state was saved and is {value} now; resume with the "
                    "same shards, seed, global batch size and lanes."
                )
        tars, data = state.get("tars"), state["data"]
        if "tars" not in state:  # saved when all shards were indexed at the start
            tars, _, config = data.partition("-")
            data = f"{self._reader.layout}-{config}"
        ours = self.state_dict()["tars"]
        if data != self._data or (tars and ours and tars != ours):
            raise InputError(
                "stream: the shards, or the settings for shuffling, captions or augmentation, have changed since this "
                "state was saved; resume with the same data and settings."
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _batches(self, epochs: int | None) -> Iterator[Batch]:
        if self._loader is None:
            if self._workers:
                self._dataset.progress = torch.zeros(1, dtype=torch.int64).share_memory_()
            self._loader = DataLoader(
                self._dataset,
                sampler=self._sampler,
                batch_size=None,
                num_workers=self._workers,
                persistent_workers=self._workers > 0,
                prefetch_factor=self._prefetch,
                pin_memory=self._pin_memory,
                worker_init_fn=start_new_session,
            )
        step, usable = self.global_batch_size, self.batches_per_epoch * self.global_batch_size
        units = self._dataset.units_of_micro_batch
        self._sampler.start(self.epoch, self.position, step, usable, epochs, self._micro_batches * units)
        loaded, count = self._await_units(iter(self._loader)), 0
        while parts := list(islice(loaded, units)):
            count += 1
            if count % self._micro_batches == 0:
                self.position += step
            if self.position >= usable:
                self.epoch, self.position = self.epoch + 1, 0
            yield Batch.join(parts)

    def _await_units(self, batches: Any) -> Iterator[Batch]:
        """Yields the units of DataLoader's iterator; raises a worker's error, and RunStopped if one was killed or a
        batch is lost."""
        watch = LostBatchWatch(batches._workers if self._workers else [], self._progress, self._lost_after_s)
        try:
            with watch:
                while True:
                    with watch.awaiting():
                        batch = next(batches, None)
                    if batch is None:
                        return
                    if not isinstance(batch, Batch):
                        raise batch
                    yield batch
        except (InputError, RunStopped):
            self._end_workers(batches)
            raise
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error) and watch.error is None:
                raise
            self._end_workers(batches)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise watch.error or RunStopped(
                f"data: a DataLoader worker was killed ({reason}), most likely because memory ran out; lower "
                "data.workers or train.batch_size, then resume."
            ) from None

    def _end_workers(self, batches: Any) -> None:
        """Ends the workers now: the garbage collector would wait 5 s for each."""
        self._loader = None
        if self._workers:
            batches._shutdown_workers()

    def _progress(self) -> int | None:
        """A number that changes while a worker loads samples; None while a shard is downloaded, which has limits."""
        if self._reader.is_remote and self._reader.cache.is_downloading():
            return None
        return int(self._dataset.progress or 0)


def window_and_lanes(config: DataConfig, batch_size: int, samples: int) -> tuple[int, int]:
    """(samples of a shuffle window, number of lanes) of a stream of global batches, with `samples` per epoch."""
    window = config.shuffle_window or max(_SMALLEST_WINDOW, _BATCHES_PER_WINDOW * batch_size)
    return window, lane_count(batch_size, samples, window, config.lanes)


def _config_fingerprint(config: DataConfig, window: int, more: Mapping[str, Any] = MappingProxyType({})) -> str:
    """A hash of all settings that affect the contents of batches, and of `more` facts that are not empty."""
    values, defaults = {**hyperparameters(config), "shuffle_window": window}, hyperparameters(DataConfig())
    # `train` and `sources` are part of the reader's fingerprint, `lanes` of the state; others affect no image or text.
    apart = ("train", "sources", "lanes", "max_bad_fraction", "mask_equal_captions", "negatives_from")
    unused = () if IMAGE in more.get("second", ()) else ("augment.second",)
    unused += () if config.negatives else ("negatives", "fields.negatives")
    # Other keys count when they are set, so that states from before they existed stay equal.
    relevant = {
        name: value
        for name, value in values.items()
        if name not in apart and (name in _ALWAYS_HASHED or value != defaults.get(name, ...))
        if not name.startswith(unused)
    } | {f"stream.{name}": value for name, value in more.items() if value}
    return hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=6).hexdigest()


class _UnitSampler(Sampler[tuple[int, int, int]]):
    """Yields (epoch, position of the batch, unit) from a starting point on, for BatchDataset."""

    def start(self, epoch: int, position: int, step: int, usable: int, epochs: int | None, units: int) -> None:
        self._first, self._step, self._usable, self._units = (epoch, position), step, usable, units
        self._last_epoch = None if epochs is None else epoch + epochs - 1

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch, position = self._first
        while self._last_epoch is None or epoch <= self._last_epoch:
            for first in range(position, self._usable, self._step):
                yield from ((epoch, first, unit) for unit in range(self._units))
            epoch, position = epoch + 1, 0


def stream(
    shards: ShardSpec | DataConfig,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    image: ImageSpec | Callable[[Image.Image], Any] | None = None,
    text: Callable[[str], Any] | None = None,
) -> Stream:
    """Image-text batches from WebDataset shards, in a new order each epoch, resumable at any batch.

    Each `iter(stream)` is one epoch of `Batch`. To resume, save `state_dict()` after any batch and give it to
    `load_state_dict()` of a new stream, which continues with the next batch.

    Args:
        shards: a tar, a brace pattern, a folder, a list file (`@shards.txt`), a URL of one of these, a list of these,
            or a DataConfig, which has all keys of a training config's `data:` section.
        batch_size: rows of this rank; the global batch is batch_size * world_size.
        image: an ImageSpec for uint8 (B, C, H, W); a callable on an RGB Pillow image; None for the files' bytes.
        text: a callable on a caption; None for the strings.

    Raises:
        InputError: shards missing, empty or not tars; fields that no sample has; fewer samples than one batch.
    """
    config = data_config(shards)
    return Stream(
        open_training_set(config),
        batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        image=image,
        text=None if text is None else _MapTexts(text),
        config=config,
    )


class _MapTexts:
    """Applies a function to each caption and stacks the results if they are tensors. A class, so that it can be pickled
    for workers."""

    def __init__(self, function: Callable[[str], Any]) -> None:
        self._function = function

    def __call__(self, texts: list[str]) -> Any:
        values = [self._function(text) for text in texts]
        return torch.stack(values) if isinstance(values[0], torch.Tensor) else values
