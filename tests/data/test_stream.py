import itertools
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sample_members, write_tar
from helpers.samples import SPEC
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmrl
from mmrl.data.batches import Batch
from mmrl.data.samples import FieldsConfig, SampleReader
from mmrl.data.sequential import read_sequential
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stream import Stream
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError, RunStopped
from mmrl.images.image_spec import ImageSpec

AUGMENT = AugmentConfig(
    random_resized_crop=[0.5, 1.0], rotate=20, zoom=[0.8, 1.2], shift=0.1, flip=0.5, brightness=0.2, grey=0.3
)


def tokens(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), sum(map(ord, text))] for text in texts])


def make(shards: Path, rank: int = 0, world: int = 1, workers: int = 0, batch: int = 12, window: int = 10) -> Stream:
    config = DataConfig(train=str(shards), augment=AUGMENT, shuffle_window=window)
    return Stream(
        open_reader(shards), batch // world, seed=4, rank=rank, world_size=world, num_workers=workers,
        image=SPEC, text=tokens, config=config,
    )  # fmt: skip


def joined(batches: list[Batch]) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of all ranks' batches in one batch."""
    keys = [key for batch in batches for key in batch.keys]
    image, text, group = (torch.cat([getattr(b, name) for b in batches]) for name in ("image", "text", "group"))
    return keys, image, text, group


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.text, other.text)
    assert torch.equal(one.group, other.group)


def test_an_epoch_of_the_public_stream_has_each_sample_at_most_once(shards: Path) -> None:
    stream = mmrl.stream(str(shards), batch_size=5, seed=1)
    first, second = ([key for batch in stream for key in batch.keys] for _ in range(2))
    assert len(set(first)) == len(first) == 45  # of 48 samples; 3 fill no batch
    assert first != second
    assert all(key.startswith("part-") for key in first)
    batch = next(iter(stream))
    assert isinstance(batch.image[0], bytes)
    assert isinstance(batch.text[0], str)


def test_the_samples_left_over_differ_each_epoch(shards: Path) -> None:
    stream = mmrl.stream(str(shards), batch_size=5)
    everything = {key for batch in mmrl.stream(str(shards), batch_size=1) for key in batch.keys}
    tails = [everything - {key for batch in stream for key in batch.keys} for _ in range(3)]
    assert len({frozenset(tail) for tail in tails}) == 3


def test_image_and_text_can_be_callables(shards: Path) -> None:
    stream = mmrl.stream(str(shards), 4, image=lambda image: image.size, text=lambda text: torch.tensor(len(text)))
    batch = next(iter(stream))
    assert batch.image == [(32, 32)] * 4
    assert batch.text.shape == (4,)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (3, 1), (4, 0)])
