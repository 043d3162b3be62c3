"""`onnx`: graphs image.onnx and text.onnx from pixels and token ids to unit vectors, each with its weights in
NAME.onnx.data, a tokenizer.json, and an encoder.py that needs neither torch nor mmrl."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmrl.export import onnx_graphs, tokenizer_json
from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Format, Truncated
from mmrl.model.bundle import Bundle

_PACKAGE = Path(__file__).parents[2]


def _check(full: Bundle) -> None:
    tokenizer_json.check(full, "onnx")


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    (folder / "encoder.py").write_text(_encoder_source())
    files = {
        modality: {"fp32": f"{modality}.onnx", **{variant: f"{modality}.{variant}.onnx" for variant in variants}}
        for modality in ("image", "text")
    }
    return write_graphs(truncated, folder, files, raw=True, inputs=("pixels", "input_ids"), external=True)


def _encoder_source() -> str:
    """The source of encoder.py: standalone.py with upright.py in place of its import."""
    source = (_PACKAGE / "inference" / "standalone.py").read_text()
    before, line, after = re.split(r"^(from mmrl\.images\.upright import .*\n)", source, flags=re.MULTILINE)
    assert line
    return before + (_PACKAGE / "images" / "upright.py").read_text() + after


def write_graphs(
    truncated: Truncated,
    folder: Path,
    files: dict[str, dict[str, str]],
    *,
    raw: bool,
    inputs: tuple[str, str],
    external: bool,
) -> dict[str, Any]:
    """Writes both towers' graphs and the tokenizer; returns the manifest's `graphs`.

    Args:
        files: {modality: {variant: file}}.
        raw: the image graph takes uint8 pixels and normalises them itself.
        inputs: names of the image graph's and the text graph's input.
        external: write each graph's weights to a separate file.
    """
    model, bundle = truncated.bundle.model, truncated.bundle
    names = {modality: (name, f"{modality}_embeds") for modality, name in zip(("image", "text"), inputs, strict=True)}
    fp32 = {modality: folder / files[modality]["fp32"] for modality in files}
    onnx_graphs.write_image(
        model.image, bundle.image_spec, fp32["image"], raw=raw, names=names["image"], external=external
    )
    length = bundle.tokenise.context_length
    any_length = onnx_graphs.write_text(model.text, length, fp32["text"], names=names["text"], external=external)
    for modality, of_variant in files.items():
        for variant, name in of_variant.items():
            if variant == "fp16":
                onnx_graphs.store_fp16(fp32[modality], folder / name, external=external)
            elif variant == "int8":
                of_text = modality == "text"
                onnx_graphs.store_int8(fp32[modality], folder / name, external=external, embeddings=of_text)
    tokenizer = tokenizer_json.write(bundle, truncated.folder, folder)
    return {**files, "default": "fp32", **tokenizer, "any_length": any_length}


def reopen(folder: Path, variant: str | None) -> Reopened:
    """Opens a folder of graphs with onnxruntime."""
    import onnxruntime

    from mmrl.inference.standalone import Encoder

    encoder = Encoder(folder, variant=variant)
    pad = encoder.graphs["pad_id"]

    def tokens(tokens_BL: torch.Tensor) -> Any:
        if encoder.graphs["any_length"]:
            # Drops the padding after the longest text. The padding id can also be a word inside a text ("!" is 0).
            tokens_BL = tokens_BL[:, : int((tokens_BL != pad).nonzero()[:, 1].max()) + 1]
        return encoder.encode_tokens(tokens_BL.numpy())

    return Reopened(
        f"onnxruntime {onnxruntime.__version__}",
        pixels=lambda pixels_BCHW: encoder.encode_pixels(pixels_BCHW.numpy()),
        tokens=tokens,
        images=encoder.encode_images,
        texts=encoder.encode_texts,
    )


FORMAT = Format(
    name="onnx",
    check=_check,
    write=_write,
    reopen=reopen,
    tolerance=1e-5,
    usage="""```python
from encoder import Encoder  # the file in this folder; needs numpy, Pillow, tokenizers and onnxruntime, not torch

encoder = Encoder("FOLDER")  # mmrl.load("FOLDER") has the same methods
vectors = encoder.encode_texts(["a red shoe"])  # images: encoder.encode_images(["shoe.jpg"])
```

Each graph needs its weights file in the same folder: copy `image.onnx` together with `image.onnx.data`.
""",
    library="onnx",
    needs=("onnx", "onnxscript", "onnxruntime"),
    variants=True,
)
