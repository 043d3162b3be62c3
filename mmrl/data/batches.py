"""Load one rank's rows of a batch: a pure function of (seed, epoch, position), the same in every worker.

Shapes: B rows of this rank, M captions, C channels, H and W the image size, L tokens of a text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from mmrl.data import draws
from mmrl.data.captions import caption_id
from mmrl.data.index import Problem
from mmrl.data.order import EpochOrder
from mmrl.data.samples import BadSample, Sample, SampleReader
from mmrl.data.sources import DataConfig
from mmrl.data.transforms import Augmentation
from mmrl.data.workers import unit_count
from mmrl.errors import InputError, RunStopped
from mmrl.images.decode import to_pil
from mmrl.images.image_spec import ImageSpec

Tokenise = Callable[[list[str]], torch.Tensor]
ImageTransform = ImageSpec | Callable[[Image.Image], Any]
_CAPTION_DRAW = 1 << 20
# Consecutive bad samples after which the shards are considered broken. The last ones are drawn from the whole epoch,
# since one bad shard can fill a shuffle window.
_MAX_REPLACEMENTS, _DISTANT_FROM, _GOLDEN_RATIO = 300, 16, 0.6180339887


@dataclass
class Batch:
    """One rank's rows of a batch, or of a micro-batch."""

    keys: list[str]
    """"shard/key" of each row."""
    image: Any
    """uint8 (B, C, H, W) if the stream has an ImageSpec; else a list of the callable's results, or of bytes. A tuple of
    consecutive rows, if several units of a batch are in page-locked memory: a GPU joins them faster."""
    text: Any
    """(B, L) token ids if the stream tokenises; else a list of str."""
    group: torch.Tensor
    """int64 (B,): rows with equal values show the same item; -1 is no group and matches nothing."""
    caption: torch.Tensor | None = None
    """int64 (B,): rows with equal values have equal captions; None without `data.mask_equal_captions`."""
    bad: list[Problem] = field(default_factory=list)
    """The samples that were skipped to fill these rows."""

    def share_memory(self) -> "Batch":
        """Moves the batch's tensors to shared memory, from which another process can take them without a copy.

        Raises:
            RunStopped: the shared memory is full.
        """
        images = self.image if isinstance(self.image, list) else [self.image]
        try:
            for x in (*images, self.text, self.group, self.caption):
                if isinstance(x, torch.Tensor):
                    x.share_memory_()
        except RuntimeError as error:
            raise RunStopped(
                f"data: a batch does not fit into the shared memory, /dev/shm ({error}); give the container more "
                "(docker run --shm-size=8g), or lower data.workers or train.micro_batch, then resume."
            ) from error
        return self

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; called by DataLoader."""
        image, text = (x.pin_memory() if isinstance(x, torch.Tensor) else x for x in (self.image, self.text))
        caption = None if self.caption is None else self.caption.pin_memory()
        return replace(self, image=image, text=text, group=self.group.pin_memory(), caption=caption)

    @classmethod
    def join(cls, units: Sequence["Batch"]) -> "Batch":
        """The rows of all these batches."""
        if len(units) == 1:
            return units[0]
        images = tuple(unit.image for unit in units)
        return cls(
            keys=[key for unit in units for key in unit.keys],
            image=images if _is_pinned(images[0]) else _join(images),
            text=_join([unit.text for unit in units]),
            group=_join([unit.group for unit in units]),
            caption=None if units[0].caption is None else _join([unit.caption for unit in units]),
            bad=[problem for unit in units for problem in unit.bad],
        )

    @property
    def groups(self) -> torch.Tensor:
        """The `groups` of a loss: (B, 2), the group and the caption; or (B, 1), the group alone."""
        return torch.stack([self.group] if self.caption is None else [self.group, self.caption], dim=1)


def _is_pinned(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_pinned()


def _join(parts: Sequence[Any]) -> Any:
    """Tensors concatenated, in page-locked memory if they are; or lists."""
    if not isinstance(parts[0], torch.Tensor):
        return [one for part in parts for one in part]
    return torch.cat(list(parts)).pin_memory() if _is_pinned(parts[0]) else torch.cat(list(parts))


class BatchDataset(Dataset[Batch | InputError | RunStopped]):
    """Maps (epoch, position of the global batch, unit) to that part of this rank's rows of the batch.

    The units of a batch are those of its first micro-batch, then those of the second one …
    """

    def __init__(
        self,
        reader: SampleReader,
        batch_size: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        seed: int,
        image: ImageTransform | None,
        text: Tokenise | None,
        config: DataConfig,
        window: int,
        lanes: int,
    ) -> None:
        """`window` and `lanes`: as for EpochOrder."""
        self._reader, self._seed, self._config = reader, seed, config
        self.window, self.lanes = window, lanes
        rows = np.arange(batch_size) + rank * batch_size
        self.units_of_micro_batch = unit_count(batch_size // micro_batches)
        self._rows_of_unit = [
            unit for part in np.split(rows, micro_batches) for unit in np.array_split(part, self.units_of_micro_batch)
        ]
        self._global_batch_size = batch_size * world_size
        self._image, self._text = image, text
        self._augmentation = Augmentation(config.augment, image) if isinstance(image, ImageSpec) else None
        self._order: tuple[int, EpochOrder] | None = None
        self._min_size = self._augmentation.min_source_size() if self._augmentation and config.scaled_decode else None
        self._decoded: dict[int, tuple[Sample, torch.Tensor]] = {}
        self._prefetched: tuple[int, set[int]] = 0, set()
        self.progress: torch.Tensor | None = None
        """Shared by all workers, (1,): changes with each sample that one of them loads."""

    def __getitem__(self, request: tuple[int, int, int]) -> Batch | InputError | RunStopped:
        """Loads a unit. An error is returned, since DataLoader would wrap a raised one in a traceback, and lose a batch
        for which it finds no shared memory."""
        try:
            unit = self._load_unit(*request)
            return unit if get_worker_info() is None else unit.share_memory()
        except (InputError, RunStopped) as error:
            return error

    def _load_unit(self, epoch: int, position: int, unit: int) -> Batch:
        self._prefetch(epoch, position)
        order, positions_B = self._epoch_order(epoch), position + self._rows_of_unit[unit]
        indices_B, bad = order.indices(positions_B), list[Problem]()
        params_BP = self._random_params(epoch, indices_B)
        samples, images = [], []
        for row, place in enumerate(positions_B):
            index, sample, image_CHW = self._load_row(order, int(place), int(indices_B[row]), bad)
            if index != indices_B[row]:
                indices_B[row] = index
                params_BP[row] = self._random_params(epoch, indices_B[row : row + 1])
            samples.append(sample)
            # At once, since an image of the file's own size takes far more memory.
            images.append(self._fit(sample, image_CHW, params_BP[row]))
        texts = self._choose_captions(epoch, indices_B, [sample.captions for sample in samples])
        return Batch(
            keys=[sample.name for sample in samples],
            image=images if self._augmentation is None else self._augmentation.apply(torch.stack(images), params_BP),
            text=texts if self._text is None else self._text(texts),
            group=torch.tensor([sample.group for sample in samples]),
            caption=torch.tensor([caption_id(text) for text in texts]) if self._config.mask_equal_captions else None,
            bad=bad,
        )

    def _load_row(
        self, order: EpochOrder, position: int, index: int, bad: list[Problem]
    ) -> tuple[int, Sample, torch.Tensor | None]:
        """The index, the sample and the decoded image of a row. A bad sample is replaced by that of the same row of a
        later batch, so no other rank is involved and the batch rarely holds a sample twice."""
        tried: list[Problem] = []
        for attempt in range(1, _MAX_REPLACEMENTS + 1):
            loaded = self._load(index % len(self._reader), tried)
            if loaded is not None:
                # Bad replacements are counted at their own rows: each bad sample counts once per epoch.
                bad += tried[:1]
                return index, *loaded
            replacement = self._replacement_position(position, attempt, order.length)
            index = int(order.indices(np.array([replacement]))[0])
        raise InputError(
            f"data: {_MAX_REPLACEMENTS} samples in a row are bad, the last one {tried[-1].shard} "
            f"{tried[-1].key}: {tried[-1].reason}. Check the shards with mmrl check."
        )

    def _prefetch(self, epoch: int, position: int) -> None:
        if not self._reader.is_remote:
            return
        order = self._epoch_order(epoch)
        if self._prefetched[0] != epoch:
            self._prefetched = epoch, set()
        rows = np.concatenate(self._rows_of_unit)
        windows = set(order.window_ids(position + rows).tolist())
        lanes = max(1, self.lanes * len(rows) // self._global_batch_size)
        ahead = self._config.remote.shards_ahead(lanes)
        wanted = [order.prefetch_indices(window, ahead) for window in sorted(windows - self._prefetched[1])]
        # The first shard of every lane, then the second one …
        indices = [one for some in zip_longest(*wanted) for one in some if one is not None]
        self._reader.prefetch(np.array(indices, np.int64) % len(self._reader))
        self._prefetched[1].update(windows)

    def _replacement_position(self, position: int, attempt: int, length: int) -> int:
        """The same row, `attempt` batches later, and later anywhere in the epoch; shifted by one per round through the
        epoch, so that all samples are tried."""
        ahead = attempt * self._global_batch_size
        if attempt >= _DISTANT_FROM:
            ahead += int(attempt * _GOLDEN_RATIO * length)
        return position + ahead + ahead // length

    def _load(self, index: int, bad: list[Problem]) -> tuple[Sample, torch.Tensor | None] | None:
        """Reads sample `index` and, unless the stream yields bytes, decodes its image to uint8 (C, H, W) of the file's
        own size; None and an entry in `bad` if it is bad."""
        if self.progress is not None:
            self.progress += 1
        if index in self._decoded:
            return self._decoded[index]
        try:
            if self._image is None:
                return self._reader.read(index), None
            sample, image_CHW = self._reader.read_image(index, self._min_size)
        except BadSample as error:
            bad.append(error.problem)
            return None
        sample = replace(sample, image=b"")
        if self._config.cache:
            image_CHW = image_CHW if self._augmentation is None else self._augmentation.kept(image_CHW)
            self._decoded[index] = sample, image_CHW
        return sample, image_CHW

    def _random_params(self, epoch: int, indices_B: np.ndarray) -> np.ndarray:
        """The numbers for the augmentation: (B, P); (B, 0) without one."""
        if self._augmentation is None:
            return np.empty((len(indices_B), 0))
        return self._augmentation.random_params(self._seed, epoch, indices_B)

    def _fit(self, sample: Sample, image_CHW: torch.Tensor | None, params_P: np.ndarray) -> Any:
        """A row of Batch.image, before the changes that are applied to whole units."""
        if image_CHW is None:
            return sample.image
        if self._augmentation is not None:
            return self._augmentation.crop_and_resize(image_CHW, params_P)
        assert callable(self._image)
        return self._image(to_pil(image_CHW))

    def _choose_captions(self, epoch: int, indices_B: np.ndarray, captions: list[list[str]]) -> list[str]:
        uniform_B = draws.uniform(self._seed, epoch, indices_B, _CAPTION_DRAW)
        return [
            choices[pick_caption(len(choices), self._config.captions, uniform)]
            for choices, uniform in zip(captions, uniform_B, strict=True)
        ]

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            shares, batch_size = self._reader.shares, self._global_batch_size
            self._order = epoch, EpochOrder(shares, self._seed, epoch, self.window, batch_size, self.lanes)
        return self._order[1]


def pick_caption(count: int, probabilities: list[float] | None, uniform: float) -> int:
    """Choose one of `count` captions with these probabilities; `uniform` is a random number in [0, 1)."""
    if probabilities is None:
        return int(uniform * count)
    last = len(probabilities) - 1
    shares = [probabilities[min(i, last)] / (max(count - last, 1) if i >= last else 1) for i in range(count)]
    if not sum(shares):
        return 0  # only captions that this sample lacks have a probability above 0
    return min(int(np.searchsorted(np.cumsum(shares) / sum(shares), uniform, side="right")), count - 1)
