"""Degraded images as queries for their originals: recall by kind and severity of the degradation.

The degradation of an image depends on its key only, so every model and every run gets the same queries.

Shapes: C = 3 channels, H and W the image's own size in pixels; q queries, each with s degradations, N images, D the
embedding's width.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.data import draws
from mmrl.data.sequential import ImageReader
from mmrl.distributed import comm
from mmrl.evaluate.ranking.ranks import KS, rank_queries
from mmrl.evaluate.sets import Embedded
from mmrl.images.degrade import blur, downscale, jpeg
from mmrl.inference.evaluated import EvaluatedEncoder

_CROP_DRAW = 1 << 24
_BATCH_SIZE = 64


def _crop(image_CHW: Tensor, share: float, seed: int) -> Tensor:
    """A random crop with this share of the area and the image's aspect ratio."""
    height, width = image_CHW.shape[1:]
    crop_height, crop_width = (max(1, round(side * share**0.5)) for side in (height, width))
    y, x = (float(draws.uniform(seed, _CROP_DRAW, axis)) for axis in (0, 1))
    top, left = int(y * (height - crop_height + 1)), int(x * (width - crop_width + 1))
    return image_CHW[:, top : top + crop_height, left : left + crop_width]


# {kind: (function of image, severity and seed; what the severity is; severities from mild to severe)}
KINDS: dict[str, tuple[Callable[[Tensor, float, int], Tensor], str, tuple[float, ...]]] = {
    "jpeg": (lambda x_CHW, quality, _: jpeg(x_CHW, quality), "JPEG quality", (30, 10, 3)),
    "blur": (lambda x_CHW, share, _: blur(x_CHW, share), "radius as a share of the shorter side", (0.01, 0.025, 0.06)),
    "downscale": (lambda x_CHW, side, _: downscale(x_CHW, side), "shorter side in pixels", (96, 48, 24)),
    "crop": (_crop, "share of the area kept", (0.75, 0.5, 0.25)),
}


def degrade_image(image_CHW: Tensor, kind: str, severity: float, key: str) -> Tensor:
    """A degraded copy of an image, uint8 (C, H', W')."""
    return KINDS[kind][0](image_CHW, severity, int.from_bytes(_hash(key)))


def sample_rows(keys: Sequence[str], count: int) -> list[int]:
    """At most `count` rows, sampled by the hash of their keys; ascending."""
    by_hash = sorted(range(len(keys)), key=lambda row: _hash(keys[row]))
    return sorted(by_hash[:count])


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


@torch.inference_mode()
def score_degraded(
    reader: ImageReader,
    encoder: EvaluatedEncoder,
    embedded: Embedded,
    dims: Sequence[int],
    num_queries: int,
    ks: Sequence[int] = KS,
    on_images: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Scores degraded images as queries among all originals. All processes must call it; they divide the work.

    Args:
        embedded: the originals, from `sets.embed`.
        num_queries: at most this many images are degraded, in every kind and severity.
        on_images: called with the number of images after each batch.

    Returns: {"num_queries": …, "jpeg": {"what": "JPEG quality", "severities": {"30": {"512": {"R@1": …}}}}, …}.
    """
    world, device = comm.world(), next(encoder.model.parameters()).device
    keys, image_ND = embedded.keys, embedded.image_ND
    rows = sample_rows(keys, num_queries)
    settings = [(kind, severity) for kind, (_, _, severities) in KINDS.items() for severity in severities]
    first, last = (len(rows) * r // world.size for r in (world.rank, world.rank + 1))
    local = [image_ND.new_zeros(0, len(settings), image_ND.shape[1])]
    for start in range(first, last, _BATCH_SIZE):
        batch = rows[start : min(start + _BATCH_SIZE, last)]
        pixels: list[Tensor] = []  # all degradations of one image, then those of the next
        for row in batch:
            image_CHW = encoder.image_spec.opaque(reader.read_image(embedded.sample_indices[row])[1])
            pixels += [encoder.image_spec.pixels(degrade_image(image_CHW, kind, s, keys[row])) for kind, s in settings]
        chunks = [pixels[n : n + 4 * _BATCH_SIZE] for n in range(0, len(pixels), 4 * _BATCH_SIZE)]
        query_D = [encoder.model.encode_image(torch.stack(chunk).to(device)).float().cpu() for chunk in chunks]
        local.append(torch.cat(query_D).view(len(batch), len(settings), -1))
        if on_images:
            on_images(len(batch))
    query_qsD = torch.cat(comm.all_gather_objects(torch.cat(local)))
    row_q, row_N = torch.tensor(rows), torch.arange(len(image_ND))
    result: dict[str, Any] = {"num_queries": len(rows)}
    for index, (kind, severity) in enumerate(settings):
        ranks = rank_queries(query_qsD[:, index], image_ND, row_q, row_N, dims, over_ranks=True)
        entry = result.setdefault(kind, {"what": KINDS[kind][1], "severities": {}})
        entry["severities"][f"{severity:g}"] = {str(dim): ranks[dim].scores(ks) for dim in sorted(dims, reverse=True)}
    return result
