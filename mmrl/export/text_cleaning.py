"""open_clip's text cleaning as normalizers of the tokenizers library, for tools that run tokenizer.json alone.

open_clip cleans with ftfy, then with html.unescape, twice. The rules here are made from their tables. Not represented:
ftfy's repair of mojibake, and the HTML entities beyond those of HTML 4. The patterns are valid in JavaScript, too.
"""

import html
import html.entities
import string
from collections.abc import Iterable
from typing import Any

_SPACE = r"[\u0009-\u000d\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
_TERMINAL_ESCAPE = r"\u001b\[[0-9;]*[a-zA-Z]"
_AMPERSANDS = "&(?:amp;|AMP;|#0*38;|#[xX]0*26;)+"
# ftfy leaves entities alone in a line with "<" and in all lines after it.
_OUTSIDE_MARKUP = r"(?<!<[\s\S]*){}(?![^\n]*<)"
# str.lower writes a sigma at a word's end differently.
_FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}*)\u03a3(?!\p{Case_Ignorable}*\p{Cased})"
_QUOTES = {**dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"), **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')}


def normalizers(how: str) -> list[Any]:
    """Normalizers that do what the cleaning `how` of a tokenizer does: lower, whitespace, canonicalize or none."""
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Lowercase, Replace, Strip

    if how == "none":
        return []

    characters, entities = _character_map(), _Entities()
    ftfy_rules = [(_AMPERSANDS, "&")]
    # Within markup html.unescape unescapes entities, so that ftfy does not replace their characters.
    ftfy_rules += [
        (_OUTSIDE_MARKUP.format(entities.pattern(character, strict=True)), new)
        for character, new in characters.items()
        if character in entities.names
    ]
    ftfy_rules += [(_TERMINAL_ESCAPE, ""), *_by_target(characters)]
    rules = [(entities.pattern(character), character) for character in entities.names]
    if how == "canonicalize":
        rules += [("_", " "), (_any_of(set(string.punctuation) - {"_"}), "")]
    rules += [(_SPACE, " ")]
    lower = [] if how == "whitespace" else [Replace(Regex(_FINAL_SIGMA), "\u03c2"), Lowercase()]
    first, then = ([Replace(Regex(old), new) for old, new in some] for some in (ftfy_rules, rules))
    return [*first, NFC(), *then, Strip(), *lower]


def _character_map() -> dict[str, str]:
    """{character: what ftfy replaces it with}; "" if it is removed."""
    from ftfy import chardata

    tables: list[dict[int, Any]] = [chardata.LIGATURES, chardata.WIDTH_MAP, chardata.CONTROL_CHARS]
    characters = {chr(code): new or "" for table in tables for code, new in table.items()} | _QUOTES
    characters |= {chr(code): _character(code) for code in range(0x80, 0xA0)}
    again = str.maketrans(characters)  # e.g. the quotes of Windows-1252
    return {one: new.translate(again) for one, new in characters.items() if new != one}


def _by_target(characters: dict[str, str]) -> list[tuple[str, str]]:
    """A rule per replacement."""
    sources: dict[str, list[str]] = {}
    for character, target in characters.items():
        sources.setdefault(target, []).append(character)
    return [(_any_of(some), target) for target, some in sources.items()]


def _any_of(characters: Iterable[str]) -> str:
    escaped = [f"\\u{ord(one):04x}" for one in sorted(characters)]
    return escaped[0] if len(escaped) == 1 else f"[{''.join(escaped)}]"  # a class of one is three times slower


def any_case(text: str) -> str:
    """A regular expression for a text of ASCII letters, digits, "<", ">" and "_" in upper or lower case."""
    return "".join(f"[{one.lower()}{one.upper()}]" if one.isalpha() else one for one in text)


def _character(code: int) -> str:
    """The character of a numeric entity; 128 to 159 are those of Windows-1252."""
    return html.unescape(f"&#{code};")


class _Entities:
    """The HTML entities of the characters that HTML 4 names, and of ISO 8859-1 and Windows-1252."""

    def __init__(self) -> None:
        from ftfy import chardata

        codes = {*range(0x20, 0x100), 9, 10, 13, *html.entities.name2codepoint.values()} - {ord("&")}
        self.names: dict[str, list[str]] = {}
        """{character: its entities without "&", as regular expressions}."""
        for code in sorted(codes):
            digits = any_case(f"{code:x}")
            names = self.names.setdefault(_character(code), [])
            names += [f"#0*{code};", f"#[xX]0*{digits};", f"#0*{code}(?![0-9;])", f"#[xX]0*{digits}(?![0-9a-fA-F;])"]
        self.names["&"] = []  # the last: what it leaves is not unescaped again
        html5 = html.entities.html5
        for name, character in {**html5, **{key[1:]: char for key, char in chardata.HTML_ENTITIES.items()}}.items():
            if character in self.names and not name.endswith(";"):
                longer = [one.removeprefix(name) for one in html5 if one.startswith(name) and one.endswith(";")]
                name = f"{name}(?!{'|'.join(longer)})"
            if character in self.names:
                self.names[character].append(name)

    def pattern(self, character: str, strict: bool = False) -> str:
        """A regular expression; `strict`: with a semicolon only."""
        return f"&(?:{'|'.join(name for name in self.names[character] if name.endswith(';') or not strict)})"
