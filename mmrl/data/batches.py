"""Load one rank's rows of a batch: a pure function of (seed, epoch, position), the same in every worker.

Shapes: B rows of this rank, M captions, C channels, H and W the image size, L tokens of a text.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, islice, repeat, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from mmrl.data import draws
from mmrl.data.captions import caption_id, pick_caption, pick_other_caption
from mmrl.data.index import Problem
from mmrl.data.negatives import Negative, Negatives
from mmrl.data.order import EpochOrder
from mmrl.data.parsing import BOTH, IMAGE, TEXT
from mmrl.data.samples import BadSample, Sample, SampleReader
from mmrl.data.second import SecondMembers
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
    consecutive rows, if several units of a batch are in page-locked memory: a GPU joins them faster. None without
    images; `text` likewise."""
    text: Any
    """(B, L) token ids if the stream tokenises; else a list of str."""
    group: torch.Tensor
    """int64 (B,): rows with equal values show the same item; -1 is no group and matches nothing."""
    caption: torch.Tensor | None = None
    """int64 (B,): rows with equal values have equal captions; None without `data.mask_equal_captions`, or texts."""
    bad: list[Problem] = field(default_factory=list)
    """The samples that were skipped to fill these rows."""
    second: "Batch | None" = None
    """Row i is another image and/or text of the item of row i, with the same group; `keys` has the sample of the image,
    else that of the text. None if the stream has no second members, and in second members."""
    negatives: "Batch | None" = None
    """Hard negatives: rows i * n … i * n + n - 1 belong to row i. None if the stream has none."""
    valid_image: torch.Tensor | None = None
    valid_text: torch.Tensor | None = None
    """bool, of hard negatives: False for rows that only fill the tensors, with the pair's own image or text. None if
    there are no such rows at all."""

    def share_memory(self) -> "Batch":
        """Moves the batch's tensors to shared memory, from which another process can take them without a copy.

        Raises:
            RunStopped: the shared memory is full.
        """
        try:
            for one in fields(self):
                values = getattr(self, one.name)
                for x in values if isinstance(values, list) else [values]:
                    if isinstance(x, torch.Tensor):
                        x.share_memory_()
                    elif isinstance(x, Batch):
                        x.share_memory()
        except RuntimeError as error:
            raise RunStopped(
                f"data: a batch does not fit into the shared memory, /dev/shm ({error}); give the container more "
                "(docker run --shm-size=8g), or lower data.workers or train.micro_batch, then resume."
            ) from error
        return self

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; called by DataLoader."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{n: x.pin_memory() for n, x in values.items() if isinstance(x, torch.Tensor | Batch)})

    @classmethod
    def join(cls, units: Sequence["Batch"]) -> "Batch":
        """The rows of all these batches."""
        if len(units) == 1:
            return units[0]
        joined = {
            one.name: _join([getattr(unit, one.name) for unit in units]) for one in fields(cls) if one.name != "image"
        }
        images = tuple(unit.image for unit in units)
        return cls(image=images if _is_pinned(images[0]) else _join(images), **joined)

    @property
    def groups(self) -> torch.Tensor:
        """The `groups` of a loss: (B, 2), the group and the caption; or (B, 1), the group alone."""
        return torch.stack([self.group] if self.caption is None else [self.group, self.caption], dim=1)


