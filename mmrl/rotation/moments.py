"""What a rotation is found from, in one pass and bounded memory: a set's second moments, and some of its vectors.

Two choices of the moments, and why:
- The vectors are made unit vectors first, since it is their directions that are compared: a long one would otherwise
  count more than a short one.
- Pictures and texts weigh one half each, however many texts a picture has: the same matrix serves both, and neither
  may be better kept because there is more of it.

Shapes: N pictures or texts, D the embedding's width.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrl.data.index import Problem
from mmrl.data.samples import SampleReader
from mmrl.data.sequential import WholeBatch, read_whole
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.model.bundle import Bundle
from mmrl.rotation.learned import Pairs

# The set is read in parts of so many neighbouring samples. They are the same whatever the number of processes.
PART = 256
# So many pictures' vectors are kept to learn from, for each number of the vector, and so many at most: 67 MB of 512-d,
# and as much for each of their texts.
PICTURES_PER_DIM, MOST_PICTURES = 64, 1 << 15


@dataclass(frozen=True)
class Moments:
    """What one pass finds, over all processes."""

    moment_DD: torch.Tensor
    """The mean of x xᵀ, half over pictures, half over texts: float64, on the CPU."""
    images: int
    texts: int
    bad: list[Problem]
    pairs: Pairs | None
    """Vectors of pictures spread evenly over the set, where they were asked for and any are good."""


class SecondMoment:
    """The mean of x xᵀ over unit rows x, in one pass, over all processes.

    The sums are kept in integers, which add up to the same bits in any order: any number of processes finds the same
    rotation. 2**-44 is their unit, so a part's sum is rounded less than float64 rounds a sum of a thousand such parts.
    """

    _UNIT = 2.0**-44
    _LOW_BITS = 32

    def __init__(self, dim: int, device: torch.device) -> None:
        self._high_DD = torch.zeros(dim, dim, dtype=torch.int64, device=device)
        self._low_DD = torch.zeros_like(self._high_DD)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, rows_ND: torch.Tensor) -> None:
        """Takes some rows in, of any length; fewer than 2**18 at a time."""
        assert len(rows_ND) < 1 << 18, "the sum would not fit into 63 bits"
        unit_ND = F.normalize(rows_ND.double(), dim=-1)
        sum_DD = (unit_ND.T @ unit_ND / self._UNIT).round().long()
        self._high_DD += sum_DD >> self._LOW_BITS
        self._low_DD += sum_DD & ((1 << self._LOW_BITS) - 1)
        self._count += len(rows_ND)

    def count(self) -> int:
        """The rows of all processes."""
        return int(comm.all_reduce_sum(self._count))

    def mean(self) -> torch.Tensor:
        """Over the rows of all processes: float64 (D, D)."""
        high_DD, low_DD = comm.all_reduce_sum(self._high_DD), comm.all_reduce_sum(self._low_DD)
        return (high_DD.double() * 2.0**self._LOW_BITS + low_DD.double()) * self._UNIT / self.count()


@torch.inference_mode()
def of_set(
    model: str,
    whole: Bundle,
    reader: SampleReader,
    samples: int | None,
    captions: int | None,
    console: Console,
    with_pairs: bool = False,
) -> Moments:
    """Embeds the set, divided over the processes.

    Args:
        model: how the user names it.
        samples: about so many, spread evenly over the set; all for None.
        captions: texts of each sample at most; all for None.
        with_pairs: keep vectors to learn from, too.

    Raises:
        InputError: a vector that is not finite, or nothing but bad samples.
    """
    world = comm.world()
    of_images, of_texts = (SecondMoment(whole.dim, world.device) for _ in range(2))
    bad = list(reader.problems) if world.is_rank_0 else []
    broken: list[str] = []
    kept: list[Pairs] = []
    with progress_bar(console) as progress:
        parts = own_parts(len(reader), samples)
        kept_parts = set(_spread(wanted_parts(len(reader), samples), -(-enough(whole.dim) // PART)))
        task = progress.add_task("embedding", total=min(len(parts) * PART, len(reader)))
        for (part, _), batch in zip(parts, read(whole, reader, parts, captions), strict=True):
            progress.advance(task, len(batch.keys) + len(batch.bad))
            bad += batch.bad
            if not batch.keys:
                continue
            image_ND, text_ND = embed(whole, batch)
            if not (image_ND.isfinite().all() and text_ND.isfinite().all()):
                broken.append(batch.keys[0])
                break
            of_images.add(image_ND)
            of_texts.add(text_ND)
            if with_pairs and part in kept_parts:
                kept.append(Pairs(image_ND.float().cpu(), text_ND.float().cpu(), batch.row_of_text_M, batch.group_B))
    shares = comm.all_gather_objects((broken, bad))
    broken = [key for share, _ in shares for key in share]
    bad = [problem for _, share in shares for problem in share]
    if broken:
        raise InputError(
            f"model: {model} gives vectors that are not finite, near {broken[0]}; its weights are damaged: train or "
            "export it again."
        )
    images, texts = of_images.count(), of_texts.count()
    if not images:
        raise InputError(f"shards: every sample is bad, such as {bad[0].shard} {bad[0].key}: {bad[0].reason}.")
    moment_DD = ((of_images.mean() + of_texts.mean()) / 2).cpu()
    return Moments(moment_DD, images, texts, bad, _gathered(kept) if with_pairs else None)


def enough(dim: int) -> int:
    """Pictures to learn a rotation of vectors of `dim` numbers from."""
    return min(PICTURES_PER_DIM * dim, MOST_PICTURES)


def wanted_parts(count: int, samples: int | None) -> list[int]:
    """The numbers of the parts that are read, by all processes together."""
    parts = range(-(-count // PART))
    return list(parts) if samples is None else _spread(parts, -(-samples // PART))


def own_parts(count: int, samples: int | None) -> list[tuple[int, int]]:
    """This process's share of them, each as (its number, how many the set has)."""
    wanted, world = wanted_parts(count, samples), comm.world()
    own = wanted[len(wanted) * world.rank // world.size : len(wanted) * (world.rank + 1) // world.size]
    return [(part, -(-count // PART)) for part in own]


def _spread(parts: Sequence[int], most: int) -> list[int]:
    """So many of them at most, evenly."""
    count = min(len(parts), most)
    return [parts[len(parts) * place // count] for place in range(count)]


def _gathered(kept: Sequence[Pairs]) -> Pairs | None:
    """Of all processes, in the order of the set; None where every sample of theirs is bad."""
    every = [one for share in comm.all_gather_objects(kept) for one in share]
    if not every:
        return None
    before = itertools.accumulate((len(one.image_ND) for one in every), initial=0)
    return Pairs(
        torch.cat([one.image_ND for one in every]),
        torch.cat([one.text_MD for one in every]),
        torch.cat([one.image_of_text_M + first for first, one in zip(before, every, strict=False)]),
        torch.cat([one.group_N for one in every]),
    )


def read(
    encoder: Bundle,
    reader: SampleReader,
    parts: Sequence[tuple[int, int]] | None = None,
    captions: int | None = None,
) -> Iterator[WholeBatch]:
    """The parts of a set, each a batch; all of them for None."""
    count = -(-len(reader) // PART)
    for part, of in [(part, count) for part in range(count)] if parts is None else parts:
        yield from read_whole(
            reader, encoder.image_spec, encoder.tokenise, batch_size=PART, captions=captions, rank=part, world_size=of
        )


def embed(encoder: Bundle, batch: WholeBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of the batch's pictures and texts: (N, D) each, not normalised."""
    device = comm.world().device
    return encoder.model.encode_image(batch.image_BCHW.to(device)), encoder.model.encode_text(batch.text_ML.to(device))


def progress_bar(console: Console) -> Progress:
    """Where there is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
