"""The tokenizer of a text tower: open_clip's BPE or a Hugging Face tokenizer, saved to and loaded from files.

open_clip takes seconds to import, so it is imported inside the functions.
"""

import gzip
import shutil
from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from mmrl.errors import InputError
from mmrl.model.guards import library_code_only, offline, panics_as_errors, shortened
from mmrl.model.model_cfg import check_config_folder

_BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MAX_BPE_BYTES = 32 << 20  # open_clip's own file unpacks to 3.2 MB
# Characters of a cleaned text that are tokenised, per token of the context length. No token of open_clip's BPE has more
# than 32 bytes, and words are one space apart, so that no tower reads beyond 33. Other tokenizers can make one token of
# many characters, e.g. of an unknown word.
BPE_CHARACTERS, OTHER_CHARACTERS = 64, 1024
# Characters that are cleaned: the rest of a longer text is not read.
_MOST_CLEANED = 1 << 20
# Files of Hugging Face tokenizers, of which each has one.
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")
# Words whose tokens are kept, and the bytes of the longest of them.
_MAX_KNOWN_WORDS, _LONG_WORD = 50_000, 64


class Tokenizer:
    """A list of texts -> int64 (M, L). A class, so that data workers can pickle it.

    Of a long text the first `max_characters` are tokenised, counted after cleaning: more than a tower reads.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is open_clip's; its cleaning and its BPE are replaced by ones with bounded time."""
        self.tokenizer, is_bpe = tokenizer, hasattr(tokenizer, "bpe_ranks")
        self.max_characters: int = tokenizer.context_length * (BPE_CHARACTERS if is_bpe else OTHER_CHARACTERS)
        tokenizer.clean_fn = _BoundedCleaning(tokenizer.clean_fn, self.max_characters)
        if is_bpe:
            tokenizer.bpe = _BoundedBPE(tokenizer.cache, tokenizer.bpe_ranks)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        with panics_as_errors():
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
        with panics_as_errors():
            ids = self.tokenizer.tokenizer(clean, add_special_tokens=adds_special, verbose=False)["input_ids"]
        return [len(one) + (0 if adds_special else 3) for one in ids]

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes the tokenizer's files; returns the manifest's `tokenizer`, which `load_tokenizer` needs as well.
        Raises InputError: the tokenizer is neither open_clip's BPE nor a Hugging Face one."""
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
    """Loads what `Tokenizer.save` wrote, from its files alone: no network, no code from the folder. Raises InputError:
    a file is missing, too large or damaged, or names code to run."""
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
        return _open_hugging_face(folder, length, model_cfg["text_cfg"].get("tokenizer_mode"), settings)
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        raise InputError(
            f"{folder}: the tokenizer cannot be loaded ({shortened(error)}); save the encoder again."
        ) from error


def _open_hugging_face(folder: Path, length: int, mode: str | None, settings: dict[str, Any]) -> Tokenizer:
    from open_clip import tokenizer as kinds

    if not folder.is_dir():  # transformers would read the path as the name of a hub repository
        raise FileNotFoundError("the folder is missing")
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise FileNotFoundError("it has no vocabulary; transformers would make an empty one")
    cleans = settings.get("clean") != "none"
    tokenizer: Any
    with library_code_only(), offline():
        tokenizer = kinds.HFTokenizer(
            str(folder),
            context_length=length,
            tokenizer_mode=mode,
            trust_remote_code=False,
            local_files_only=True,
            **{name: value for name, value in settings.items() if cleans or name != "clean"},
        )
    if not cleans:
        tokenizer.clean_fn = _unchanged
    return Tokenizer(tokenizer)


def _unchanged(text: str) -> str:
    return text


class _BoundedCleaning:
    """Cleans a text and returns its first characters."""

    def __init__(self, clean: Callable[[str], str], max_characters: int) -> None:
        self._clean, self._max_characters = clean, max_characters

    def __call__(self, text: str) -> str:
        return self._clean(text[:_MOST_CLEANED])[: self._max_characters]


class _BoundedBPE:
    """A word, as characters that stand for bytes -> its tokens, joined by spaces. open_clip's takes a time quadratic in
    the word's length, and keeps every word that it ever saw."""

    def __init__(self, special: Iterable[str], ranks: Mapping[tuple[str, str], int]) -> None:
        self._ranks, self._special = ranks, frozenset(special)
        self._known: dict[str, str] = {}

    def __call__(self, word: str) -> str:
        if word in self._special:
            return word
        if (known := self._known.get(word)) is not None:
            return known
        tokens = " ".join(merge_pairs([*word[:-1], word[-1] + "</w>"], self._ranks))
        if len(word) <= _LONG_WORD:
            if len(self._known) == _MAX_KNOWN_WORDS:
                self._known.clear()
            self._known[word] = tokens
        return tokens


def merge_pairs(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merges neighbours, all pairs of the lowest rank first and from left to right, until no pair has a rank: the
    tokens of a word, as open_clip's `bpe` finds them, in O(n log n)."""
    symbols, count = [*symbols], len(symbols)
    before, after = [*range(-1, count - 1)], [*range(1, count + 1)]
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, merged = heap[0][0], list[int]()
        while heap and heap[0][0] == rank:
            _, i = heappop(heap)
            j = after[i]
            if j < count and ranks.get((symbols[i], symbols[j])) == rank:  # else it was merged meanwhile
                symbols[i], symbols[j] = symbols[i] + symbols[j], ""
                after[i] = after[j]
                if after[i] < count:
                    before[after[i]] = i
                merged.append(i)
        for left in {i for one in merged for i in (before[one], one)}:
            if left >= 0 and after[left] < count and (pair := (symbols[left], symbols[after[left]])) in ranks:
                heappush(heap, (ranks[pair], left))
    return [symbol for symbol in symbols if symbol]
