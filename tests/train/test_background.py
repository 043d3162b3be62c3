"""`image.background` in a run: the stream composites with it, and the checkpoint's manifest keeps it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded, write_tar
from PIL import Image

import mmrl
from mmrl.config import load_config
from mmrl.errors import InputError
from mmrl.train.trainer import train


def test_training_and_loading_composite_alike(write_config: Callable[..., Path], tmp_path: Path) -> None:
    empty = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    members = [(f"{n}.{kind}", data) for n in range(12) for kind, data in (("png", encoded(empty)), ("txt", b"%d" % n))]
    shard = write_tar(tmp_path / "transparent.tar", members)
    overrides = [f"data.train={shard}", "train.duration=1", "image.background=[10, 20, 30]"]
    path = write_config(evaluation={})
    run = train(load_config(path, overrides))
    manifest = json.loads((run / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest["image"]["background"] == [10, 20, 30]
    encoder = mmrl.load(run)
    batch = next(iter(mmrl.stream(str(shard), batch_size=2, image=encoder.image_spec)))
    assert batch.image[0, :, 5, 5].tolist() == [10, 20, 30]
    opaque = Image.new("RGB", (32, 32), (10, 20, 30))
    vectors = encoder.encode_images([empty, opaque, encoded(empty)])
    np.testing.assert_array_equal(vectors, vectors[[0, 0, 0]])


@pytest.mark.parametrize("value", ["white", "[255, 255]", "[0, 0, 256]"])
def test_a_wrong_background_is_one_sentence(write_config: Callable[..., Path], value: str) -> None:
    with pytest.raises(InputError, match=r"image\.background") as error:
        load_config(write_config(), [f"image.background={value}"])
    assert "\n" not in str(error.value)
