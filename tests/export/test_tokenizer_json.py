"""tokenizer.json against open_clip's own tokenizers."""

from pathlib import Path

import numpy as np
import pytest
from conftest import VOCABULARY
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer
from tokenizers.normalizers import Sequence

from mmrl.data.sources import open_reader
from mmrl.export import hard_inputs, text_cleaning, tokenizer_json
from mmrl.inference.standalone import clean

LENGTH = 77
MOJIBAKE = 4  # the last of the hard texts, which tokenizer.json cannot repair


@pytest.fixture(scope="module", params=["lower", "whitespace", "canonicalize"])
def ours(request: pytest.FixtureRequest) -> SimpleTokenizer:
    return SimpleTokenizer(clean=request.param)


def exported(ours: SimpleTokenizer, clean: str, cleans: bool, folder: Path) -> Tokenizer:
    tokenizer_json._bpe(ours, clean, cleans).save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.encode_special_tokens = clean == "canonicalize"  # split_special_tokens in tokenizer_config.json
    return tokenizer


def ids(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    return np.array([row + [0] * (LENGTH - len(row)) for row in rows])


def test_there_are_two_hundred_hard_texts() -> None:
    texts = hard_inputs.texts()
    assert len(texts) == len(set(texts)) == 200


def test_hard_texts_have_the_same_token_ids(
    ours: SimpleTokenizer, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    how, texts = request.node.callspec.params["ours"], hard_inputs.texts()
    expected = ours(texts, LENGTH).numpy()
    cleaned = [clean(text, how) for text in texts]
    np.testing.assert_array_equal(ids(exported(ours, how, False, tmp_path), cleaned), expected)
    alone = ids(exported(ours, how, True, tmp_path), texts)
    np.testing.assert_array_equal(alone[:-MOJIBAKE], expected[:-MOJIBAKE])
    assert (alone[-MOJIBAKE:] != expected[-MOJIBAKE:]).any(1).all()


def test_captions_have_the_same_token_ids(tmp_path: Path) -> None:
    ours = SimpleTokenizer()
    reader = open_reader("starter:test-concepts")
    captions = [caption for number in range(0, len(reader), 5) for caption in reader.read(number).captions]
    np.testing.assert_array_equal(
        ids(exported(ours, "lower", True, tmp_path), captions), ours(captions, LENGTH).numpy()
    )


@pytest.mark.parametrize("how", ["whitespace", "canonicalize"])
def test_a_hugging_face_tokenizer_gets_the_cleaning_too(how: str, tmp_path: Path) -> None:
    from transformers import BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    letters = {
        token: i for i, token in enumerate([*VOCABULARY, *"abcdefghijklmnopqrstuvwxyz'\"&<>;-!,.", "##e", "##o"])
    }
    BertTokenizerFast(vocab=letters).save_pretrained(tmp_path)
    ours = HFTokenizer(str(tmp_path), context_length=LENGTH, clean=how)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = Sequence([*text_cleaning.normalizers(how), tokenizer.normalizer])
    tokenizer.enable_truncation(LENGTH)
    tokenizer.encode_special_tokens = how == "canonicalize"
    texts = hard_inputs.texts()[:-MOJIBAKE]
    np.testing.assert_array_equal(ids(tokenizer, texts), ours(texts).numpy())
