"""Streams of texts or images alone, with second members of their own, against the samples that the test has written."""

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawing, encoded, write_tar
from helpers.samples import SPEC
from PIL import Image

from mmrl.data.batches import Batch
from mmrl.data.captions import caption_id
from mmrl.data.groups import NO_GROUP, group_id
from mmrl.data.parsing import BOTH
from mmrl.data.sources import DataConfig, open_training_set
from mmrl.data.stream import Stream
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError

SAMPLES, BAD = 36, 7


def text_sample(number: int) -> list[tuple[str, bytes]]:
    """Every sixth has no second text but another caption, or another sample of its group; one has no text."""
    metadata: dict[str, object] = {"captions": [f"question {number}"], "group": f"item {number // 2}"}
    if number % 6:
        metadata["second_text"] = f"passage {number}"
    elif number % 4:
        metadata["captions"] = [f"question {number}", f"also {number}"]
    return [(f"{number:05}.json", json.dumps({} if number == BAD else metadata).encode())]


def image_sample(number: int) -> list[tuple[str, bytes]]:
    """No captions; the second image of one is damaged, every sixth has none."""
    second = b"damaged" if number == BAD else encoded(drawing(number + 100)[0])
    members = [(f"{number:05}.png", encoded(drawing(number)[0]))]
    return members + ([(f"{number:05}.second.png", second)] if number % 6 else [])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, make = tmp_path_factory.mktemp("sets"), {"text": text_sample, "image": image_sample}
    for side, members in make.items():
        for shard in range(3):
            numbers = range(shard * 12, shard * 12 + 12)
            write_tar(folder / side / f"{shard}.tar", [one for n in numbers for one in members(n)])
    return {side: folder / side for side in make}


def make(
    folder: Path, side: str, rank: int = 0, world: int = 1, image: Any = SPEC, sides: frozenset[str] | None = None,
    **settings: object,
) -> Stream:  # fmt: skip
    options = {"shuffle_window": 6, "lanes": 3, "max_bad_fraction": 0.1, "augment": AugmentConfig(brightness=0.2)}
    config = DataConfig.model_validate({"train": str(folder), **options, **settings})
    return Stream(
        open_training_set(config, {side}), 12 // world, seed=4, rank=rank, world_size=world, config=config,
        image=image if side == "image" else None, second=frozenset({side}), sides=sides or {side},
    )  # fmt: skip


def number_of(key: str) -> int:
    return int(key.rpartition("/")[2])


def seconds(batch: Batch) -> Batch:
    assert batch.second is not None
    return batch.second


