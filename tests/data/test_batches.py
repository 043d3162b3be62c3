"""Loading of batches: captions, groups and decoding, and the replacement of bad samples."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawing, encoded, sample_members, write_tar
from helpers.samples import SPEC, bad_members
from PIL import Image

import mmrl
from mmrl.data.batches import Batch, pick_caption
from mmrl.data.captions import caption_id
from mmrl.data.samples import group_id
from mmrl.data.sources import DataConfig, open_reader
from mmrl.data.stream import Stream
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError


def test_scaled_decode_changes_pixels_only_slightly(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data)
        for n in range(4)
        for kind, data in (("jpg", encoded(drawing(n)[0].resize((640, 480), Image.Resampling.BICUBIC), "JPEG")),
                           ("txt", b"a caption"))
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    for crop in (None, [0.8, 1.0]):
        batches = [
            next(iter(Stream(open_reader(path), 4, image=SPEC, config=DataConfig(
                scaled_decode=scaled, augment=AugmentConfig(random_resized_crop=crop)))))
            for scaled in (False, True)
        ]  # fmt: skip
        assert batches[0].keys == batches[1].keys
        difference = batches[0].image.float() - batches[1].image.float()
        assert difference.abs().max() > 0
        assert 10 * torch.log10(255**2 / difference.square().mean()) > 40


def test_a_batch_in_units_equals_one_that_is_loaded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bad samples, whose replacements have random numbers of their own."""
    path = write_tar(tmp_path / "some-bad.tar", bad_members())
    augment = AugmentConfig(
        random_resized_crop=[0.5, 1.0], rotate=20, brightness=0.2, downscale=[8, 30], blur=[0.01, 0.1], jpeg=[5, 60]
    )
    config = DataConfig(train=str(path), max_bad_fraction=1.0, augment=augment)

    def load(**options: int) -> list[Batch]:
        stream = Stream(open_reader(path), 12, image=SPEC, config=config, **options)  # pyright: ignore[reportArgumentType]
        batches = stream.forever()
        loaded = [next(batches) for _ in range(7)]
        return loaded if not options.get("micro_batch") else [Batch.join(loaded[i : i + 2]) for i in range(0, 6, 2)]

    whole = load()
    monkeypatch.setattr("mmrl.data.workers.UNIT_ROWS", 5)
    monkeypatch.setattr("mmrl.data.transforms._ROWS", 3)
    for batches in (load(), load(micro_batch=6), load(num_workers=2)):
        for one, other in zip(batches, whole, strict=False):
            assert one.keys == other.keys
            assert one.text == other.text
            assert one.bad == other.bad
            assert all(torch.equal(getattr(one, x), getattr(other, x)) for x in ("image", "groups"))


