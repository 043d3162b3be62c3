"""Captions and groups from text files, JSON values and tables' cells, as other systems write them."""

import codecs
import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

# Blank characters at the ends of texts: spaces, and the marks and NULs that other systems write.
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\0\ufeff\u200b\u200e\u200f\u2060"


def decode_text(data: bytes) -> str:
    """A text file's content: UTF-8, or UTF-16 or UTF-32 if it begins with their byte order mark.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return data.decode("utf-32")
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


def strip_blank(text: str) -> str:
    """The text without spaces, byte order marks, direction marks and NULs at its ends."""
    return text.strip(_BLANK)


def clean_captions(captions: Iterable[str]) -> list[str]:
    """The captions stripped, without empty ones and repetitions.

    Raises:
        UnicodeEncodeError: half of a surrogate pair, which JSON can hold and some tokenizers fail on.
    """
    stripped = (strip_blank(caption.encode().decode()) for caption in captions)
    return list(dict.fromkeys(caption for caption in stripped if caption))


def caption_list(value: Any) -> list[str]:
    """The captions in a JSON value or a table's cell: a text or a number, or those of a list; other values have none.

    Raises:
        UnicodeDecodeError: bytes that are no text.
    """
    if isinstance(value, list):
        return [text for one in value for text in caption_list(one)]
    if isinstance(value, bytes):
        return [decode_text(value)]
    return [value] if isinstance(value, str) else [_number(value)] if _is_number(value) else []


def group_name(value: Any) -> str | None:
    """The group in a JSON value or a table's cell; None for null, "" and NaN, which is Parquet's missing number.

    Raises:
        UnicodeDecodeError: bytes that are no text.
    """
    if isinstance(value, bytes):
        value = decode_text(value)
    if _is_number(value):
        return _number(value)
    return None if value is None or value == "" or value != value else str(value)


def _is_number(value: Any) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float | Decimal) -> str:
    """A number as text; 7.0 as 7, since a column of integers becomes one of floats where a cell is missing."""
    return str(int(value) if value == int(value) else value)
