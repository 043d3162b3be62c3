"""Second members of pairs, against the members found by brute force over the samples that the test has written."""

import io
import itertools
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawing, encoded, write_tar
from helpers.samples import SPEC
from PIL import Image

from mmrl.data import second as second_module
from mmrl.data.batches import Batch
from mmrl.data.captions import caption_id
from mmrl.data.groups import NO_GROUP, group_id, parse_groups
from mmrl.data.index import index_shard
from mmrl.data.order import EpochOrder
from mmrl.data.sources import DataConfig, SourceConfig, open_training_set
from mmrl.data.stream import Stream, _config_fingerprint
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError

BOTH = frozenset({"image", "text"})
# Of the samples 0 … 35, in three shards of 12: some are alone, some have others of their group in their shard, some in
# other shards only, some both; None is no group.
GROUPS: list[str | None] = [
    *("a", "a", "a", "b", "b", "c", "d", None, None, "e", "f", "g"),
    *("a", "c", "d", "d", "h", "i", "i", "j", None, "e", "k", "l"),
    *("a", "c", "m", "m", "n", "f", "h", "e", None, "e", "o", "p"),
]


def captions(number: int) -> list[str]:
    """One, two or three captions; those of every seventh sample are equal."""
    own = [f"caption {number}", f"other {number}", f"third {number}"][: 1 + number % 3]
    return [f"Same {number}", f"same  {number}"] if number % 7 == 0 else own


def write_set(folder: Path, groups: Sequence[str | None] = GROUPS, bad: tuple[int, ...] = (), shards: int = 3) -> Path:
    size = len(groups) // shards
    for shard in range(shards):
        members = []
        for number in range(shard * size, shard * size + size):
            metadata = {"captions": captions(number), **({"group": groups[number]} if groups[number] else {})}
            image = b"damaged" if number in bad else encoded(drawing(number)[0])
            members += [(f"{number:05}.png", image), (f"{number:05}.json", json.dumps(metadata).encode())]
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


def make(
    folder: Path, rank: int = 0, world: int = 1, workers: int = 0, second: frozenset[str] = BOTH,
    micro_batch: int | None = None, **settings: object,
) -> Stream:  # fmt: skip
    options = {"shuffle_window": 6, "lanes": 3, "augment": AugmentConfig(rotate=20, brightness=0.2)}
    config = DataConfig.model_validate({"train": str(folder), **options, **settings})
    return Stream(
        open_training_set(config), 12 // world, seed=4, rank=rank, world_size=world, num_workers=workers,
        image=SPEC, config=config, second=second, micro_batch=micro_batch,
    )  # fmt: skip


def numbers(keys: list[str]) -> list[int]:
    return [int(key.rpartition("/")[2]) for key in keys]


