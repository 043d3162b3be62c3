"""Hugging Face data sets: their Parquet files, and the library `datasets` as a source of pack and of training."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import drawing, encoded
from helpers.pack_sources import bad_lines, members, put

from mmrl.data.pack.command import pack_shards
from mmrl.data.pack.hub import pack_missing
from mmrl.data.shards import hub_folder
from mmrl.data.sources import open_reader
from mmrl.errors import InputError

IMAGES = [encoded(drawing(number)[0], kind) for number, kind in enumerate(("PNG", "JPEG", "BMP"))]


def rows() -> list[dict[str, Any]]:
    """Images as the library stores them: with their bytes, with a path too, with a path alone, with neither."""
    structs = [
        {"bytes": IMAGES[0], "path": None},
        {"bytes": IMAGES[1], "path": "photos/one.v2.jpg"},
        {"bytes": None, "path": "two.bmp"},
        {"bytes": None, "path": None},
        {"bytes": b"no picture", "path": "three.png"},
    ]
    return [{"image": one, "text": [f"caption {n}", "other"], "sku": n // 2} for n, one in enumerate(structs)]


def write(path: Path, some: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path)
    return path


def test_image_structs_are_packed(tmp_path: Path) -> None:
    put(tmp_path / "data" / "two.bmp", IMAGES[2])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", rows()[:2])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", rows()[2:])
    result = pack_shards(tmp_path / "data" / "train-*.parquet", tmp_path / "out", group_column="sku", quiet=True)
    found = members(tmp_path / "out")
    assert [name for name in found if name[-3:] not in ("txt", "son")] == [
        "train-00000-of-00002-1.png", "photos_one_v2.jpg", "two.png",
    ]  # fmt: skip
    assert found["train-00000-of-00002-1.png"] == IMAGES[0]
    assert found["photos_one_v2.jpg"] == IMAGES[1]
    assert found["two.json"] == b'{"captions": ["caption 2", "other"], "group": "1"}'
    assert result["bad"] == {"missing image": 1, "unreadable image": 1}
    assert bad_lines(tmp_path / "out")[0]["reason"] == "missing image: image is empty"


def test_a_folder_of_parquet_files_is_one_table_of_one_split(tmp_path: Path) -> None:
    for number, name in enumerate(("part-0.parquet", "sub/part-1.parquet")):
        write(tmp_path / "in" / name, rows()[number : number + 1])
    assert pack_shards(tmp_path / "in", tmp_path / "out", workers=2, quiet=True)["samples"] == 2
    write(tmp_path / "in" / "test" / "part-0.parquet", rows()[:1])
    assert pack_shards(tmp_path / "in", tmp_path / "again", quiet=True)["samples"] == 3
    write(tmp_path / "in" / "train-0.parquet", rows()[:1])
    with pytest.raises(InputError, match=r"holds the splits train, test; give the files of one, e\.g\. '.*parquet'"):
        pack_shards(tmp_path / "in", tmp_path / "more")
    write(tmp_path / "other" / "a.parquet", rows()[:1])
    write(tmp_path / "other" / "b.parquet", [{"image": rows()[0]["image"]}])
    with pytest.raises(InputError, match=r"b\.parquet lacks the column 'sku' of .*a\.parquet"):
        pack_shards(tmp_path / "other", tmp_path / "more")


class _Image:
    """Of the stand-in for `datasets`."""

    def __init__(self, decode: bool = True) -> None:
        self.decode = decode


class _Data:
    """As datasets.Dataset, with the methods that are used: decodes images unless told otherwise."""

    def __init__(self, some: list[dict[str, Any]], decodes: bool = True) -> None:
        self._rows, self._decodes, self._fingerprint = some, decodes, str(hash(str(some)))
        self.features = {"image": _Image(), "text": object(), "sku": object()}
        self.column_names = list(some[0]) if some else []

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            yield {**row, "image": drawing(0)[0]} if self._decodes else row

    def cast_column(self, column: str, feature: _Image) -> "_Data":
        assert column == "image"
        return _Data(self._rows, feature.decode)

    def select_columns(self, columns: list[str]) -> "_Data":
        return _Data([{name: row[name] for name in columns} for row in self._rows], self._decodes)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for `datasets`; lists the names that were opened."""
    opened: list[str] = []

    def load_dataset(name: str) -> dict[str, _Data]:
        opened.append(name)
        if name == "org/none":
            raise FileNotFoundError("no such data set")
        return {"train": _Data(rows()[:2]), "test": _Data(rows()[:1])}

    def load_from_disk(name: str) -> _Data:
        opened.append(f"disk {name}")
        return _Data(rows()[:2])

    stand_in = SimpleNamespace(Image=_Image, load_dataset=load_dataset, load_from_disk=load_from_disk)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    return opened


def test_a_data_set_by_name_or_folder_is_packed(tmp_path: Path, library: list[str]) -> None:
    result = pack_shards(Path("hf:org/shoes:train"), tmp_path / "out", quiet=True)
    assert result["samples"] == 2
    assert members(tmp_path / "out")["train-1.png"] == IMAGES[0]
    put(tmp_path / "saved" / "state.json", "{}")
    assert pack_shards(Path(f"hf:{tmp_path}/saved"), tmp_path / "disk", quiet=True)["samples"] == 2
    assert library == ["org/shoes", f"disk {tmp_path}/saved"]
    for spec, message in {
        "hf:org/shoes": r"names none of the splits; give hf:org/shoes:train\|test",
        "hf:org/shoes:val": r"names none of the splits",
        "hf:org/none:train": r"datasets cannot open hf:org/none:train \(no such data set\)",
        f"hf:{tmp_path}/saved:train": r"names a split, but .*saved has none",
    }.items():
        with pytest.raises(InputError, match=message):
            pack_shards(Path(spec), tmp_path / "more")


def test_training_packs_a_data_set_once(tmp_path: Path, library: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        InputError, match=r"hf:org/shoes:train is not packed on this host; mmrl train does it, or: mmrl"
    ):
        open_reader("hf:org/shoes:train")
    pack_missing(["hf:org/shoes:train", "starter:train", "part-{0..3}.tar"])
    pack_missing(["hf:org/shoes:train"])
    assert library == ["org/shoes"]
    reader = open_reader("hf:org/shoes:train")
    assert [reader.read(number).image for number in range(2)] == IMAGES[:2]
    assert hub_folder("hf:org/shoes:train").is_relative_to(tmp_path / "cache")


def test_without_the_library_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'mmrl-clip\[datasets\]', or pack its Parquet files"):
        pack_shards(Path("hf:org/shoes"), tmp_path / "out")


def test_the_real_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in IMAGES]
    data = datasets.Dataset.from_dict(
        {"image": pictures, "text": ["a", "b", "c"]},
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    data.save_to_disk(str(tmp_path / "saved"))
    assert pack_shards(Path(f"hf:{tmp_path}/saved"), tmp_path / "one", quiet=True)["samples"] == 3
    data.to_parquet(str(tmp_path / "parquet" / "train-0.parquet"))
    assert pack_shards(Path(f"hf:{tmp_path}/parquet:train"), tmp_path / "two", quiet=True)["samples"] == 3
    assert pack_shards(tmp_path / "parquet", tmp_path / "three", quiet=True)["samples"] == 3
    assert [*members(tmp_path / "one").values()] == [*members(tmp_path / "three").values()]
