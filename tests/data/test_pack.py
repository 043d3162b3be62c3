"""A user's pictures into shards: what goes in comes out of the stream, and what cannot is told."""

import builtins
import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import drawing, encoded
from PIL import Image

import mmrl
from mmrl.data.pack import BAD_SAMPLES, pack
from mmrl.data.pairs import safe_key
from mmrl.data.samples import NO_GROUP, group_number
from mmrl.data.sequential import read_whole
from mmrl.data.sources import open_reader
from mmrl.errors import InputError
from mmrl.image_spec import ImageSpec

SPEC = ImageSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
Rows = list[dict[str, Any]]


def tokens(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), sum(map(ord, text))] for text in texts])


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def members(out: Path) -> dict[str, bytes]:
    """All files in all shards, in order."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def bad_lines(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / BAD_SAMPLES).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ what comes out


def picture_folder(folder: Path) -> dict[str, bytes]:
    """Six pictures in all manners that a folder may say things of them; key -> the picture's bytes."""
    pictures = {}
    kinds = ["PNG", "JPEG", "WEBP", "JPEG", "PNG", "PNG"]
    names = ["a.png", "sub/b.JPG", "sub/deep er/c.v2.webp", "d.jpeg", "e.png", "f.png"]
    for number, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        data = encoded(drawing(number)[0], kind)
        path = put(folder / name, data)
        pictures[safe_key(str(Path(name).with_suffix("")))] = data
        caption, group = drawing(number)[1:]
        if number < 4:
            put(path.with_suffix(".txt"), f" {caption}\n")
        if number in (2, 4):
            put(path.with_suffix(".json"), json.dumps({"captions": [caption, f"{caption}, é"], "group": group}))
        if number == 3:
            put(path.with_suffix(".json"), json.dumps({"group": 7, "licence": "mine"}))
    put(folder / "f.json", json.dumps({"caption": "as img2dataset has it"}))
    put(folder / ".hidden.png", b"")
    return pictures


