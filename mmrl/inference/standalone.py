"""Encodes images and texts as unit vectors with the graphs of ONNX or OpenVINO. Imports neither torch nor mmrl.

This file is copied into every export of graphs as encoder.py, with mmrl/images/upright.py and ValueError in place of
the imports from mmrl. It needs Python 3.10, numpy, Pillow 10.3, ftfy, tokenizers and onnxruntime or openvino:

    from encoder import Encoder

    encoder = Encoder("FOLDER")
    query = encoder.encode_texts(["red running shoes"])
    gallery = encoder.encode_images(["a.jpg", "b.jpg"])
    print(gallery @ query.T)

The weights of image.onnx are in image.onnx.data in the same folder and may stay memory-mapped. To replace a folder that
is in use, rename a new folder over it; do not overwrite its files.

Shapes: N inputs, d embedding dim, C = 3 channels, H and W the graph's image size, L tokens per text.
"""

import functools
import hashlib
import html
import json
import mmap
import os
import re
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from mmrl.errors import InputError
from mmrl.images.upright import composite, fit, open_upright, upright

ImageInput = Image.Image | str | Path | bytes
# Characters of a text that are cleaned, and those of a clean text that are tokenised, per token of the context length.
_MOST_CLEANED, _CHARACTERS_PER_TOKEN = 1 << 20, 1024
_LONGEST_NAME = 255
# Keys of the manifest; numbers are in 0 … _LARGEST.
_KINDS = {
    **dict.fromkeys(("dim", "tokenizer.context_length", "image.height", "image.width"), int),
    "nested_dims": list,
    "graphs.default": str,
    "files": dict,
}
_KINDS_OF = {
    "image": {"graphs.image": dict},
    "text": {
        **dict.fromkeys(("graphs.tokenizer", "graphs.clean"), str),
        "graphs.text": dict,
        "graphs.pad_id": int,
        "graphs.any_length": bool,
    },
}
_LARGEST = 1_000_000
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Encoder:
    """The towers of one folder, each a graph of onnxruntime or OpenVINO."""

    towers: tuple[str, ...]
    """Those that are loaded: 'image', 'text' or both."""

    def __init__(
        self,
        folder: str | Path,
        dim: int | None = None,
        towers: str = "both",
        variant: str | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """Checks the hashes of the graphs and opens them.

        Args:
            dim: embeddings are truncated to their first `dim` dims and renormalised (default: full dim).
            towers: 'both' (all that the folder has), 'image' or 'text'.
            variant: 'fp32', 'fp16' or 'int8', if it was exported (default: as in the manifest).
            device: 'cpu' or 'cuda'; of OpenVINO, one of its devices.
            threads: per graph (default: the runtime's).

        Raises:
            ValueError: no such folder, tower, variant or dim; a file is missing or its hash differs from the manifest.
        """
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.graphs: dict[str, Any] = self.manifest["graphs"]
        self.towers = choose_towers(self.folder, towers, self.manifest["towers"])
        self.variant = variant or self.graphs["default"]
        variants = [name for name in self.graphs[self.towers[0]] if name in self.graphs[self.towers[-1]]]
        if self.variant not in variants:
            raise InputError(f"variant: {self.folder} has no {self.variant!r}; it has {', '.join(variants)}.")
        full = self.manifest["dim"]
        self.dim = full if dim is None else dim
        if not 1 <= self.dim <= full:
            raise InputError(f"dim: {self.dim} is out of range; this embedding has dims 1 to {full}.")
        self.nested_dims = tuple(d for d in self.manifest["nested_dims"] if d <= self.dim)
        self._graphs = {side: self._open(self.graphs[side][self.variant], device, threads) for side in self.towers}
        self._tokenizer: Tokenizer | None = None
        if "text" in self._graphs:
            path = self._checked_path(self.graphs["tokenizer"])
            try:
                self._tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # its errors have no class of their own
                raise InputError(f"{path} is no tokenizer ({' '.join(str(error).split())}).") from None
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.manifest["tokenizer"]["context_length"])

    def encode_images(self, images: Sequence[ImageInput], batch_size: int = 64) -> np.ndarray:
        """Pillow images, paths or file contents -> float32 unit vectors (N, d). Raises ValueError: an image cannot be
        read (the message names it), or there is no image tower, or it was not loaded."""
        return self._encode("image", chunks(images, batch_size), lambda chunk: np.stack([*map(self.pixels, chunk)]))

    def encode_pixels(self, pixels_NCHW: Any, batch_size: int = 64) -> np.ndarray:
        """uint8 pixels (N, C, H, W), resized by `pixels` -> float32 unit vectors (N, d)."""
        return self._encode("image", chunks(pixels_NCHW, batch_size), np.ascontiguousarray)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Texts -> float32 unit vectors (N, d). Texts are truncated to the tower's context length. Raises ValueError:
        `texts` is a single string, or there is no text tower, or it was not loaded."""
        check_text_list(texts)
        return self._encode("text", chunks(texts, batch_size), self.tokenise)

    def encode_tokens(self, tokens_NL: Any, batch_size: int = 64) -> np.ndarray:
        """int64 token ids (N, L) from `tokenise` -> float32 unit vectors (N, d)."""
        return self._encode("text", chunks(tokens_NL, batch_size), np.ascontiguousarray)

    def tokenise(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> int64 token ids (N, L): padded to the context length, or the longest text if the graph allows."""
        if self._tokenizer is None:
            raise missing_tower("text", self.manifest["towers"])
        limit = _CHARACTERS_PER_TOKEN * self.manifest["tokenizer"]["context_length"]
        cleaned = [clean(text[:_MOST_CLEANED], self.graphs["clean"])[:limit] for text in texts]
        try:
            rows = [encoding.ids for encoding in self._tokenizer.encode_batch(cleaned)]
        except BaseException as error:  # of tokenizers: an Exception, or a PanicException, which is not one
            if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
                raise
            reason = " ".join(str(error).split())
            raise InputError(f"the tokenizer of {self.folder} cannot read these texts ({reason}).") from None
        longest = max(map(len, rows)) if self.graphs["any_length"] else self.manifest["tokenizer"]["context_length"]
        tokens_NL = np.full((len(rows), longest), self.graphs["pad_id"], np.int64)
        for i, row in enumerate(rows):
            tokens_NL[i, : len(row)] = row
        if self.graphs.get("zero_id") is not None:
            tokens_NL[tokens_NL == self.graphs["zero_id"]] = 0
        return tokens_NL

    def pixels(self, image: ImageInput) -> np.ndarray:
        """An image -> uint8 RGB pixels (C, H, W): upright, on the background colour, resized to the graph's size."""
        spec = self.manifest["image"]
        resized = fit(composite(_open_image(image), spec.get("background")), spec)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    def _encode(self, side: str, batches: Iterable[Any], prepare: Callable[[Any], np.ndarray]) -> np.ndarray:
        run = self._graphs.get(side)
        if run is None:
            raise missing_tower(side, self.manifest["towers"])
        # Other graphs normalise pixels themselves.
        normalise = side == "image" and self.manifest.get("layout") == "transformers.js"
        rows = [np.zeros((0, self.dim), np.float32)]
        for batch in batches:
            inputs = prepare(batch)
            if normalise:
                mean, std = (
                    np.array(self.manifest["image"][name], np.float32)[:, None, None] for name in ("mean", "std")
                )
                inputs = (inputs.astype(np.float32) / 255 - mean) / std
            vectors_Nd = self._run(run, inputs, side)
            if self.dim < vectors_Nd.shape[1]:
                vectors_Nd = vectors_Nd[:, : self.dim]
                vectors_Nd = vectors_Nd / np.maximum(np.linalg.norm(vectors_Nd, axis=1, keepdims=True), 1e-12)
            rows.append(vectors_Nd)
        return np.concatenate(rows)

    def _run(self, run: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray, side: str) -> np.ndarray:
        try:
            vectors_Nd = run(inputs)
        except Exception as error:  # the runtimes' exceptions have no common base class
            reason = " ".join(str(error).split())[:500]
            raise InputError(f"the {side} graph of {self.folder} cannot be computed: {reason}") from error
        shape, want = vectors_Nd.shape, (len(inputs), self.manifest["dim"])
        if shape != want or vectors_Nd.dtype != np.float32:
            raise InputError(f"the {side} graph of {self.folder} gives {vectors_Nd.dtype} {shape}, not float32 {want}.")
        return vectors_Nd

    def _open(self, name: str, device: str, threads: int | None) -> Callable[[np.ndarray], np.ndarray]:
        graph = self._checked_path(name)
        weights = [Path(name).with_suffix(".bin").name] if graph.suffix == ".xml" else _named_weights(graph)
        for one in weights:  # which the runtime reads
            self._checked_path((Path(name).parent / one).as_posix())
        try:
            return (_open_vino if graph.suffix == ".xml" else _open_onnx)(graph, device, threads)
        except ValueError:
            raise
        except Exception as error:  # the runtimes' exceptions have no common base class
            raise InputError(f"{graph} cannot be opened: {' '.join(str(error).split())[:500]}") from error

    def _checked_path(self, name: str) -> Path:
        """The path of a file inside the folder; raises ValueError unless its SHA-256 equals the one in the manifest."""
        if len(name.encode(errors="surrogatepass")) > _LONGEST_NAME:
            raise InputError(f"{self.folder / 'manifest.json'} names a file of {len(name):,} characters.")
        path, root, digest = self.folder / name, Path(os.path.realpath(self.folder)), hashlib.sha256()
        # In the cache of a hub, files are links to a folder of the repository's contents.
        roots = [root, *(one.parent / "blobs" for one in root.parents if one.name == "snapshots")]
        if ".." in Path(name).parts or not any(Path(os.path.realpath(path)).is_relative_to(one) for one in roots):
            raise InputError(f"{self.folder / 'manifest.json'} names {name!r}, which is outside its folder.")
        if name not in self.manifest["files"]:
            raise InputError(f"{self.folder / 'manifest.json'} has no hash of {name}; export the encoder again.")
        try:
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except FileNotFoundError:
            raise InputError(f"{self.folder} is incomplete: {name} is missing.") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}).") from None
        if digest.hexdigest() != self.manifest["files"][name]:
            raise InputError(f"{path} is not the file that manifest.json was written for; export the encoder again.")
        return path


