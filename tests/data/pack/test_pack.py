"""`mmrl pack`: what is packed comes out of the stream unchanged; what cannot be packed is listed."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import drawing, encoded
from helpers.pack_sources import Rows, bad_lines, image_folder, members, put, write_csv
from PIL import Image

import mmrl
from mmrl.data.fields import FieldsConfig
from mmrl.data.groups import groups_suffix
from mmrl.data.pack.command import pack_shards
from mmrl.data.pack.pairs import safe_key
from mmrl.data.pack.writer import BAD_SAMPLES
from mmrl.data.samples import NO_GROUP, group_id
from mmrl.data.sequential import read_sequential
from mmrl.data.sources import open_reader
from mmrl.images.image_spec import ImageSpec

SPEC = ImageSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def tokens(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), sum(map(ord, text))] for text in texts])


# ------------------------------------------------------------------------------------------------ packed samples


def test_a_packed_folder_streams_unchanged(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "in")
    result = pack_shards(tmp_path / "in", tmp_path / "out", samples_per_shard=4, quiet=True)
    assert result["samples"] == 6
    assert [Path(shard).name for shard in result["shards"]] == ["shard-000000.tar", "shard-000001.tar"]
    endings = (groups_suffix(FieldsConfig()), "", ".index")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *sorted(f"shard-00000{number}.tar{ending}" for number in range(2) for ending in endings), "shards.json",
    ]  # fmt: skip
    (batch,) = mmrl.stream(tmp_path / "out", batch_size=6)
    image_of = {key.rpartition("/")[2]: data for key, data in zip(batch.keys, batch.image, strict=True)}
    assert image_of == images
    assert sorted(image_of) == ["a", "d", "e", "f", "sub_b", "sub_deep_er_c_v2"]

    (whole,) = read_sequential(open_reader(tmp_path / "out"), SPEC, tokens)
    captions: dict[str, list[str]] = {}
    for caption, row in zip(whole.captions, whole.row_of_text_M.tolist(), strict=True):
        captions.setdefault(whole.keys[row].rpartition("/")[2], []).append(caption)
    texts = [drawing(number)[1] for number in range(6)]
    assert captions == {
        "a": [texts[0]],
        "sub_b": [texts[1]],
        "sub_deep_er_c_v2": [texts[2], f"{texts[2]}, é"],
        "d": [texts[3]],
        "e": [texts[4], f"{texts[4]}, é"],
        "f": ["in the format of img2dataset"],
    }
    group_of = dict(zip((key.rpartition("/")[2] for key in whole.keys), whole.group_B.tolist(), strict=True))
    assert group_of == {
        "a": NO_GROUP,
        "sub_b": NO_GROUP,
        "sub_deep_er_c_v2": group_id(drawing(2)[2]),
        "d": group_id("7"),
        "e": group_id(drawing(4)[2]),
        "f": NO_GROUP,
    }


def test_json_is_written_only_for_several_captions_or_a_group(tmp_path: Path) -> None:
    image_folder(tmp_path / "in")
    pack_shards(tmp_path / "in", tmp_path / "out", quiet=True)
    found = members(tmp_path / "out")
    assert {name for name in found if name.endswith(".json")} == {"d.json", "e.json", "sub_deep_er_c_v2.json"}
    assert json.loads(found["d.json"]) == {"group": "7"}
    assert json.loads(found["e.json"])["captions"][0] == found["e.txt"].decode()


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
def test_a_packed_table_streams_unchanged(tmp_path: Path, kind: str) -> None:
    rows = []
    for number in range(5):
        image, caption, group = drawing(number)
        path = put(tmp_path / "photos" / f"{number}.png", encoded(image))
        name = str(path) if number == 2 else f"photos/{number}.png"
        row = {"file_name": name, "caption": f'{caption}, "quoted",\tin two\nlines', "title": f"no {number}"}
        rows.append({**row, "product": group if number else None, "price": 3})
    WRITERS[kind](tmp_path / f"table.{kind}", rows)
    result = pack_shards(
        tmp_path / f"table.{kind}", tmp_path / "out", image_column="file_name", group_column="product", quiet=True
    )
    assert result["samples"] == 5
    assert result["bad"] == {}
    assert result["columns"] == {"image": "file_name", "captions": ["caption", "title"], "group": "product"}
    (whole,) = read_sequential(open_reader(tmp_path / "out"), SPEC, tokens)
    assert [key.rpartition("/")[2] for key in whole.keys] == [f"photos_{number}" for number in range(5)]
    assert whole.captions == [text for row in rows for text in (row["caption"], row["title"])]
    assert whole.group_B.tolist() == [NO_GROUP, *(group_id(drawing(number)[2]) for number in range(1, 5))]
    found = members(tmp_path / "out")
    for number in range(5):
        assert found[f"photos_{number}.png"] == (tmp_path / "photos" / f"{number}.png").read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_cell_can_hold_a_list_of_captions(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    WRITERS[kind](tmp_path / f"t.{kind}", [{"path": "a.png", "captions": ["one", "", " one ", "two"]}])
    pack_shards(tmp_path / f"t.{kind}", tmp_path / "out", quiet=True)
    assert json.loads(members(tmp_path / "out")["a.json"]) == {"captions": ["one", "two"]}


def test_captions_are_in_the_order_of_the_named_columns(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    write_csv(tmp_path / "t.csv", [{"image": "a.png", "x": "from x", "y": "from y", "caption": "not named"}])
    pack_shards(tmp_path / "t.csv", tmp_path / "out", caption_columns=["y", "x"], quiet=True)
    assert json.loads(members(tmp_path / "out")["a.json"])["captions"] == ["from y", "from x"]


def test_keys_are_sanitised_and_unique(tmp_path: Path) -> None:
    names = ["x/a.png", "x_a.png", "x.a.png", "x_a-2.png", "../outside.png"]
    folder = tmp_path / "in"
    for number, name in enumerate(names):
        put(folder / name, encoded(drawing(number)[0]))
    rows = [{"image": name, "text": name} for name in [*names, "x/a.png", str(tmp_path / "outside.png")]]
    write_csv(folder / "t.csv", rows)
    result = pack_shards(folder / "t.csv", tmp_path / "out", quiet=True)
    assert result["samples"] == 7
    texts = {name: text.decode() for name, text in members(tmp_path / "out").items() if name.endswith(".txt")}
    assert list(texts) == [
        "x_a.txt", "x_a-2.txt", "x_a-3.txt", "x_a-2-2.txt", "outside.txt", "x_a-4.txt", "outside-2.txt",
    ]  # fmt: skip
    assert [*texts.values()] == [row["text"] for row in rows]


def test_a_key_can_be_long_and_not_ascii(tmp_path: Path) -> None:
    for name in ("a" * 30, "товар"):
        put(tmp_path / "in" / "/".join([name] * 6) / "x.png", encoded(drawing(0)[0]))
        put(tmp_path / "in" / "/".join([name] * 6) / "x.txt", name)
    pack_shards(tmp_path / "in", tmp_path / "out", quiet=True)
    (batch,) = mmrl.stream(tmp_path / "out", batch_size=2)
    assert {key.rpartition("/")[2] for key in batch.keys} == {("a" * 30 + "_") * 6 + "x", "товар_" * 6 + "x"}


def test_keys_are_unicode_normalised() -> None:
    assert safe_key("cafe\u0301/日本 1") == safe_key("caf\u00e9/日本 1") == "café_日本_1"
    assert safe_key("\udcff") == "_"


def test_links_are_followed_but_not_in_a_loop(tmp_path: Path) -> None:
    elsewhere = put(tmp_path / "elsewhere" / "a.png", encoded(drawing(0)[0]))
    put(tmp_path / "in" / "a.txt", "linked")
    (tmp_path / "in" / "a.png").symlink_to(elsewhere)
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert pack_shards(tmp_path / "in", tmp_path / "out", quiet=True)["samples"] == 1
    assert members(tmp_path / "out") == {"a.png": elsewhere.read_bytes(), "a.txt": b"linked"}


def test_other_image_formats_are_converted_losslessly(tmp_path: Path) -> None:
    image = drawing(0)[0]
    for extension, kind in (("bmp", "BMP"), ("tif", "TIFF")):
        put(tmp_path / "in" / f"{extension}.{extension}", encoded(image, kind))
        put(tmp_path / "in" / f"{extension}.txt", "x")
    put(tmp_path / "in" / "no_ending", encoded(image, "WEBP"))
    write_csv(tmp_path / "in" / "t.csv", [{"image": "no_ending", "text": "x"}])
    pack_shards(tmp_path / "in", tmp_path / "out", quiet=True)
    found = members(tmp_path / "out")
    assert set(found) == {"bmp.png", "bmp.txt", "tif.png", "tif.txt"}
    for name in ("bmp.png", "tif.png"):
        assert Image.open(io.BytesIO(found[name])).tobytes() == image.tobytes()
    pack_shards(tmp_path / "in" / "t.csv", tmp_path / "out2", quiet=True)
    assert set(members(tmp_path / "out2")) == {"no_ending.webp", "no_ending.txt"}


def test_max_side_shrinks_only_larger_images(tmp_path: Path) -> None:
    small, large = drawing(0)[0], Image.new("RGB", (200, 100), (10, 200, 30))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # EXIF orientation: rotate by 90 degrees
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", exif=rotated)
    for name, data in (("small", encoded(small)), ("large", encoded(large)), ("rotated", buffer.getvalue())):
        put(tmp_path / "in" / f"{name}.png", data)
        put(tmp_path / "in" / f"{name}.txt", name)
    pack_shards(tmp_path / "in", tmp_path / "out", max_side=50, quiet=True)
    found = members(tmp_path / "out")
    assert found["small.png"] == encoded(small)
    for name, size in (("large.jpg", (50, 25)), ("rotated.jpg", (25, 50))):
        image = Image.open(io.BytesIO(found[name]))
        assert (image.format, image.size) == ("JPEG", size)
        assert not image.getexif()


def test_dedup_keeps_the_first_of_equal_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = encoded(drawing(0)[0]), encoded(drawing(1)[0])
    for name, data in (("a", one), ("b", other), ("c", one), ("sub/d", one)):
        put(tmp_path / "in" / f"{name}.png", data)
        if name != "a":  # it has no caption and is not packed, so b.png is the first of these
            put(tmp_path / "in" / f"{name}.txt", name)
    pack_shards(tmp_path / "in", tmp_path / "all")
    assert "Samples with the same image as an earlier one and no group: 1." in capsys.readouterr().out
    result = pack_shards(tmp_path / "in", tmp_path / "out", dedup=True)
    assert result["bad"] == {"no caption": 1, "duplicate": 1}
    assert {line["key"]: line["reason"] for line in bad_lines(tmp_path / "out")}["sub/d.png"] == (
        "duplicate: the image has the same bytes as that of sample c"
    )
    assert [*members(tmp_path / "out")] == ["b.png", "b.txt", "c.png", "c.txt"]
    assert "same image" not in capsys.readouterr().out
    pack_shards(tmp_path / "in", tmp_path / "small", dedup=True, max_side=20, quiet=True)
    assert [*members(tmp_path / "small")] == ["b.jpg", "b.txt", "c.jpg", "c.txt"]


def test_shards_do_not_depend_on_time_or_umask(tmp_path: Path) -> None:
    image_folder(tmp_path / "in")
    pack_shards(tmp_path / "in", tmp_path / "one", max_side=20, samples_per_shard=4, quiet=True)
    for path in (tmp_path / "in").rglob("*"):
        os.utime(path, (1e9, 1e9))
    old = os.umask(0o077)
    try:
        pack_shards(tmp_path / "in", tmp_path / "two", max_side=20, samples_per_shard=4, quiet=True)
    finally:
        os.umask(old)
    for shard in ("shard-000000.tar", "shard-000001.tar"):
        assert (tmp_path / "one" / shard).read_bytes() == (tmp_path / "two" / shard).read_bytes()
        with tarfile.open(tmp_path / "one" / shard) as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


# ------------------------------------------------------------------------------------------------ bad samples


def test_bad_pairs_of_a_folder_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    good = encoded(drawing(0)[0])
    put(folder / "good.png", good)
    put(folder / "good.txt", "good")
    put(folder / "broken.png", b"not an image")
    put(folder / "broken.txt", "x")
    put(folder / "cut.png", good[:-200])
    put(folder / "cut.txt", "x")
    put(folder / "uncaptioned.png", good)
    put(folder / "blank.png", good)
    put(folder / "blank.txt", " \n ")
    put(folder / "latin.png", good)
    put(folder / "latin.txt", "é".encode("latin-1"))
    put(folder / "list.png", good)
    put(folder / "list.json", "[1]")
    put(folder / "alone.txt", "x")
    result = pack_shards(folder, tmp_path / "out")
    assert result["samples"] == 1
    assert result["bad"] == {"unreadable image": 2, "no caption": 2, "unreadable text": 2, "missing image": 1}
    lines = bad_lines(tmp_path / "out")
    assert {line["key"] for line in lines} == {
        "broken.png", "cut.png", "uncaptioned.png", "blank.png", "latin.png", "list.png", "alone",
    }  # fmt: skip
    assert all(set(line) == {"shard", "key", "reason"} and line["shard"] == str(folder) for line in lines)
    assert not any("_io" in line["reason"] for line in lines)  # a memory address, different in each run
    assert {line["key"]: line["reason"] for line in lines}["latin.png"] == "unreadable text: latin.txt is not UTF-8"
    shown = capsys.readouterr().out
    assert "1 samples" in shown
    assert "2 unreadable image, " in shown
    assert f"listed in {tmp_path / 'out' / BAD_SAMPLES}, e.g. blank.png: no caption" in shown


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
        "https://example.invalid/a.png,x",
        "file:///etc/hostname,x",
        "folder.png,x",
        f"{'n' * 300}.png,x",
    ]
    table = put(tmp_path / "t.csv", "\n".join(lines))
    result = pack_shards(table, tmp_path / "out", quiet=True)
    assert result["samples"] == 1
    assert result["bad"] == {"missing image": 6, "no caption": 2, "broken row": 1}
    listed = bad_lines(tmp_path / "out")
    assert {line["shard"] for line in listed} == {str(table)}
    reasons = {line["key"]: line["reason"] for line in listed}
    assert reasons["row 3"] == "missing image: image is empty"
    assert reasons["row 6"] == "broken row: 3 cells for 2 columns"
    assert "is a URL; name its column with --image-column to fetch it" in reasons["row 7"]
    assert "is neither a path nor an http(s) URL" in reasons["row 8"]


def test_lines_that_are_not_json_objects_are_bad_rows(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    row = json.dumps({"image": "a.png", "text": "x"})
    surrogate = '{"image": "a.png", "text": "\\ud800"}'
    number = '{"image": 5, "text": "x"}'
    put(tmp_path / "t.jsonl", "\n".join(["[1]", row, "{", surrogate, number, "[" * 100_000]))
    result = pack_shards(tmp_path / "t.jsonl", tmp_path / "out", quiet=True)
    assert result["bad"] == {"broken row": 3, "unreadable text": 1, "missing image": 1}


def test_an_image_of_several_rows_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.png", encoded(drawing(0)[0]))
    write_csv(tmp_path / "t.csv", [{"image": "a.png", "text": text} for text in ("one", "two", "three")])
    pack_shards(tmp_path / "t.csv", tmp_path / "out")
    assert "Samples with the same image as an earlier one and no group: 2." in capsys.readouterr().out
    pack_shards(tmp_path / "t.csv", tmp_path / "grouped", group_column="image")
    assert "same image" not in capsys.readouterr().out
    (batch,) = mmrl.stream(tmp_path / "grouped", batch_size=3)
    assert batch.group.tolist() == [group_id("a.png")] * 3