def test_a_folder_comes_back_from_the_stream(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "in")
    result = pack(tmp_path / "in", tmp_path / "out", samples_per_shard=4, quiet=True)
    assert result["samples"] == 6
    assert [Path(shard).name for shard in result["shards"]] == ["shard-000000.tar", "shard-000001.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["shard-000000.tar", "shard-000001.tar"]
    (batch,) = mmrl.stream(tmp_path / "out", batch_size=6)
    image_of = {key.rpartition("/")[2]: data for key, data in zip(batch.keys, batch.image, strict=True)}
    assert image_of == pictures
    assert sorted(image_of) == ["a", "d", "e", "f", "sub_b", "sub_deep_er_c_v2"]

    (whole,) = read_whole(open_reader(tmp_path / "out"), SPEC, tokens)
    said: dict[str, list[str]] = {}
    for caption, row in zip(whole.captions, whole.row_of_text_M.tolist(), strict=True):
        said.setdefault(whole.keys[row].rpartition("/")[2], []).append(caption)
    texts = [drawing(number)[1] for number in range(6)]
    assert said == {
        "a": [texts[0]],
        "sub_b": [texts[1]],
        "sub_deep_er_c_v2": [texts[2], f"{texts[2]}, é"],
        "d": [texts[3]],
        "e": [texts[4], f"{texts[4]}, é"],
        "f": ["as img2dataset has it"],
    }
    group_of = dict(zip((key.rpartition("/")[2] for key in whole.keys), whole.group_B.tolist(), strict=True))
    assert group_of == {
        "a": NO_GROUP,
        "sub_b": NO_GROUP,
        "sub_deep_er_c_v2": group_number(drawing(2)[2]),
        "d": group_number("7"),
        "e": group_number(drawing(4)[2]),
        "f": NO_GROUP,
    }


def test_json_is_there_only_where_it_says_more_than_the_text(tmp_path: Path) -> None:
    picture_folder(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "out", quiet=True)
    found = members(tmp_path / "out")
    assert {name for name in found if name.endswith(".json")} == {"d.json", "e.json", "sub_deep_er_c_v2.json"}
    assert json.loads(found["d.json"]) == {"group": "7"}
    assert json.loads(found["e.json"])["captions"][0] == found["e.txt"].decode()


def write_csv(path: Path, rows: Rows, separator: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


def write_parquet(path: Path, rows: Rows) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_comes_back_whole(tmp_path: Path, kind: str) -> None:
    rows = []
    for number in range(5):
        image, caption, group = drawing(number)
        path = put(tmp_path / "photos" / f"{number}.png", encoded(image))
        name = str(path) if number == 2 else f"photos/{number}.png"
        row = {"file_name": name, "caption": f'{caption}, "quoted",\tin two\nlines', "title": f"no {number}"}
        rows.append({**row, "product": group if number else None, "price": 3})
    WRITERS[kind](tmp_path / f"table.{kind}", rows)
    result = pack(
        tmp_path / f"table.{kind}", tmp_path / "out", image_column="file_name", group_column="product", quiet=True
    )
    assert result["samples"] == 5
    assert result["bad"] == {}
    assert result["columns"] == {"image": "file_name", "captions": ["caption", "title"], "group": "product"}
    (whole,) = read_whole(open_reader(tmp_path / "out"), SPEC, tokens)
    assert [key.rpartition("/")[2] for key in whole.keys] == [f"photos_{number}" for number in range(5)]
    assert whole.captions == [text for row in rows for text in (row["caption"], row["title"])]
    assert whole.group_B.tolist() == [NO_GROUP, *(group_number(drawing(number)[2]) for number in range(1, 5))]
    found = members(tmp_path / "out")
    for number in range(5):
        assert found[f"photos_{number}.png"] == (tmp_path / "photos" / f"{number}.png").read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_cell_may_hold_a_list_of_captions(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    WRITERS[kind](tmp_path / f"t.{kind}", [{"path": "a.png", "captions": ["one", "", " one ", "two"]}])
    pack(tmp_path / f"t.{kind}", tmp_path / "out", quiet=True)
    assert json.loads(members(tmp_path / "out")["a.json"]) == {"captions": ["one", "two"]}


def test_captions_come_in_the_order_in_which_their_columns_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    write_csv(tmp_path / "t.csv", [{"image": "a.png", "x": "from x", "y": "from y", "caption": "unasked"}])
    pack(tmp_path / "t.csv", tmp_path / "out", caption_columns=["y", "x"], quiet=True)
    assert json.loads(members(tmp_path / "out")["a.json"])["captions"] == ["from y", "from x"]


def test_keys_are_made_safe_and_unique(tmp_path: Path) -> None:
    names = ["x/a.png", "x_a.png", "x.a.png", "x_a-2.png", "../outside.png"]
    folder = tmp_path / "in"
    for number, name in enumerate(names):
        put(folder / name, encoded(drawing(number)[0]))
    rows = [{"image": name, "text": name} for name in [*names, "x/a.png", str(tmp_path / "outside.png")]]
    write_csv(folder / "t.csv", rows)
    result = pack(folder / "t.csv", tmp_path / "out", quiet=True)
    assert result["samples"] == 7
    texts = {name: text.decode() for name, text in members(tmp_path / "out").items() if name.endswith(".txt")}
    assert list(texts) == [
        "x_a.txt", "x_a-2.txt", "x_a-3.txt", "x_a-2-2.txt", "outside.txt", "x_a-4.txt", "outside-2.txt",
    ]  # fmt: skip
    assert [*texts.values()] == [row["text"] for row in rows]


def test_a_key_does_not_depend_on_how_a_file_system_spells_letters() -> None:
    assert safe_key("cafe\u0301/日本 1") == safe_key("caf\u00e9/日本 1") == "café_日本_1"
    assert safe_key("\udcff") == "_"


def test_links_are_followed_and_a_circle_of_them_ends(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere" / "a.png", encoded(drawing(0)[0]))
    put(tmp_path / "in" / "a.txt", "linked")
    (tmp_path / "in" / "a.png").symlink_to(elsewhere)
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert pack(tmp_path / "in", tmp_path / "out", quiet=True)["samples"] == 1
    assert members(tmp_path / "out") == {"a.png": elsewhere.read_bytes(), "a.txt": b"linked"}


def test_pictures_of_other_kinds_are_stored_again_without_loss(tmp_path: Path) -> None:
    image = drawing(0)[0]
    for extension, kind in (("bmp", "BMP"), ("tif", "TIFF")):
        put(tmp_path / "in" / f"{extension}.{extension}", encoded(image, kind))
        put(tmp_path / "in" / f"{extension}.txt", "x")
    put(tmp_path / "in" / "no_ending", encoded(image, "WEBP"))
    write_csv(tmp_path / "in" / "t.csv", [{"image": "no_ending", "text": "x"}])
    pack(tmp_path / "in", tmp_path / "out", quiet=True)
    found = members(tmp_path / "out")
    assert set(found) == {"bmp.png", "bmp.txt", "tif.png", "tif.txt"}
    for name in ("bmp.png", "tif.png"):
        assert Image.open(io.BytesIO(found[name])).tobytes() == image.tobytes()
    pack(tmp_path / "in" / "t.csv", tmp_path / "out2", quiet=True)
    assert set(members(tmp_path / "out2")) == {"no_ending.webp", "no_ending.txt"}


def test_max_side_makes_only_larger_pictures_smaller(tmp_path: Path) -> None:
    small, large = drawing(0)[0], Image.new("RGB", (200, 100), (10, 200, 30))
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright: the picture is to be turned by 90 degrees
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", exif=turned)
    for name, data in (("small", encoded(small)), ("large", encoded(large)), ("turned", buffer.getvalue())):
        put(tmp_path / "in" / f"{name}.png", data)
        put(tmp_path / "in" / f"{name}.txt", name)
    pack(tmp_path / "in", tmp_path / "out", max_side=50, quiet=True)
    found = members(tmp_path / "out")
    assert found["small.png"] == encoded(small)
    for name, size in (("large.jpg", (50, 25)), ("turned.jpg", (25, 50))):
        image = Image.open(io.BytesIO(found[name]))
        assert (image.format, image.size) == ("JPEG", size)
        assert not image.getexif()


def test_two_runs_on_two_clocks_give_equal_bytes(tmp_path: Path) -> None:
    picture_folder(tmp_path / "in")
    pack(tmp_path / "in", tmp_path / "one", max_side=20, samples_per_shard=4, quiet=True)
    for path in (tmp_path / "in").rglob("*"):
        os.utime(path, (1e9, 1e9))
    old = os.umask(0o077)
    try:
        pack(tmp_path / "in", tmp_path / "two", max_side=20, samples_per_shard=4, quiet=True)
    finally:
        os.umask(old)
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
        with tarfile.open(tmp_path / "one" / shard) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


# ------------------------------------------------------------------------------------------------ what is left out


def test_bad_pairs_of_a_folder_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    good = encoded(drawing(0)[0])
    put(folder / "good.png", good)
    put(folder / "good.txt", "good")
    put(folder / "broken.png", b"no picture")
    put(folder / "broken.txt", "x")
    put(folder / "cut.png", good[:-200])
    put(folder / "cut.txt", "x")
    put(folder / "silent.png", good)
    put(folder / "blank.png", good)
    put(folder / "blank.txt", " \n ")
    put(folder / "latin.png", good)
    put(folder / "latin.txt", "é".encode("latin-1"))
    put(folder / "list.png", good)
    put(folder / "list.json", "[1]")
    put(folder / "alone.txt", "x")
    result = pack(folder, tmp_path / "out")
    assert result["samples"] == 1
    assert result["bad"] == {"unreadable image": 2, "no caption": 2, "unreadable text": 2, "missing image": 1}
    lines = bad_lines(tmp_path / "out")
    assert {line["key"] for line in lines} == {"broken", "cut", "silent", "blank", "latin", "list", "alone"}
    assert all(set(line) == {"shard", "key", "reason"} and line["shard"] == "" for line in lines)
    assert not any("_io" in line["reason"] for line in lines)  # an address in memory, never the same again
    assert {line["key"]: line["reason"] for line in lines}["latin"] == "unreadable text: latin.txt is not UTF-8"
    shown = capsys.readouterr().out
    assert "1 samples" in shown
    assert "2 unreadable image, " in shown
    assert f"listed in {tmp_path / 'out' / BAD_SAMPLES}, such as blank: no caption" in shown


def test_bad_rows_of_a_table_are_listed_with_the_table(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    put(tmp_path / "folder.png" / "x", "")
    lines = [
        "image,caption",
        "a.png,good",
        "missing.png,x",
        ",x",
        "a.png,",
        "a.png",
        "a.png,a, b",
        "https://example.org/a.png,x",
        "folder.png,x",
        f"{'n' * 300}.png,x",
    ]
    table = put(tmp_path / "t.csv", "\n".join(lines))
    result = pack(table, tmp_path / "out", quiet=True)
    assert result["samples"] == 1
    assert result["bad"] == {"missing image": 5, "no caption": 2, "broken row": 1}
    listed = bad_lines(tmp_path / "out")
    assert {line["shard"] for line in listed} == {str(table)}
    reasons = {line["key"]: line["reason"] for line in listed}
    assert reasons["row 3"] == "missing image: image is empty"
    assert reasons["row 6"] == "broken row: 3 cells for 2 columns"
    assert "is an address; fetch the pictures first" in reasons["row 7"]


def test_lines_that_are_no_json_object_are_bad_rows(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    row = json.dumps({"image": "a.png", "text": "x"})
    surrogate = '{"image": "a.png", "text": "\\ud800"}'
    number = '{"image": 5, "text": "x"}'
    put(tmp_path / "t.jsonl", "\n".join(["[1]", row, "{", surrogate, number, "[" * 100_000]))
    result = pack(tmp_path / "t.jsonl", tmp_path / "out", quiet=True)
    assert result["bad"] == {"broken row": 3, "unreadable text": 1, "missing image": 1}


def test_a_picture_that_many_rows_share_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    write_csv(tmp_path / "t.csv", [{"image": "a.png", "text": text} for text in ("one", "two", "three")])
    pack(tmp_path / "t.csv", tmp_path / "out")
    assert "2 samples show a picture that another one shows as well" in capsys.readouterr().out
    pack(tmp_path / "t.csv", tmp_path / "grouped", group_column="image")
    assert "as well" not in capsys.readouterr().out
    (batch,) = mmrl.stream(tmp_path / "grouped", batch_size=3)
    assert batch.group.tolist() == [group_number("a.png")] * 3


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def table(tmp_path: Path) -> Path:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    return put(tmp_path / "t.csv", "image,caption,product\na.png,x,p\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "imag"}, r"image-column: .*t\.csv has no column 'imag'\. Did you mean 'image'\?"),
        ({"caption_columns": ["capton"]}, r"caption-column: .*'capton'\. Did you mean 'caption'\?"),
        ({"group_column": "xyz"}, r"group-column: .*'xyz'\. Allowed: caption, image, product\."),
        ({"samples_per_shard": 0}, r"samples-per-shard: 0 .* at least 1"),
        ({"max_side": 0}, r"max-side: 0 .* at least 1"),
    ],
)
def test_a_wrong_option_is_named(table: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack(table, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", "", r"no table that can be read; give \.csv, \.tsv, \.jsonl, \.parquet or a folder"),
        ("t.csv", "", r"has no rows"),
        ("t.csv", "image,caption\n", r"has no rows"),
        ("t.csv", "picture,caption\na,b\n", r"has none of image, .*; its columns are picture, caption\. Name one"),
        ("t.csv", "image,words\na,b\n", r"caption-column: .* has none of caption, "),
        ("t.csv", 'image,caption\na.png,"x\nb.png,y\n', r"line 3: .*put texts .* in quotes"),
        ("t.csv", "image,caption\na.png,é\n".encode("latin-1"), r"not UTF-8 text; save it as UTF-8"),
        ("t.parquet", "image,caption", r"not a readable Parquet file"),
        ("t.jsonl", '{"image": "gone.png", "text": "x"}', r"nothing in .* can be packed: 1 missing image; listed in"),
        ("in/readme.md", "", r"holds no picture \(\.jpg, "),
    ],
)
def test_a_source_that_will_not_do(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    put(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        pack(tmp_path / Path(name).parts[0], tmp_path / "out", quiet=True)


def test_a_source_that_is_not_there_and_a_column_of_a_folder(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give a folder of pictures or a table"):
        pack(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(InputError, match="is a folder; only a table has columns"):
        pack(tmp_path, tmp_path / "out", image_column="image")


def test_out_must_be_new_or_empty(table: Path, tmp_path: Path) -> None:
    put(tmp_path / "out" / "thesis.tex", "mine")
    with pytest.raises(InputError, match=r"out already holds thesis\.tex; name a new or empty folder"):
        pack(table, tmp_path / "out")
    with pytest.raises(InputError, match="cannot be made a folder"):
        pack(table, table)
    pack(table, tmp_path / "first", quiet=True)
    with pytest.raises(InputError, match=r"already holds shard-000000\.tar"):
        pack(table, tmp_path / "first")


def test_a_failed_attempt_leaves_only_its_list_and_can_be_repeated(table: Path, tmp_path: Path) -> None:
    bad = put(tmp_path / "bad.csv", "image,caption\ngone.png,x\n")
    put(tmp_path / "out" / "shard-000000.tar.partial", "killed here")
    with pytest.raises(InputError, match="nothing in"):
        pack(bad, tmp_path / "out", quiet=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [BAD_SAMPLES]
    pack(table, tmp_path / "out", quiet=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-000000.tar"]


def test_an_interruption_leaves_no_shard(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text("image,caption\na.png,x\na.png,y\n")
    calls = iter([None])

    def decode(data: bytes) -> Image.Image:
        if next(calls, "second") == "second":
            raise KeyboardInterrupt
        return Image.open(io.BytesIO(data))

    monkeypatch.setattr("mmrl.data.pack.decode", decode)
    with pytest.raises(KeyboardInterrupt):
        pack(table, tmp_path / "out", quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "t.parquet", "")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs pyarrow.*pip install 'mmrl-clip\[search\]'"):
        pack(tmp_path / "t.parquet", tmp_path / "out")


def test_the_command(table: Path, tmp_path: Path) -> None:
    code = "from mmrl.cli import main; import sys; sys.argv[0] = 'mmrl'; main()"
    mmrl_pack = [sys.executable, "-c", code, "pack"]
    good = subprocess.run(
        [*mmrl_pack, table, tmp_path / "out", "--caption-column", "caption", "--caption-column", "product", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(good.stdout)["columns"]["captions"] == ["caption", "product"]
    assert json.loads(members(tmp_path / "out")["a.json"])["captions"] == ["x", "p"]
    wrong = subprocess.run(
        [*mmrl_pack, table, tmp_path / "o", "--group-column", "x"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("mmrl: group-column: ")
    assert "Traceback" not in wrong.stderr