def _named_weights(graph: Path) -> set[str]:
    """The files with weights that an ONNX graph names: the entries `location` of its tensors' external data.

    Found by their encoding, because onnxruntime cannot list them. A name in any other encoding is refused.
    """
    names, found = set(), 0
    if not graph.stat().st_size:
        raise InputError(f"{graph} is empty; export the encoder again.")
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for entry in re.finditer(rb"j(.)\n\x08location\x12(.)", data, re.DOTALL):
            length = entry[2][0]
            name = data[entry.end() : entry.end() + length].decode("utf-8", "replace")
            if length < 128 and entry[1][0] == length + 12 and name.isprintable():  # nothing else is in the entry
                names.add(name)
                found += 1
        if found != sum(1 for _ in re.finditer(b"location", data)):
            raise InputError(f"{graph} names files in an unknown way; export the encoder again.")
    return names


def _open_onnx(graph: Path, device: str, threads: int | None) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options, providers = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
    options.log_severity_level = 4  # errors are raised, and name what is in the file
    if threads:
        options.intra_op_num_threads = threads
    if device != "cpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise InputError(f"device: this onnxruntime has no {device!r}; pip install onnxruntime-gpu, or use 'cpu'.")
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    name = session.get_inputs()[0].name
    return lambda inputs: np.asarray(session.run(None, {name: inputs})[0])


