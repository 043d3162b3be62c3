import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawing, encoded, sample_members, write_tar
from helpers.samples import SPEC, bad_members
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import mmrl
from mmrl.data.samples import FieldsConfig, group_number
from mmrl.data.sequential import read_whole
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stream import Batch, Stream, pick_caption
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError

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
    """The rows of several ranks' batches as one."""
    keys = [key for batch in batches for key in batch.keys]
    image, text, group = (torch.cat([getattr(b, name) for b in batches]) for name in ("image", "text", "group"))
    return keys, image, text, group


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys
    assert torch.equal(one.image, other.image)
    assert torch.equal(one.text, other.text)
    assert torch.equal(one.group, other.group)


def test_public_stream_gives_each_sample_at_most_once_an_epoch(shards: Path) -> None:
    stream = mmrl.stream(str(shards), batch_size=5, seed=1)
    first, second = ([key for batch in stream for key in batch.keys] for _ in range(2))
    assert len(set(first)) == len(first) == 45  # 48 samples: a tail of 3 is left out
    assert first != second
    assert all(key.startswith("part-") for key in first)
    batch = next(iter(stream))
    assert isinstance(batch.image[0], bytes)
    assert isinstance(batch.text[0], str)


def test_the_tail_left_out_is_another_each_epoch(shards: Path) -> None:
    stream = mmrl.stream(str(shards), batch_size=5)
    everything = {key for batch in mmrl.stream(str(shards), batch_size=1) for key in batch.keys}
    tails = [everything - {key for batch in stream for key in batch.keys} for _ in range(3)]
    assert len({frozenset(tail) for tail in tails}) == 3


def test_callables_on_picture_and_text(shards: Path) -> None:
    stream = mmrl.stream(str(shards), 4, image=lambda picture: picture.size, text=lambda text: torch.tensor(len(text)))
    batch = next(iter(stream))
    assert batch.image == [(32, 32)] * 4
    assert batch.text.shape == (4,)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (3, 1), (4, 0)])
