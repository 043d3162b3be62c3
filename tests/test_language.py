"""Words that a reader of this field would not search for, with the term to use instead.

Only words that are never ordinary English here are listed; each exception names its reason.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for pattern in ("mmrl/**/*", "launch/*", "configs/*", "README.md", "Makefile")
    for path in sorted(ROOT.glob(pattern))
    if path.suffix in (".py", ".md", ".yaml", ".sh", ".sbatch", ".html", ".js", "") and path.is_file()
]
EXCEPTIONS = {
    "mmrl/data/starter/NOTICE": "licence texts of others",
}
WORDS = {
    r"\b(?:be|is|are|was) had\b": "available",
    r"(?<!there )\bis none\b(?! of)": "is not a …",
    r"\bso many\b": "up to N, N",
    r"\bheld against\b": "compared with, checked against",
    r"\btold\b(?!\()": "logged, printed, stated",
    r"\btwins?\b": "baseline",
    r"\bshel(?:f|ves)\b": "gallery",
    r"\b(?:the|a|by|this|after|mid-run) turn\b|\bturned by\b|\bturning the embedding\b": "rotation, rotated",
    r"\bin vain\b": "(say what happens)",
    r"\bby way of\b": "at, through",
    r"\boutshouts?\b": "dominates",
    r"\bget together\b": "join",
    r"\bmain process\b": "rank 0",
    r"\bthe other (?:ones|way round)\b": "the reverse direction",
    r"\b(?:a|an) (?:vector|gpu|pair|step|epoch|process)(?= (?:each|in all)\b)": "per …",
    r"\bcomes? by\b": "(name the event)",
    r"\bgoes along\b": "is included",
    r"\bheard of\b": "received",
    r"\bwhole vectors?\b": "full vectors, full dim",
    r"\bjudges?\b|\bjudged\b": "holdout, evaluated",
    r"\bat the door\b|\bonly door\b|\bone door\b|\bonly place\b": "(claims about imports belong to import-linter)",
    r"\b(?:own_rows|from_main|pass_on|anywhere\(|narrow_blocks|_a_pair|_a_gpu|_an_epoch)": "see the names in use",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS, ids=lambda word: re.sub(r"\W+", " ", word).strip()[:30])
def test_a_word_that_nobody_searches_for_is_not_used(word: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for path in FILES
        if (name := path.relative_to(ROOT).as_posix()) not in EXCEPTIONS
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(word, line)
    ]
    assert not found, f"use instead: {WORDS[word]}"


def test_the_exceptions_are_still_needed() -> None:
    assert [name for name in EXCEPTIONS if not (ROOT / name).exists()] == []
