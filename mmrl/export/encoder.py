"""A stored encoder in use: `mmrl.load` and what it returns. No training code is imported here.

Shapes: N inputs, d the encoder's dim.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from mmrl.decode import decode_pixels, to_tensor, upright_rgb
from mmrl.errors import InputError
from mmrl.image_spec import ImageSpec
from mmrl.model import bundle
from mmrl.model.towers import Side, TokeniseList
from mmrl.model.two_tower import Encoder
from mmrl.nesting import check_dims, cut

Picture = Image.Image | str | Path | bytes


class LoadedEncoder:
    """Pictures and texts -> unit vectors of one dim."""

    def __init__(
        self,
        encoders: dict[Side, Encoder],
        tokenise: TokeniseList | None,
        image_spec: ImageSpec,
        dim: int,
        nested_dims: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.dim = dim
        self.nested_dims = nested_dims
        self.image_spec = image_spec
        self._encoders = {side: encoder.eval().to(device) for side, encoder in encoders.items()}
        self._tokenise = tokenise
        self._device = device
        self._dtype = dtype

    def encode_images(self, images: Sequence[Picture], batch_size: int = 64) -> np.ndarray:
        """Pillow pictures, paths or file contents -> float32 (N, d), rows of length 1.

        Raises:
            InputError: a picture that cannot be read, named; the image tower was not loaded.
        """
        chunks = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return self._encode(
            "image", (torch.stack([self.image_spec.pixels(_pixels(image)) for image in chunk]) for chunk in chunks)
        )

    def encode_pixels(self, pixels_NCHW: torch.Tensor, batch_size: int = 64) -> np.ndarray:
        """uint8 (N, C, H, W), fitted by `image_spec.pixels` -> float32 (N, d), rows of length 1."""
        return self._encode("image", pixels_NCHW.split(batch_size))

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Texts -> float32 (N, d), rows of length 1. Longer texts than the tower takes are cut.

        Raises:
            InputError: one text given as a bare string; the text tower was not loaded.
        """
        if isinstance(texts, str):
            raise InputError(f"encode_texts: want a list of texts, got the single text {texts[:40]!r}; wrap it in [ ].")
        tokenise = self._tokenise
        if tokenise is None:
            raise InputError("encode_texts: only the image tower was loaded; load with towers='both' or 'text'.")
        chunks = (list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size))
        return self._encode("text", (tokenise(chunk) for chunk in chunks))

    @torch.inference_mode()
    def _encode(self, side: Side, inputs: Iterable[torch.Tensor]) -> np.ndarray:
        if side not in self._encoders:
            raise InputError(f"encode_{side}s: this tower was not loaded; load with towers='both' or {side!r}.")
        rows = []
        for batch in inputs:
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                embedding = self._encoders[side](batch.to(self._device))
            rows.append(cut(embedding, self.dim).cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, self.dim), np.float32)


def load(
    path: str | Path,
    dim: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    towers: Literal["both", "image", "text"] = "both",
) -> LoadedEncoder:
    """Opens an encoder for use, offline.

    Args:
        path: a run folder (its best checkpoint, else its last), a checkpoint, an exported bundle, or
            `open_clip:NAME[:PRETRAINED]`.
        dim: length of the vectors, at most the stored encoder's own, which is the default. Best one of the trained
            dims (`nested_dims`).
        device: 'cuda' or 'cpu'; a GPU is used where there is one.
        dtype: torch.bfloat16 or torch.float16 to compute in; float32 when left out. Vectors are float32 in any case.
        towers: 'image' or 'text' loads one tower alone, as online serving wants it.

    Raises:
        InputError: no encoder at `path`, a damaged one, a dim that it does not have.
    """
    if towers not in ("both", "image", "text"):
        raise InputError(f"towers: {towers!r}; want 'both', 'image' or 'text'.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sides: list[Side] = ["image", "text"] if towers == "both" else [towers]
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
    return LoadedEncoder(
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
