"""`mmrl pack --holdout`: train and val share no group, no caption and no image, also after an interruption."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import drawing, encoded
from helpers.pack_sources import files, members, put, write_csv

from mmrl.data.captions import caption_key
from mmrl.data.pack import writer
from mmrl.data.pack.command import pack_shards
from mmrl.data.pack.holdout import parse_holdout
from mmrl.data.sources import open_reader
from mmrl.errors import InputError, RunStopped

OPTIONS: dict[str, Any] = {"samples_per_shard": 7, "quiet": True}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 pairs, many of which share a caption, a group or an image file; three cannot be used."""
    folder = tmp_path_factory.mktemp("source")
    rng, rows = random.Random(0), []
    for number in range(80):
        put(folder / f"{number}.png", encoded(drawing(number)[0].resize((9 + number, 8))))
    for number in range(100):
        captions = [f"caption {rng.randrange(200)}" for _ in range(rng.randrange(1, 3))]
        if rng.random() < 0.3:
            captions[0] = f" {captions[0].upper()} "
        group = f"g{rng.randrange(10)}" if rng.random() < 0.1 else None
        image = "nowhere.png" if number in (5, 60) else f"{number % 80}.png"
        first, last = ("", "") if number == 50 else (captions[0], captions[-1])
        rows.append({"image": image, "caption": first, "text": last, "sku": group})
    write_csv(folder / "t.csv", rows)
    return folder / "t.csv"


def facts(folder: Path) -> tuple[int, set[str]]:
    """The number of samples, and the captions, groups and images that they have."""
    reader, found = open_reader(folder), set[str]()
    samples = [reader.read(index) for index in range(len(reader))]
    for sample in samples:
        found |= {"caption " + caption_key(caption) for caption in sample.captions}
        found |= {"group " + sample.group_name} if sample.group_name else set()
        found.add(f"image {sample.image!r}")
    return len(samples), found


def pack(table: Path, out: Path, holdout: str = "10%", **options: Any) -> dict[str, Any]:
    return pack_shards(table, out, group_column="sku", holdout=holdout, **OPTIONS, **options)


def test_train_and_val_share_nothing_and_lose_nothing(table: Path, tmp_path: Path) -> None:
    result = pack(table, tmp_path / "out")
    (train, in_train), (val, in_val) = facts(tmp_path / "out" / "train"), facts(tmp_path / "out" / "val")
    assert not in_train & in_val
    assert train + val == result["samples"] == 97
    assert 8 <= val == result["held_out"]["samples"] <= 10
    assert result["held_out"] == {"shards": 2, "samples": val, "images_in_train": 0}
    assert result["bad"] == {"missing image": 2, "no caption": 1}
    assert [Path(shard).parent.name for shard in result["shards"]].count("val") == 2
    whole = pack_shards(table, tmp_path / "whole", group_column="sku", **OPTIONS)
    assert whole["samples"] == 97
    both = {**members(tmp_path / "out" / "train"), **members(tmp_path / "out" / "val")}
    assert sorted(both.values()) == sorted(members(tmp_path / "whole").values())


def test_the_seed_chooses(table: Path, tmp_path: Path) -> None:
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        pack(table, tmp_path / str(number), holdout="8", holdout_seed=seed, workers=1 + number % 2)
        chosen.append(files(tmp_path / str(number)))
    assert chosen[0] == chosen[1] != chosen[2]


def test_an_interrupted_pack_ends_with_the_same_bytes(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(table, tmp_path / "whole")
    whole, finish = files(tmp_path / "whole"), writer.PackWriter._finish_shard
    for stop_at in (1, 2, 3, 9):
        count = 0

        def stop(packer: writer.PackWriter, stop_at: int = stop_at) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise OSError(28, "No space left on device")
            finish(packer)

        out = tmp_path / str(stop_at)
        monkeypatch.setattr(writer.PackWriter, "_finish_shard", stop)
        with pytest.raises(RunStopped):
            pack(table, out)
        monkeypatch.setattr(writer.PackWriter, "_finish_shard", finish)
        pack(table, out)
        assert files(out) == whole, stop_at


def test_equal_images_in_other_files_are_printed_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        put(tmp_path / "in" / f"{number}.png", encoded(drawing(number % 10)[0]))
        put(tmp_path / "in" / f"{number}.txt", f"caption {number}")
    result = pack_shards(tmp_path / "in", tmp_path / "out", holdout="3")
    train, val = (
        [data for data in members(tmp_path / "out" / part).values() if len(data) > 20] for part in ("train", "val")
    )
    shared = sum(image in val for image in train)
    assert shared > 0
    assert result["held_out"] == {"shards": 1, "samples": 3, "images_in_train": shared}
    printed = capsys.readouterr().out
    assert f" MB in {tmp_path / 'out'}\n" in printed
    assert "Held out: 3 samples in" in printed
    assert f"same image as one held out: {shared}. Leave them out with --dedup." in printed
    deduplicated = pack_shards(tmp_path / "in", tmp_path / "dedup", holdout="3", dedup=True, quiet=True)
    assert deduplicated["samples"] == 10
    assert deduplicated["held_out"]["images_in_train"] == 0


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("500", 500), (" 12.5% ", 0.125)])
def test_shares_and_numbers(text: str, value: float) -> None:
    assert parse_holdout(text) == value


@pytest.mark.parametrize("text", ["", "%", "0", "100%", "-5%", "1.5", "nan", "five", "5 percent", "inf%"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is no share and no number of pairs; give e\.g\. 5% or 500"):
        parse_holdout(text)


def test_what_cannot_be_held_out_is_refused(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / "in" / f"{number}.png", encoded(drawing(number)[0]))
        put(tmp_path / "in" / f"{number}.json", json.dumps({"captions": ["linked", f"own {number}"]}))
    with pytest.raises(InputError, match=r"holdout: 25% of 4 usable pairs are 1, and any fewer share .* has 4\); give"):
        pack_shards(tmp_path / "in", tmp_path / "out", holdout="25%", quiet=True)
    with pytest.raises(InputError, match="holdout: 4 of 4 usable pairs leaves none to train on; give less"):
        pack_shards(tmp_path / "in", tmp_path / "out", holdout="4", quiet=True)
    for number in range(4):
        put(tmp_path / "broken" / f"{number}.png", b"not an image")
        put(tmp_path / "broken" / f"{number}.txt", f"caption {number}")
    put(tmp_path / "broken" / "sound.png", encoded(drawing(0)[0]))
    put(tmp_path / "broken" / "sound.txt", "sound")
    found = set()
    for seed in range(12):
        with pytest.raises(InputError) as error:
            pack_shards(tmp_path / "broken", tmp_path / str(seed), holdout="1", holdout_seed=seed, quiet=True)
        found.add(str(error.value).partition(" pair in ")[0])
    assert found == {"holdout: no held-out", "holdout: no training"}
