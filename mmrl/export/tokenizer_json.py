"""Write a text tower's tokenizer as tokenizer.json, for the tokenizers library, transformers and transformers.js."""

import json
from pathlib import Path
from typing import Any

from mmrl.errors import InputError
from mmrl.export import text_cleaning
from mmrl.model.bundle import Bundle

FILE = "tokenizer.json"
# As open_clip's pattern, which ignores case: it then finds no word in U+0345, the mark whose capital is a letter.
_CONTRACTIONS = "'[sS\u017f]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_WORDS = _CONTRACTIONS + r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}\u0345]+"


def check(bundle: Bundle, format: str) -> None:
    """Raises InputError if tokenizer.json cannot represent the tokenizer of an encoder with a text tower."""
    if "text" not in bundle.model.sides:
        return
    settings = bundle.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    unsupported = next((name for name in ("reduction_mask", "additional_special_tokens") if settings.get(name)), None)
    if bundle.model_cfg["text_cfg"].get("tokenizer_mode"):
        unsupported = "tokenizer_mode"
    if unsupported is not None:
        raise InputError(
            f"format: {format} cannot hold this tokenizer ({unsupported} is set); allowed: {allowed(bundle)}."
        )


def allowed(bundle: Bundle) -> str:
    """The formats that hold any tokenizer and any preprocessing."""
    return "bundle, open_clip" if len(bundle.model.sides) == 2 else "bundle"


def is_bpe(bundle: Bundle) -> bool:
    """Whether the tokenizer is open_clip's BPE."""
    return hasattr(bundle.tokenise.tokenizer, "bpe_ranks")


def pad_id(bundle: Bundle) -> int:
    """The token id with which mmrl pads texts."""
    return 0 if is_bpe(bundle) else bundle.tokenise.tokenizer.tokenizer.pad_token_id or 0


def write(bundle: Bundle, stored: Path, folder: Path, *, cleans: bool) -> dict[str, Any]:
    """Writes FOLDER/tokenizer.json; returns the tokenizer's keys of a manifest's `graphs`.

    Args:
        stored: the bundle's folder, with the files of a Hugging Face tokenizer.
        cleans: it cleans texts as training did; else it expects clean texts.
    """
    from tokenizers import Tokenizer, normalizers

    settings = bundle.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    if is_bpe(bundle):
        clean, zero_id = settings.get("clean", "lower"), None
        tokenizer = _bpe(bundle.tokenise.tokenizer, clean, cleans)
    else:
        original = stored / "tokenizer" / FILE
        if not original.is_file():
            raise InputError(f"format: this tokenizer has no {FILE} (a slow tokenizer); allowed: {allowed(bundle)}.")
        tokenizer = Tokenizer.from_file(str(original))
        inner, clean = bundle.tokenise.tokenizer.tokenizer, settings.get("clean", "whitespace")
        zero_id = inner.sep_token_id if settings.get("strip_sep_token") else None
        if cleans:
            own = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
            tokenizer.normalizer = normalizers.Sequence([*text_cleaning.normalizers(clean), *own])
    tokenizer.save(str(folder / FILE))
    return {"tokenizer": FILE, "clean": clean, "pad_id": pad_id(bundle), "zero_id": zero_id}


def write_config(bundle: Bundle, folder: Path) -> None:
    """Writes FOLDER/tokenizer_config.json, for transformers and transformers.js."""
    tokenizer = bundle.tokenise.tokenizer
    if is_bpe(bundle):
        start, end = (tokenizer.decoder[index] for index in (tokenizer.sot_token_id, tokenizer.eot_token_id))
        special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    else:
        special = {name: str(token) for name, token in tokenizer.tokenizer.special_tokens_map.items()}
    cleaning = (bundle.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}).get("clean")
    config = {
        # The class that reads tokenizer.json as it is; CLIPTokenizer and others replace its normalizer by their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": bundle.tokenise.context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Training sees no special token in a text, because their brackets are removed first.
        **({"split_special_tokens": True} if cleaning == "canonicalize" else {}),
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _bpe(simple: Any, clean: str, cleans: bool) -> Any:
    """The tokenizers library's equivalent of an open_clip SimpleTokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    start, end = (simple.decoder[index] for index in (simple.sot_token_id, simple.eot_token_id))
    merges = [pair for pair in simple.bpe_ranks if len(pair) == 2]
    bpe = BPE(
        vocab=simple.encoder,
        merges=merges,
        unk_token=end,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    tokenizer = Tokenizer(bpe)
    if cleans:
        tokenizer.normalizer = normalizers.Sequence(text_cleaning.normalizers(clean))
    # open_clip finds them in the cleaned text; without punctuation there are none.
    found = clean != "canonicalize"
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=found) for token in (start, end)])
    words = "|".join([*map(text_cleaning.any_case, (start, end)), _WORDS])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, simple.eot_token_id), (start, simple.sot_token_id), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer
