"""Dynamic batching: texts and images of concurrent requests are encoded together.

One thread runs the encoder. While it encodes a batch, further inputs arrive and form the next one, so that batches grow
with the load and a lone request waits for nothing.

Shapes: D embedding dim.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np

from mmrl.inference.base import LoadedEncoder
from mmrl.inference.standalone import missing_tower
from mmrl.search.metrics import Metrics

Modality = Literal["text", "image"]
_MAX_BATCH: dict[Modality, int] = {"text": 64, "image": 16}  # fewer images: texts wait for them


class Batcher:
    """Encodes texts and image files of concurrent callers in one thread. Not bounded: its callers are."""

    def __init__(self, encoder: LoadedEncoder, metrics: Metrics) -> None:
        self._encoder, self._metrics = encoder, metrics
        self._thread = ThreadPoolExecutor(1, "encode")
        self._lock, self._arrivals = threading.Lock(), itertools.count()
        self._waiting: dict[Modality, deque[tuple[int, str | bytes, Future[np.ndarray]]]] = {
            "text": deque(),
            "image": deque(),
        }
        metrics.waiting = lambda: sum(map(self.waiting, self._waiting))

    def waiting(self, modality: Modality) -> int:
        """The number of inputs that wait to be encoded."""
        return len(self._waiting[modality])

    def submit(self, modality: Modality, inputs: Sequence[str | bytes]) -> list[Future[np.ndarray]]:
        """A future of each input's embedding, (D,) at the encoder's dim; its exception is that of the encoder. Raises
        InputError: the encoder has no tower for this modality."""
        if modality not in self._encoder.towers:
            raise missing_tower(modality, self._encoder.towers)
        futures = [Future[np.ndarray]() for _ in inputs]
        with self._lock:
            self._waiting[modality].extend(zip(self._arrivals, inputs, futures, strict=False))
        self._thread.submit(self._encode_waiting)
        return futures

    def encode(self, modality: Modality, value: str | bytes) -> np.ndarray:
        """The embedding of one text or image file: (D,). Waits for it; raises as the encoder."""
        return self.submit(modality, [value])[0].result()

    def _encode_waiting(self) -> None:
        while True:
            with self._lock:
                waiting_since: dict[Modality, int] = {
                    name: waiting[0][0] for name, waiting in self._waiting.items() if waiting
                }
                if not waiting_since:
                    return
                modality = min(waiting_since, key=waiting_since.__getitem__)
                waiting = self._waiting[modality]
                batch = [waiting.popleft()[1:] for _ in range(min(len(waiting), _MAX_BATCH[modality]))]
            batch = [(value, future) for value, future in batch if future.set_running_or_notify_cancel()]
            if not batch:
                continue
            began = time.perf_counter()
            vectors = self._encode(modality, [value for value, _ in batch])
            self._metrics.add("mmrl_encode_seconds_total", time.perf_counter() - began, modality=modality)
            self._metrics.add("mmrl_inputs_total", len(batch), modality=modality)
            self._metrics.add("mmrl_batches_total", modality=modality)
            for (_, future), vector_D in zip(batch, vectors, strict=True):
                if isinstance(vector_D, Exception):
                    future.set_exception(vector_D)
                else:
                    future.set_result(vector_D)

    def _encode(self, modality: Modality, batch: list[str | bytes]) -> list[np.ndarray | Exception]:
        """Each input's embedding, or the error of encoding it: a damaged image does not fail the rest of its batch."""
        encode = self._encoder.encode_texts if modality == "text" else self._encoder.encode_images
        try:
            return list(encode(batch))  # pyright: ignore[reportArgumentType]
        except Exception as error:
            return [error] if len(batch) == 1 else [self._encode(modality, [value])[0] for value in batch]
