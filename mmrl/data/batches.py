"""Load one rank's rows of a batch: a pure function of (seed, epoch, position), the same in every worker.

Shapes: B rows of this rank, M captions, C channels, H and W the image size, L tokens of a text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from mmrl.errors import InputError, RunStopped
from mmrl.images.decode import to_pil
from mmrl.images.image_spec import ImageSpec

Tokenise = Callable[[list[str]], torch.Tensor]
ImageTransform = ImageSpec | Callable[[Image.Image], Any]
# A sample and its decoded image, uint8 (C, H, W) of the file's own size; None if images are not decoded.
_Loaded = tuple[Sample, torch.Tensor | None]
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
    """uint8 (B, C, H, W) if the stream has an ImageSpec; else a list of the callable's results, or of bytes."""
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

    @property
    def groups(self) -> torch.Tensor:
        """The `groups` of a loss: (B, 2), the group and the caption; or (B, 1), the group alone."""
        return torch.stack([self.group] if self.caption is None else [self.group, self.caption], dim=1)


class BatchDataset(Dataset[Batch | InputError | RunStopped]):
    """Maps (epoch, position of the global batch, micro-batch) to this rank's rows of that micro-batch."""

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
        self._rows_of_micro_batch = (np.arange(batch_size) + rank * batch_size).reshape(micro_batches, -1)
        self._global_batch_size = batch_size * world_size
        self._image, self._text = image, text
        self._augmentation = Augmentation(config.augment, image) if isinstance(image, ImageSpec) else None
        self._order: tuple[int, EpochOrder] | None = None
        self._min_size = self._augmentation.min_source_size() if self._augmentation and config.scaled_decode else None
        self._decoded: dict[int, _Loaded] = {}
        self._prefetched: tuple[int, set[int]] = 0, set()
        self.progress: torch.Tensor | None = None
        """Shared by all workers, (1,): changes with each sample that one of them loads."""

    def __getitem__(self, request: tuple[int, int, int]) -> Batch | InputError | RunStopped:
        """Loads a micro-batch. An error is returned, since DataLoader would wrap a raised one in a traceback, and lose
        a batch for which it finds no shared memory."""
        try:
            batch = self._load_batch(*request)
            return batch if get_worker_info() is None else batch.share_memory()
        except (InputError, RunStopped) as error:
            return error

    def _load_batch(self, epoch: int, position: int, micro_batch: int) -> Batch:
        bad: list[Problem] = []
        self._prefetch(epoch, position)
        indices_B, loaded = self._load_rows(epoch, position + self._rows_of_micro_batch[micro_batch], bad)
        texts = self._choose_captions(epoch, indices_B, [sample.captions for sample, _ in loaded])
        return Batch(
            keys=[sample.name for sample, _ in loaded],
            image=self._transform_images(epoch, indices_B, loaded),
            text=texts if self._text is None else self._text(texts),
            group=torch.tensor([sample.group for sample, _ in loaded]),
            caption=torch.tensor([caption_id(text) for text in texts]) if self._config.mask_equal_captions else None,
            bad=bad,
        )

    def _load_rows(self, epoch: int, positions_B: np.ndarray, bad: list[Problem]) -> tuple[np.ndarray, list[_Loaded]]:
        """The indices at these positions and their samples. A bad sample is replaced by that of the same row of a later
        batch, so no other rank is involved and the batch rarely holds a sample twice."""
        order, loaded = self._epoch_order(epoch), []
        indices_B = order.indices(positions_B)
        for row in range(len(indices_B)):
            tried: list[Problem] = []
            for attempt in range(1, _MAX_REPLACEMENTS + 1):
                one = self._load(int(indices_B[row]) % len(self._reader), tried)
                if one is not None:
                    loaded.append(one)
                    break
                replacement = self._replacement_position(positions_B[row], attempt, order.length)
                indices_B[row] = order.indices(np.array([replacement]))[0]
            else:
                raise InputError(
                    f"data: {_MAX_REPLACEMENTS} samples in a row are bad, the last one {tried[-1].shard} "
                    f"{tried[-1].key}: {tried[-1].reason}. Check the shards with mmrl check."
                )
            # Bad replacements are counted at their own rows: each bad sample counts once per epoch.
            bad += tried[:1]
        return indices_B, loaded

    def _prefetch(self, epoch: int, position: int) -> None:
        if not self._reader.is_remote:
            return
        order = self._epoch_order(epoch)
        if self._prefetched[0] != epoch:
            self._prefetched = epoch, set()
        windows = set(order.window_ids(position + self._rows_of_micro_batch.ravel()).tolist())
        for window in sorted(windows - self._prefetched[1]):
            indices = order.prefetch_indices(window, self._config.remote.read_ahead)
            self._reader.prefetch(indices % len(self._reader))
        self._prefetched[1].update(windows)

    def _replacement_position(self, position: int, attempt: int, length: int) -> int:
        """The same row, `attempt` batches later, and later anywhere in the epoch; shifted by one per round through the
        epoch, so that all samples are tried."""
        ahead = attempt * self._global_batch_size
        if attempt >= _DISTANT_FROM:
            ahead += int(attempt * _GOLDEN_RATIO * length)
        return position + ahead + ahead // length

    def _load(self, index: int, bad: list[Problem]) -> _Loaded | None:
        """Reads sample `index`, with its decoded image unless the stream yields bytes; None and an entry in `bad` if it
        is bad."""
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
        if self._config.cache:
            self._decoded[index] = replace(sample, image=b""), image_CHW
        return sample, image_CHW

    def _transform_images(self, epoch: int, indices_B: np.ndarray, loaded: list[_Loaded]) -> Any:
        if self._image is None:
            return [sample.image for sample, _ in loaded]
        images = [image_CHW for _, image_CHW in loaded if image_CHW is not None]
        if self._augmentation is None:
            assert callable(self._image)
            return [self._image(to_pil(image_CHW)) for image_CHW in images]
        params_BP = self._augmentation.random_params(self._seed, epoch, indices_B)
        resized = [
            self._augmentation.crop_and_resize(image_CHW, params_P)
            for image_CHW, params_P in zip(images, params_BP, strict=True)
        ]
        return self._augmentation.apply(torch.stack(resized), params_BP)

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
