"""`mmrl.load` for torch weights: an encoder of any layout with weights, or an open_clip model. No training code here.

Shapes: N inputs, C channels, H and W image size, d embedding dim.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrl.errors import InputError
from mmrl.images.decode import decode_pixels, to_tensor
from mmrl.images.image_spec import ImageSpec
from mmrl.images.upright import upright
from mmrl.inference.base import ImageInput, LoadedEncoder
from mmrl.inference.standalone import check_text_list, choose_towers, chunks, missing_tower
from mmrl.model import bundle
from mmrl.model.source import ModelSource, OpenClipModel
from mmrl.model.tokenizer import Tokenizer
from mmrl.model.towers import SIDES, Modality
from mmrl.model.two_tower import ProjectedTower
from mmrl.nesting import check_dims, truncate


class TorchEncoder(LoadedEncoder):
    """A `LoadedEncoder` that runs on torch, on a CPU or a GPU."""

    def __init__(
        self,
        towers: dict[Modality, ProjectedTower],
        available: Sequence[str],
        tokenise: Tokenizer,
        image_spec: ImageSpec,
        dim: int,
        nested_dims: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Args: available: the towers that the stored encoder has, of which `towers` are loaded."""
        self.dim = dim
        self.nested_dims = nested_dims
        self.towers = tuple(towers)
        self._available = available
        self._image_spec = image_spec
        self._towers = {modality: tower.eval().to(device) for modality, tower in towers.items()}
        self._tokenise = tokenise
        self._device = device
        self._dtype = dtype

    @property
    def image_spec(self) -> ImageSpec:
        return self._image_spec

    def encode_images(self, images: Sequence[ImageInput], batch_size: int = 64) -> np.ndarray:
        batches = chunks(images, batch_size)
        return self._encode(
            "image", (torch.stack([self.image_spec.pixels(_pixels(image)) for image in batch]) for batch in batches)
        )

    def encode_pixels(self, pixels_NCHW: torch.Tensor, batch_size: int = 64) -> np.ndarray:
        return self._encode("image", pixels_NCHW.split(batch_size))

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        check_text_list(texts)
        return self._encode("text", (self._tokenise(list(batch)) for batch in chunks(texts, batch_size)))

    @torch.inference_mode()
    def _encode(self, modality: Modality, inputs: Iterable[torch.Tensor]) -> np.ndarray:
        if modality not in self._towers:
            raise missing_tower(modality, self._available)
        embeddings = []
        for batch in inputs:
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                embedding = self._towers[modality](batch.to(self._device))
            embeddings.append(truncate(embedding, self.dim).cpu())
        return torch.cat(embeddings).numpy() if embeddings else np.zeros((0, self.dim), np.float32)


def open_torch(
    source: ModelSource, dim: int | None, device: str | torch.device | None, dtype: torch.dtype | None, towers: str
) -> TorchEncoder:
    """Opens an encoder with weights; see `mmrl.load` for the arguments. Raises InputError: as `mmrl.load`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(source, OpenClipModel):
        opened, available = bundle.open_model(source), SIDES
        loaded: dict[Modality, ProjectedTower] = {
            side: getattr(opened.model, side) for side in SIDES if towers in ("both", side)
        }
        tokenise, spec, full, nested = opened.tokenise, opened.image_spec, opened.dim, opened.nested_dims
    else:
        folder = source.folder
        manifest = bundle.read_manifest(folder)
        available = manifest["towers"]
        chosen: Any = choose_towers(folder, towers, available)
        loaded = bundle.load_towers(folder, manifest, bundle.read_weights(folder, manifest), chosen)
        tokenise = bundle.load_tokenizer(folder, manifest)
        spec = ImageSpec.from_json(manifest["image"])
        full, nested = manifest["dim"], tuple(manifest["nested_dims"])
    encoder_dim = full if dim is None else dim
    check_dims([encoder_dim], full, "dim")
    return TorchEncoder(
        loaded,
        available,
        tokenise,
        spec,
        encoder_dim,
        bundle.dims_up_to(nested, encoder_dim),
        device,
        dtype or torch.float32,
    )


def _pixels(image: ImageInput) -> torch.Tensor:
    try:
        if isinstance(image, Image.Image):
            return to_tensor(upright(image))
        return decode_pixels(image if isinstance(image, bytes) else Path(image).read_bytes())
    except Exception as error:  # of an opened image, Pillow's decoders raise many kinds
        name = f"{len(image)} bytes" if isinstance(image, bytes) else image
        raise InputError(f"image {name}: {error}") from None
