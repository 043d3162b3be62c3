"""`transformers`: a CLIPModel with its CLIPProcessor, for architectures that CLIPModel supports: open_clip's plain ViT
and text transformer."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mmrl.errors import InputError
from mmrl.export import tokenizer_json
from mmrl.export.contract import Reopened
from mmrl.export.formats.base import Format, Truncated
from mmrl.images.image_spec import ImageSpec
from mmrl.model import layouts
from mmrl.model.bundle import Bundle
from mmrl.model.manifest import read_manifest
from mmrl.model.towers import SIDES

# The keys of a tower's config that CLIPModel supports, with their allowed values (...: any).
_VISION: dict[str, Any] = {
    **dict.fromkeys(("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"), ...),
    "timm_model_pretrained": ...,
    "ls_init_value": (None,),
    "attentional_pool": (False,),
    "pool_type": ("tok",),
    "pos_embed_type": ("learnable",),
    "no_ln_pre": (False,),
    "final_ln_after_pool": ...,  # no effect where the embedding is read from one token
    "output_tokens": (False,),
}
_TEXT: dict[str, Any] = {
    **dict.fromkeys(("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"), ...),
    "hf_model_pretrained": (None, False),
    **dict.fromkeys(("hf_tokenizer_name", "tokenizer_kwargs"), ...),  # tokenizer_json.check
    "ls_init_value": (None,),
    "embed_cls": (False,),
    "no_causal_mask": (False,),
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "proj_bias": (False,),
    "output_tokens": (False,),
}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's codes


def check_architecture(full: Bundle, format: str, sides: Sequence[str] = SIDES) -> None:
    """Raises InputError, naming the key, if CLIPModel does not support these towers."""
    for section in ("vision_cfg" if side == "image" else "text_cfg" for side in sides):
        allowed = _VISION if section == "vision_cfg" else _TEXT
        for name, value in full.named_cfg[section].items():
            values = allowed.get(name, (None,))
            is_resnet = name == "layers" and not isinstance(value, int)
            if is_resnet or (values is not ... and value not in values):
                raise InputError(
                    f"format: {format} supports CLIP's plain ViT and text transformer only, and this model has "
                    f"{section}.{name}: {value!r}; allowed: bundle, onnx, openvino"
                    f"{'; open_clip for most' if len(full.model.sides) == 2 else ''}."
                )
    tokenizer_json.check(full, format)
    check_preprocessing(full, format)


def check_preprocessing(full: Bundle, format: str) -> None:
    """Raises InputError if CLIPImageProcessor does not support the image tower's way of resizing."""
    spec = full.image_spec
    if "image" not in full.model.sides:
        return
    if spec.resize_mode == "longest" or spec.height != spec.width:
        raise InputError(
            f"format: {format} supports square images and the resize modes 'shortest' and 'squash', and this model has "
            f"{spec.height}x{spec.width} and {spec.resize_mode!r}; allowed: {tokenizer_json.allowed(full)}, onnx."
        )


def write_preprocessing(spec: ImageSpec, folder: Path) -> dict[str, Any]:
    """Writes FOLDER/preprocessor_config.json; returns its content."""
    side = {"height": spec.height, "width": spec.width}
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": side if spec.resize_mode == "squash" else {"shortest_edge": spec.height},
        "resample": _RESAMPLE[spec.interpolation],
        "do_center_crop": spec.resize_mode == "shortest",
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def vision_config(truncated: Truncated) -> dict[str, Any]:
    """The vision_config of CLIPModel's config.json."""
    model_cfg = truncated.manifest["model_cfg"]
    vision = model_cfg["vision_cfg"]
    width = vision.get("width", 768)
    return {
        "model_type": "clip_vision_model",
        "image_size": truncated.bundle.image_spec.height,
        "patch_size": vision.get("patch_size", 16),
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": vision.get("layers", 12),
        "num_attention_heads": width // vision.get("head_width", 64),
        "projection_dim": truncated.bundle.dim,
        "hidden_act": _activation(model_cfg),
    }