def _open_vino(graph: Path, device: str, threads: int | None) -> Callable[[np.ndarray], np.ndarray]:
    with graph.open("rb") as file:
        if file.read(5) not in (b"<?xml", b"<net "):  # OpenVINO reads other formats by their content, which name files
            raise InputError(f"{graph} is no graph of OpenVINO; export the encoder again.")
    # By default OpenVINO computes in bfloat16 on CPUs that have it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    compiled = _vino_core().compile_model(graph, device.upper(), settings)
    # A request per call, because one request serves one thread at a time.
    return lambda inputs: np.asarray(compiled.create_infer_request().infer({0: inputs})[0])


@functools.cache
def _vino_core() -> Any:
    """The only Core of the process. A Core replaces the thread's alternate signal stack and frees its own when it is
    deleted: of two, the one deleted last restores the freed stack of the other, and the next signal ends the process.
    """
    import openvino

    return openvino.Core()


def clean(text: str, how: str) -> str:
    """open_clip's text cleaning before tokenisation."""
    if how == "none":
        return text
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is not an encoder: it has no manifest.json.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / 'manifest.json'} is not JSON ({error}); export the encoder again.") from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != ("mmrl-bundle", 2):
        raise InputError(f"{folder / 'manifest.json'} is not the manifest of an mmrl ONNX export, version 2.")
    manifest = {"towers": ["image", "text"], **manifest}
    sides = manifest["towers"]
    if not isinstance(sides, list) or not sides or any(side not in ("image", "text") for side in sides):
        raise InputError(f"{folder / 'manifest.json'}: towers is damaged; export the encoder again.")
    for key, kind in {**_KINDS, **{key: kind for side in sides for key, kind in _KINDS_OF[side].items()}}.items():
        value: Any = manifest
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or (kind is int and not 0 <= value <= _LARGEST):
            raise InputError(f"{folder / 'manifest.json'}: {key} is missing or damaged; export the encoder again.")
    return manifest


