"""An encoder of ONNX graphs: pictures and texts -> unit vectors, without torch and without mmrl.

This file goes along with every ONNX export as encoder.py. It needs Python 3.10, numpy, Pillow, tokenizers and
onnxruntime:

    from encoder import Encoder

    encoder = Encoder("FOLDER")
    query = encoder.encode_texts(["red running shoes"])
    shelf = encoder.encode_images(["a.jpg", "b.jpg"])
    print(shelf @ query.T)

The weights of image.onnx are in image.onnx.data, beside it, and may stay mapped from there: replace a folder that is in
use by renaming another, never in place.

Shapes: N inputs, d the vectors' length, H and W the graph's picture size, L tokens.
"""

import hashlib
import html
import io
import json
import string
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

Picture = Image.Image | str | Path | bytes
# A picture of more pixels is refused, not decoded: a small file can unfold to any size.
MAX_PIXELS = 64_000_000
# Named, because Pillow would also open formats that start other programs, such as EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Encoder:
    """The towers of one folder, each as an onnxruntime session."""

    def __init__(
        self,
        folder: str | Path,
        dim: int | None = None,
        towers: str = "both",
        variant: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Opens the graphs after a check of their hashes.

        Args:
            dim: vectors are cut to their first `dim` numbers and renormalised; whole when left out.
            towers: 'both', 'image' or 'text'.
            variant: 'fp32', or 'fp16' or 'int8' where they were exported; the manifest's default when left out.
            device: 'cpu' or 'cuda'.
            threads: of each session; onnxruntime's own choice when left out.

        Raises:
            ValueError: no such folder, variant or dim; a file is missing or is not what the manifest says.
        """
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.graphs: dict[str, Any] = self.manifest["graphs"]
        self.variant = variant or self.graphs["default"]
        if self.variant not in self.graphs["image"]:
            raise ValueError(
                f"variant: {self.folder} has no {self.variant!r}; it has {', '.join(self.graphs['image'])}."
            )
        full = self.manifest["dim"]
        self.dim = full if dim is None else dim
        if not 1 <= self.dim <= full:
            raise ValueError(f"dim: {self.dim} is out of range; this embedding has dims 1 to {full}.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        self._sessions = {
            side: self._session(self.graphs[side][self.variant], options, device)
            for side in ("image", "text")
            if towers in ("both", side)
        }
        self._tokenizer: Tokenizer | None = None
        if "text" in self._sessions:
            self._tokenizer = Tokenizer.from_file(str(self._checked(self.graphs["tokenizer"])))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.manifest["tokenizer"]["context_length"])

    def encode_images(self, images: Sequence[Picture], batch_size: int = 64) -> np.ndarray:
        """Pillow pictures, paths or file contents -> float32 (N, d), rows of length 1.

        Raises:
            ValueError: a picture that cannot be read, named; the image tower was not loaded.
        """
        return self._encode("image", _chunks(images, batch_size), lambda chunk: np.stack([*map(self.pixels, chunk)]))

    def encode_pixels(self, pixels_NCHW: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """uint8 (N, C, H, W), fitted as `pixels` does -> float32 (N, d), rows of length 1."""
        return self._encode("image", _chunks(pixels_NCHW, batch_size), np.asarray)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Texts -> float32 (N, d), rows of length 1. Longer texts than the tower takes are cut.

        Raises:
            ValueError: one text given as a bare string; the text tower was not loaded.
        """
        if isinstance(texts, str):
            raise ValueError(f"encode_texts: want a list of texts, got the single text {texts[:40]!r}; wrap it in [ ].")
        return self._encode("text", _chunks(texts, batch_size), self.tokenise)

    def encode_tokens(self, tokens_NL: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """int64 (N, L) of `tokenise` -> float32 (N, d), rows of length 1."""
        return self._encode("text", _chunks(tokens_NL, batch_size), np.asarray)

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> int64 (N, L): L is the longest text's where the graph takes any length, else the tower's."""
        if self._tokenizer is None:
            raise _not_loaded("text")
        rows = [one.ids for one in self._tokenizer.encode_batch([clean(text, self.graphs["clean"]) for text in texts])]
        longest = max(map(len, rows)) if self.graphs["any_length"] else self.manifest["tokenizer"]["context_length"]
        tokens_NL = np.full((len(rows), longest), self.graphs["pad_id"], np.int64)
        for number, row in enumerate(rows):
            tokens_NL[number, : len(row)] = row
        if self.graphs.get("zero_id") is not None:
            tokens_NL[tokens_NL == self.graphs["zero_id"]] = 0
        return tokens_NL

    def pixels(self, picture: Picture) -> np.ndarray:
        """A picture -> uint8 (C, H, W): upright, RGB, fitted to the graph's size."""
        fitted = _fitted(_opened(picture), self.manifest["image"])
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))

    def _encode(self, side: str, chunks: Iterable[Any], prepare: Callable[[Any], np.ndarray]) -> np.ndarray:
        session = self._sessions.get(side)
        if session is None:
            raise _not_loaded(side)
        place = session.get_inputs()[0]
        rows = [np.zeros((0, self.dim), np.float32)]
        for chunk in chunks:
            inputs = prepare(chunk)
            if side == "image" and place.type == "tensor(float)":  # the graph leaves mean and deviation to us
                mean, std = (
                    np.array(self.manifest["image"][name], np.float32)[:, None, None] for name in ("mean", "std")
                )
                inputs = (inputs.astype(np.float32) / 255 - mean) / std
            vectors_Nd = np.asarray(session.run(None, {place.name: inputs})[0])
            if self.dim < vectors_Nd.shape[1]:
                vectors_Nd = vectors_Nd[:, : self.dim]
                vectors_Nd = vectors_Nd / np.maximum(np.linalg.norm(vectors_Nd, axis=1, keepdims=True), 1e-12)
            rows.append(vectors_Nd)
        return np.concatenate(rows)

    def _session(self, name: str, options: Any, device: str) -> onnxruntime.InferenceSession:
        providers = ["CPUExecutionProvider"]
        if device != "cpu":
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                raise ValueError(
                    f"device: this onnxruntime has no {device!r}; pip install onnxruntime-gpu, or use 'cpu'."
                )
            providers.insert(0, "CUDAExecutionProvider")
        graph = self._checked(name)
        if f"{name}.data" in self.manifest["files"]:  # its weights, which onnxruntime finds beside it
            self._checked(f"{name}.data")
        try:
            return onnxruntime.InferenceSession(graph, options, providers=providers)
        except Exception as error:  # onnxruntime's kinds have no base of their own
            raise ValueError(f"{graph}: onnxruntime cannot open it: {' '.join(str(error).split())}") from error

    def _checked(self, name: str) -> Path:
        """A file of the folder, if it is what the manifest was written for."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{self.folder / 'manifest.json'} names {name!r}, which is outside its folder.")
        path, digest = self.folder / name, hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except FileNotFoundError:
            raise ValueError(f"{self.folder} is incomplete: {name} is missing.") from None
        if digest.hexdigest() != self.manifest["files"].get(name):
            raise ValueError(f"{path} is not the file that manifest.json was written for; export the encoder again.")
        return path


def clean(text: str, how: str) -> str:
    """What open_clip does to a text before it is tokenised, but for ftfy, whose part is in tokenizer.json."""
    text = html.unescape(html.unescape(text))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no encoder: it has no manifest.json.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'manifest.json'} is not JSON ({error}); export the encoder again.") from None
    if manifest.get("format") != "mmrl-bundle" or manifest.get("version") != 2 or "graphs" not in manifest:
        raise ValueError(f"{folder / 'manifest.json'} is not of an mmrl export of ONNX graphs, version 2.")
    return manifest


def _opened(picture: Picture) -> Image.Image:
    """Upright RGB.

    Raises:
        ValueError: not a picture in one of FORMATS, damaged, or of more than MAX_PIXELS.
    """
    if isinstance(picture, Image.Image):
        return _upright_rgb(picture)
    name = f"{len(picture)} bytes" if isinstance(picture, bytes) else str(picture)
    try:
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damage that it gets over
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed")
            return _upright_rgb(image)
    except Image.UnidentifiedImageError:
        raise ValueError(f"image {name}: no picture in a known format: it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders let many kinds through on damaged files
        raise ValueError(f"image {name}: {error}") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _fitted(image: Image.Image, spec: dict[str, Any]) -> Image.Image:
    """Resized, then cropped or padded about the centre, to the spec's size."""
    height, width, mode = spec["height"], spec["width"], spec["resize_mode"]
    if image.size == (width, height):
        return image
    resampling = _RESAMPLING[spec["interpolation"]]
    if mode == "squash":
        return image.resize((width, height), resampling)
    fit = max if mode == "shortest" else min
    scale = fit(height / image.height, width / image.width)
    # open_clip fits by torchvision, which truncates the free side, for squares; else by timm's rule, which rounds.
    whole = int if mode == "shortest" and height == width else round
    least_w, least_h = (width, height) if mode == "shortest" else (1, 1)
    fitted = image.resize(
        (max(least_w, whole(image.width * scale)), max(least_h, whole(image.height * scale))), resampling
    )
    canvas = Image.new("RGB", (width, height), (spec["fill_color"],) * 3)
    if mode == "longest":
        canvas.paste(fitted, ((width - fitted.width) // 2, (height - fitted.height) // 2))
        return canvas
    left, top = round((fitted.width - width) / 2), round((fitted.height - height) / 2)
    return fitted.crop((left, top, left + width, top + height))


def _chunks(inputs: Any, size: int) -> Iterable[Any]:
    return (inputs[start : start + size] for start in range(0, len(inputs), size))


def _not_loaded(side: str) -> ValueError:
    return ValueError(f"encode_{side}s: this tower was not loaded; load with towers='both' or {side!r}.")
