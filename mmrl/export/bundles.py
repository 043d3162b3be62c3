"""A checkpoint -> an encoder of one dim, with its projections really cut, checked against the one it came from."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrl import nesting
from mmrl.errors import InputError, RunStopped
from mmrl.model import bundle
from mmrl.model.bundle import Bundle

# The cut encoder computes each kept number from the same weights; only the order of sums may differ.
WORST_ERROR = 1e-6
_TEXTS = ["a photo of a red bicycle", "two cups of coffee on a table", "x", "size 42 running shoes, blue / white"]


def export_bundle(model: str, out: Path, dim: int) -> dict[str, Any]:
    """Writes the encoder whose vectors are the renormalised first `dim` numbers of MODEL's; returns its manifest.

    The manifest's "contract" holds the worst difference between the two, measured on seeded pictures and texts.

    Raises:
        InputError: MODEL is none, `dim` is not one that it has, OUT exists and is not empty.
        RunStopped: the cut encoder does not keep to the contract.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out: {out} exists and is not empty; name a new folder.")
    whole = bundle.open_model(model)
    nested_dims = bundle.kept_dims(whole.nested_dims, dim)
    state = bundle.cut_state(whole, dim)
    source: dict[str, Any] = {"model": Path(model).name, "dim": whole.dim}
    if not model.startswith("open_clip:"):
        manifest = bundle.read_manifest(bundle.find(model))
        source |= {**manifest["source"], "weights_sha256": bundle.origin(manifest)}
    small = Bundle(whole.model, whole.tokenise, whole.image_spec, whole.model_cfg, dim, nested_dims)
    beside = out.parent / f".{out.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        manifest = bundle.save(small, beside, state, source)
        worst = _worst_difference(whole, bundle.load(beside))
        if worst > WORST_ERROR:
            raise RunStopped(f"{model} cut to {dim} differs from its prefix by {worst:.1e}; nothing was written.")
        manifest["contract"] = {
            "equals": f"the renormalised first {dim} of the source's {whole.dim} numbers",
            "worst_absolute_difference": worst,
            "allowed": WORST_ERROR,
        }
        bundle.write_manifest(beside, manifest)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return manifest


@torch.inference_mode()
def _worst_difference(whole: Bundle, small: Bundle) -> float:
    """The greatest difference between a number of the small encoder's vectors and of the whole one's prefix."""
    spec = whole.image_spec
    noise = np.random.default_rng(0).integers(0, 256, (4, 3, spec.height, spec.width), np.uint8)
    pictures_BCHW, texts_ML = torch.from_numpy(noise), whole.tokenise(_TEXTS)
    pairs = [
        (whole.model.encode_image(pictures_BCHW), small.model.encode_image(pictures_BCHW)),
        (whole.model.encode_text(texts_ML), small.model.encode_text(texts_ML)),
    ]
    return max(float((nesting.cut(full, small.dim) - nesting.cut(cut, small.dim)).abs().max()) for full, cut in pairs)
