"""`mmrl pack` of two texts, two images, and image-text pairs with second members: what is packed comes out of the
stream unchanged."""

import io
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import drawing, encoded
from helpers.pack_sources import Rows, bad_lines, files, members, put, write_csv
from PIL import Image

import mmrl.data
from mmrl import cli
from mmrl.data.batches import Batch
from mmrl.data.captions import caption_key
from mmrl.data.groups import NO_GROUP, group_id
from mmrl.data.pack import writer
from mmrl.data.pack.command import pack_shards
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stream import Stream
from mmrl.errors import InputError, RunStopped

TEXTS: dict[str, Any] = {
    "caption_columns": ["question"], "second_text_column": "passage", "group_column": "item", "sides": ["text"],
    "samples_per_shard": 7, "quiet": True,
}  # fmt: skip
IMAGES: dict[str, Any] = {"second_image_column": "shop", "sides": ["image"], "samples_per_shard": 4, "quiet": True}


def epoch(out: Path, *sides: str, second: frozenset[str] | None = None) -> Batch:
    """All samples, in one batch."""
    reader = open_training_set(config := DataConfig(train=str(out)), sides)
    kinds = frozenset(sides) if second is None else second
    (batch,) = Stream(reader, len(reader), config=config, second=kinds, sides=sides)
    return batch


