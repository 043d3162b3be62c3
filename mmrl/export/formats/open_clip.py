"""`open_clip`: a folder for `local-dir:` names of an unmodified open_clip."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mmrl.errors import InputError
from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Format, Truncated
from mmrl.images.image_spec import ImageSpec
from mmrl.model import layouts, towers
from mmrl.model.bundle import Bundle
from mmrl.model.guards import quiet
from mmrl.model.manifest import INNER, TEXT_MODEL, TOKENIZER, read_manifest


def _check(full: Bundle) -> None:
    for modality in ("image", "text"):
        if towers.projection_axes(full.model_cfg, modality) is None:
            raise InputError(
                f"format: open_clip cannot hold the projection that mmrl added to this {modality} tower, which has "
                "none that can be truncated; allowed: bundle, onnx."
            )
    name = full.named_cfg["text_cfg"].get("hf_model_name")
    if name is not None and (name == TEXT_MODEL or Path(name).exists()):
        raise InputError(
            "format: open_clip reads the config of this text tower from the hub, and it came from a local folder; use "
            "bundle or onnx, or set text_cfg.hf_model_name of the model config to the text model's name on the hub."
        )


def _write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> None:
    layout = layouts.LAYOUTS["open_clip"]
    state = layout.export_state(truncated.bundle.state())
    save_file(state, folder / layout.weights)
    spec = truncated.bundle.image_spec
    model_cfg: dict[str, Any] = {**truncated.manifest["model_cfg"], "embed_dim": truncated.bundle.dim}
    cleaning = dict(model_cfg["text_cfg"].get("tokenizer_kwargs") or {})
    if cleaning.get("clean") == "none":  # open_clip always cleans; the contract measures what that changes
        del cleaning["clean"]
        model_cfg["text_cfg"] = {**model_cfg["text_cfg"], "tokenizer_kwargs": cleaning}
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
    for name in INNER:
        if (truncated.folder / name).is_dir():
            shutil.copytree(truncated.folder / name, folder / name)
    if truncated.manifest["tokenizer"]["kind"] == "huggingface":  # open_clip expects the tokenizer next to its config
        shutil.copytree(truncated.folder / TOKENIZER, folder, dirs_exist_ok=True)


def _reopen(folder: Path, variant: str | None) -> Reopened:
    import open_clip

    model: Any
    preprocess: Any
    with quiet():
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    spec = ImageSpec.from_json(read_manifest(folder)["image"])
    tool = f"open_clip {open_clip.__version__}"
    return Reopened.of_torch(tool, model.encode_image, model.encode_text, spec.normalise, preprocess, tokenizer)


FORMAT = Format(
    name="open_clip", one_tower=False, check=_check, write=_write, reopen=_reopen, tolerance=1e-6, library="open_clip"
)
