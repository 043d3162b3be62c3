"""A stored encoder that torch computes: any layout with weights, or an open_clip model. No training code here.

Shapes: N inputs, d the encoder's dim.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmrl.errors import InputError
from mmrl.images.decode import decode_pixels, to_tensor, upright_rgb
from mmrl.images.image_spec import ImageSpec
from mmrl.inference.base import LoadedEncoder, Picture, check_list, not_loaded
from mmrl.model import bundle
from mmrl.model.towers import Side, Tokenizer
from mmrl.model.two_tower import Encoder
from mmrl.nesting import check_dims, cut


class TorchEncoder(LoadedEncoder):
    """Pictures and texts -> unit vectors of one dim, on a CPU or a GPU."""

    def __init__(
        self,
        encoders: dict[Side, Encoder],
        tokenise: Tokenizer | None,
        image_spec: ImageSpec,
        dim: int,
        nested_dims: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.dim = dim
        self.nested_dims = nested_dims
        self._image_spec = image_spec
        self._encoders = {side: encoder.eval().to(device) for side, encoder in encoders.items()}
        self._tokenise = tokenise
        self._device = device
        self._dtype = dtype

    @property
    def image_spec(self) -> ImageSpec:
        return self._image_spec

    def encode_images(self, images: Sequence[Picture], batch_size: int = 64) -> np.ndarray:
        chunks = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return self._encode(
            "image", (torch.stack([self.image_spec.pixels(_pixels(image)) for image in chunk]) for chunk in chunks)
        )

    def encode_pixels(self, pixels_NCHW: torch.Tensor, batch_size: int = 64) -> np.ndarray:
        return self._encode("image", pixels_NCHW.split(batch_size))

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        check_list(texts)
        tokenise = self._tokenise
        if tokenise is None:
            raise not_loaded("text")
        chunks = (list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size))
        return self._encode("text", (tokenise(chunk) for chunk in chunks))

    @torch.inference_mode()
    def _encode(self, side: Side, inputs: Iterable[torch.Tensor]) -> np.ndarray:
        if side not in self._encoders:
            raise not_loaded(side)
        rows = []
        for batch in inputs:
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                embedding = self._encoders[side](batch.to(self._device))
            rows.append(cut(embedding, self.dim).cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, self.dim), np.float32)


def open_torch(
    path: str | Path,
    dim: int | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    sides: Sequence[Side],
) -> TorchEncoder:
    """What `mmrl.load` returns for an encoder with weights.

    Raises:
        InputError: as `mmrl.load`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if str(path).startswith("open_clip:"):
        found = bundle.open_model(path)
        encoders: dict[Side, Encoder] = {side: getattr(found.model, side) for side in sides}
        tokenise, spec, full, nested = found.tokenise, found.image_spec, found.dim, found.nested_dims
    else:
        folder = bundle.find(path)
        manifest = bundle.read_manifest(folder)
        encoders = bundle.load_encoders(folder, manifest, bundle.read_weights(folder, manifest), sides)
        tokenise = bundle.load_tokenise(folder, manifest)
        spec = ImageSpec.from_json(manifest["image"])
        full, nested = manifest["dim"], tuple(manifest["nested_dims"])
    kept = full if dim is None else dim
    check_dims([kept], full, "dim")
    return TorchEncoder(
        encoders,
        tokenise if "text" in sides else None,
        spec,
        kept,
        bundle.kept_dims(nested, kept),
        device,
        dtype or torch.float32,
    )


def _pixels(image: Picture) -> torch.Tensor:
    if isinstance(image, Image.Image):
        return to_tensor(upright_rgb(image))
    try:
        return decode_pixels(image if isinstance(image, bytes) else Path(image).read_bytes())
    except (OSError, ValueError) as error:
        name = f"{len(image)} bytes" if isinstance(image, bytes) else image
        raise InputError(f"image {name}: {error}") from None
