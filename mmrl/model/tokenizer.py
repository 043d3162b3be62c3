"""The tokenizer of a text tower: open_clip's BPE or a Hugging Face tokenizer, saved to and loaded from files.

open_clip takes seconds to import, so it is imported inside the functions.
"""

import gzip
import shutil
from pathlib import Path
from typing import Any

import torch

from mmrl.errors import InputError
from mmrl.model.guards import library_code_only, offline
from mmrl.model.model_cfg import check_config_folder

_BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MAX_BPE_BYTES = 32 << 20  # open_clip's own file unpacks to 3.2 MB


class Tokenizer:
    """A list of texts -> int64 (M, L). A class, so that data workers can pickle it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.tokenizer(texts)

    @property
    def context_length(self) -> int:
        """The maximum number of tokens of a text; longer texts are truncated."""
        return self.tokenizer.context_length

    def lengths(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text before truncation, special tokens included."""
        from open_clip import tokenizer as kinds

        if isinstance(self.tokenizer, kinds.SimpleTokenizer):
            return [len(self.tokenizer.encode(text)) + 2 for text in texts]
        # In mode "clips" open_clip adds three special tokens itself.
        adds_special = self.tokenizer.tokenizer_mode != "clips"
        clean = [self.tokenizer.clean_fn(text) for text in texts]
        ids = self.tokenizer.tokenizer(clean, add_special_tokens=adds_special, verbose=False)["input_ids"]
        return [len(one) + (0 if adds_special else 3) for one in ids]

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the tokenizer's files; returns the manifest's `tokenizer`, which `load_tokenizer` needs as well.

        Raises:
            InputError: the tokenizer is neither open_clip's BPE nor a Hugging Face one.
        """
        from open_clip import tokenizer as kinds

        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.tokenizer, kinds.SimpleTokenizer):
            shutil.copyfile(kinds.default_bpe(), folder / _BPE_FILE)
            kind = "open_clip_bpe"
        elif isinstance(self.tokenizer, kinds.HFTokenizer):
            self.tokenizer.save_pretrained(folder)
            kind = "huggingface"
        else:
            raise InputError(
                f"tokenizer: a {type(self.tokenizer).__name__} cannot be stored; name a Hugging Face tokenizer as "
                "text_cfg.hf_tokenizer_name in the model config."
            )
        return {"kind": kind, "context_length": self.tokenizer.context_length}


def load_tokenizer(folder: Path, info: dict[str, Any], model_cfg: dict[str, Any]) -> Tokenizer:
    """Loads what `Tokenizer.save` wrote, from its files alone: no network, no code from the folder.

    Raises:
        InputError: a file is missing, too large or damaged, or names code to run.
    """
    from open_clip import tokenizer as kinds

    settings = model_cfg["text_cfg"].get("tokenizer_kwargs") or {}
    length = info["context_length"]
    check_config_folder(folder)
    try:
        if info["kind"] == "open_clip_bpe":
            with gzip.open(folder / _BPE_FILE) as file:
                if len(file.read(_MAX_BPE_BYTES + 1)) > _MAX_BPE_BYTES:
                    raise ValueError(f"{_BPE_FILE} unpacks to more than {_MAX_BPE_BYTES:,} bytes")
            return Tokenizer(kinds.SimpleTokenizer(str(folder / _BPE_FILE), context_length=length, **settings))
        if not folder.is_dir():  # transformers would read the path as the name of a hub repository
            raise FileNotFoundError("the folder is missing")
        with library_code_only(), offline():
            tokenizer = kinds.HFTokenizer(
                str(folder),
                context_length=length,
                tokenizer_mode=model_cfg["text_cfg"].get("tokenizer_mode"),
                trust_remote_code=False,
                local_files_only=True,
                **settings,
            )
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason}); export the encoder again.") from error
    return Tokenizer(tokenizer)
