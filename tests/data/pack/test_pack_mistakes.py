"""Error messages of `mmrl pack`, raised before any image is read."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import drawing, encoded
from helpers.pack_sources import members, put

from mmrl import cli
from mmrl.data.pack.command import pack_shards
from mmrl.data.pack.writer import BAD_SAMPLES
from mmrl.errors import InputError


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
        ({"workers": 0}, r"workers: 0 .* at least 1"),
    ],
)
def test_wrong_options(table: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack_shards(table, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.xlsx", "", r"not a supported table; give \.csv, \.tsv, \.jsonl, \.parquet or a folder"),
        ("t.csv", "", r"has no rows"),
        ("t.csv", "image,caption\n", r"has no rows"),
        ("t.csv", "picture,caption\na,b\n", r"has none of the columns image, .*; name one of picture, caption\."),
        ("t.csv", "image,words\na,b\n", r"caption-column: .* has none of the columns caption, "),
        (
            "t.csv",
            '"image,caption\na.png,x\n',
            r"header of .*t\.csv cannot be read: line 1: .*enclose texts .* in quotes",
        ),
        ("t.csv", "PK\x03\x04...", r"t\.csv is no text table but a spreadsheet or a zip file; save it as CSV"),
        ("t.csv", "image,caption,caption\na,b,c\n", r"has 2 columns 'caption'; rename all but one"),
        ("t.parquet", "image,caption", r"not a readable Parquet file"),
        ("t.jsonl", '{"image": "gone.png", "text": "x"}', r"no pair in .* can be packed: 1 missing image; listed in"),
        ("in/readme.md", "", r"holds no images \(\.jpg, "),
    ],
)
def test_unusable_sources(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    put(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        pack_shards(tmp_path / Path(name).parts[0], tmp_path / "out", quiet=True)


def test_a_missing_source_and_a_column_of_a_folder(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give a folder of images or a table"):
        pack_shards(tmp_path / "gone", tmp_path / "out")
    with pytest.raises(InputError, match="is a folder; only a table has columns"):
        pack_shards(tmp_path, tmp_path / "out", image_column="image")


def test_out_must_be_new_or_empty(table: Path, tmp_path: Path) -> None:
    put(tmp_path / "out" / "thesis.tex", "mine")
    with pytest.raises(InputError, match=r"out already holds thesis\.tex; choose a new or empty folder"):
        pack_shards(table, tmp_path / "out")
    with pytest.raises(InputError, match="cannot be created"):
        pack_shards(table, table)
    pack_shards(table, tmp_path / "first", quiet=True)
    with pytest.raises(InputError, match=r"already holds shard-000000\.tar"):
        pack_shards(table, tmp_path / "first")


def test_a_pack_without_a_usable_pair_leaves_only_its_list_and_can_be_repeated(table: Path, tmp_path: Path) -> None:
    bad = put(tmp_path / "bad.csv", "image,caption\ngone.png,x\n")
    put(tmp_path / "out" / ".partial" / "shard-000000.tar.partial", "killed here")
    with pytest.raises(InputError, match="no pair in"):
        pack_shards(bad, tmp_path / "out", quiet=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [BAD_SAMPLES]
    pack_shards(table, tmp_path / "out", quiet=True)
    written = ["shard-000000.tar", "shard-000000.tar.index", "shards.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "t.parquet", "")
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs pyarrow.*pip install 'mmrl-clip\[search\]'"):
        pack_shards(tmp_path / "t.parquet", tmp_path / "out")


def test_the_command_line(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmrl", "pack", str(table), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    columns = ("--caption-column", "caption", "--caption-column", "product")
    code, out, _ = run(str(tmp_path / "out"), *columns, "--json", "--workers", "1")
    assert code == 0
    assert json.loads(out)["columns"]["captions"] == ["caption", "product"]
    assert json.loads(members(tmp_path / "out")["a.json"])["captions"] == ["x", "p"]
    code, _, error = run(str(tmp_path / "o"), "--group-column", "x")
    assert code == 2
    assert error.startswith("mmrl: group-column: ")
