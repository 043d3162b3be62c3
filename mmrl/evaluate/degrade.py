"""The same picture of lesser quality, as a query for the original: recall by kind of damage and by its severity.

What is done to a picture is a function of its name alone, so that every model and every run is asked the same.

Shapes: C = 3 channels, H and W the picture's own size in pixels; q pictures, each with s damages, N images, D the
embedding's width.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import ImageFilter
from torch import Tensor

from mmrl.data import draws
from mmrl.data.sequential import PictureReader
from mmrl.distributed import comm
from mmrl.evaluate.ranking.ranks import KS, rank_queries
from mmrl.images.decode import decode_pixels, to_picture, to_tensor
from mmrl.images.image_spec import ImageSpec, resize

_CROP_DRAW = 1 << 24
_BATCH = 64


def _jpeg(picture_CHW: Tensor, quality: float, _: int) -> Tensor:
    file = io.BytesIO()
    to_picture(picture_CHW).save(file, "JPEG", quality=int(quality))
    return decode_pixels(file.getvalue())


def _blur(picture_CHW: Tensor, share: float, _: int) -> Tensor:
    radius = share * min(picture_CHW.shape[1:])
    return to_tensor(to_picture(picture_CHW).filter(ImageFilter.GaussianBlur(radius)))


def _downscale(picture_CHW: Tensor, side: float, _: int) -> Tensor:
    height, width = picture_CHW.shape[1:]
    scale = min(1.0, side / min(height, width))
    return resize(picture_CHW, max(1, round(height * scale)), max(1, round(width * scale)), "bilinear")


def _crop(picture_CHW: Tensor, share: float, name: int) -> Tensor:
    """A window of that share of the area, of the picture's shape, somewhere in it."""
    height, width = picture_CHW.shape[1:]
    tall, wide = (max(1, round(side * share**0.5)) for side in (height, width))
    down, right = (float(draws.uniform(name, _CROP_DRAW, axis)) for axis in (0, 1))
    top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
    return picture_CHW[:, top : top + tall, left : left + wide]


# Of each kind: what is done, what its number means, the numbers from mild to severe.
KINDS: dict[str, tuple[Callable[[Tensor, float, int], Tensor], str, tuple[float, ...]]] = {
    "jpeg": (_jpeg, "JPEG quality", (30, 10, 3)),
    "blur": (_blur, "radius as a share of the shorter side", (0.01, 0.025, 0.06)),
    "downscale": (_downscale, "shorter side in pixels", (96, 48, 24)),
    "crop": (_crop, "share of the area kept", (0.75, 0.5, 0.25)),
}


def degraded(picture_CHW: Tensor, kind: str, amount: float, key: str) -> Tensor:
    """A picture, uint8 (C, H, W), made worse."""
    name = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())
    return KINDS[kind][0](picture_CHW, amount, name)


def chosen_rows(keys: Sequence[str], most: int) -> list[int]:
    """The rows of at most `most` pictures, drawn by their names, ascending."""
    drawn = sorted(range(len(keys)), key=lambda row: hashlib.blake2b(keys[row].encode(), digest_size=8).digest())
    return sorted(drawn[:most])


@torch.inference_mode()
def score_degraded(
    reader: PictureReader,
    model: Any,
    image_spec: ImageSpec,
    numbers: Sequence[int],
    keys: Sequence[str],
    image_ND: Tensor,
    dims: Sequence[int],
    most: int,
    ks: Sequence[int] = KS,
    on_pictures: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Degraded pictures among all originals, each looking for its own; called on all processes, which divide the work.

    Args:
        numbers, keys, image_ND: of the originals, as `sets.embed` gives them.
        most: so many of the pictures are degraded, in every way and severity.
        on_pictures: told the number of pictures after each batch.

    Returns: {"num_queries": …, "jpeg": {"what": "JPEG quality", "severities": {"30": {"512": {"R@1": …}}}}, …}.
    """
    world, device = comm.world(), next(model.parameters()).device
    rows = chosen_rows(keys, most)
    settings = [(kind, amount) for kind, (_, _, amounts) in KINDS.items() for amount in amounts]
    first, last = (len(rows) * r // world.size for r in (world.rank, world.rank + 1))
    mine = [image_ND.new_zeros(0, len(settings), image_ND.shape[1])]
    for start in range(first, last, _BATCH):
        batch = rows[start : min(start + _BATCH, last)]
        # All severities of a picture, then those of the next.
        pixels = []
        for row in batch:
            _, picture_CHW = reader.read_picture(numbers[row])
            pixels += [image_spec.pixels(degraded(picture_CHW, kind, amount, keys[row])) for kind, amount in settings]
        query_D = [model.encode_image(torch.stack(part).to(device)).float().cpu() for part in _parts(pixels)]
        mine.append(torch.cat(query_D).view(len(batch), len(settings), -1))
        if on_pictures:
            on_pictures(len(batch))
    query_qsD = torch.cat(comm.all_gather_objects(torch.cat(mine)))
    row_q, row_N = torch.tensor(rows), torch.arange(len(image_ND))
    result: dict[str, Any] = {"num_queries": len(rows)}
    for place, (kind, amount) in enumerate(settings):
        ranks = rank_queries(query_qsD[:, place], image_ND, row_q, row_N, dims, over_ranks=True)
        entry = result.setdefault(kind, {"what": KINDS[kind][1], "severities": {}})
        entry["severities"][f"{amount:g}"] = {str(dim): ranks[dim].scores(ks) for dim in sorted(dims, reverse=True)}
    return result


def _parts(pixels: list[Tensor]) -> list[list[Tensor]]:
    return [pixels[start : start + 4 * _BATCH] for start in range(0, len(pixels), 4 * _BATCH)]
