"""The teacher of a training run: another model, live or by the embeddings that `mmrl embed` wrote of the training set.

Shapes: B images, C channels, H and W the image's size, L tokens, N stored rows, T the teacher's width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mmrl.data.arrow import arrow
from mmrl.data.captions import caption_id
from mmrl.data.samples import group_id
from mmrl.errors import InputError
from mmrl.inference.evaluated import OnnxModel, Tokenise, open_encoder, require_both_towers
from mmrl.model.two_tower import MatryoshkaCLIP, Precision
from mmrl.settings import Settings, machine_field

# The scale of a teacher of ONNX graphs, which do not store one: most CLIPs end near 100, at which softmaxes are sharp.
_SCALE_OF_GRAPHS = 50.0


class TeacherConfig(Settings):
    """Another model whose softmaxes over the global batch the run's own are drawn to at every dim, between images and
    texts. It replaces loss.distillation."""

    model: str
    """MODEL, in any form that `mmrl eval` takes."""
    weight: float = Field(default=1.0, gt=0)
    """Of KL(teacher's softmax || own softmax), which is added to each dim's loss."""
    embeddings: str | None = machine_field(None)
    """Output folder of `mmrl embed MODEL SHARDS OUT --texts` for the training shards. Default: the teacher encodes each
    batch, which costs its forward pass, and sees the augmented images."""
    logit_scale: float | None = Field(default=None, gt=0, le=100)
    """The multiplier of the teacher's similarities (default: the teacher's own)."""


class LiveTeacher:
    """Encodes the batches of a run: images that were resized and augmented for the student, and texts."""

    def __init__(self, config: TeacherConfig, device: torch.device, precision: Precision) -> None:
        """Raises InputError: there is no such model, it lacks a tower, or it cannot be opened."""
        require_both_towers(config.model, "teacher.model")
        encoder = open_encoder(config.model)
        self._model = encoder.model.to(device).eval().requires_grad_(False)
        self._spec = encoder.image_spec
        self._precision: Precision = precision
        self.tokenise: Tokenise = encoder.tokenise
        self.logit_scale = config.logit_scale or _scale_of(self._model)

    @torch.no_grad()
    def images(self, image_BCHW: Tensor, _keys: Sequence[str]) -> Tensor:
        """uint8 images of any size -> unit vectors (B, T), float32."""
        size = self._spec.height, self._spec.width
        if image_BCHW.shape[2:] != size:
            resized = F.interpolate(image_BCHW.float(), size, mode="bicubic", antialias=True)
            image_BCHW = resized.round_().clamp_(0, 255).to(torch.uint8)
        return self._encode("encode_image", image_BCHW)

    @torch.no_grad()
    def texts(self, text_BL: Tensor, _captions: Tensor | None) -> Tensor:
        """The teacher's token ids -> unit vectors (B, T), float32."""
        return self._encode("encode_text", text_BL)

    def _encode(self, name: str, x: Tensor) -> Tensor:
        if isinstance(self._model, MatryoshkaCLIP):
            with self._model.encoding_in(self._precision):
                rows = getattr(self._model, name)(x)
        else:
            rows = getattr(self._model, name)(x).to(x.device)
        return F.normalize(rows.float(), dim=-1)


class StoredTeacher:
    """Looks the embeddings of images up by their keys, and those of texts by their captions."""

    tokenise: Tokenise | None = None

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        """Raises InputError: a file is missing or was not written by `mmrl embed`, or no logit scale is given."""
        assert config.embeddings is not None
        self.logit_scale = config.logit_scale or _scale_of(open_encoder(config.model).model)
        self._folder, self._device = Path(config.embeddings), device
        self._images = _read(self._folder / "embeddings.parquet", "key", group_id)
        self._texts = _read(self._folder / "texts.parquet", "caption", caption_id)

    def images(self, _image_BCHW: Any, keys: Sequence[str]) -> Tensor:
        """The embeddings of these samples: (B, T), float32."""
        return self._look_up(self._images, np.array([group_id(key) for key in keys]), keys, "sample")

    def texts(self, _text_BL: Any, caption_B: Tensor | None) -> Tensor:
        """The embeddings of the captions with these ids: (B, T), float32."""
        assert caption_B is not None
        ids = caption_B.cpu().numpy()
        return self._look_up(self._texts, ids, ids.tolist(), "caption with the id")

    def _look_up(
        self, stored: tuple[np.ndarray, np.ndarray], ids_B: np.ndarray, names: Sequence[Any], what: str
    ) -> Tensor:
        sorted_ids_N, rows_NT = stored
        place_B = np.searchsorted(sorted_ids_N, ids_B).clip(max=len(sorted_ids_N) - 1)
        missing = np.flatnonzero(sorted_ids_N[place_B] != ids_B)
        if len(missing):
            raise InputError(
                f"teacher.embeddings: {self._folder} lacks the {what} {names[missing[0]]}; run mmrl embed "
                f"--texts on the training shards (data.train) again."
            )
        rows_BT = torch.from_numpy(rows_NT[place_B].astype(np.float32))
        return F.normalize(rows_BT.to(self._device), dim=-1)


Teacher = LiveTeacher | StoredTeacher


def open_teacher(config: TeacherConfig, device: torch.device, precision: Precision) -> Teacher:
    """Opens the teacher of a run. Raises InputError: the model or the embeddings cannot be opened, or the model lacks a
    tower."""
    return LiveTeacher(config, device, precision) if config.embeddings is None else StoredTeacher(config, device)


@torch.no_grad()
def _scale_of(model: MatryoshkaCLIP | OnnxModel) -> float:
    return float(model.logit_scale[-1]) if isinstance(model, MatryoshkaCLIP) else _SCALE_OF_GRAPHS


def _read(path: Path, name: str, id_of: Callable[[str], int]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a Parquet file's rows, ascending, (N,), and their vectors as float16, (N, T)."""
    pyarrow, parquet = arrow("teacher.embeddings")
    remedy = "give the output folder of mmrl embed MODEL SHARDS OUT --texts"
    try:
        with parquet.ParquetFile(path) as file:
            count, ids, vectors = file.metadata.num_rows, [], []
            for batch in file.iter_batches(columns=[name, "embedding"]):
                column = batch.column("embedding")
                width = column.type.list_size
                vectors.append(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width).astype(np.float16))
                ids += map(id_of, batch.column(name).to_pylist())
    except FileNotFoundError:
        raise InputError(f"teacher.embeddings: {path} does not exist; {remedy}.") from None
    except (pyarrow.ArrowException, OSError, KeyError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"teacher.embeddings: {path} has no column of vectors ({reason}); {remedy}.") from None
    if not count:
        raise InputError(f"teacher.embeddings: {path} has no rows; {remedy}.")
    order = np.argsort(np.array(ids), kind="stable")
    return np.array(ids)[order], np.concatenate(vectors)[order]
