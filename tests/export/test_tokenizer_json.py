"""tokenizer.json against open_clip's own tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mmrl.data.sources import open_reader
from mmrl.export import tokenizer_json
from mmrl.inference.standalone import clean
from mmrl.model import towers
from mmrl.model.tokenizer import Tokenizer as MmrlTokenizer

UNUSUAL = [
    "Caf\u00e9 \u201cquoted\u201d, it\u2019s 3kg; don't",
    "Tom &amp; Jerry &lt;3 &quot;x&quot; &amp;amp; &eacute;",
    "  white \t space\n here ",
    "\ufb01ne o\ufb03ce \ufb02ag",
    "\uff21\uff22\uff23 full\u3000width \uff11\uff12",
    "\u00dcber gro\u00dfe STRASSE \u0130stanbul \u039f\u0394\u039f\u03a3",
    "\u65e5\u672c\u8a9e \U0001f600 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "e\u0301 decomposed",
    "a_b-c/d:e 100% #tag @name https://x.y/z?q=1",
    "zero\u0000byte \ufeffmark",
    "word " * 60,
    "",
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[MmrlTokenizer, Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    ours = towers.build_tokenizer("mmrl-starter")
    tokenizer_json._write_bpe(ours.tokenizer, folder / "tokenizer.json")
    exported = Tokenizer.from_file(str(folder / "tokenizer.json"))
    exported.enable_truncation(ours.context_length)
    return ours, exported


def ids(exported: Tokenizer, text: str, length: int) -> list[int]:
    row = exported.encode(text).ids
    return row + [0] * (length - len(row))


@pytest.mark.parametrize("text", UNUSUAL)
def test_unusual_texts_have_the_same_token_ids(tokenizers: tuple[MmrlTokenizer, Tokenizer], text: str) -> None:
    ours, exported = tokenizers
    assert ids(exported, clean(text, "lower"), ours.context_length) == ours([text])[0].tolist()


def test_captions_have_the_same_token_ids_without_cleaning(
    tokenizers: tuple[MmrlTokenizer, Tokenizer],
) -> None:
    ours, exported = tokenizers
    reader = open_reader("starter:test-concepts")
    captions = [caption for number in range(0, len(reader), 5) for caption in reader.read(number).captions]
    found = [ids(exported, caption, ours.context_length) for caption in captions]
    np.testing.assert_array_equal(found, ours(captions).numpy())
