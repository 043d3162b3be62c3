"""Long captions: the tokens that a tower reads are those of the whole text, in bounded time."""

import pickle
import random
import time
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn

from mmrl.model.registry import build_tokenizer
from mmrl.model.tokenizer import BPE_CHARACTERS, OTHER_CHARACTERS, Tokenizer

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ab", "aaaab", "etaoin", "äöüéñ", "男女犬猫鳥魚赤青", "กขคงจฉ", "😂😍❤️🇺🇸", "!?.-=*",
    "0123456789", "ab 'sll&;\n", "مرحبا", "e\u0301\u0302a",
)  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> SimpleTokenizer:
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def bounded() -> Tokenizer:
    return Tokenizer(SimpleTokenizer())


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [
        "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randint(1, 240))) + " ".join(rng.choices(ALPHABETS, k=2))
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_long_words_have_the_tokens_of_open_clip(plain: SimpleTokenizer, bounded: Tokenizer, count: int) -> None:
    for text in random_texts(count):
        assert bounded.tokenizer.encode(text) == plain.encode(text), text


def test_no_token_that_was_read_changes(plain: SimpleTokenizer, bounded: Tokenizer) -> None:
    longest = max(len(token.removesuffix("</w>")) for token in plain.encoder)
    assert longest + 1 < BPE_CHARACTERS  # and a space
    texts = [
        "a red shoe " * 2000, "😂" * 9000, "😂😂😂😂😂😂😂😂 " * 1500, "blackandwhitephotography " * 900, "." * 9000,
        "a " * 9000, " " * 9000 + "behind spaces", "&nbsp;" * 4000 + "behind entities", "\n\ufeff" * 5000 + "x",
        "haha" * 3000,
    ]  # fmt: skip
    assert torch.equal(bounded(texts), plain(texts))
    assert bounded.lengths(["a red shoe"]) == [5]
    assert bounded.lengths(["a " * 9000]) == [bounded.max_characters // 2 + 2]


@pytest.mark.parametrize(
    "alphabet", ["abcdefghijklmnopqrstuvwxyz", "男女犬猫鳥魚赤青黄白黒", "😂😍🔥👍", "abc-_ .0123456789", "&;amp"]
)
def test_an_unbroken_caption_costs_no_more_than_its_beginning(bounded: Tokenizer, alphabet: str) -> None:
    text = "".join(random.Random(1).choices(alphabet, k=40_000))
    began = time.process_time()
    tokens = bounded([text])
    assert time.process_time() - began < 1  # 54 s without the bound
    assert torch.equal(tokens, bounded([text[:1000]]))
    began = time.process_time()
    bounded([text * 100])
    assert time.process_time() - began < 5


def test_the_words_that_are_kept_are_bounded(plain: SimpleTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl.model.tokenizer._MAX_KNOWN_WORDS", 5)
    tokenizer = Tokenizer(SimpleTokenizer())
    for _ in range(2):
        for word in ("red", "<end_of_text>", "blue", "a" * 500, "shoes", "green", "dress", "large", "photo"):
            assert tokenizer.tokenizer.encode(word) == plain.encode(word)
    kept = [*tokenizer.tokenizer.bpe._known, *tokenizer.tokenizer.cache]
    assert len(kept) <= 5 + 2
    assert max(map(len, kept)) <= 64


def test_it_can_be_pickled_for_workers(bounded: Tokenizer) -> None:
    text = "abcdefghij" * 1000
    copy = pickle.loads(pickle.dumps(bounded))  # noqa: S301
    assert torch.equal(copy([text]), bounded([text]))


def test_a_tokenizer_of_hugging_face_is_bounded_too(hf_model: Path) -> None:
    tokenizer = build_tokenizer(str(hf_model))
    inner = tokenizer.tokenizer
    assert isinstance(inner, HFTokenizer)
    assert tokenizer.max_characters == OTHER_CHARACTERS * tokenizer.context_length
    limit, plain = tokenizer.max_characters, get_clean_fn("whitespace")
    texts = ["x" * limit + " red", "x" * (limit - 4) + " red shoe", "a red shoe " * 40_000]
    assert [inner.clean_fn(text) for text in texts] == [plain(text)[:limit] for text in texts]
    assert torch.equal(tokenizer(texts), tokenizer(["x", "x red", "a red shoe " * 10]))  # x…x is one unknown word
