"""`onnx`: image.onnx and text.onnx, pixels and token ids in, unit vectors out, the weights of each in NAME.onnx.data
beside it, with a tokenizer.json and a small encoder.py that needs neither torch nor mmrl."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmrl.export import onnx_graphs, tokenizer_json
from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Cut, Format
from mmrl.model.bundle import Bundle

_STANDALONE = Path(__file__).parents[2] / "inference" / "standalone.py"


def _check(whole: Bundle) -> None:
    tokenizer_json.check(whole, "onnx")


def _write(cut: Cut, folder: Path, variants: Sequence[str]) -> dict[str, Any]:
    shutil.copyfile(_STANDALONE, folder / "encoder.py")
    files = {
        side: {"fp32": f"{side}.onnx", **{one: f"{side}.{one}.onnx" for one in variants}} for side in ("image", "text")
    }
    return write_graphs(cut, folder, files, raw=True, inputs=("pixels", "input_ids"), beside=True)


def write_graphs(
    cut: Cut, folder: Path, files: dict[str, dict[str, str]], *, raw: bool, inputs: tuple[str, str], beside: bool
) -> dict[str, Any]:
    """Writes both towers' graphs and the tokenizer; returns the manifest's `graphs`.

    Args:
        files: the file of each variant ("fp32" and others) of each side.
        raw: whether the image graph takes uint8 pixels, and normalises them itself.
        inputs: the names of the two graphs' inputs.
        beside: whether each graph's weights are a file of their own.
    """
    model, bundle = cut.bundle.model, cut.bundle
    names = {side: (inputs[number], f"{side}_embeds") for number, side in enumerate(("image", "text"))}
    whole = {side: folder / files[side]["fp32"] for side in files}
    onnx_graphs.write_image(
        model.image, bundle.image_spec, whole["image"], raw=raw, names=names["image"], beside=beside
    )
    length = bundle.tokenise.context_length
    any_length = onnx_graphs.write_text(model.text, length, whole["text"], names=names["text"], beside=beside)
    for side, of_variant in files.items():
        for variant, name in of_variant.items():
            if variant == "fp16":
                onnx_graphs.store_halved(whole[side], folder / name, beside=beside)
            elif variant == "int8":
                onnx_graphs.store_int8(whole[side], folder / name, beside=beside, embeddings=side == "text")
    tokenizer = tokenizer_json.write(bundle, cut.folder, folder)
    return {**files, "default": "fp32", **tokenizer, "any_length": any_length}


def reopen(folder: Path, variant: str | None) -> Reopened:
    """A folder of graphs, by onnxruntime."""
    import onnxruntime

    from mmrl.inference.standalone import Encoder

    one = Encoder(folder, variant=variant)
    pad = one.graphs["pad_id"]

    def tokens(tokens_BL: torch.Tensor) -> Any:
        if one.graphs["any_length"]:
            # To the longest text's end; a pad's id within a text is a word ("!" is 0).
            tokens_BL = tokens_BL[:, : int((tokens_BL != pad).nonzero()[:, 1].max()) + 1]
        return one.encode_tokens(tokens_BL.numpy())

    return Reopened(
        f"onnxruntime {onnxruntime.__version__}",
        pixels=lambda pixels_BCHW: one.encode_pixels(pixels_BCHW.numpy()),
        tokens=tokens,
        images=one.encode_images,
        texts=one.encode_texts,
    )


FORMAT = Format(
    name="onnx",
    check=_check,
    write=_write,
    reopen=reopen,
    allowed=1e-5,
    usage="""```python
from encoder import Encoder  # the file of this folder: numpy, Pillow, tokenizers and onnxruntime, no torch

encoder = Encoder("FOLDER")  # mmrl.load("FOLDER") has the same calls
vectors = encoder.encode_texts(["a red shoe"])  # encode_images(["shoe.jpg"]) likewise
```

The weights of each graph are in a file beside it, `image.onnx.data` and so on: copy both.
""",
    library="onnx",
    needs=("onnx", "onnxscript", "onnxruntime"),
    variants=True,
)
