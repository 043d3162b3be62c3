"""Write a text tower's tokenizer as tokenizer.json, for the tokenizers library, transformers and transformers.js."""

import json
import shutil
from pathlib import Path
from typing import Any

from mmrl.errors import InputError
from mmrl.model.bundle import Bundle

FILE = "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"
# What ftfy changes in correctly encoded texts; open_clip runs it before its BPE. (ftfy also repairs mojibake; these
# rules do not.)
_ENTITIES = (
    ("&amp;", "&"),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&quot;", '"'),
    ("&#39;", "'"),
    ("&nbsp;", " "),
)
_LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st", "ĳ": "ij", "Ĳ": "IJ"}
_QUOTES = {"[\u02bc\u2018-\u201b]": "'", "[\u201c-\u201f]": '"'}
_CONTROL = "[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\ufeff\u206a-\u206f\ufff9-\ufffc]"
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def check(bundle: Bundle, format: str) -> None:
    """Raises InputError if tokenizer.json cannot represent the tokenizer."""
    settings = bundle.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    unsupported = next((name for name in ("reduction_mask", "additional_special_tokens") if settings.get(name)), None)
    if bundle.model_cfg["text_cfg"].get("tokenizer_mode"):
        unsupported = "tokenizer_mode"
    if unsupported is not None:
        raise InputError(
            f"format: {format} cannot hold this tokenizer ({unsupported} is set); allowed: bundle, open_clip."
        )


def is_bpe(bundle: Bundle) -> bool:
    """Whether the tokenizer is open_clip's BPE."""
    return hasattr(bundle.tokenise.tokenizer, "bpe_ranks")


def write(bundle: Bundle, stored: Path, folder: Path) -> dict[str, Any]:
    """Writes FOLDER/tokenizer.json; returns the tokenizer's keys of a manifest's `graphs`.

    Args:
        stored: the bundle's folder, with the files of a Hugging Face tokenizer.
    """
    settings = bundle.model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    if is_bpe(bundle):
        _write_bpe(bundle.tokenise.tokenizer, folder / FILE)
        return {"tokenizer": FILE, "clean": settings.get("clean", "lower"), "pad_id": 0, "zero_id": None}
    original = stored / "tokenizer" / FILE
    if not original.is_file():
        raise InputError(f"format: this tokenizer has no {FILE} (a slow tokenizer); allowed: bundle, open_clip.")
    shutil.copyfile(original, folder / FILE)
    inner = bundle.tokenise.tokenizer.tokenizer
    zero_id = inner.sep_token_id if settings.get("strip_sep_token") else None
    clean = settings.get("clean", "whitespace")
    return {"tokenizer": FILE, "clean": clean, "pad_id": inner.pad_token_id or 0, "zero_id": zero_id}


def write_config(context_length: int, folder: Path) -> None:
    """Writes FOLDER/tokenizer_config.json, for transformers and transformers.js."""
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_bpe(simple: Any, path: Path) -> None:
    """Converts open_clip's SimpleTokenizer. The start and end tokens get the names that transformers uses."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    renamed: dict[Any, str] = {simple.sot_token_id: START, simple.eot_token_id: END}
    vocab: dict[str, int] = {renamed.get(index) or token: index for token, index in simple.encoder.items()}
    merges = [pair for pair in simple.bpe_ranks if len(pair) == 2]
    bpe = BPE(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
    wide = {chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)} | {"\u3000": " "}
    replaced = [*_ENTITIES, *_LIGATURES.items(), *wide.items()]
    tokenizer.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(old, new) for old, new in replaced),
            *(normalizers.Replace(Regex(old), new) for old, new in _QUOTES.items()),
            normalizers.Replace(Regex(_CONTROL), ""),
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, simple.eot_token_id), (START, simple.sot_token_id), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.save(str(path))
