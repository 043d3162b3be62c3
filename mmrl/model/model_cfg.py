"""Allow-list of the keys and values of an open_clip model config, from a manifest, a JSON file or a hub repository.

open_clip, timm and transformers pass many values on to constructors, and some of these run code from the model's folder
(`trust_remote_code`, `auto_map`) or download from an address (`hf-hub:` in a timm name). So every key is listed below
with its type and range; any other is refused before one of the three libraries sees it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mmrl.errors import InputError
from mmrl.output.files import parse_json
from mmrl.settings import Settings

# Large enough for every published tower, too small to exhaust a machine's memory by a single value.
_Size = Annotated[int, Field(ge=1, le=1_000_000)]
_Layers = Annotated[int, Field(ge=1, le=1000)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Ratio = Annotated[float, Field(gt=0, le=100)]
_Pair = Annotated[list[_Size], Field(min_length=2, max_length=2)]
_Stages = Annotated[list[_Layers], Field(min_length=4, max_length=4)]
# A name that open_clip looks up; it refuses unknown ones itself.
_Choice = Annotated[str, Field(pattern=r"^[a-z0-9_]*$", max_length=40)]
# A name in timm's registry. The forms that timm would download or read, `hf-hub:…` and `local-dir:…`, have a colon.
_TimmName = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
# A hub repository or a folder. A stored encoder reads neither: it holds copies of the files.
_HubName = Annotated[str, Field(max_length=4096)]


class TokenizerKwargs(Settings):
    """Arguments of open_clip's two tokenizers. None is passed on to constructors of transformers."""

    clean: Literal["lower", "whitespace", "canonicalize", "none"] | None = None
    """`none` is mmrl's: texts reach a Hugging Face tokenizer as they are."""
    strip_sep_token: bool = False
    reduction_mask: Literal["", "simple", "random", "shuffle", "syntax"] = ""
    additional_special_tokens: list[str] | None = None
    language: Annotated[str, Field(pattern=r"^\w+$", max_length=20)] | None = None


class _ActKwargs(Settings):
    approximate: Literal["none", "tanh"] = "none"


class _NormKwargs(Settings):
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    elementwise_affine: bool = True


class _TowerCfg(Settings):
    """Keys of both towers."""

    layers: _Layers | _Stages = 12
    width: _Size = 512
    mlp_ratio: _Ratio = 4.0
    ls_init_value: float | None = None
    final_ln_after_pool: bool = False
    pool_type: _Choice = "tok"
    output_tokens: bool = False
    act_kwargs: _ActKwargs | None = None
    norm_kwargs: _NormKwargs | None = None
    block_type: _Choice | None = None
    qk_norm: bool = False
    scaled_cosine_attn: bool = False
    scale_heads: bool = False
    scale_attn_inner: bool = False
    scale_attn: bool = False
    scale_fc: bool = False


class _VisionCfg(_TowerCfg):
    head_width: _Size = 64
    patch_size: _Size | None = 16
    image_size: _Size | _Pair = 224
    patch_dropout: _Share = 0.0
    attentional_pool: bool | _Choice = False
    attn_pooler_queries: _Size = 256
    attn_pooler_heads: _Size = 8
    no_ln_pre: bool = False
    pos_embed_type: _Choice = "learnable"
    timm_model_name: _TimmName | None = None
    timm_model_pretrained: bool = False
    timm_pool: _Choice | None = "avg"
    timm_proj: _Choice | None = "linear"
    timm_proj_bias: bool = False
    timm_drop: _Share = 0.0
    timm_drop_path: _Share | None = None


class _TextCfg(_TowerCfg):
    context_length: _Size = 77
    vocab_size: _Size = 49408
    hf_tokenizer_name: _HubName | None = None
    tokenizer_mode: _Choice | None = None
    tokenizer_kwargs: TokenizerKwargs | None = None
    heads: _Size = 8
    embed_cls: bool = False
    pad_id: Annotated[int, Field(ge=0)] = 0
    eos_id: Annotated[int, Field(ge=0)] = 2
    no_causal_mask: bool = False
    proj_bias: bool = False
    proj_type: _Choice = "linear"
    hf_model_name: _HubName | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: _Choice | None = "mlp"
    hf_pooler_type: _Choice | None = "mean_pooler"


class _ModelCfg(Settings):
    embed_dim: Annotated[int, Field(ge=1, le=65536)]
    vision_cfg: _VisionCfg
    text_cfg: _TextCfg
    quick_gelu: bool = False
    custom_text: bool = False
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None
    nonscalar_logit_scale: bool = False
    output_dict: bool = False
    multimodal_cfg: dict[str, _Size] | None = None
    """CoCa's decoder, which mmrl does not use."""


def check_model_cfg(model_cfg: Any, source: str | Path) -> dict[str, Any]:
    """Returns the config, which was read from `source`, unchanged if every key and value is allowed. Raises InputError:
    names the key that is not allowed, or whose value has the wrong type or is out of range."""
    try:
        _ModelCfg.model_validate(model_cfg)
    except ValidationError as error:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            key, reason = ".".join(location), "this key is not allowed in a model config"
        else:
            key = ".".join(part for part in location if part in _KEYS) or "the config"
            missing = first["type"] == "missing"
            reason = "this key is missing" if missing else f"{first['msg']}; got {str(first['input'])[:80]!r}"
        raise InputError(f"{source}: model config: {key}: {reason}.") from None
    return model_cfg


def check_config_folder(folder: Path) -> None:
    """Raises InputError if a JSON file that transformers reads from `folder` names code to run or kernels to download.

    `auto_map` names Python files of the folder or of a hub repository; a value such as `kernels-community/…` of an
    attention setting names a repository of compiled code.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            config = parse_json(path.read_text())
        except (ValueError, OSError) as error:
            raise InputError(f"{path} cannot be read as JSON ({error}); export the encoder again.") from None
        if path.name.removesuffix(".json") in ("tokenizer", "vocab"):  # token tables: any string may be a key
            continue
        for key, value in _entries(config):
            if key in _CODE_KEYS and value:
                raise InputError(f"{path}: {key}: this key names code to run; remove it.")
            if "attn_implementation" in key and isinstance(value, str) and not value.replace("_", "").isalnum():
                raise InputError(f"{path}: {key}: {value[:80]!r} names kernels to download; remove this key.")


_CODE_KEYS = frozenset(
    ("auto_map", "custom_pipelines", "kernel_config", "quantization_config", "trust_remote_code", "use_kernels")
)
_KEYS = frozenset(
    name
    for section in (_ModelCfg, _VisionCfg, _TextCfg, TokenizerKwargs, _ActKwargs, _NormKwargs)
    for name in section.model_fields
)


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs of nested JSON."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