def test_world_and_workers_change_nothing(shards: Path, world: int, workers: int) -> None:
    alone = list(make(shards))
    ranks = [list(make(shards, rank, world, workers)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        keys, image, text, group = joined([batches[step] for batches in ranks])
        assert keys == batch.keys
        assert torch.equal(image, batch.image)
        assert torch.equal(text, batch.text)
        assert torch.equal(group, batch.group)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_resumed_equals_uninterrupted(shards: Path, stop_after: int) -> None:
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


def test_a_cache_changes_nothing(shards: Path) -> None:
    config = DataConfig(train=str(shards), augment=AUGMENT, shuffle_window=10, cache=True)
    cached = Stream(open_reader(shards), 12, seed=4, image=SPEC, text=tokens, config=config).forever()
    plain = make(shards).forever()
    for _ in range(12):
        assert_equal(next(cached), next(plain))


def test_an_epoch_resumed_in_another_world_still_sees_each_sample_once(shards: Path) -> None:
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    world=st.integers(1, 5),
    other_world=st.integers(1, 5),
    rows=st.integers(1, 4),
    stop_after=st.integers(0, 40),
    window=st.integers(1, 50),
    repeat=st.sampled_from([1.0, 0.5, 2.0]),
)
def test_each_sample_once_an_epoch_whatever_the_division_and_wherever_it_stops(
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
def test_one_shard_feeds_many_workers(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = small_shards(tmp_path_factory, [50])
    seen = [key for rank in range(4) for batch in mmrl.stream(folder, 3, rank=rank, world_size=4, num_workers=6)
            for key in batch.keys]  # fmt: skip
    assert len(seen) == len(set(seen)) == 48


def test_large_jpegs_may_be_decoded_small(tmp_path: Path) -> None:
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


def test_the_data_of_a_state_must_be_the_same(shards: Path, tmp_path: Path) -> None:
    state = make(shards).state_dict()
    for number, name in ((0, "part-2.tar"), (1, "part-0.tar"), (2, "part-1.tar")):
        (tmp_path / f"part-{number}.tar").write_bytes((shards / name).read_bytes())
    with pytest.raises(
        InputError, match="the shards, or how they are shuffled, captioned or augmented, are not as when"
    ):
        make(tmp_path).load_state_dict(state)
    assert len(json.dumps(state)) < 200


def test_a_state_of_another_batch_size_or_seed_is_refused(shards: Path) -> None:
    state = make(shards, batch=12).state_dict()
    with pytest.raises(InputError, match=r"global_batch_size was 12 .* and is 6 now"):
        make(shards, batch=6).load_state_dict(state)
    with pytest.raises(InputError, match=r"seed was 5 when this state was saved and is 4 now"):
        make(shards).load_state_dict({**state, "seed": 5})
    with pytest.raises(InputError, match="how they are shuffled"):
        make(shards, window=11).load_state_dict(state)


def test_augmentation_differs_by_epoch_and_stays_with_the_sample(shards: Path) -> None:
    stream = make(shards)
    pictures = [
        {key: picture for batch in stream for key, picture in zip(batch.keys, batch.image, strict=True)}
        for _ in range(2)
    ]
    both = pictures[0].keys() & pictures[1].keys()
    assert both
    assert all(not torch.equal(pictures[0][key], pictures[1][key]) for key in both)
    # Another order of the same epoch changes no picture.
    reordered = {
        key: picture for batch in make(shards, window=3) for key, picture in zip(batch.keys, batch.image, strict=True)
    }
    assert all(torch.equal(reordered[key], pictures[0][key]) for key in reordered.keys() & pictures[0].keys())


def test_without_augmentation_training_and_evaluation_see_the_same_pixels(shards: Path) -> None:
    reader = open_reader(shards)
    plain = Stream(reader, 12, image=SPEC, text=tokens)
    trained = {key: x for batch in plain for key, x in zip(batch.keys, batch.image, strict=True)}
    batches = read_whole(reader, SPEC, tokens)
    whole = {key: x for batch in batches for key, x in zip(batch.keys, batch.image_BCHW, strict=True)}
    assert trained.keys() == whole.keys()
    assert all(torch.equal(trained[key], whole[key]) for key in whole)


def test_read_whole_is_divided_without_loss(shards: Path) -> None:
    reader = open_reader(shards)
    parts = [list(read_whole(reader, SPEC, tokens, batch_size=7, rank=r, world_size=5)) for r in range(5)]
    keys = [key for part in parts for batch in part for key in batch.keys]
    assert keys == [key for batch in read_whole(reader, SPEC, tokens) for key in batch.keys]
    batch = next(read_whole(reader, SPEC, tokens))
    assert batch.row_of_text_M.tolist() == [row for row in range(48) for _ in range(2)]
    assert batch.captions[:2] == ["a red square number 0", "a red square number 0, again"]
    first = next(read_whole(reader, SPEC, tokens, captions=1))
    assert len(first.captions) == len(first.keys)


def test_groups_are_stable_hashes_and_absent_ones_minus_one(tmp_path: Path) -> None:
    members = [*sample_members(0), *sample_members(12), *sample_members(1), *sample_members(2)[:2]]
    batch = next(iter(mmrl.stream(write_tar(tmp_path / "a.tar", members), 4)))
    group = dict(zip([key.rpartition("/")[2] for key in batch.keys], batch.group.tolist(), strict=True))
    assert group["00000"] == group["00012"] == group_number("red square") == 2006242075667802697
    assert group["00001"] != group["00000"]
    assert group["00002"] == -1


def test_bad_samples_are_replaced_and_listed_on_any_division(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "some-bad.tar", bad_members())
    config = DataConfig(train=str(path), max_bad_fraction=1.0)

    def run(rank: int, world: int) -> list[Batch]:
        return list(Stream(open_reader(path), 12 // world, rank=rank, world_size=world, image=SPEC, config=config))

    alone = run(0, 1)
    assert [len(batch.keys) for batch in alone] == [12, 12, 12]
    listed = {problem.key: problem.reason for batch in alone for problem in batch.bad}
    for step, batch in enumerate(alone):
        pair = [run(rank, 2)[step] for rank in range(2)]
        assert [key for half in pair for key in half.keys] == batch.keys
        assert len(set(batch.keys)) == 12
    epochs = Stream(open_reader(path), 12, image=SPEC, config=config).forever()
    for _ in range(12):
        listed |= {problem.key: problem.reason for problem in next(epochs).bad}
    assert listed.keys() == {"corrupt", "halved", "noimage", "silent", "latin", "badjson"}
    assert "no image: none of .jpg, .jpeg, .png, .webp" in listed["noimage"]
    assert "caption" in listed["silent"]


def test_a_shard_that_vanishes_or_changes_is_skipped_and_listed(shards: Path, tmp_path: Path) -> None:
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stream = make(tmp_path)
    stream._work._reader._open_none()  # as a worker that has not come to them
    (tmp_path / "part-2.tar").unlink()
    changed = (tmp_path / "part-1.tar").read_bytes()
    (tmp_path / "part-1.tar").write_bytes(changed[:512].replace(b"00020", b"00099") + changed[512:])
    problems = [problem for batch in stream for problem in batch.bad]
    assert len({problem.key for problem in problems}) == 17 + 11
    assert {problem.kind for problem in problems} == {"shard out of reach"}


@pytest.mark.parametrize("seed", range(12))
def test_damage_anywhere_costs_samples_but_never_the_epoch(shards: Path, tmp_path: Path, seed: int) -> None:
    """Bits flipped all over the shards: what is lost is listed, and what is whole is read."""
    rng = np.random.default_rng(seed)
    keys = {key.rpartition("/")[2] for batch in mmrl.stream(str(shards), 1) for key in batch.keys}
    for path in shards.glob("*.tar"):
        data = bytearray(path.read_bytes())
        for place in rng.integers(0, len(data), 4):
            data[place] ^= 1 << rng.integers(8)
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
def test_a_small_set_finds_a_reserve_for_every_bad_sample(tmp_path: Path, good: int, bad: int, batch: int) -> None:
    members = [m for number in range(good) for m in sample_members(number)]
    members += [m for n in range(bad) for m in ((f"bad{n}.png", b"x"), (f"bad{n}.txt", b"caption"))]
    stream = Stream(open_reader(write_tar(tmp_path / "a.tar", members)), batch, image=SPEC)
    for _ in range(4):
        assert all(len(one.keys) == batch for one in stream)


def test_an_error_in_a_worker_is_one_sentence(tmp_path: Path) -> None:
    members = [m for n in range(12) for m in ((f"{n}.png", b"no picture"), (f"{n}.txt", b"caption"))]
    stream = Stream(open_reader(write_tar(tmp_path / "bad.tar", members)), 4, image=SPEC, num_workers=1)
    with pytest.raises(InputError, match=r"^data: .* samples in a row are bad") as error:
        next(iter(stream))
    assert "Traceback" not in str(error.value)


def test_evaluation_reads_on_past_a_batch_of_bad_samples(tmp_path: Path) -> None:
    members = [m for number in range(4) for m in sample_members(number)]
    members += [("bad.png", b"x"), ("bad.txt", b"caption"), ("deep.png", b"x"), ("deep.json", b"[" * 100_000)]
    reader = open_reader(write_tar(tmp_path / "a.tar", members))
    batches = list(read_whole(reader, SPEC, tokens, batch_size=2))
    assert [len(batch.keys) for batch in batches] == [2, 2, 0]
    assert {problem.key for batch in batches for problem in batch.bad} == {"bad", "deep"}


def test_a_set_of_nothing_but_bad_pictures_stops(tmp_path: Path) -> None:
    members = [m for n in range(12) for m in ((f"{n}.png", b"no picture"), (f"{n}.txt", b"caption"))]
    stream = Stream(open_reader(write_tar(tmp_path / "bad.tar", members)), 4, image=SPEC)
    with pytest.raises(InputError, match="samples in a row are bad"):
        next(iter(stream))


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


def test_too_few_samples_for_one_batch(shards: Path) -> None:
    with pytest.raises(InputError, match="hold 48 samples, fewer than one global batch of 64"):
        mmrl.stream(str(shards), batch_size=32, world_size=2)


def test_captions_follow_their_probabilities() -> None:
    drawn = np.linspace(0, 1, 10_000, endpoint=False)
    uniform = Counter(pick_caption(4, None, x) for x in drawn)
    assert set(uniform.values()) == {2500}
    mixed = Counter(pick_caption(4, [0.5, 0.3, 0.2], x) for x in drawn)
    assert [round(mixed[i] / 10_000, 2) for i in range(4)] == [0.5, 0.3, 0.1, 0.1]
    assert Counter(pick_caption(1, [0.5, 0.5], x) for x in drawn) == {0: 10_000}
    assert Counter(pick_caption(1, [0.0, 1.0], x) for x in drawn) == {0: 10_000}


def test_names_in_a_tar_cannot_reach_outside(tmp_path: Path) -> None:
    picture = encoded(Image.new("RGB", (32, 32)))
    members = [("../../evil.png", picture), ("../../evil.txt", b"a"), ("/etc/x.png", picture), ("/etc/x.txt", b"b")]
    members += [("code.png", picture), ("code.txt", b"c"), ("code.pyd", b"cos\nsystem\n(S'false'\ntR.")]
    batch = next(iter(mmrl.stream(write_tar(tmp_path / "names.tar", members), 3)))
    assert sorted(batch.text) == ["a", "b", "c"]
    assert not (tmp_path.parent.parent / "evil.png").exists()
