"""Tables as spreadsheets, pandas and databases write them: no row is lost in silence, and no cell costs the others."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import drawing, encoded
from helpers.pack_sources import bad_lines, members, put

from mmrl.data.pack.command import pack_shards
from mmrl.data.pack.pairs import Columns, Pair, TablePairs
from mmrl.data.pack.tables import Table
from mmrl.errors import InputError

IMAGE = encoded(drawing(0)[0])


def packed(path: Path, **options: Any) -> tuple[list[str], dict[str, str]]:
    """The captions of the packed samples, and key -> reason of the others, of a table next to a.png."""
    put(path.parent / "a.png", IMAGE)
    out = path.with_name(path.name + ".out")
    result = pack_shards(path, out, quiet=True, **options)
    texts = [data.decode() for name, data in members(out).items() if name.endswith(".txt")]
    return texts, {line["key"]: line["reason"] for line in bad_lines(out)} if result["bad"] else {}


# ------------------------------------------------------------------------------------------------ one bad cell


def test_a_stray_quote_costs_its_row_alone(tmp_path: Path) -> None:
    lines = ["image,caption", "a.png,one", 'a.png,"Best" shoe', "a.png,two", 'a.png,"never closed', "a.png,three",
             'a.png,"with, ""quotes"" and\na line"', "a.png,four"]  # fmt: skip
    texts, bad = packed(put(tmp_path / "t.csv", "\n".join(lines)))
    assert texts == ["one", "two", "three", 'with, "quotes" and\na line', "four"]
    assert list(bad) == ["row 2", "row 4"]
    assert bad["row 2"].startswith("broken row: line 3: ',' expected after '\"'; enclose texts with a quote")


def test_the_columns_that_were_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.png", IMAGE)
    pack_shards(put(tmp_path / "t.csv", "sku,path,title\n1,a.png,one\n"), tmp_path / "out", group_column="sku")
    assert "Columns that were read: path, title, sku\n" in capsys.readouterr().out


def test_cells_of_any_size(tmp_path: Path) -> None:
    long = "word " * 60_000
    texts, bad = packed(put(tmp_path / "t.csv", f"image,caption,notes\na.png,one,{long}\na.png,{long},\n"))
    assert (texts, bad) == (["one", long.strip()], {})


def test_a_byte_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    rows = b"image,caption,notes\na.png,one,\na.png,caf\xe9,\na.png,two,caf\xe9\nn\xe9.png,three,\n"
    put(tmp_path / "n\udce9.png", IMAGE)
    texts, bad = packed(put(tmp_path / "t.csv", rows))
    assert texts == ["one", "two", "three"]
    assert bad == {"row 2": "unreadable text: not UTF-8; save the table as UTF-8"}
    line = b'{"image": "a.png", "caption": "caf\xe9"}\n{"image": "a.png", "caption": "one"}\n'
    texts, bad = packed(put(tmp_path / "t.jsonl", line))
    assert (texts, list(bad)) == (["one"], ["row 1"])


def test_a_parquet_cell_without_a_value_costs_its_row_alone(tmp_path: Path) -> None:
    text = pyarrow.array([b"one", b"caf\xe9", b"two"], pyarrow.binary()).view(pyarrow.string())
    late = pyarrow.array([1, 10**18, 3], pyarrow.timestamp("us"))
    table = pyarrow.table({"image": ["a.png"] * 3, "caption": text, "when": late})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    texts, bad = packed(tmp_path / "t.parquet")
    assert (texts, bad) == (["one", "two"], {"row 2": "broken row: a text is not UTF-8"})
    pyarrow.parquet.write_table(table, tmp_path / "late.parquet")
    texts, bad = packed(tmp_path / "late.parquet", caption_columns=["image", "when"])
    assert len(texts) == 2
    assert bad["row 2"].startswith("broken row: a cell cannot be read (")


# ------------------------------------------------------------------------------------------------ other systems


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n", "\n\n"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["image,caption", "a.png,naïve 日本", "a.png,two", ""])
    assert packed(put(tmp_path / "t.csv", text.encode(encoding))) == (["naïve 日本", "two"], {})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "image;caption;price\na.png;one, two;3,5\n"),
        ("t.csv", "sep=;\r\nimage;caption\r\na.png;one, two\r\n"),
        ("t.csv", 'image\tcaption\na.png\t"one, two"\n'),
        ("t.csv", 'image|caption|"a,b;c;d;e"\na.png|one, two|\n'),
        ("t.tsv", "image\tcaption\na.png\tone, two\n"),
        ("t.csv", 'Image, Caption \na.png,"one, two",,,\n,,,\n'),
        ("t.csv", '\n\nIMAGE,"CAPTION"\n a.png ,"\ufeffone, two\u200b"\n'),
        ("t.jsonl", '[{"image": "a.png", "caption": "one, two"}]'),
        ("t.jsonl", '\ufeff{"image": "a.png", "caption": "one, two"}\r\n\x00\r\n'),
    ],
)
def test_dialects(tmp_path: Path, name: str, text: str) -> None:
    texts, bad = packed(put(tmp_path / name, text))
    assert texts == ["one, two"]
    assert set(bad.values()) <= {"missing image: Image is empty"}


def test_paths_are_found_in_the_spelling_of_other_systems(tmp_path: Path) -> None:
    put(tmp_path / "photos" / unicodedata.normalize("NFD", "café.png"), IMAGE)
    put(tmp_path / unicodedata.normalize("NFC", "naïve.png"), IMAGE)
    put(tmp_path / " spaced\\.png", IMAGE)
    names = ["photos/café.png", "photos\\café.png ", unicodedata.normalize("NFD", "naïve.png"), " spaced\\.png"]
    rows = "".join(f"{name},{number}\n" for number, name in enumerate(names))
    assert packed(put(tmp_path / "t.csv", f"image,caption\n{rows}")) == (["0", "1", "2", "3"], {})


def test_captions_and_photos_in_two_unicode_forms_belong_together(tmp_path: Path) -> None:
    put(tmp_path / "in" / unicodedata.normalize("NFD", "é.png"), IMAGE)
    put(tmp_path / "in" / unicodedata.normalize("NFC", "é.txt"), "one")
    put(tmp_path / "in" / unicodedata.normalize("NFC", "ö.png"), IMAGE)
    put(tmp_path / "in" / unicodedata.normalize("NFD", "ö.txt"), "two".encode("utf-16"))
    result = pack_shards(tmp_path / "in", tmp_path / "out", quiet=True)
    assert (result["samples"], result["bad"]) == (2, {})


# ------------------------------------------------------------------------------------------------ types of cells


def test_cells_of_any_type_give_the_caption_or_the_true_reason(tmp_path: Path) -> None:
    good = {1984: "1984", 7.0: "7", 0.5: "0.5", "text": "text", "['a', \"b's\"]": "a", "['a' 'b']": "a", '["é"]': "é"}
    bad = {
        "a value of type dict, not text": {"en": "a"},
        "a value of type bool, not text": True,
        "'NaN', which stands": "NaN",
        "' \\\\N ', which": " \\N ",
        "none given, or only empty ones": "\u200b",
        "no caption: none given": None,
    }
    rows = [{"image": "a.png", "caption": value} for value in (*good, *bad.values())]
    texts, reasons = packed(put(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows))))
    assert texts == list(good.values())
    for part, reason in zip(bad, reasons.values(), strict=True):
        assert part in reason
    found = members(tmp_path / "t.jsonl.out")
    assert json.loads(found["a-5.json"])["captions"] == ["a", "b's"]
    assert json.loads(found["a-6.json"])["captions"] == ["a", "b"]


def test_parquet_types(tmp_path: Path) -> None:
    columns = {
        "image": pyarrow.array([b"a.png", b"a.png", IMAGE, b""], pyarrow.binary()),
        "caption": pyarrow.array([Decimal("5.00"), None, Decimal("0.10"), Decimal(1)], pyarrow.decimal128(9, 2)),
        "text": pyarrow.array(["x", "y", None, "z"]).dictionary_encode(),
        "title": pyarrow.array([[b"p"], [], None, None], pyarrow.list_(pyarrow.binary())),
        "sku": pyarrow.array([7.0, None, float("nan"), 8.5]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    texts, bad = packed(tmp_path / "t.parquet", group_column="sku")
    assert (texts, bad) == (["5", "y", "0.10"], {"row 4": "missing image: image is empty"})
    found = members(tmp_path / "t.parquet.out")
    assert json.loads(found["a.json"]) == {"captions": ["5", "x", "p"], "group": "7"}
    assert found["t-3.png"] == IMAGE
    assert "t-3.json" not in found


def test_groups_that_stand_for_a_missing_value_are_none(tmp_path: Path) -> None:
    rows = "".join(f"a.png,{number},{group}\n" for number, group in enumerate(["nan", "NULL", "\\N", "", "x", "7.0"]))
    packed(put(tmp_path / "t.csv", f"image,caption,sku\n{rows}"), group_column="sku")
    groups = {n: json.loads(data)["group"] for n, data in members(tmp_path / "t.csv.out").items() if n[-4:] == "json"}
    assert groups == {"a-5.json": "x", "a-6.json": "7.0"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "a spreadsheet or a zip file; save it as CSV"),
        (b"\xd0\xcf\x11\xe0", "an Excel file"),
        (b"\x1f\x8b", "compressed; decompress it first"),
        (b"PAR1", "name it .parquet"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Table(put(tmp_path / "t.csv", content + bytes(100)))


# ------------------------------------------------------------------------------------------------ fuzzing


def _fuzzed_cell(rng: np.random.Generator) -> str:
    kind = rng.integers(8)
    if kind == 0:
        return "".join(map(chr, rng.integers(1, 0x2FF, rng.integers(30))))
    if kind == 1:
        return str(
            rng.choice(['"', '""', ",", ";", "\n", "\r\n", "\0", "\ufeff", "\\N", "NaN", "=1+1", "'", "[", "{}"])
        )
    if kind == 2:
        return str(
            rng.choice(["['a', 'b']", "['a' 'b']", '["a"]', "[" * 50, "['a", "[1, 2]", "5", "-1e400", "\U0001f600"])
        )
    return "a caption" if kind < 6 else str(rng.integers(10**9))


def _fuzzed_tables(seed: int) -> Iterator[tuple[str, bytes, int]]:
    """(name, content, number of rows): a sound table of odd cells in each format and encoding."""
    rng = np.random.default_rng(seed)
    rows = [["a.png", _fuzzed_cell(rng), _fuzzed_cell(rng)] for _ in range(int(rng.integers(1, 6)))]
    encoding = str(rng.choice(["utf-8", "utf-8-sig", "utf-16"]))
    for name, separator in (("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")):
        text = io.StringIO(newline="")
        end = str(rng.choice(["\n", "\r\n"]))
        csv.writer(text, delimiter=separator, lineterminator=end).writerows([["image", "caption", "sku"], *rows])
        yield name, text.getvalue().encode(encoding), len(rows)
    lines = [json.dumps({"image": one, "caption": two, "sku": three}, ensure_ascii=False) for one, two, three in rows]
    yield "t.jsonl", "\n".join(lines).encode(encoding), len(rows)


def _all_pairs(path: Path) -> list[Any]:
    table = Table(path)
    pairs = list(TablePairs(table, Columns(group="sku")).after(0))
    assert len(pairs) == table.count
    return pairs


def _fuzz_tables(folder: Path, count: int) -> None:
    tried, refused = 0, list[str]()
    for seed in range(count):
        rng = np.random.default_rng(seed + 10**6)
        for name, content, rows in _fuzzed_tables(seed):
            # A sound table: every row is a pair or a problem with a reason.
            pairs = _all_pairs(put(folder / name, content))
            assert len(pairs) == rows
            assert all(isinstance(one, Pair) or one.reason for one in pairs)
            # A damaged one: the same, or a sentence.
            damaged = bytearray(content)
            for _ in range(int(rng.integers(1, 4))):
                damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
            try:
                _all_pairs(put(folder / name, bytes(damaged[: int(rng.integers(len(damaged) + 1))])))
            except InputError as error:
                refused.append(str(error))
            tried += 2
            if tried >= count:
                starts = ("source: ", "image-column: ", "caption-column: ", "group-column: ")
                assert all(sentence.startswith(starts) for sentence in refused)
                return


def test_fuzzed_tables(tmp_path: Path) -> None:
    _fuzz_tables(tmp_path, 400)


@pytest.mark.slow
def test_many_fuzzed_tables(tmp_path: Path) -> None:
    _fuzz_tables(tmp_path, 20_000)
