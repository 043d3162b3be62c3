"""`open_clip`: a folder for stock open_clip's `local-dir:`, its projections cut to the dim."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mmrl.errors import InputError
from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Cut, Format
from mmrl.images.image_spec import ImageSpec
from mmrl.model import layouts, towers
from mmrl.model.bundle import Bundle
from mmrl.model.manifest import read_manifest


def _check(whole: Bundle) -> None:
    for side in ("image", "text"):
        if towers.projection_axes(whole.model_cfg, side) is None:
            raise InputError(
                f"format: open_clip has no place for the projection that mmrl added to this {side} tower, which has "
                "none of its own that can be cut; allowed: bundle, onnx."
            )
    name = whole.named_cfg["text_cfg"].get("hf_model_name")
    if name is not None and Path(name).exists():
        raise InputError(
            "format: open_clip would look for this text tower's config in a folder of this machine "
            f"({name}); name it as the hub does in the model config, or use bundle or onnx."
        )


def _write(cut: Cut, folder: Path, variants: Sequence[str]) -> None:
    layout = layouts.LAYOUTS["open_clip"]
    state = layout.to_theirs(cut.bundle.state())
    save_file(state, folder / layout.weights)
    spec = cut.bundle.image_spec
    model_cfg: dict[str, Any] = {**cut.manifest["model_cfg"], "embed_dim": cut.bundle.dim}
    if "logit_bias" in state:
        model_cfg["init_logit_bias"] = float(state["logit_bias"])
    preprocess_cfg = {
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize_mode,
        "fill_color": spec.fill_color,
    }
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")
    for name in ("tokenizer", "text_model"):
        if (cut.folder / name).is_dir():
            shutil.copytree(cut.folder / name, folder / name)
    if cut.manifest["tokenizer"]["kind"] == "huggingface":  # open_clip looks for it beside its config
        shutil.copytree(cut.folder / "tokenizer", folder, dirs_exist_ok=True)


def _reopen(folder: Path, variant: str | None) -> Reopened:
    import open_clip

    model: Any
    with towers.quiet():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    spec = ImageSpec.from_json(read_manifest(folder)["image"])
    fit: Any = preprocess

    @torch.inference_mode()
    def pixels(pixels_BCHW: torch.Tensor) -> np.ndarray:
        return model.encode_image(spec.normalise(pixels_BCHW)).numpy()

    @torch.inference_mode()
    def tokens(tokens_BL: torch.Tensor) -> np.ndarray:
        return model.encode_text(tokens_BL).numpy()

    @torch.inference_mode()
    def images(pictures: list[Image.Image]) -> np.ndarray:
        return model.encode_image(torch.stack([fit(picture) for picture in pictures])).numpy()

    return Reopened(
        f"open_clip {open_clip.__version__}", pixels, tokens, images, lambda texts: tokens(tokenizer(texts))
    )


FORMAT = Format(
    name="open_clip",
    check=_check,
    write=_write,
    reopen=_reopen,
    allowed=1e-6,
    usage="""```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
vectors = model.eval().encode_text(tokenizer(["a red shoe"]), normalize=True)
```

`preprocess` does not turn pictures upright by their EXIF orientation: `PIL.ImageOps.exif_transpose` does.
""",
    library="open_clip",
)