def assert_equal(one: Batch, other: Batch) -> None:
    for a, b in ((one, other), (seconds(one), seconds(other))):
        assert (a.keys, a.text, a.bad) == (b.keys, b.text, b.bad)
        for name in ("image", "group", "caption"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


def test_texts_come_with_their_second_texts_and_no_images(sets: dict[str, Path]) -> None:
    for _ in range(3):
        batch = Batch.join(list(make(sets["text"], "text")))
        second = seconds(batch)
        assert batch.image is None
        assert second.image is None
        assert [problem.reason for problem in batch.bad] == ["no caption"]
        assert batch.group.tolist() == [group_id(f"item {number_of(key) // 2}") for key in batch.keys]
        assert second.caption is not None
        assert second.caption.tolist() == [caption_id(text) for text in second.text]
        for key, text, other in zip(batch.keys, batch.text, second.text, strict=True):
            number = number_of(key)
            if number % 6:
                assert (text, other) == (f"question {number}", f"passage {number}")
            elif number % 4:
                assert {text, other} == {f"question {number}", f"also {number}"}
            else:  # the other sample of the group
                assert (text, other) == (f"question {number}", f"question {number + 1}")


def test_images_come_with_their_second_images_and_no_texts(sets: dict[str, Path]) -> None:
    for image in (SPEC, None, Image.Image.tobytes):
        batch = Batch.join(list(make(sets["image"], "image", image=image, augment=AugmentConfig())))
        second = seconds(batch)
        assert batch.text is batch.caption is second.text is second.caption is None
        assert batch.group.tolist() == [NO_GROUP] * SAMPLES
        assert second.keys == batch.keys
        for row, number in enumerate(map(number_of, batch.keys)):
            for found, source in ((batch.image[row], number), (second.image[row], number + 100 * bool(number % 6))):
                data = encoded(drawing(source)[0])
                picture = Image.open(io.BytesIO(data)).convert("RGB")
                if image is SPEC:
                    assert torch.equal(found, SPEC.pixels(torch.from_numpy(np.array(picture)).permute(2, 0, 1)))
                elif source == BAD + 100:  # of a stream of bytes no image is decoded, so the damaged one is not found
                    assert (image, found) == (None, b"damaged")
                else:
                    assert found == (picture.tobytes() if image else data)
        assert [problem.key for problem in batch.bad] == ([f"{BAD:05}"] if image else [])


@pytest.mark.parametrize("side", ["text", "image"])
def test_ranks_and_resumes_do_not_matter(sets: dict[str, Path], side: str) -> None:
    expected = list(islice(make(sets[side], side).forever(), 6))
    for world in (2, 3):
        ranks = [islice(make(sets[side], side, rank, world).forever(), 6) for rank in range(world)]
        for batch, shares in zip(expected, zip(*ranks, strict=True), strict=True):
            assert_equal(Batch.join(shares), batch)
    first, resumed = make(sets[side], side), make(sets[side], side)
    for _ in zip(range(4), first.forever(), strict=False):
        pass
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    state = first.state_dict()
    for batch, other in zip(expected[4:], resumed.forever(), strict=False):
        assert_equal(batch, other)
    with pytest.raises(InputError, match="have changed since this state was saved"):
        make(sets[side], side, sides=BOTH).load_state_dict(state)


def test_a_bad_second_image_makes_the_sample_bad_and_is_counted_once_per_epoch(sets: dict[str, Path]) -> None:
    stream = make(sets["image"], "image")
    for _ in range(5):
        batch = Batch.join(list(stream))
        assert f"{BAD:05}" not in {key.rpartition("/")[2] for key in (*batch.keys, *seconds(batch).keys)}
        assert [(problem.key, problem.kind) for problem in batch.bad] == [(f"{BAD:05}", "no picture in a known format")]


def test_cached_images_give_the_same_batches(sets: dict[str, Path]) -> None:
    second = AugmentConfig(random_resized_crop=[0.3, 0.6])
    for augment in (AugmentConfig(brightness=0.2, second=second), AugmentConfig()):
        plain, cached = (make(sets["image"], "image", cache=cache, augment=augment) for cache in (False, True))
        for _, batch, other in zip(range(7), plain.forever(), cached.forever(), strict=False):
            assert_equal(batch, other)
        assert len(cached._dataset._decoded) == SAMPLES - 1


def test_second_members_do_not_depend_on_how_samples_were_counted(tmp_path: Path) -> None:
    """Samples of the first shard have second texts. Those of the others do not, and are looked for in all shards."""

    def metadata(shard: int, row: int) -> dict[str, str]:
        own = {"second_text": f"passage {row}"} if not shard else {"group": f"item {row}"}
        return {"captions": f"question {shard}-{row}", **own}

    for shard in range(3):
        members = [(f"{row}.json", json.dumps(metadata(shard, row)).encode()) for row in range(12)]
        write_tar(tmp_path / f"{shard}.tar", members)
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({f"{shard}.tar": 12 for shard in range(3)}))
    declared = [Batch.join(list(make(tmp_path, "text", lanes=1))) for _ in range(2)]
    sizes.unlink()  # all shards are indexed when they are opened
    for batch in declared:
        assert_equal(Batch.join(list(make(tmp_path, "text", lanes=1))), batch)
    assert any(text.startswith("question 1") for text in seconds(declared[0]).text)


def test_wrong_texts_of_samples_are_second_texts(tmp_path: Path) -> None:
    """A question is compared with the passages of the samples that it names, not with their questions."""

    def metadata(number: int) -> dict[str, object]:
        second = {} if number == 3 else {"second_text": f"passage {number}"}
        return {"captions": f"question {number}", "negatives": [f"{(number + 1) % 12}"], **second}

    write_tar(tmp_path / "a.tar", [(f"{n}.json", json.dumps(metadata(n)).encode()) for n in range(12)])
    batch = Batch.join(list(make(tmp_path, "text", lanes=1, negatives=1)))
    assert batch.negatives is not None
    for key, text in zip(batch.keys, batch.negatives.text, strict=True):
        wrong = (number_of(key) + 1) % 12
        assert text == (f"question {wrong}" if wrong == 3 else f"passage {wrong}")
