"""`mmrl check` names a sorted set, and no other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing, encoded, write_tar

from mmrl.data.check.command import check_shards
from mmrl.data.check.sortedness import SAMPLES, order_note, sampled_rows
from mmrl.data.samples import NO_GROUP, group_id
from mmrl.data.sources import DataConfig

RNG = np.random.default_rng(0)
WORDS = ["".join(RNG.choice([*"abcdefghijklmnopqrstuvwxyz"], 6)) for _ in range(500)]
CLASSES = [f"a photo of a {name}" for name in WORDS[:12]]


def of_classes(count: int) -> list[str]:
    """Captions by class, as a set is made from one folder per class."""
    return [f"{CLASSES[n * 12 // count]}, {' '.join(RNG.choice(WORDS, 4))}" for n in range(count)]


def in_alphabetical_order(count: int) -> list[str]:
    return sorted(" ".join(RNG.choice(WORDS[:50], 8)) for _ in range(count))


def without_spaces(count: int) -> list[str]:
    letters = [chr(0x4E00 + n) for n in range(400)]
    return ["".join([*letters[(n * 10 // count) * 5 :][:5], *RNG.choice(letters, 5)]) for n in range(count)]


@pytest.mark.parametrize("make", [of_classes, in_alphabetical_order, without_spaces])
@pytest.mark.parametrize("count", [120, 5000])
def test_a_sorted_set_is_named_and_a_shuffled_one_is_not(make: Callable[[int], list[str]], count: int) -> None:
    rows = [(caption, NO_GROUP) for caption in make(count)]
    note = order_note(rows, samples=10 * count, window=count)
    assert note.startswith("The set is sorted: neighbouring samples share ")
    assert note.endswith(f"or set data.shuffle_window, {count:,} here, to all {10 * count:,} samples.")
    for _ in range(20 if count == 120 else 3):
        RNG.shuffle(rows)
        assert order_note([(str(caption), int(group)) for caption, group in rows], 10 * count, count) == ""


def test_groups_of_neighbours_count_and_small_or_equal_sets_do_not() -> None:
    captions = [" ".join(RNG.choice(WORDS, 6)) for _ in range(200)]
    grouped = [(caption, group_id(str(n // 4))) for n, caption in enumerate(captions)]
    note = order_note(grouped, 200, 16384)
    assert note.startswith("The set is sorted: neighbouring samples share 75% of their groups (random ones ")
    assert "one shuffle window holds them all, so training mixes them" in note
    for rows in ([], grouped[:1], grouped[:4], [("a cat", 7)] * 300, [("", NO_GROUP)] * 300):
        assert order_note(rows, 300, 10) == ""


@pytest.mark.parametrize(
    ("count", "shards", "wanted"), [(10, 1, 10), (0, 3, 0), (10_000, 4, SAMPLES // 4), (50, 10**5, 1)]
)
def test_the_sampled_rows_are_bounded_and_spread(count: int, shards: int, wanted: int) -> None:
    rows = sorted(sampled_rows(count, shards))
    assert len(rows) == wanted
    assert not rows or rows[0] == 0
    assert len(rows) < 2 or (rows[-1] == count - 1 and max(np.diff(rows)) <= -(-count // wanted))


def test_check_says_so(tmp_path: Path) -> None:
    image, captions = encoded(drawing(0)[0]), of_classes(240)
    members = [[(f"{n}.png", image + b"%d" % n), (f"{n}.txt", text.encode())] for n, text in enumerate(captions)]
    for name, order in (("sorted", range(240)), ("shuffled", RNG.permutation(240))):
        for shard in range(4):
            rows = order[60 * shard : 60 * shard + 60]
            write_tar(tmp_path / name / f"{shard}.tar", [member for n in rows for member in members[n]])
    for window in (None, 50):
        config = DataConfig(train=str(tmp_path / "sorted"), shuffle_window=window)
        (note,) = check_shards(config, workers=1, quiet=True).notes
        assert note.startswith("The set is sorted: neighbouring samples share ")
        assert ("data.shuffle_window, 50 here, to all 240 samples" in note) == (window is not None)
    assert check_shards(tmp_path / "shuffled", workers=1, quiet=True).notes == []
