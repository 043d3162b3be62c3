"""Second moments of a set's embeddings, and some of the embeddings themselves, in one pass with bounded memory.

- Embeddings are normalised first, since they are compared by cosine: otherwise long vectors would weigh more.
- Images and texts weigh one half each, however many texts an image has: one rotation serves both modalities.

Shapes: N images or texts, D the embedding's width.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console

from mmrl.data.index import Problem
from mmrl.data.samples import SampleReader
from mmrl.data.sequential import SequentialBatch, read_ranges
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.evaluate.sets import decoding_workers
from mmrl.model.bundle import Bundle
from mmrl.output.progress import progress_bar
from mmrl.rotation.learned import Pairs

# A set is read in chunks of this many consecutive samples, whatever the number of ranks.
CHUNK_SIZE = 256
# Images whose embeddings are kept to learn a rotation from: this many per dim, and at most MAX_IMAGES, which is 67 MB
# of 512-d embeddings, and as much again per text of an image.
IMAGES_PER_DIM, MAX_IMAGES = 64, 1 << 15


@dataclass(frozen=True)
class Moments:
    """The result of one pass over a set, over all ranks."""

    moment_DD: torch.Tensor
    """The mean of x xᵀ, half of it over images, half over texts: float64, on the CPU."""
    images: int
    texts: int
    bad: list[Problem]
    pairs: Pairs | None
    """Embeddings of images spread evenly over the set; None if not requested."""


class SecondMoment:
    """The mean of x xᵀ over unit rows x, in one pass, over all ranks.

    Sums are kept in integers, which add exactly in any order: the rotation does not depend on the number of ranks. The
    unit 2**-30 rounds a chunk's sum far less than float32 rounds its embeddings, and 2**33 rows fit.
    """

    _UNIT = 2.0**-30

    def __init__(self, dim: int, device: torch.device) -> None:
        self._sum_DD = torch.zeros(dim, dim, dtype=torch.int64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, rows_ND: torch.Tensor) -> None:
        unit_ND = F.normalize(rows_ND.double(), dim=-1)
        self._sum_DD += (unit_ND.T @ unit_ND / self._UNIT).round().long()
        self._count += len(rows_ND)

    def count(self) -> int:
        """The number of rows of all ranks."""
        return int(comm.all_reduce_sum(self._count))

    def mean(self) -> torch.Tensor:
        """The mean over the rows of all ranks: float64 (D, D)."""
        return comm.all_reduce_sum(self._sum_DD).double() * self._UNIT / self.count()


@torch.inference_mode()
def compute_moments(
    model: str,
    encoder: Bundle,
    reader: SampleReader,
    samples: int | None,
    captions: int | None,
    console: Console,
    with_pairs: bool = False,
) -> Moments:
    """Embeds a set, divided over the ranks, and returns its second moments.

    Args:
        model: the name for error messages.
        samples: use about this many samples, spread evenly over the set; None: all.
        captions: use at most this many texts per sample; None: all.
        with_pairs: also return embeddings to learn a rotation from.

    Raises:
        InputError: an embedding is not finite, or all samples are bad.
    """
    world = comm.world()
    of_images, of_texts = (SecondMoment(encoder.dim, world.device) for _ in range(2))
    bad = list(reader.problems) if world.is_rank_0 else []
    not_finite: list[str] = []
    kept: list[Pairs] = []
    all_chunks = spread_chunks(-(-len(reader) // CHUNK_SIZE), samples)
    chunks = all_chunks[len(all_chunks) * world.rank // world.size : len(all_chunks) * (world.rank + 1) // world.size]
    pair_images = max_images(encoder.dim) if with_pairs else 0
    pair_chunks = {all_chunks[i] for i in spread_chunks(len(all_chunks), pair_images)}
    with progress_bar(console) as progress:
        task = progress.add_task("embedding", total=min(len(chunks) * CHUNK_SIZE, len(reader)))
        batches = read_chunks(encoder, reader, chunks, captions, decoding_workers(world.device, encoder.image_spec))
        for chunk, batch in zip(chunks, batches, strict=True):
            progress.advance(task, len(batch.keys) + len(batch.bad))
            bad += batch.bad
            if not batch.keys:
                continue
            image_ND, text_ND = embed(encoder, batch)
            if not (image_ND.isfinite().all() and text_ND.isfinite().all()):
                not_finite.append(batch.keys[0])
                break
            of_images.add(image_ND)
            of_texts.add(text_ND)
            if chunk in pair_chunks:
                kept.append(Pairs(image_ND.float().cpu(), text_ND.float().cpu(), batch.row_of_text_M, batch.group_B))
    by_rank = comm.all_gather_objects((not_finite, bad))
    not_finite = [key for keys, _ in by_rank for key in keys]
    bad = [problem for _, problems in by_rank for problem in problems]
    if not_finite:
        raise InputError(
            f"model: {model} gives embeddings that are not finite, in the chunk of samples from {not_finite[0]}; its "
            "weights are damaged: train or export it again."
        )
    images, texts = of_images.count(), of_texts.count()
    if not images:
        raise InputError(f"shards: every sample is bad, e.g. {bad[0].shard} {bad[0].key}: {bad[0].reason}.")
    moment_DD = ((of_images.mean() + of_texts.mean()) / 2).cpu()
    return Moments(moment_DD, images, texts, bad, _gather_pairs(kept) if with_pairs else None)


def max_images(dim: int) -> int:
    """The maximum number of images to learn a rotation of `dim` dims from."""
    return min(IMAGES_PER_DIM * dim, MAX_IMAGES)


def spread_chunks(count: int, samples: int | None) -> list[int]:
    """The indices of as many of `count` chunks as hold this many samples, evenly spaced; None: of all."""
    chosen = count if samples is None else min(count, -(-samples // CHUNK_SIZE))
    return [count * i // chosen for i in range(chosen)]


def _gather_pairs(kept: Sequence[Pairs]) -> Pairs | None:
    """The pairs of all ranks, in the order of the set; None if there are none."""
    chunks = [one for of_rank in comm.all_gather_objects(kept) for one in of_rank]
    if not chunks:
        return None
    offsets = itertools.accumulate((len(one.image_ND) for one in chunks), initial=0)
    return Pairs(
        torch.cat([one.image_ND for one in chunks]),
        torch.cat([one.text_MD for one in chunks]),
        torch.cat([one.image_of_text_M + offset for offset, one in zip(offsets, chunks, strict=False)]),
        torch.cat([one.group_N for one in chunks]),
    )


def read_chunks(
    encoder: Bundle, reader: SampleReader, chunks: Sequence[int], captions: int | None = None, workers: int = 0
) -> Iterator[SequentialBatch]:
    """Reads the chunks of a set with these indices; one batch per chunk. `workers`: as of `read_sequential`."""
    count = -(-len(reader) // CHUNK_SIZE)
    ranges = [range(len(reader) * chunk // count, len(reader) * (chunk + 1) // count) for chunk in chunks]
    return read_ranges(reader, encoder.image_spec, encoder.tokenise, ranges, captions, workers)


def embed(encoder: Bundle, batch: SequentialBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the batch's images and texts, not normalised: (B, D) and (M, D)."""
    device = comm.world().device
    return encoder.model.encode_image(batch.image_BCHW.to(device)), encoder.model.encode_text(batch.text_ML.to(device))