def test_units_in_page_locked_memory_are_joined_without_a_copy_of_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU, which a CPU can only pretend."""
    monkeypatch.setattr("mmrl.data.batches._is_pinned", lambda x: isinstance(x, torch.Tensor))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    units = [
        Batch(keys=[str(n)] * n, image=torch.rand(n, 3, 2, 2), text=torch.full((n, 4), n), group=torch.arange(n))
        for n in (2, 3)
    ]
    batch = Batch.join(units)
    assert all(one is unit.image for one, unit in zip(batch.image, units, strict=True))
    assert batch.keys == ["2", "2", "3", "3", "3"]
    assert batch.text[:, 0].tolist() == [2, 2, 3, 3, 3]
    assert batch.group.tolist() == [0, 1, 0, 1, 2]
    assert Batch.join(units[:1]) is units[0]


def test_a_worker_holds_one_image_of_the_files_size(tmp_path: Path) -> None:
    image = encoded(drawing(1)[0].resize((640, 480)), "JPEG")
    members = [(f"{n}.{kind}", data) for n in range(32) for kind, data in (("jpg", image), ("txt", b"a caption"))]
    reader = open_reader(write_tar(tmp_path / "a.tar", members))
    for spec in (SPEC, lambda image: image.size):
        next(iter(Stream(reader, 32, image=spec)))
        tracemalloc.start()
        next(iter(Stream(reader, 32, image=spec)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * 3 * 640 * 480


def test_groups_are_stable_hashes_and_minus_one_if_absent(tmp_path: Path) -> None:
    members = [*sample_members(0), *sample_members(12), *sample_members(1), *sample_members(2)[:2]]
    batch = next(iter(mmrl.stream(write_tar(tmp_path / "a.tar", members), 4)))
    group = dict(zip([key.rpartition("/")[2] for key in batch.keys], batch.group.tolist(), strict=True))
    assert group["00000"] == group["00012"] == group_id("red square") == 2006242075667802697
    assert group["00001"] != group["00000"]
    assert group["00002"] == -1


EQUAL = ["A dog &amp; a cat", "a dog  & a\tCAT ", "Ａ dog ＆ a cat"]
OTHER = ["a dog and a cat", "a dog & a cat.", "a cat & a dog", "ÀB", "ab"]


def test_equal_captions_have_one_id_and_others_have_not() -> None:
    assert len({caption_id(text) for text in EQUAL}) == 1
    assert len({caption_id(text) for text in [EQUAL[0], *OTHER]}) == 1 + len(OTHER)
    assert caption_id("Cafe\u0301") == caption_id("CAFÉ") >= 0


def test_batches_have_the_id_of_the_drawn_caption(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data)
        for n in range(4)
        for kind, data in (
            ("png", encoded(drawing(n)[0])),
            ("json", json.dumps({"captions": [f"{n}", "Same"]}).encode()),
        )
    ]
    path = write_tar(tmp_path / "a.tar", members)
    stream, drawn = mmrl.stream(path, 4), Counter[str]()
    for _ in range(4):
        for batch in stream:
            assert batch.caption is not None
            assert batch.caption.tolist() == [caption_id(text) for text in batch.text]
            assert torch.equal(batch.groups, torch.stack([batch.group, batch.caption], 1))
            drawn.update(batch.text)
    assert drawn["Same"] > 1, "several samples drew it"
    off = DataConfig(train=str(path), mask_equal_captions=False)
    batch = next(iter(mmrl.stream(off, 4)))
    assert batch.caption is None
    assert torch.equal(batch.groups, batch.group[:, None])
    resumed = mmrl.stream(off, 4)
    resumed.load_state_dict(mmrl.stream(path, 4).state_dict())  # batches do not depend on it


def test_bad_samples_are_replaced_alike_at_any_world_size_and_listed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "some-bad.tar", bad_members())
    config = DataConfig(train=str(path), max_bad_fraction=1.0)

    def run(rank: int, world: int) -> list[Batch]:
        return list(Stream(open_reader(path), 12 // world, rank=rank, world_size=world, image=SPEC, config=config))

    single = run(0, 1)
    assert [len(batch.keys) for batch in single] == [12, 12, 12]
    listed = {problem.key: problem.reason for batch in single for problem in batch.bad}
    for step, batch in enumerate(single):
        ranks = [run(rank, 2)[step] for rank in range(2)]
        assert [key for one in ranks for key in one.keys] == batch.keys
        assert len(set(batch.keys)) == 12
    epochs = Stream(open_reader(path), 12, image=SPEC, config=config).forever()
    for _ in range(12):
        listed |= {problem.key: problem.reason for problem in next(epochs).bad}
    assert listed.keys() == {"corrupt", "halved", "noimage", "silent", "latin", "badjson"}
    assert "no image: none of .jpg, .jpeg, .png, .webp" in listed["noimage"]
    assert "caption" in listed["silent"]


def test_the_samples_of_a_missing_or_changed_shard_are_skipped_and_listed(shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stream = Stream(open_reader(tmp_path), 12, seed=4, image=SPEC)
    stream._dataset._reader._reset_caches()  # as in a new worker
    (tmp_path / "part-2.tar").unlink()
    changed = (tmp_path / "part-1.tar").read_bytes()
    (tmp_path / "part-1.tar").write_bytes(changed[:512].replace(b"00020", b"00099") + changed[512:])
    problems = [problem for batch in stream for problem in batch.bad]
    assert len({problem.key for problem in problems}) == 17 + 11
    assert {problem.kind for problem in problems} == {"shard out of reach"}


@pytest.mark.parametrize("seed", range(12))
def test_bit_flips_in_shards_cost_samples_but_not_the_epoch(shards: Path, tmp_path: Path, seed: int) -> None:
    """Lost samples are listed, and all others are read."""
    rng = np.random.default_rng(seed)
    keys = {key.rpartition("/")[2] for batch in mmrl.stream(str(shards), 1) for key in batch.keys}
    for path in shards.glob("*.tar"):
        data = bytearray(path.read_bytes())
        for offset in rng.integers(0, len(data), 4):
            data[offset] ^= 1 << rng.integers(8)
        (tmp_path / path.name).write_bytes(data)
    try:
        reader = open_reader(tmp_path)
    except InputError:  # the first header of a shard is hit
        return
    seen: set[str] = set()
    listed = {problem.key for problem in reader.problems}
    stream = Stream(reader, 4, image=SPEC, config=DataConfig(max_bad_fraction=1.0))
    for _ in range(2):
        for batch in stream:
            seen |= {key.rpartition("/")[2] for key in batch.keys}
            listed |= {problem.key for problem in batch.bad}
    assert seen
    assert not keys - seen or listed


@pytest.mark.parametrize(("good", "bad", "batch"), [(12, 6, 9), (20, 3, 12)])
def test_every_bad_sample_of_a_small_set_is_replaced(tmp_path: Path, good: int, bad: int, batch: int) -> None:
    members = [m for number in range(good) for m in sample_members(number)]
    members += [m for n in range(bad) for m in ((f"bad{n}.png", b"x"), (f"bad{n}.txt", b"caption"))]
    stream = Stream(open_reader(write_tar(tmp_path / "a.tar", members)), batch, image=SPEC)
    for _ in range(4):
        assert all(len(one.keys) == batch for one in stream)


def test_an_input_error_in_a_worker_comes_without_a_traceback(tmp_path: Path) -> None:
    members = [m for n in range(12) for m in ((f"{n}.png", b"no picture"), (f"{n}.txt", b"caption"))]
    stream = Stream(open_reader(write_tar(tmp_path / "bad.tar", members)), 4, image=SPEC, num_workers=1)
    with pytest.raises(InputError, match=r"^data: .* samples in a row are bad") as error:
        next(iter(stream))
    assert "Traceback" not in str(error.value)


def test_a_set_of_only_bad_images_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrl.data.batches._MAX_REPLACEMENTS", 60)
    members = [m for n in range(12) for m in ((f"{n}.png", b"no picture"), (f"{n}.txt", b"caption"))]
    stream = Stream(open_reader(write_tar(tmp_path / "bad.tar", members)), 4, image=SPEC)
    with pytest.raises(InputError, match="samples in a row are bad"):
        next(iter(stream))


def test_captions_follow_their_probabilities() -> None:
    points = np.linspace(0, 1, 10_000, endpoint=False)
    uniform = Counter(pick_caption(4, None, x) for x in points)
    assert set(uniform.values()) == {2500}
    mixed = Counter(pick_caption(4, [0.5, 0.3, 0.2], x) for x in points)
    assert [round(mixed[i] / 10_000, 2) for i in range(4)] == [0.5, 0.3, 0.1, 0.1]
    assert Counter(pick_caption(1, [0.5, 0.5], x) for x in points) == {0: 10_000}
    assert Counter(pick_caption(1, [0.0, 1.0], x) for x in points) == {0: 10_000}


def test_member_names_cannot_write_files_or_run_code(tmp_path: Path) -> None:
    image = encoded(Image.new("RGB", (32, 32)))
    members = [("../../evil.png", image), ("../../evil.txt", b"a"), ("/etc/x.png", image), ("/etc/x.txt", b"b")]
    members += [("code.png", image), ("code.txt", b"c"), ("code.pyd", b"cos\nsystem\n(S'false'\ntR.")]
    batch = next(iter(mmrl.stream(write_tar(tmp_path / "names.tar", members), 3)))
    assert sorted(batch.text) == ["a", "b", "c"]
    assert not (tmp_path.parent.parent / "evil.png").exists()
