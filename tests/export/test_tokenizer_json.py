"""tokenizer.json against open_clip's own tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from mmrl.data.sources import open_reader
from mmrl.export import tokenizer_json
from mmrl.inference.standalone import clean
from mmrl.model import towers

ODD = [
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
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[towers.Tokenizer, Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    ours = towers.tokenise_of("mmrl-starter")
    tokenizer_json._write_bpe(ours.tokenizer, folder / "tokenizer.json")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.enable_truncation(ours.context_length)
    return ours, theirs


def ids(theirs: Tokenizer, text: str, length: int) -> list[int]:
    row = theirs.encode(text).ids
    return row + [0] * (length - len(row))


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_become_the_same_ids(both: tuple[towers.Tokenizer, Tokenizer], text: str) -> None:
    ours, theirs = both
    assert ids(theirs, clean(text, "lower"), ours.context_length) == ours([text])[0].tolist()


def test_real_captions_become_the_same_ids_without_any_cleaning(
    both: tuple[towers.Tokenizer, Tokenizer],
) -> None:
    ours, theirs = both
    reader = open_reader("starter:test-concepts")
    captions = [caption for number in range(0, len(reader), 5) for caption in reader.read(number).captions]
    found = [ids(theirs, caption, ours.context_length) for caption in captions]
    np.testing.assert_array_equal(found, ours(captions).numpy())
