"""Texts and images that tools tokenise and resize differently; every export is checked on them."""

import io
import unicodedata

import numpy as np
from PIL import Image

_ENTITIES = (
    "amp", "lt", "gt", "quot", "apos", "nbsp", "eacute", "Eacute", "uuml", "szlig", "ntilde", "copy", "reg", "trade",
    "hellip", "ndash", "mdash", "rsquo", "lsquo", "ldquo", "rdquo", "deg", "times", "euro", "frac12", "laquo",
    "middot", "bull",
)  # fmt: skip
_NUMERIC = ("#39", "#039", "#x27", "#X27", "#8217", "#x2019", "#150", "#233", "#x20AC", "#160", "#174", "#8482")
_OTHER_ENTITIES = (
    "AT&ampT", "3 &lt5 shoes", "&copy2020", "&reg; &regular", "a&eacute b", "&notit; &notin;", "R&D & Q&A", "&NTILDE;",
    "x?a=1&copy=2&region=3", "&amp;amp; &amp;lt; &amp;#39;", "<b>women&rsquo;s</b> shoes", "women&rsquo;s\n<b>x</b>",
    "1 < 2 &amp; 3 > 2 &hellip;", "&unknown; & ;", "&#39s &#8217s",
)  # fmt: skip
_WRITING = (
    "قميص أحمر للنساء", "حذاء جلدي، مقاس ٤٢", "كِتَابٌ عَرَبِيّ", "لباس‌های زنانه", "שמלה אדומה", "שָׁלוֹם עוֹלָם",
    "\u202bנעליים\u202c shoes",
    "abc \u200fאבג\u200e def", "اردو میں جوتے؟", "ﻻ ﷲ ﷺ",
    "红色连衣裙", "女士運動鞋", "赤いワンピース", "ﾜﾝﾋﾟｰｽ ｶﾞ", "レディース スニーカー",
    "빨간 드레스", "\u1107\u1161\u11af\u1100\u1161\u11ab", "𠮷野家 𠀋",
    "「靴」、女性用。", "鞋／shoes",
    "लाल पोशाक", "ชุดเดรสสีแดง", "சிவப்பு உடை", "წითელი კაბა", "կարմիր զգեստ",
    "ΚΟΚΚΙΝΟ ΦΟΡΕΜΑ", "ΟΔΟΣ Σ ΑΣ'Α", "красное ПЛАТЬЕ",
    "İSTANBUL ısı", "Đầm đỏ nữ", "GROẞE STRASSE ſo", "ǅ Ǆ ŉ ĳ",
)  # fmt: skip
_EMOJI = (
    "😀 shoe", "👨‍👩‍👧‍👦 family", "👍🏽👍🏿 skin", "👩🏾‍🚀", "🏳️‍🌈 flag", "🇩🇪🇯🇵", "1️⃣ #️⃣", "❤️ vs ❤", "☺︎ ☺️",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "🧑‍🤝‍🧑", "shoe👟shoe", "©️ ™️", "🫠🪿",
)  # fmt: skip
_PUNCTUATION = (
    "don't DON'T it'S we'LL I'M they'VE", "''s 's' 'ſ", "!!! ?! ...", "a_b-c/d:e", "100% #tag @name", "$9.99 (50% off)",
    "https://x.y/z?q=1&r=2", "me@x.com", "½ ² № ℃ ™ C++", "x=1;y=2", "【新品】★☆", "⁄ ‰ § ¶ †", "Ⅷ ⅷ ①Ⓐ",
)  # fmt: skip
_SPECIAL = (
    "<|endoftext|>", "<|startoftext|> shoe", "a <end_of_text> b", "<START_OF_TEXT>",
    "[SEP] [CLS]", "[MASK] shoe", "<s> </s>", "<pad> <unk>",
)  # fmt: skip


def texts() -> list[str]:
    """200 texts: typographic quotes, HTML entities, all scripts, emoji, control characters, long ones and others."""
    some = [f"women{quote}s {quote}red{quote} shoes" for quote in "’‘‚‛“”„‟«‹′″ʼ`´–"]
    some += [f"Tom &{name}; Jerry" for name in (*_ENTITIES, *_NUMERIC)]
    some += _OTHER_ENTITIES
    some += [f"o{ligature}ce {ligature}" for ligature in ("ﬀ", "ﬁ", "ﬂ", "ﬃ", "ﬄ", "ﬅ", "ﬆ", "æ", "œ")]
    wide = "".join(chr(0xFEE0 + ord(one)) for one in "Red SHOE-42!&<")
    some += [wide, f"{wide}\u3000{wide}", "￥１００", "￦￡", "\uffe3\uff5e", "ＬＯＵＤ'Ｓ"]
    some += [*_WRITING, *_EMOJI, *_PUNCTUATION, *_SPECIAL]
    controls = "\0\x07\x08\x0b\x1b\x1c\x1f\x7f\x80\x85\x92\x9f\xad\u200b\u200e\u2060\ufeff\u206a\ufff9\ufffc\ufffd"
    some += [f"red{control}shoe {control}" for control in controls] + ["\x1b[31mred\x1b[0m shoe"]
    some += [
        "",
        " ",
        "\t\n\r\n",
        "\u00a0\u2003\u3000",
        "a\u00a0b\u2009c\u202fd",
        " padded  twice ",
        "a\u2028b\u2029c\x0cd",
    ]
    some += [unicodedata.normalize("NFD", one) for one in ("Café crème", "Ångström ñ", "Việt Nam", "йё")]
    some += [
        "e\u0301\u0327\u0316 z\u0335a\u0336l\u0337g\u0338o",
        "\u212b \u2126 \u212a",
        "x\u0345 \u1fb3",
        "q\u0307\u0323",
    ]
    some += [
        "word " * 300,
        " ".join(f"word{i}" for i in range(300)),
        "a" * 2000,
        "犬" * 300,
        "!" * 300,
        "0123456789" * 30,
    ]
    some += [one.encode().decode("windows-1252") for one in ("women’s shoes", "Café", "red – shoe", "£5")]
    return some


def images(height: int, width: int) -> dict[str, Image.Image]:
    """Ten images of a smooth random pattern, by kind; sizes are relative to those of a tower, in pixels."""

    def image(scale_h: float, scale_w: float, channels: int = 3) -> Image.Image:
        size = max(1, round(width * scale_w)), max(1, round(height * scale_h))
        coarse = np.random.default_rng(0).integers(0, 256, (9, 9, channels), np.uint8)
        resized = [Image.fromarray(coarse[..., i]).resize(size, Image.Resampling.BICUBIC) for i in range(channels)]
        return Image.merge({1: "L", 3: "RGB", 4: "RGBA"}[channels], resized)

    rotated, grey = image(1.5, 2.5), image(2.2, 1.7, channels=1)
    exif = rotated.getexif()
    exif[0x0112] = 6
    jpeg = io.BytesIO()
    rotated.save(jpeg, "JPEG", quality=90, exif=exif)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    return {
        "landscape": image(2.4, 3.5),
        "portrait": image(3.55, 1.9),
        "enlarged": image(0.4, 0.55),
        "panorama": image(1.3, 7.1),
        "grey": grey,
        "palette": image(2.6, 2.3).quantize(64),
        "CMYK": image(1.9, 2.1).convert("CMYK"),
        "16-bit": deep,
        "transparent": image(2.1, 2.7, channels=4),
        "rotated by EXIF": Image.open(jpeg),
    }
