"""The batches of each step. While a GPU computes a step, those of the next one are loaded and copied to it."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from mmrl.data.batches import Batch
from mmrl.data.stream import Stream
from mmrl.engine.engine import Engine


class BatchFeed:
    """Takes the micro-batches of each step from a stream, one step ahead on a GPU."""

    def __init__(self, stream: Stream, micro_batches: int, engine: Engine) -> None:
        """`micro_batches`: micro-batches of a step."""
        self._stream, self._count, self._engine = stream, micro_batches, engine
        on_gpu = engine.device.type == "cuda"
        self._is_ahead = on_gpu  # a CPU has nothing to overlap
        self._copies = torch.cuda.Stream(engine.device) if on_gpu else None
        self._most_bytes = torch.cuda.get_device_properties(engine.device).total_memory // 64 if on_gpu else 0
        self._batches: Iterator[Batch] | None = None
        self._next: list[Batch] = []
        self._before: dict[str, int] = {}  # the stream's position before the batches of `_next`

    def state_dict(self) -> dict[str, Any]:
        """The stream's state after the last step that was taken; batches loaded ahead do not count."""
        return self._stream.state_dict() | self._before

    @property
    def epoch(self) -> int:
        """The epoch of this state."""
        return self._before.get("epoch", self._stream.epoch)

    def take(self) -> list[Batch]:
        """The micro-batches of the next step."""
        if self._batches is None:
            self._batches = self._stream.forever()
        with self._engine.timer.phase("data"):
            batches = self._next or self._load(self._batches)
            self._next, self._before = [], {}
            if self._copies is not None:
                computing = torch.cuda.current_stream(self._engine.device)
                computing.wait_stream(self._copies)
                for x in (x for batch in batches for part in _parts(batch) for x in vars(part).values()):
                    if isinstance(x, torch.Tensor) and x.is_cuda:
                        x.record_stream(computing)  # its memory is not reused for a copy before the step is computed
            return batches

    def load_ahead(self) -> None:
        """Loads the next step's batches, and copies them to the GPU next to what it computes."""
        if not self._is_ahead or self._batches is None:
            return
        with self._engine.timer.phase("data"):
            self._before = {"epoch": self._stream.epoch, "position": self._stream.position}
            self._next = self._load(self._batches)

    def _load(self, batches: Iterator[Batch]) -> list[Batch]:
        loaded = list(islice(batches, self._count))
        rows = [x for batch in loaded for part in _parts(batch) for x in (part.image, part.text) if x is not None]
        size = sum(part.nbytes for x in rows for part in (x if isinstance(x, tuple) else (x,)))
        # Else the towers' forward pass copies one micro-batch after another.
        names = (*_SMALL, *(("image", "text") if size <= self._most_bytes else ()))
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            return [self._on_device(batch, names) for batch in loaded]

    def _on_device(self, batch: Batch, names: Sequence[str]) -> Batch:
        """The batch with these tensors on the device. Each tensor of DataLoader by itself: they are in page-locked
        memory, from which a copy does not wait."""
        given = {name: getattr(batch, name) for name in names}
        moved: dict[str, Any] = {name: self._engine.to_device(x) for name, x in given.items() if x is not None}
        moved |= {name: self._on_device(part, names) for name in _MORE if (part := getattr(batch, name)) is not None}
        return replace(batch, **moved)


_SMALL, _MORE = ("group", "caption", "valid_image", "valid_text"), ("second", "negatives")


def _parts(batch: Batch) -> list[Batch]:
    """The batch, its second members and its hard negatives."""
    return [batch, *(part for name in _MORE if (part := getattr(batch, name)) is not None)]