def _open_image(source: ImageInput) -> Image.Image:
    """Decodes an image as upright RGB or RGBA. Raises ValueError: it cannot be read; the message names it."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else source
    try:
        if isinstance(source, Image.Image):
            return upright(source)
        return open_upright(source if isinstance(source, bytes) else Path(source).read_bytes())
    except Exception as error:  # of an opened image, Pillow's decoders raise many kinds
        raise InputError(f"image {name}: {error}") from None


def chunks(inputs: Any, size: int) -> Iterable[Any]:
    """Batches of consecutive inputs."""
    return (inputs[start : start + size] for start in range(0, len(inputs), size))


def check_text_list(texts: Sequence[str]) -> None:
    """Raises ValueError if `texts` is a single string instead of a list of strings."""
    if isinstance(texts, str):
        raise InputError(f"encode_texts: want a list of texts, got the single text {texts[:40]!r}; wrap it in [ ].")


def choose_towers(folder: Path | str, towers: str, available: Sequence[str]) -> tuple[str, ...]:
    """The towers to load: `towers`, or all that are `available` for 'both'. Raises ValueError: there is no such
    tower."""
    if towers != "both" and towers not in available:
        raise InputError(f"model: {folder} has no {towers} tower; it encodes {available[0]}s only.")
    return tuple(side for side in available if towers in ("both", side))


def missing_tower(side: str, available: Sequence[str]) -> InputError:
    """The error of a call that needs a tower which was not loaded, or which is not even `available`."""
    if side not in available:
        return InputError(f"model: this encoder has no {side} tower; it encodes {available[0]}s only.")
    return InputError(f"encode_{side}s: this tower was not loaded; load with towers='both' or {side!r}.")
