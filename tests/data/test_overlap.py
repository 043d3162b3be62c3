"""Whether training says that an evaluation set has images of the training set."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing, encoded, write_tar
from PIL import Image

from mmrl.config import load_config
from mmrl.data import overlap
from mmrl.data.overlap import overlap_note, shared_images
from mmrl.data.samples import SampleReader
from mmrl.data.sources import open_reader
from mmrl.distributed import comm
from mmrl.train.preflight import prepare


def noise(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def shard(path: Path, images: dict[str, bytes]) -> SampleReader:
    members = [one for key, data in images.items() for one in ((f"{key}.png", data), (f"{key}.txt", key.encode()))]
    return open_reader(write_tar(path, members))


def test_shared_images_are_found_under_any_key(tmp_path: Path) -> None:
    train = shard(tmp_path / "train.tar", {f"t{n}": noise(n) for n in range(60)})
    val = shard(tmp_path / "val.tar", {f"v{n}": noise(n) for n in range(50, 80)})
    assert len({len(noise(n)) for n in range(80)}) < 80, "images of equal size that differ are among them"
    assert shared_images(train, val) == (10, 30)
    assert shared_images(val, train) == (10, 60)
    other = shard(tmp_path / "other.tar", {f"t{n}": noise(n + 100) for n in range(60)})
    assert shared_images(train, other) == (0, 60)
    assert overlap_note("val", train, other) == ""
    assert "evaluation.sets.val: 10 of 30 compared images are training images too" in overlap_note("val", train, val)


def test_the_work_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of one size are all candidates of each other."""
    images = [noise(0) + bytes([n]) for n in range(40)]  # Pillow ignores what follows the image
    train = shard(tmp_path / "train.tar", {str(n): image for n, image in enumerate(images)})
    val = shard(tmp_path / "val.tar", {str(n): image for n, image in enumerate(images)})
    reads: list[int] = []
    read = overlap._Images.read
    monkeypatch.setattr(overlap._Images, "read", lambda self, row: reads.append(row) or read(self, row))
    monkeypatch.setattr(overlap, "_COMPARISONS", 100)
    shared, compared = shared_images(train, val)
    assert 0 < shared <= compared < 40
    assert len(reads) <= 200


def test_a_run_says_so_before_it_starts(write_config: Callable[..., Path], shards: Path, tmp_path: Path) -> None:
    """The configured evaluation set of these tests is the training set itself."""
    path = write_config()
    notes = prepare(load_config(path), comm.start()).reader.notes
    assert any("evaluation.sets.val: 48 of 48 compared images are training images too" in note for note in notes)
    fresh = shard(tmp_path / "fresh.tar", {str(n): encoded(drawing(n)[0].rotate(20)) for n in range(4)})
    config = load_config(
        path, [f"evaluation.sets.val.shards={fresh.sources[0].shards[0].location}", f"run={tmp_path}/b"]
    )
    assert not any("training images too" in note for note in prepare(config, comm.start()).reader.notes)
