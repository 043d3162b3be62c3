"""Tiny models with random weights, saved by transformers itself: the oracle of what mmrl reads from such folders."""

from pathlib import Path
from typing import Any

import torch
from conftest import VOCABULARY

IMAGE = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 32, "patch_size": 16}  # fmt: skip
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 16}  # fmt: skip
NASTY = [
    "A red square",
    "women’s  shoes &amp; ﬁne   “quotes”",
    "",
    "ＦＵＬＬ ｗｉｄｔｈ 漢字 👟",
    "red " * 50,
    "a\x00b\tc\n",
]


def save_clip(folder: Path, **text: Any) -> Any:
    """Saves a CLIPModel with a tokenizer of CLIP's kind (bytes, some merges) and its processor; returns the model."""
    import transformers as hf
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d</w>"), ("s", "q"), ("e", "n</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = hf.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)  # pyright: ignore[reportArgumentType]
    ends = {"vocab_size": len(vocab), "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    config = hf.CLIPConfig(text_config={**TEXT, **ends, **text}, vision_config=IMAGE, projection_dim=24)
    return _save(hf.CLIPModel(config), folder, tokenizer, crop=True)


def save_chinese_clip(folder: Path) -> Any:
    """Saves a ChineseCLIPModel with a BERT tokenizer; returns the model."""
    import transformers as hf

    text = {**TEXT, "vocab_size": len(VOCABULARY), "type_vocab_size": 2}
    config = hf.ChineseCLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24)
    return _save(hf.ChineseCLIPModel(config), folder, bert_tokenizer(), crop=False)


def save_siglip(folder: Path) -> Any:
    """Saves a SiglipModel whose image tower has the size of SigLIP's B/32, the smallest that timm has (90 M parameters,
    a text tower of two layers); returns the model."""
    import transformers as hf

    image = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "image_size": 256, "patch_size": 32}  # fmt: skip
    text = {**TEXT, "vocab_size": len(VOCABULARY), "projection_size": 768}
    config = hf.SiglipConfig(text_config=text, vision_config=image)
    return _save(hf.SiglipModel(config), folder, bert_tokenizer(), crop=False)


def bert_tokenizer() -> Any:
    """A word-piece tokenizer of a few words."""
    from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    vocab = {token: number for number, token in enumerate(VOCABULARY)}
    return BertTokenizerFast(vocab=vocab, model_max_length=16)


def _save(model: Any, folder: Path, tokenizer: Any, crop: bool) -> Any:
    import transformers as hf

    with torch.no_grad():  # nothing is 0 or 1, so that no parameter can be forgotten unnoticed
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = model.config.vision_config.image_size
    square = {"height": side, "width": side}
    hf.CLIPImageProcessor(
        size={"shortest_edge": side} if crop else square,
        crop_size=square,
        do_center_crop=crop,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    ).save_pretrained(folder)
    return model