def test_batches_do_not_depend_on_world_size_and_workers(shards: Path, world: int, workers: int) -> None:
    expected = list(make(shards))
    ranks = [list(make(shards, rank, world, workers)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(expected)}
    for step, batch in enumerate(expected):
        keys, image, text, group = joined([batches[step] for batches in ranks])
        assert keys == batch.keys
        assert torch.equal(image, batch.image)
        assert torch.equal(text, batch.text)
        assert torch.equal(group, batch.group)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_a_resumed_stream_equals_an_uninterrupted_one(shards: Path, stop_after: int) -> None:
    whole = make(shards).forever()
    expected = [next(whole) for _ in range(9)]
    stopped = make(shards)
    batches = stopped.forever()
    for _ in range(stop_after):
        next(batches)
    state = stopped.state_dict()
    resumed = make(shards, workers=1)
    resumed.load_state_dict(state)
    rest = resumed.forever()
    for batch in expected[stop_after:]:
        assert_equal(next(rest), batch)


def test_a_state_from_before_there_were_lanes_continues_with_one(shards: Path) -> None:
    config = DataConfig(train=str(shards), shuffle_window=10, lanes=1)
    older = Stream(open_reader(shards), 12, seed=4, config=config)
    next(iter(older))
    state = {name: value for name, value in older.state_dict().items() if name != "lanes"}
    today = Stream(open_reader(shards), 12, seed=4, config=config.model_copy(update={"lanes": 64}))
    with pytest.raises(InputError, match="lanes was 1 when this state was saved and is 4 now"):
        today.load_state_dict(older.state_dict())
    today.load_state_dict(state)
    assert [batch.keys for batch in today] == [batch.keys for batch in older]
    assert today.state_dict()["lanes"] == 1


@pytest.mark.parametrize("crop", [None, [0.5, 1.0]])
def test_cached_images_give_the_same_batches(crop: list[float] | None, shards: Path) -> None:
    augment = AUGMENT.model_copy(update={"random_resized_crop": crop})
    spec = ImageSpec(height=16, width=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    cached, plain = (
        Stream(open_reader(shards), 12, image=spec, text=tokens, config=DataConfig(augment=augment, cache=cache))
        for cache in (True, False)
    )
    for one, other in itertools.islice(zip(cached.forever(), plain.forever(), strict=True), 12):
        assert_equal(one, other)
    images = [one.image_CHW for one in cached._dataset._decoded.values()]
    sizes = {tuple(image_CHW.shape) for image_CHW in images if image_CHW is not None}
    assert sizes == {(3, 32, 32) if crop else (3, 16, 16)}


def test_an_epoch_resumed_with_another_world_size_has_each_sample_once(shards: Path) -> None:
    stream = make(shards, rank=0, world=2)
    seen = [next(iter(stream)).keys for _ in range(1)]
    other = next(iter(make(shards, rank=1, world=2))).keys
    seen.append(other)
    for rank in range(3):
        resumed = make(shards, rank, 3)
        resumed.load_state_dict(stream.state_dict())
        seen += [batch.keys for batch in resumed]
    assert max(Counter(key for keys in seen for key in keys).values()) == 1
    assert sum(map(len, seen)) == 48


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    world=st.integers(1, 5),
    other_world=st.integers(1, 5),
    rows=st.integers(1, 4),
    stop_after=st.integers(0, 40),
    window=st.integers(1, 50),
    repeat=st.sampled_from([1.0, 0.5, 2.0]),
)
def test_any_resume_with_any_world_size_gives_the_same_batches(
    counts: list[int],
    world: int,
    other_world: int,
    rows: int,
    stop_after: int,
    window: int,
    repeat: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = small_shards(tmp_path_factory, counts)
    data = DataConfig.model_validate({"sources": [{"shards": str(folder), "repeat": repeat}], "shuffle_window": window})
    batch = world * other_world * rows

    def streams(world: int) -> list[Stream]:
        reader = open_training_set(data)
        return [Stream(reader, batch // world, seed=7, rank=r, world_size=world, config=data) for r in range(world)]

    if sum(share.per_epoch for share in open_training_set(data).shares) < batch:
        with pytest.raises(InputError, match="fewer than one global batch"):
            streams(world)
        return
    uninterrupted = streams(1)[0]
    steps = 2 * uninterrupted.batches_per_epoch
    whole = uninterrupted.forever()
    expected = [next(whole).keys for _ in range(steps)]
    stop_after = min(stop_after, steps - 1)
    first = streams(world)
    running = [one.forever() for one in first]
    got = [[key for rank in running for key in next(rank).keys] for _ in range(stop_after)]
    states = [json.loads(json.dumps(one.state_dict())) for one in first]
    assert all(state == states[0] for state in states)
    second = streams(other_world)
    for one in second:
        one.load_state_dict(states[0])
    running = [one.forever() for one in second]
    got += [[key for rank in running for key in next(rank).keys] for _ in range(steps - stop_after)]
    assert got == expected
    for epoch in range(2):
        batches = expected[epoch * steps // 2 : (epoch + 1) * steps // 2]
        times = Counter(key for keys in batches for key in keys)
        assert max(times.values()) <= max(1, repeat)
        assert sum(times.values()) == uninterrupted.batches_per_epoch * batch


def small_shards(factory: pytest.TempPathFactory, counts: list[int]) -> Path:
    folder, first = factory.mktemp("small"), 0
    for shard, count in enumerate(counts):
        members = [(f"{n}.{kind}", b"x") for n in range(first, first + count) for kind in ("jpg", "txt")]
        write_tar(folder / f"{shard:03}.tar", members)
        first += count
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
def test_one_shard_is_split_over_many_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = small_shards(tmp_path_factory, [50])
    seen = [key for rank in range(4) for batch in mmrl.stream(folder, 3, rank=rank, world_size=4, num_workers=6)
            for key in batch.keys]  # fmt: skip
    assert len(seen) == len(set(seen)) == 48


def test_a_state_of_other_shards_is_rejected(shards: Path, tmp_path: Path) -> None:
    state = make(shards).state_dict()
    for number, name in ((0, "part-2.tar"), (1, "part-0.tar"), (2, "part-1.tar")):
        (tmp_path / f"part-{number}.tar").write_bytes((shards / name).read_bytes())
    with pytest.raises(
        InputError, match="the shards, or the settings for shuffling, captions or augmentation, have changed"
    ):
        make(tmp_path).load_state_dict(state)
    assert len(json.dumps(state)) < 200


def test_a_state_of_another_batch_size_or_seed_is_rejected(shards: Path) -> None:
    state = make(shards, batch=12).state_dict()
    with pytest.raises(InputError, match=r"global_batch_size was 12 .* and is 6 now"):
        make(shards, batch=6).load_state_dict(state)
    with pytest.raises(InputError, match=r"seed was 5 when this state was saved and is 4 now"):
        make(shards).load_state_dict({**state, "seed": 5})
    with pytest.raises(InputError, match="the settings for shuffling"):
        make(shards, window=11).load_state_dict(state)


def test_augmentation_differs_per_epoch_and_does_not_depend_on_the_order(shards: Path) -> None:
    stream = make(shards)
    images = [
        {key: image for batch in stream for key, image in zip(batch.keys, batch.image, strict=True)} for _ in range(2)
    ]
    both = images[0].keys() & images[1].keys()
    assert both
    assert all(not torch.equal(images[0][key], images[1][key]) for key in both)
    reordered = {
        key: image for batch in make(shards, window=3) for key, image in zip(batch.keys, batch.image, strict=True)
    }
    assert all(torch.equal(reordered[key], images[0][key]) for key in reordered.keys() & images[0].keys())


def test_without_augmentation_training_and_evaluation_have_the_same_pixels(shards: Path) -> None:
    reader = open_reader(shards)
    plain = Stream(reader, 12, image=SPEC, text=tokens)
    trained = {key: x for batch in plain for key, x in zip(batch.keys, batch.image, strict=True)}
    batches = read_sequential(reader, SPEC, tokens)
    whole = {key: x for batch in batches for key, x in zip(batch.keys, batch.image_BCHW, strict=True)}
    assert trained.keys() == whole.keys()
    assert all(torch.equal(trained[key], whole[key]) for key in whole)


def test_read_sequential_on_several_ranks_reads_each_sample_once(shards: Path) -> None:
    reader = open_reader(shards)
    ranks = [list(read_sequential(reader, SPEC, tokens, batch_size=7, rank=r, world_size=5)) for r in range(5)]
    keys = [key for batches in ranks for batch in batches for key in batch.keys]
    assert keys == [key for batch in read_sequential(reader, SPEC, tokens) for key in batch.keys]
    batch = next(read_sequential(reader, SPEC, tokens))
    assert batch.row_of_text_M.tolist() == [row for row in range(48) for _ in range(2)]
    assert batch.captions[:2] == ["a red square number 0", "a red square number 0, again"]
    first = next(read_sequential(reader, SPEC, tokens, captions=1))
    assert len(first.captions) == len(first.keys)


def test_read_sequential_reads_the_same_in_workers(shards: Path) -> None:
    reader = open_reader(str(shards))
    here, there = (list(read_sequential(reader, SPEC, tokens, batch_size=20, workers=n)) for n in (0, 2))
    for one, other in zip(here, there, strict=True):
        for name, value in vars(one).items():
            found = getattr(other, name)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_a_killed_worker_of_read_sequential_is_one_sentence(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = os.getpid()

    def read_image(self: SampleReader, index: int) -> Any:
        if index == 30 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    real = SampleReader.read_image
    monkeypatch.setattr(SampleReader, "read_image", read_image)
    with pytest.raises(RunStopped, match="a worker that decodes images was killed"):
        list(read_sequential(open_reader(str(shards)), SPEC, tokens, batch_size=20, workers=1))


def test_read_sequential_continues_after_a_batch_of_bad_samples(tmp_path: Path) -> None:
    members = [m for number in range(4) for m in sample_members(number)]
    members += [("bad.png", b"x"), ("bad.txt", b"caption"), ("deep.png", b"x"), ("deep.json", b"[" * 100_000)]
    reader = open_reader(write_tar(tmp_path / "a.tar", members))
    batches = list(read_sequential(reader, SPEC, tokens, batch_size=2))
    assert [len(batch.keys) for batch in batches] == [2, 2, 0]
    assert {problem.key for batch in batches for problem in batch.bad} == {"bad", "deep"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"image": ["tiff"]}, r"fields.image: no sample .* has .tiff; the members there are .json, .png, .txt"),
        ({"text": "text"}, r"fields.text: no sample .* has .text. Did you mean 'txt'"),
        ({"captions": "caption"}, r"fields.captions: none of 48 samples .* 'caption' .* Did you mean 'captions'"),
        ({"group": "sku"}, r"fields.group: none of 48 samples .* has 'sku'"),
        ({"metadata": "jsonl"}, r"fields.metadata: no sample .* has .jsonl. Did you mean 'json'"),
    ],
)
def test_fields_that_no_sample_has_are_named_before_training(shards: Path, fields: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_reader(shards, FieldsConfig(**fields))


def test_fewer_samples_than_one_batch_are_an_error(shards: Path) -> None:
    with pytest.raises(InputError, match="hold 48 samples, fewer than one global batch of 64"):
        mmrl.stream(str(shards), batch_size=32, world_size=2)