def text_config(truncated: Truncated) -> dict[str, Any]:
    """The text_config of CLIPModel's config.json."""
    model_cfg = truncated.manifest["model_cfg"]
    text = model_cfg["text_cfg"]
    width = text.get("width", 512)
    return {
        "model_type": "clip_text_model",
        "vocab_size": text.get("vocab_size", 49408),
        "max_position_embeddings": text.get("context_length", 77),
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_hidden_layers": text.get("layers", 12),
        "num_attention_heads": text.get("heads", 8),
        "projection_dim": truncated.bundle.dim,
        "hidden_act": _activation(model_cfg),
        **_special_tokens(truncated.bundle),
    }


def _special_tokens(bundle: Bundle) -> dict[str, int]:
    tokenizer = bundle.tokenise.tokenizer
    if tokenizer_json.is_bpe(bundle):
        start, end, pad = tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.eot_token_id
    else:
        inner = tokenizer.tokenizer
        start, end, pad = inner.bos_token_id, inner.eos_token_id, inner.pad_token_id
    return {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad}


def _activation(model_cfg: dict[str, Any]) -> str:
    return "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"


def model_config(truncated: Truncated) -> dict[str, Any]:
    """The content of CLIPModel's config.json."""
    dim = truncated.bundle.dim
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "dtype": "float32",
        "projection_dim": dim,
        # What vLLM and SGLang read to allow the parameter `dimensions`; vLLM takes the largest from embedding_size.
        "is_matryoshka": True,
        "matryoshka_dimensions": sorted({dim, *truncated.bundle.nested_dims}, reverse=True),
        "embedding_size": dim,
        "logit_scale_init_value": float(truncated.bundle.model.log_logit_scale.detach()[-1]),
        "vision_config": vision_config(truncated),
        "text_config": text_config(truncated),
    }


def write(truncated: Truncated, folder: Path, variants: Sequence[str]) -> None:
    """Writes the files of `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained`."""
    layout = layouts.LAYOUTS["transformers"]
    save_file(layout.export_state(truncated.bundle.state()), folder / layout.weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model_config(truncated), indent=2) + "\n")
    tokenizer_json.write(truncated.bundle, truncated.folder, folder, cleans=True)
    tokenizer_json.write_config(truncated.bundle, folder)
    image_processor = write_preprocessing(truncated.bundle.image_spec, folder)
    processor = {"processor_class": "CLIPProcessor", "image_processor": image_processor}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    shutil.copytree(truncated.folder / "tokenizer", folder / "tokenizer")  # for mmrl.load


def _reopen(folder: Path, variant: str | None) -> Reopened:
    import transformers

    model: Any = transformers.CLIPModel.from_pretrained(folder).eval()
    processor: Any = transformers.CLIPProcessor.from_pretrained(folder)
    spec = ImageSpec.from_json(read_manifest(folder)["image"])

    @torch.inference_mode()
    def texts(texts: list[str]) -> np.ndarray:
        inputs = processor(text=texts, return_tensors="pt", padding=True, truncation=True)
        return model.get_text_features(**inputs).pooler_output.numpy()

    def token_ids(texts: list[str]) -> list[list[int]]:
        return processor(text=texts, truncation=True)["input_ids"]

    opened = Reopened.of_torch(
        f"transformers {transformers.__version__}",
        lambda pixels_BCHW: model.get_image_features(pixel_values=pixels_BCHW).pooler_output,
        lambda tokens_BL: model.get_text_features(input_ids=tokens_BL).pooler_output,
        normalise=spec.normalise,
        prepare=lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
        tokenise=lambda texts: torch.tensor(token_ids(texts)),
    )
    return replace(opened, texts=texts, token_ids=token_ids)


FORMAT = Format(
    name="transformers",
    one_tower=False,
    check=lambda full: check_architecture(full, "transformers"),
    write=write,
    reopen=_reopen,
    tolerance=1e-5,
    library="transformers",
)