def _is_pinned(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_pinned()


def _join(parts: Sequence[Any]) -> Any:
    """Tensors concatenated, in page-locked memory if they are; or lists, or batches; None if there are none."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Batch):
        return Batch.join(parts)
    if not isinstance(parts[0], torch.Tensor):
        return [one for part in parts for one in part]
    return torch.cat(list(parts)).pin_memory() if _is_pinned(parts[0]) else torch.cat(list(parts))


class _Loaded(NamedTuple):
    """A sample with its decoded images, uint8 (C, H, W) of the files' own size; None where there is no image or the
    stream yields bytes."""

    sample: Sample
    image_CHW: torch.Tensor | None = None
    second_CHW: torch.Tensor | None = None


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
        second: frozenset[str] = frozenset(),
        sides: Collection[str] = BOTH,
    ) -> None:
        """`window` and `lanes`: as for EpochOrder; `second` and `sides`: what second members and batches have, IMAGE,
        TEXT or both."""
        self._reader, self._seed, self._config, self.sides = reader, seed, config, sides
        self.window, self.lanes = window, lanes
        rows = np.arange(batch_size) + rank * batch_size
        self.units_of_micro_batch = unit_count(batch_size // micro_batches)
        self._rows_of_unit = [
            unit for part in np.split(rows, micro_batches) for unit in np.array_split(part, self.units_of_micro_batch)
        ]
        self._global_batch_size = batch_size * world_size
        self._image, self._text = image, text
        self._second = SecondMembers(reader, seed, second) if second else None
        self.second = second
        # Of texts alone, a question is compared with passages.
        self._negatives = Negatives(reader, seed, config, IMAGE not in sides) if config.negatives else None
        self.negatives_identity = self._negatives.identity if self._negatives else ""
        self._augmentations: list[Augmentation] = []
        """Of the images, and of second images."""
        if isinstance(image, ImageSpec):
            is_second = (False, True) if IMAGE in second else (False,)
            self._augmentations = [Augmentation(config.augment, image, one) for one in is_second]
        self._order: tuple[int, EpochOrder] | None = None
        self._min_size: tuple[int, int] | None = None
        if self._augmentations and config.scaled_decode:
            heights, widths = zip(*(one.min_source_size() for one in self._augmentations), strict=True)
            self._min_size = max(heights), max(widths)
        self._decoded: dict[int, _Loaded] = {}
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
        params_BP, second_params_BP = (self._random_params(epoch, indices_B, second) for second in (False, True))
        samples, images, seconds, second_images = [], [], list[Sample](), []
        for row, place in enumerate(positions_B):
            index, loaded = self._load_row(order, int(place), int(indices_B[row]), bad)
            if index != indices_B[row]:
                indices_B[row] = index
                params_BP[row] = self._random_params(epoch, indices_B[row : row + 1], False)
                second_params_BP[row] = self._random_params(epoch, indices_B[row : row + 1], True)
            samples.append(loaded.sample)
            if IMAGE in self.sides:
                # At once, since an image of the file's own size takes far more memory.
                images.append(self._fit(loaded.sample, loaded.image_CHW, params_BP[row]))
            if IMAGE in self.second:
                other, image_CHW, _ = self._load_second(order, int(place), index, loaded)
                seconds.append(other)
                second_images.append(self._fit(other, image_CHW, second_params_BP[row], second=True))
        texts = self._draw_captions(epoch, indices_B, samples) if TEXT in self.sides else []
        batch = Batch(
            keys=[sample.name for sample in samples],
            image=self._apply(images, params_BP) if images else None,
            text=self._tokenise(texts) if texts else None,
            group=torch.tensor([sample.group for sample in samples]),
            caption=self._caption_ids(texts) if texts else None,
            bad=bad,
        )
        if self._negatives is not None:
            batch.negatives = self._load_negatives(self._negatives, epoch, indices_B, samples, texts, images, params_BP)
        if self._second is None:
            return batch
        image = self._apply(second_images, second_params_BP, second=True) if second_images else None
        text, caption = None, batch.caption
        if TEXT in self.second:
            seconds, texts = self._second_texts(order, positions_B, indices_B, samples, seconds, texts)
            text, caption = self._tokenise(texts), self._caption_ids(texts)
        keys = [sample.name for sample in seconds]
        batch.second = Batch(keys=keys, image=image, text=text, group=batch.group, caption=caption)
        return batch

    def _draw_captions(self, epoch: int, indices_B: np.ndarray, samples: Sequence[Sample]) -> list[str]:
        """The text of each row."""
        uniform_B = draws.uniform(self._seed, epoch, indices_B, _CAPTION_DRAW)
        return [
            one.captions[pick_caption(len(one.captions), self._config.captions, uniform)]
            for one, uniform in zip(samples, uniform_B.tolist(), strict=True)
        ]

    def _load_second(self, order: EpochOrder, position: int, index: int, own: _Loaded) -> _Loaded:
        """The second sample of a row and its decoded image: the row's own sample with its second image, if it has one
        or if its group has no other usable sample."""
        assert self._second is not None
        is_bytes = self._image is None and IMAGE in self.second and own.sample.second_image
        if own.second_CHW is not None or is_bytes:
            return _Loaded(replace(own.sample, image=own.sample.second_image), own.second_CHW)
        for other in self._second.candidates(index, order, position):
            # A bad one is not counted here but at its own row: each bad sample counts once per epoch.
            if (loaded := self._load(other, [], with_image=IMAGE in self.second)) is not None:
                return loaded
        return own

    def _second_texts(
        self,
        order: EpochOrder,
        positions_B: np.ndarray,
        indices_B: np.ndarray,
        samples: Sequence[Sample],
        seconds: Sequence[Sample],
        texts: Sequence[str],
    ) -> tuple[list[Sample], list[str]]:
        """The second samples and texts of the rows, given the drawn texts; `seconds` are loaded already with images."""
        assert self._second is not None
        chosen, second_texts = [], []
        for row, uniform in enumerate(self._second.uniform(order.epoch, indices_B).tolist()):
            sample, text, probabilities = samples[row], texts[row], self._config.captions
            other = pick_other_caption(sample.captions, text, probabilities, uniform)
            if sample.second_text:
                other = sample.second_text
            if seconds:
                sample = seconds[row]
            elif other is None:
                sample = self._load_second(order, int(positions_B[row]), int(indices_B[row]), _Loaded(sample)).sample
            if other is None:
                other = pick_other_caption(sample.captions, text, probabilities, uniform)
            chosen.append(sample)
            second_texts.append(other or text)
        return chosen, second_texts

    def _load_negatives(
        self,
        negatives: Negatives,
        epoch: int,
        indices_B: np.ndarray,
        samples: Sequence[Sample],
        texts: Sequence[str],
        images: Sequence[Any],
        params_BP: np.ndarray,
    ) -> Batch:
        """Batch.negatives, given the pairs and their images before `_apply`."""
        with_images = self._config.negatives_images
        rows, chosen, params = [], [], []
        for row, (index, sample) in enumerate(zip(indices_B.tolist(), samples, strict=True)):
            found = negatives.draw(epoch, index, sample, lambda other: self._load(other, [], with_images))
            for one in islice(chain(found, repeat(None)), self._config.negatives):
                image, params_P = images[row] if with_images else None, params_BP[row]
                if with_images and one is not None and one.sample is not None:
                    params_P = self._random_params(epoch, np.array([one.index]), False)[0]
                    image = self._fit(one.sample, one.image_CHW, params_P)
                rows.append((one or Negative(sample.name, texts[row] if texts else "", sample.group), one))
                chosen.append(image)
                params.append(params_P)
        drawn = [one.text for one, _ in rows]
        has_image = torch.tensor([one is not None and one.sample is not None for _, one in rows])
        return Batch(
            keys=[one.key for one, _ in rows],
            image=self._apply(chosen, np.stack(params)) if with_images else None,
            text=self._tokenise(drawn) if texts else None,
            group=torch.tensor([one.group for one, _ in rows]),
            caption=self._caption_ids(drawn) if texts else None,
            valid_image=has_image if with_images else None,
            valid_text=torch.tensor([one is not None for _, one in rows]) if texts else None,
        )

    def _load_row(self, order: EpochOrder, position: int, index: int, bad: list[Problem]) -> tuple[int, _Loaded]:
        """The index and the sample of a row. A bad sample is replaced by that of the same row of a
        later batch, so no other rank is involved and the batch rarely holds a sample twice."""
        tried: list[Problem] = []
        for attempt in range(1, _MAX_REPLACEMENTS + 1):
            loaded = self._load(index % len(self._reader), tried, IMAGE in self.sides)
            if loaded is not None:
                # Bad replacements are counted at their own rows: each bad sample counts once per epoch.
                bad += tried[:1]
                return index, loaded
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

    def _load(self, index: int, bad: list[Problem], with_image: bool = True) -> _Loaded | None:
        """Reads sample `index` and, unless the stream yields bytes, decodes its image, and its second one if second
        members have images; None and an entry in `bad` if it is bad."""
        if self.progress is not None:
            self.progress += 1
        if index in self._decoded:
            return self._decoded[index]
        try:
            if self._image is None or not with_image:
                return _Loaded(self._reader.read(index, with_image))
            sample, image_CHW = self._reader.read_image(index, self._min_size)
            second_CHW = None
            if IMAGE in self.second and sample.second_image:
                second_CHW = self._reader.decode(index, sample.second_image, self._min_size)
        except BadSample as error:
            bad.append(error.problem)
            return None
        sample = replace(sample, image=b"", second_image=b"")
        if self._config.cache:
            kept = [one.kept(image_CHW) for one in self._augmentations]
            # All of it if any needs that.
            image_CHW = kept[0] if kept and all(one is not image_CHW for one in kept) else image_CHW
            if second_CHW is not None and self._augmentations:
                second_CHW = self._augmentations[-1].kept(second_CHW)
            self._decoded[index] = _Loaded(sample, image_CHW, second_CHW)
        return _Loaded(sample, image_CHW, second_CHW)

    def _random_params(self, epoch: int, indices_B: np.ndarray, second: bool) -> np.ndarray:
        """The numbers for the augmentation: (B, P); (B, 0) without one."""
        if len(self._augmentations) <= second:
            return np.empty((len(indices_B), 0))
        return self._augmentations[second].random_params(self._seed, epoch, indices_B)

    def _fit(self, sample: Sample, image_CHW: torch.Tensor | None, params_P: np.ndarray, second: bool = False) -> Any:
        """A row of Batch.image, before the changes that are applied to whole units."""
        if image_CHW is None:
            return sample.image
        if self._augmentations:
            return self._augmentations[second].crop_and_resize(image_CHW, params_P)
        assert callable(self._image)
        return self._image(to_pil(image_CHW))

    def _apply(self, images: list[Any], params_BP: np.ndarray, second: bool = False) -> Any:
        """Batch.image: the rows with the changes that are applied to whole units."""
        return self._augmentations[second].apply(torch.stack(images), params_BP) if self._augmentations else images

    def _tokenise(self, texts: list[str]) -> Any:
        """Batch.text."""
        return texts if self._text is None else self._text(texts)

    def _caption_ids(self, texts: list[str]) -> torch.Tensor | None:
        """Batch.caption."""
        return torch.tensor([caption_id(text) for text in texts]) if self._config.mask_equal_captions else None

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            shares, batch_size = self._reader.shares, self._global_batch_size
            self._order = epoch, EpochOrder(shares, self._seed, epoch, self.window, batch_size, self.lanes)
        return self._order[1]
