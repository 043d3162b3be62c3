"""`mmrl pack` puts the samples of a group into one shard."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import drawing, encoded
from helpers.pack_sources import files, put, write_csv

from mmrl.data.check.command import check_shards
from mmrl.data.fields import FieldsConfig
from mmrl.data.groups import GroupFile, groups_suffix
from mmrl.data.index import BLOCK
from mmrl.data.pack import grouped
from mmrl.data.pack.command import pack_shards
from mmrl.data.pack.writer import PackWriter
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stream import Stream
from mmrl.errors import InputError

# "large" does not fit into a shard of four; the images of rows 5 and 17, the last of its group, are missing.
GROUPS = [
    "", "a", "large", "b", "c", "b", "large", "", "a", "d", "large", "b",
    "", "large", "d", "large", "a", "d", "e", "", "b", "c", "f", "",
]  # fmt: skip
BAD = {5, 17}
SIZES = Counter(group for number, group in enumerate(GROUPS) if number not in BAD)


def write_table(folder: Path, kind: str = "csv") -> Path:
    rows = []
    for number, group in enumerate(GROUPS):
        image = encoded(drawing(number)[0])
        if number not in BAD:
            put(folder / f"{number:03}.png", image)
        row = {"image": f"{number:03}.png", "caption": f"number {number}", "sku": group}
        if kind == "parquet":
            row |= {
                "image": {"bytes": None if number in BAD else image, "path": f"{number:03}.png"},
                "sku": group or None,
            }
        rows.append(row)
    if kind == "csv":
        write_csv(folder / "table.csv", rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
    return folder / f"table.{kind}"


def write_folder(folder: Path) -> Path:
    for number, group in enumerate(GROUPS):
        put(folder / f"{number:03}.png", b"broken" if number in BAD else encoded(drawing(number)[0]))
        put(folder / f"{number:03}.json", json.dumps({"captions": f"number {number}", "group": group}))
    return folder


def packed(out: Path) -> list[list[int]]:
    """The samples of each shard, in order."""
    shards = []
    for path in sorted(out.glob("**/*.tar")):
        with tarfile.open(path) as tar:
            shards.append([int(name[:3]) for name in tar.getnames() if name.endswith(".png")])
    return shards


@pytest.mark.parametrize("source", ["csv", "parquet", "folder"])
def test_the_samples_of_a_group_are_neighbours_in_one_shard(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_IN_MEMORY", 1000)
    path = write_folder(tmp_path / "in") if source == "folder" else write_table(tmp_path / "in", source)
    group_column = None if source == "folder" else "sku"
    pack_shards(path, tmp_path / "out", samples_per_shard=4, group_column=group_column, quiet=True)
    shards = packed(tmp_path / "out")
    order = [number for shard in shards for number in shard]
    assert sorted(order) == [number for number in range(24) if number not in BAD]
    assert all(len(shard) <= 4 for shard in shards)
    for group in "abcdef":
        rows = [n for n, number in enumerate(order) if GROUPS[number] == group]
        assert rows == [*range(rows[0], rows[0] + SIZES[group])]
        assert sum(any(GROUPS[number] == group for number in shard) for shard in shards) == 1
    apart = [number for number in order if GROUPS[number] in ("", "large")]
    assert apart == sorted(apart), "all others keep their order"
    facts = check_shards(str(tmp_path / "out"), workers=1, quiet=True).sets[0]
    assert (facts.groups, facts.split_groups) == (7, 1)
    assert files(tmp_path / "out").keys() >= {f"shard-000000.tar{groups_suffix(FieldsConfig())}"}
    reader = open_reader(tmp_path / "out")
    for shard in reader.sources[0].shards:
        stored = GroupFile(shard.location, FieldsConfig(), reader.cache).load(shard.samples, shard.tar)
        assert stored is not None
    assert np.array_equal(
        np.sort(reader.all_groups()[0]), np.sort([read.group for read in map(reader.read, range(22))])
    )


def test_a_source_without_repeated_groups_keeps_its_order(tmp_path: Path) -> None:
    rows = [{"image": f"{n:03}.png", "caption": f"number {n}", "sku": f"{n}" if n % 2 else ""} for n in (3, 1, 2, 5, 4)]
    for row in rows:
        put(tmp_path / "in" / row["image"], encoded(drawing(int(row["image"][:3]))[0]))
    write_csv(tmp_path / "in" / "table.csv", rows)
    pack_shards(tmp_path / "in" / "table.csv", tmp_path / "out", group_column="sku", samples_per_shard=2, quiet=True)
    assert packed(tmp_path / "out") == [[3, 1], [2, 5], [4]]


@pytest.mark.parametrize("holdout", [None, "6"])
def test_an_interrupted_pack_resumes_with_the_same_bytes(
    tmp_path: Path, holdout: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_table(tmp_path / "in")
    options = {"group_column": "sku", "samples_per_shard": 4, "holdout": holdout, "quiet": True}
    pack_shards(table, tmp_path / "whole", **options)
    expected = files(tmp_path / "whole")
    assert len(packed(tmp_path / "whole")) >= 6
    if holdout:
        parts = [{GROUPS[n] for shard in packed(tmp_path / "whole" / part) for n in shard} for part in ("val", "train")]
        assert parts[0] & parts[1] <= {""}
    for stop_at in (1, 3, 5):
        out = tmp_path / f"out-{stop_at}"
        interrupt(table, out, stop_at, monkeypatch, options)
        pack_shards(table, out, **options)
        assert files(out) == expected


def interrupt(table: Path, out: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """Packs until a number of shards is finished."""
    finish = PackWriter._finish_shard

    def finish_some(packer: PackWriter) -> None:
        finish(packer)
        if packer.progress.shards == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PackWriter, "_finish_shard", finish_some)
        with pytest.raises(KeyboardInterrupt):
            pack_shards(table, out, **options)


def test_a_pack_that_began_in_another_order_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_table(tmp_path / "in")
    options = {"group_column": "sku", "samples_per_shard": 4, "quiet": True}

    interrupt(table, tmp_path / "out", 1, monkeypatch, options)
    progress = tmp_path / "out" / ".partial" / "progress.json"
    saved = json.loads(progress.read_text())
    del saved["arguments"]["order"]
    progress.write_text(json.dumps(saved))
    with pytest.raises(InputError, match=r"was started with another order \(none, now by group\)"):
        pack_shards(table, tmp_path / "out", **options)


def test_dedup_counts_what_is_kept_of_a_group(tmp_path: Path) -> None:
    """Two groups of three with one image twice fit into a shard of four."""
    rows = []
    for number, group in enumerate("ababab"):
        put(tmp_path / "in" / f"{number:03}.png", encoded(drawing(number % 4)[0]))
        rows.append({"image": f"{number:03}.png", "caption": f"number {number}", "sku": group})
    write_csv(tmp_path / "in" / "table.csv", rows)
    pack_shards(tmp_path / "in" / "table.csv", tmp_path / "out", group_column="sku", samples_per_shard=4, dedup=True,
                quiet=True)  # fmt: skip
    assert packed(tmp_path / "out") == [[0, 2, 1, 3]]


def test_remote_groups_spare_the_download_of_the_shards(tmp_path: Path) -> None:
    pack_shards(write_table(tmp_path / "in"), tmp_path / "out", group_column="sku", samples_per_shard=4, quiet=True)
    urls = [f"file://{path}" for path in sorted((tmp_path / "out").glob("*.tar"))]
    config = DataConfig.model_validate({"train": urls, "remote": {"folder": str(tmp_path / "cache")}})
    reader = open_training_set(config)
    before = {path.name for path in (tmp_path / "cache" / "shards").glob("*.tar")}
    Stream(reader, 4, config=config, second=frozenset({"image"}))
    assert {path.name for path in (tmp_path / "cache" / "shards").glob("*.tar")} == before
    assert len(before) <= 1, "the first one, to check the names of the fields"
    for path in (tmp_path / "out").glob("*.groups"):
        path.unlink()
    config = DataConfig.model_validate({"train": urls, "remote": {"folder": str(tmp_path / "cache-2")}})
    scanned = open_training_set(config)
    assert np.array_equal(scanned.all_groups()[0], reader.all_groups()[0])
    assert len([*(tmp_path / "cache-2" / "shards").glob("*.tar")]) == len(urls)


def test_check_writes_the_groups_next_to_shards(tmp_path: Path) -> None:
    pack_shards(write_table(tmp_path / "in"), tmp_path / "out", group_column="sku", samples_per_shard=4, quiet=True)
    stored = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.groups")}
    for path in stored:
        path.unlink()
    check_shards(str(tmp_path / "out"), workers=1, index=True, quiet=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*.groups")} == stored
    assert all(len(data) < BLOCK for data in stored.values())
