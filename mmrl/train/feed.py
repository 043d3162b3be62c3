"""The batches of each step. While a GPU computes a step, those of the next one are loaded and copied to it."""

from collections.abc import Iterator
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

    def __init__(self, stream: Stream, micro_batches: int, engine: Engine, is_ahead: bool | None = None) -> None:
        """Args:
        micro_batches: micro-batches of a step.
        is_ahead: load the next step's batches in `load_ahead` (default: on a GPU, since a CPU has nothing to overlap).
        """
        self._stream, self._count, self._engine = stream, micro_batches, engine
        on_gpu = engine.device.type == "cuda"
        self._is_ahead = on_gpu if is_ahead is None else is_ahead
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
                for x in (x for batch in batches for x in (batch.image, batch.text, batch.group, batch.caption)):
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
        rows = [x for batch in loaded for x in (batch.image, batch.text)]
        size = sum(part.nbytes for x in rows for part in (x if isinstance(x, tuple) else (x,)))
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            # Each tensor of DataLoader by itself: they are in page-locked memory, from which a copy does not wait.
            to_device = self._engine.to_device
            for i, batch in enumerate(loaded):
                caption = None if batch.caption is None else to_device(batch.caption)
                loaded[i] = replace(batch, group=to_device(batch.group), caption=caption)
                if size <= self._most_bytes:  # else the towers' forward pass copies one micro-batch after another
                    loaded[i] = replace(loaded[i], image=to_device(batch.image), text=to_device(batch.text))
        return loaded
