"""`data.mask_equal_captions` in a run: no negatives among equal captions, and what an older run keeps when resumed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import sample_members, write_tar

from mmrl.config import load_config
from mmrl.distributed import comm
from mmrl.errors import InputError
from mmrl.train.run_folder import open_run, with_stored_values
from mmrl.train.trainer import train

WriteConfig = Callable[..., Path]


def test_samples_of_one_caption_are_not_negatives(write_config: WriteConfig, tmp_path: Path) -> None:
    captions = [b"a red square", b" A red\tsquare "]
    members = [
        (f"{n}.{kind}", data)
        for n in range(24)
        for kind, data in (("png", sample_members(n)[0][1]), ("txt", captions[n % 2]))
    ]
    shard = write_tar(tmp_path / "equal.tar", members)
    path = write_config(evaluation={})
    overrides = [f"data.train={shard}", "train.duration=1"]
    losses = {}
    for mask in ("true", "false"):
        folder = train(load_config(path, [*overrides, f"run={tmp_path / mask}", f"data.mask_equal_captions={mask}"]))
        losses[mask] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["true"] == pytest.approx(0, abs=1e-6)  # every pair is masked
    assert losses["false"] > 1


def test_a_run_of_an_earlier_version_stays_without_the_mask(write_config: WriteConfig) -> None:
    world, path = comm.start(), write_config()
    config = load_config(path)
    stored = Path(config.run) / "config.yaml"
    assert with_stored_values(config, world).data.mask_equal_captions, "a new run masks"
    open_run(config, 1)
    (stored.parent / "checkpoints").mkdir()  # else its start has failed, and another run may take the folder
    values = yaml.safe_load(stored.read_text())
    assert values["data"].pop("mask_equal_captions") is True
    assert values["image"].pop("background") == [255, 255, 255]
    stored.write_text(yaml.safe_dump(values))
    for _ in range(2):  # the first time without the key, the second time with what the first has written
        resumed = with_stored_values(config, world)
        assert not resumed.data.mask_equal_captions
        assert resumed.image.background is None
        open_run(resumed, 1)
    assert yaml.safe_load(stored.read_text())["data"]["mask_equal_captions"] is False
    explicit = load_config(path, ["data.mask_equal_captions=true"])
    with pytest.raises(InputError, match=r"holds a run of another config \(data\.mask_equal_captions: False -> True"):
        open_run(with_stored_values(explicit, world), 1)