def assert_equal(one: Batch | None, other: Batch | None) -> None:
    assert one is not None
    assert other is not None
    assert (one.keys, one.text) == (other.keys, other.text)
    for name in ("image", "group", "caption"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def epochs(stream: Stream, count: int) -> list[Batch]:
    """One batch per epoch, of all its rows."""
    return [Batch.join(list(stream)) for _ in range(count)]


def lanes(stream: Stream, epoch: int) -> list[set[int]]:
    """The samples of each of the three lanes in an epoch."""
    order = EpochOrder(stream._reader.shares, 4, epoch, 6, 12, 3)
    index = order.indices(np.arange(36)).tolist()
    return [{index[p] for p in range(36) if p % 12 // 4 == lane} for lane in range(3)]


def allowed(in_lane: set[int], number: int) -> set[int]:
    """The samples that may be the second member of this one."""
    same = {n for n, group in enumerate(GROUPS) if group is not None and group == GROUPS[number] and n != number}
    return {n for n in same if n // 12 == number // 12} or same & in_lane or {number}


@pytest.mark.parametrize("wanted", [BOTH, frozenset({"image"}), frozenset({"text"})])
def test_second_members_are_those_that_a_search_finds_and_all_of_them(tmp_path: Path, wanted: frozenset[str]) -> None:
    stream = make(write_set(tmp_path), second=wanted, augment=AugmentConfig(), cache=True)
    assert stream._dataset.lanes == 3
    seen: dict[tuple[int, tuple[int, ...]], Counter[int]] = {}
    for epoch, batch in enumerate(epochs(stream, 40 if wanted == BOTH else 10)):
        in_lane = lanes(stream, epoch)
        assert batch.second is not None
        assert batch.second.second is None
        assert torch.equal(batch.second.group, batch.group)
        assert (batch.second.image is not None) == ("image" in wanted)
        assert (batch.second.text is not None) == ("text" in wanted)
        assert batch.caption is not None
        assert batch.second.caption is not None
        first_B, second_B = batch.caption.tolist(), batch.second.caption.tolist()
        for row, (number, other) in enumerate(zip(numbers(batch.keys), numbers(batch.second.keys), strict=True)):
            name = GROUPS[number]
            assert batch.group[row] == (NO_GROUP if name is None else group_id(name))
            members = allowed(in_lane[row % 12 // 4], number)
            if "image" in wanted:
                assert other in members
                seen.setdefault((number, tuple(sorted(members))), Counter())[other] += 1
                assert torch.equal(batch.second.image[row], SPEC.pixels(pixels(other)))
            if "text" not in wanted:
                assert second_B[row] == first_B[row]
                continue
            first, text = batch.text[row], batch.second.text[row]
            assert second_B[row] == caption_id(text)
            own = {one for one in captions(number) if caption_id(one) != caption_id(first)}
            if own or members == {number}:
                assert text in (own or {first})
            else:
                assert text in {one for n in members for one in captions(n)}
                assert wanted == {"text"} or text in captions(other)
                assert other in members
    if wanted == BOTH:  # each of them is drawn, about equally often
        for (_, members), drawn in seen.items():
            if drawn.total() > 20:
                assert all(drawn[one] > 0.4 * drawn.total() / len(members) for one in members)


def pixels(number: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(encoded(drawing(number)[0]))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_ranks_workers_units_and_caches_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, bad=(1, 13))
    expected = list(itertools.islice(make(tmp_path).forever(), 6))
    for world, workers in ((2, 0), (3, 0), (1, 2)):
        ranks = [list(itertools.islice(make(tmp_path, rank, world, workers).forever(), 6)) for rank in range(world)]
        for step, batch in enumerate(expected):
            joined = Batch.join([one[step] for one in ranks])
            assert_equal(joined, batch)
            assert_equal(joined.second, batch.second)
    monkeypatch.setattr("mmrl.data.workers.UNIT_ROWS", 5)
    for cache, micro_batch in ((True, None), (False, 4)):
        batches = make(tmp_path, cache=cache, micro_batch=micro_batch).forever()
        for batch in expected[:4]:
            joined = Batch.join([next(batches) for _ in range(12 // (micro_batch or 12))])
            assert_equal(joined.second, batch.second)
    resumed = make(tmp_path)
    first = make(tmp_path)
    running = first.forever()
    for _ in range(4):
        next(running)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch, other in zip(resumed.forever(), expected[4:], strict=False):
        assert_equal(batch, other)
        assert_equal(batch.second, other.second)


def test_a_damaged_second_image_is_replaced_by_the_next_one_and_counted_once(tmp_path: Path) -> None:
    groups = ["a"] * 4 + ["b", "b"] + ["c"] * 6
    stream = make(write_set(tmp_path, groups, bad=(0, 1, 4, 6), shards=1), lanes=1, max_bad_fraction=1.0)
    for batch in epochs(stream, 20):
        assert batch.second is not None
        seen = list(zip(numbers(batch.keys), numbers(batch.second.keys), strict=True))
        assert {other for _, other in seen}.isdisjoint({0, 1, 4, 6})
        assert all(other == (number if number == 5 else other) for number, other in seen)
        assert all(other != number for number, other in seen if number != 5)
        counted = Counter(problem.key for problem in batch.bad)
        assert counted == {f"{n:05}": 1 for n in (0, 1, 4, 6)}
        assert not batch.second.bad


def test_two_images_of_one_sample_differ_and_have_settings_of_their_own(tmp_path: Path) -> None:
    write_set(tmp_path, [None] * 12, shards=1)
    (batch,) = epochs(make(tmp_path, augment=AugmentConfig(brightness=0.3)), 1)
    assert batch.second is not None
    assert batch.second.keys == batch.keys
    assert all(not torch.equal(one, other) for one, other in zip(batch.image, batch.second.image, strict=True))
    for augment in (
        AugmentConfig(second=AugmentConfig(random_resized_crop=[0.3, 0.5])),
        AugmentConfig(random_resized_crop=[0.3, 0.5], second=AugmentConfig()),
    ):
        plain, cropped = ("image", "second") if augment.random_resized_crop is None else ("second", "image")
        of_cache = [next(iter(make(tmp_path, augment=augment, cache=cache))) for cache in (False, True)]
        for batch in of_cache:
            images = {"image": batch.image, "second": batch.second.image if batch.second else None}
            for number, image, other in zip(numbers(batch.keys), images[plain], images[cropped], strict=True):
                assert torch.equal(image, SPEC.pixels(pixels(number)))
                assert not torch.equal(image, other)
        assert_equal(of_cache[0].second, of_cache[1].second)


def test_without_an_image_spec_second_images_are_bytes_or_what_a_callable_makes(tmp_path: Path) -> None:
    reader = open_training_set(config := DataConfig(train=str(write_set(tmp_path))))
    for image in (None, lambda image: np.asarray(image).tobytes()):
        batch = next(iter(Stream(reader, 12, image=image, config=config, second=frozenset({"image"}))))
        assert batch.second is not None
        for number, other in zip(numbers(batch.second.keys), batch.second.image, strict=True):
            expected = encoded(drawing(number)[0])
            assert other == (expected if image is None else image(Image.open(io.BytesIO(expected))))


def test_text_alone_reads_no_second_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make(write_set(tmp_path, bad=(2,)), second=frozenset({"text"}), max_bad_fraction=1.0)
    load, decoded = stream._reader.read_image, list[int]()
    monkeypatch.setattr(stream._reader, "read_image", lambda index, *rest: decoded.append(index) or load(index, *rest))
    batches = list(stream)
    assert len(decoded) <= 37
    assert any(one.keys != one.second.keys for one in batches if one.second)


def test_copies_of_a_repeated_source_have_second_members_of_their_own(tmp_path: Path) -> None:
    write_set(tmp_path, ["a"] * 5 + [None])
    source = SourceConfig(shards=str(tmp_path), repeat=3)
    config = DataConfig(sources=[source], shuffle_window=3)
    reader = open_training_set(config)
    seen: dict[int, set[int]] = {}
    for batch in Stream(reader, 9, image=SPEC, config=config, second=frozenset({"image"})):
        assert batch.second is not None
        for number, other in zip(numbers(batch.keys), numbers(batch.second.keys), strict=True):
            assert (number == other) == (number == 5)
            seen.setdefault(number, set()).add(other)
    assert any(len(others) > 1 for others in seen.values())


def test_second_members_change_the_state_and_nothing_else(tmp_path: Path) -> None:
    write_set(tmp_path)
    plain, second = make(tmp_path, second=frozenset()), make(tmp_path)
    for one, other in zip(plain, second, strict=True):
        assert one.second is None
        assert_equal(one, other)
    for wanted in (frozenset[str](), frozenset({"text"})):
        with pytest.raises(InputError, match="have changed since this state was saved"):
            make(tmp_path, second=wanted).load_state_dict(second.state_dict())
    ignored = AugmentConfig(rotate=20, brightness=0.2, second=AugmentConfig(jpeg=[10, 90]))
    make(tmp_path, second=frozenset(), augment=ignored).load_state_dict(plain.state_dict())
    assert _config_fingerprint(DataConfig(), 5) == "c294f78695fc", "older states must stay valid"


def test_a_large_set_has_second_members_of_the_same_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make(write_set(tmp_path))
    assert small._reader.notes[-1] == (
        "Second members of pairs: 36.1% of the samples have another one of their group in their shard, 33.3% in other "
        "shards only (used if it is in the same lane), and 30.6% have none, and are their own second member."
    )
    monkeypatch.setattr(second_module, "_MOST_IN_TABLE", 35)
    stream = make(tmp_path)
    assert "36 samples, more than 35, so they are looked for in a sample's own shard alone" in stream._reader.notes[-1]
    for batch in stream:
        assert batch.second is not None
        for number, other in zip(numbers(batch.keys), numbers(batch.second.keys), strict=True):
            same = {n for n, group in enumerate(GROUPS) if group is not None and group == GROUPS[number]} - {number}
            assert other in ({n for n in same if n // 12 == number // 12} or {number})


def test_groups_are_read_once_and_again_when_the_shard_or_the_fields_change(tmp_path: Path) -> None:
    folder, cache = write_set(tmp_path / "set", ["a", "b", None, "a"], shards=1), tmp_path / "cache"

    def groups(**fields: str) -> list[int]:
        settings = {"train": str(folder), "fields": fields, "remote": {"folder": str(cache)}}
        return open_training_set(DataConfig.model_validate(settings)).all_groups()[0].tolist()

    expected = [group_id("a"), group_id("b"), NO_GROUP, group_id("a")]
    assert groups() == expected
    (stored,) = cache.glob("index/*.groups")
    sound = stored.read_bytes()
    for damage in (sound[:40], sound.replace(np.int64(expected[0]).tobytes(), np.int64(7).tobytes()), b""):
        stored.write_bytes(damage)
        assert groups() == expected
        assert stored.read_bytes() == sound
    assert groups(group="captions")[0] == group_id(str(captions(0)))
    assert groups() == expected
    write_set(folder, ["b", "b", None, "a"], shards=1)
    assert groups() == [group_id("b"), *expected[1:]]


def test_the_groups_of_a_shard_take_about_a_second(tmp_path: Path) -> None:
    members = (
        (f"{n}.json", json.dumps({"group": f"g{n % 3000}", "captions": ["x"] * 5}).encode()) for n in range(10_000)
    )
    path = write_tar(tmp_path / "a.tar", members)
    index = index_shard(path)
    with path.open("rb") as file:
        data = file.read()
    began = time.process_time()
    groups = parse_groups(DataConfig().fields, index, lambda offset, size: data[offset : offset + size])
    assert time.process_time() - began < 1.0
    assert len(set(groups.tolist())) == 3000