def write_rows(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        write_csv(path, rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def questions(count: int = 20) -> Rows:
    return [
        {"question": f' what, "is"\n{number}? ', "passage": f"it is {number}, é", "item": f"i{number % 8}", "price": 3}
        for number in range(count)
    ]


def test_the_python_of_the_page_writes_such_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(mmrl.data.__file__).parent / "README.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "webdataset" in code]
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # noqa: S102
    batch = epoch(tmp_path / "pairs", "text")
    assert batch.second is not None
    assert batch.group.tolist() == [group_id("article 7")] * 2
    assert set(zip(batch.text, batch.second.text, strict=True)) == {
        ("who wrote it?", "It was written by Ada."), ("when?", "In 1843."),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_two_texts_of_a_table_stream_unchanged(tmp_path: Path, kind: str) -> None:
    rows = questions()
    rows[4]["item"] = "" if kind == "csv" else None
    bad: dict[int, tuple[str, str]] = {
        3: ("passage", ""), 6: ("passage", "NULL"), 9: ("question", " "), 12: ("passage", "['one', 'two', 'one']"),
    }  # fmt: skip
    for number, (column, value) in bad.items():
        rows[number][column] = value
    result = pack_shards(write_rows(tmp_path / f"pairs.{kind}", rows), tmp_path / "out", **TEXTS)
    assert result["samples"] == 16
    assert result["bad"] == {"no second text": 2, "no caption": 1, "several second texts": 1}
    assert result["columns"] == {"image": None, "captions": ["question"], "group": "item", "second_text": "passage"}
    assert {line["key"]: line["reason"] for line in bad_lines(tmp_path / "out")} == {
        "row 4": "no second text: none given, or only empty ones",
        "row 7": "no second text: passage holds 'NULL', which stands for a missing value",
        "row 10": "no caption: none given, or only empty ones",
        "row 13": "several second texts: passage holds 2; write a row for each, with a common group",
    }
    good = [row for number, row in enumerate(rows) if number not in bad]
    batch = epoch(tmp_path / "out", "text")
    assert batch.image is None
    assert batch.second is not None
    assert set(zip(batch.text, batch.second.text, batch.group.tolist(), strict=True)) == {
        (row["question"].strip(), row["passage"], group_id(row["item"]) if row["item"] else NO_GROUP) for row in good
    }
    found = members(tmp_path / "out")
    assert all(name.endswith(".json") for name in found)
    assert json.loads(found["pairs-1.json"]) == {
        "captions": ['what, "is"\n0?'], "second_text": "it is 0, é", "group": "i0",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"fields\.image: no sample .* has \.jpg"):
        open_reader(tmp_path / "out")


def write_images(folder: Path, count: int = 10) -> Path:
    """Photos and the shop's images, which several share; the shop's image of row 3 is damaged, of row 5 missing."""
    rows = []
    for number in range(count):
        put(folder / "shop" / f"{number // 2}.jpg", encoded(drawing(100 + number // 2)[0], "JPEG"))
        put(folder / f"{number}.png", encoded(drawing(number)[0]))
        rows.append({"image": f"{number}.png", "shop": f"shop/{number // 2}.jpg", "sku": f"s{number % 3}"})
    put(folder / "broken.jpg", encoded(drawing(1)[0], "JPEG")[:200])
    rows[3]["shop"], rows[5]["shop"] = "broken.jpg", ""
    return write_rows(folder / "t.csv", rows)


def test_two_images_of_a_table_stream_unchanged(tmp_path: Path) -> None:
    table = write_images(tmp_path / "in")
    result = pack_shards(table, tmp_path / "out", **IMAGES)
    assert result["samples"] == 8
    assert result["bad"] == {"unreadable image": 1, "missing image": 1}
    broken, missing = [line["reason"] for line in bad_lines(tmp_path / "out")]
    assert broken.startswith(f"unreadable image: {tmp_path}/in/broken.jpg: ")
    assert missing == "missing image: shop is empty"
    batch = epoch(tmp_path / "out", "image")
    assert batch.text is None
    assert batch.second is not None
    numbers = [int(key.rpartition("/")[2]) for key in batch.keys]
    assert sorted(numbers) == [0, 1, 2, 4, 6, 7, 8, 9]
    for number, image, second in zip(numbers, batch.image, batch.second.image, strict=True):
        assert image == (tmp_path / "in" / f"{number}.png").read_bytes()
        assert second == (tmp_path / "in" / "shop" / f"{number // 2}.jpg").read_bytes()
    pack_shards(table, tmp_path / "small", max_side=20, **IMAGES)
    small = members(tmp_path / "small")
    assert {name.partition(".")[2] for name in small} == {"jpg", "second.jpg"}
    assert {Image.open(io.BytesIO(data)).size for data in small.values()} == {(20, 20)}


def test_image_text_pairs_may_have_second_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for number in range(6):
        put(tmp_path / "in" / f"{number}.png", encoded(drawing(number)[0]))
        rows.append({"image": f"{number}.png", "text": f"caption {number}", "shop": "", "title": ""})
    rows[0].update(shop="1.png", title="second 0")
    rows[1].update(title="second 1")
    rows[2].update(shop="3.png")
    rows[4].update(shop="gone.png")
    options: dict[str, Any] = {"second_image_column": "shop", "second_text_column": "title"}
    result = pack_shards(write_rows(tmp_path / "in" / "t.csv", rows), tmp_path / "out", **options)
    assert result["bad"] == {"missing image": 1}
    assert result["columns"]["captions"] == ["text"]  # not the title, which is the second text
    printed = capsys.readouterr().out
    assert "Columns that were read: image, text, title, shop\nSamples without a second text or image: 2\n" in printed
    found = members(tmp_path / "out")
    assert json.loads(found["0.json"]) == {"second_text": "second 0"}
    assert found["0.txt"] == b"caption 0"
    batch = epoch(tmp_path / "out", "image", "text")
    assert batch.second is not None
    texts = dict(zip((int(key[-1]) for key in batch.keys), batch.second.text, strict=True))
    assert texts == {n: f"second {n}" if n < 2 else f"caption {n}" for n in (0, 1, 2, 3, 5)}
    for key, second in zip(batch.keys, batch.second.image, strict=True):
        source = {0: 1, 2: 3}.get(int(key[-1]), int(key[-1]))
        assert second == encoded(drawing(source)[0])


def test_train_and_val_share_no_text_on_either_side(tmp_path: Path) -> None:
    rng, rows = random.Random(0), []
    for _ in range(100):
        question, passage = (f"Text {rng.randrange(400)}" for _ in range(2))
        rows.append({"question": question, "passage": passage.lower(), "item": rng.choice(["", "", f"i{len(rows)}"])})
    result = pack_shards(write_rows(tmp_path / "t.csv", rows), tmp_path / "out", holdout="20%", **TEXTS)
    found, counts = [], []
    for part in ("val", "train"):
        reader = open_reader(tmp_path / "out" / part, required=["text"])
        samples = [reader.read(index) for index in range(len(reader))]
        texts = {caption_key(text) for one in samples for text in (*one.captions, one.second_text)}
        found.append(texts | {f"group {one.group_name}" for one in samples if one.group_name})
        counts.append(len(samples))
    assert not found[0] & found[1]
    assert counts == [result["held_out"]["samples"], 100 - result["held_out"]["samples"]]
    assert 15 <= counts[0] <= 20


def test_dedup_keeps_the_first_of_equal_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*questions(4), *questions(2), {**questions(1)[0], "passage": "another one"}]
    table = write_rows(tmp_path / "t.csv", [{**row, "item": None} for row in rows])
    pack_shards(table, tmp_path / "all", **{**TEXTS, "quiet": False})
    assert "Samples with the same texts as an earlier one and no group: 2." in capsys.readouterr().out
    result = pack_shards(table, tmp_path / "out", dedup=True, **TEXTS)
    assert (result["samples"], result["bad"]) == (5, {"duplicate": 2})
    assert bad_lines(tmp_path / "out")[0]["reason"] == "duplicate: the texts are those of sample t-1"


def with_bytes(folder: Path) -> Path:
    """A Parquet table of image bytes, so that those of a group wait in the temporary file."""
    rows = [
        {
            "image": {"bytes": encoded(drawing(number)[0]), "path": f"{number}.png"},
            "shop": encoded(drawing(number + 50)[0]),
            "sku": f"s{number % 3}",
        }
        for number in range(12)
    ]
    return write_rows(folder / "t.parquet", rows)


@pytest.mark.parametrize("kind", ["texts", "files", "bytes"])
def test_an_interrupted_pack_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make: dict[str, Callable[[Path], Path]] = {"files": write_images, "bytes": with_bytes}
    options = {**IMAGES, "group_column": "sku"}
    if kind == "texts":
        make, options = {kind: lambda folder: write_rows(folder / "t.jsonl", questions())}, TEXTS
    table = make[kind](tmp_path / "in")
    pack_shards(table, tmp_path / "whole", **options)
    finish = writer.PackWriter._finish_shard

    def stop(packer: writer.PackWriter) -> None:
        if packer.progress.shards == 1:
            raise OSError(28, "No space left on device")
        finish(packer)

    with monkeypatch.context() as patch:
        patch.setattr(writer.PackWriter, "_finish_shard", stop)
        with pytest.raises(RunStopped):
            pack_shards(table, tmp_path / "out", **options)
    if kind == "texts":
        with pytest.raises(InputError, match=r"another second-text-column \(passage, now item\)"):
            pack_shards(table, tmp_path / "out", **{**options, "second_text_column": "item"})
    pack_shards(table, tmp_path / "out", workers=2 if kind == "bytes" else 1, **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    if kind == "bytes":
        batch = epoch(tmp_path / "out", "image")
        assert batch.second is not None
        for key, image, second in zip(batch.keys, batch.image, batch.second.image, strict=True):
            number = int(key.rpartition("/")[2])
            assert [image, second] == [encoded(drawing(one)[0]) for one in (number, number + 50)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_text_column": "passag"}, r"second-text-column: .*t\.csv has no column 'passag'\. Did you mean 'pas"),
        ({"second_text_column": "question"}, "question is the column of the image or of captions too; name another"),
        ({"image_column": "item"}, "image-column: no use with --towers text; remove the option"),
        ({"second_image_column": "item"}, "second-image-column: no use with --towers text"),
        ({"max_side": 64}, "max-side: no use with --towers text"),
        ({"sides": ["image"], "second_text_column": "passage"}, "second-text-column: no use with --towers image"),
        ({"sides": ["image"], "second_text_column": None}, "image-column: .* has none of the columns image, "),
        ({"caption_columns": []}, "caption-column: .* has none of the columns caption, "),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    table = write_rows(tmp_path / "t.csv", questions(2))
    with pytest.raises(InputError, match=message):
        pack_shards(table, tmp_path / "out", **{**TEXTS, **options})
    assert not (tmp_path / "out").exists()


def test_a_folder_has_images_with_or_without_captions(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "in" / f"{number}.png", encoded(drawing(number)[0]))
    put(tmp_path / "in" / "0.json", json.dumps({"caption": "one", "group": "g"}))
    result = pack_shards(tmp_path / "in", tmp_path / "out", sides=["image"], quiet=True)
    assert result["samples"] == 3
    assert set(members(tmp_path / "out")) == {"0.png", "0.txt", "0.json", "1.png", "2.png"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"sides": ["text"]}, "is a folder; texts without images are packed from a table"),
        ({"second_text_column": "x"}, "second-text-column: .* is a folder; only a table has columns"),
    ]
    for options, message in wrong:
        with pytest.raises(InputError, match=message):
            pack_shards(tmp_path / "in", tmp_path / "more", **options)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str | Path | int) -> str:
        monkeypatch.setattr(sys, "argv", ["mmrl", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    table, out = write_rows(tmp_path / "t.csv", questions()), tmp_path / "out"
    columns = ("--caption-column", "question", "--second-text-column", "passage", "--group-column", "item")
    printed = run("pack", table, out, *columns, "--towers", "text", "--workers", 1)
    assert "Columns that were read: question, item, passage\n" in printed
    steps = [line.partition("  #")[0].strip() for line in printed.splitlines()[-2:]]
    assert steps[0].endswith(f"check {out} --towers text")
    assert steps[1].endswith(f"train --data {out} model.towers=text loss.image_text=0 loss.text_text=1")
    checked = json.loads(run(*steps[0].split()[1:], "--json", "--workers", 1))
    assert checked["ok"]
    assert checked["sets"][0]["second_texts"] == 20
