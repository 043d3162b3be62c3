"""The share of bad samples that stops a run: the true one, and the one that `mmrl check` reports."""

from pathlib import Path

import pytest
from conftest import sample_members, write_tar
from helpers.samples import SPEC

from mmrl.data.check.command import check_shards
from mmrl.data.sources import DataConfig, SourceConfig, open_training_set
from mmrl.data.stream import Stream
from mmrl.errors import RunStopped
from mmrl.train.bad_samples import BadSamples


def shard(path: Path, good: int, bad: int, alternating: bool = True) -> Path:
    """A tar of good samples and of samples with a damaged image; the bad ones are spread evenly, or all at the end."""
    order = sorted([(n / good, n, True) for n in range(good)] + [(n / bad, n, False) for n in range(bad)])
    if not alternating:
        order.sort(key=lambda one: not one[2])
    members = []
    for _, n, is_good in order:
        members += sample_members(n) if is_good else [(f"bad{n}.png", b"x"), (f"bad{n}.txt", b"a caption")]
    return write_tar(path, members)


def share_after(config: DataConfig, epochs: int, batch_size: int, limit: float = 1.0) -> float:
    """The share that a run knows after some epochs; raises RunStopped where the run would."""
    reader = open_training_set(config)
    stream = Stream(reader, batch_size, image=SPEC, config=config)
    bad = BadSamples("run", reader, stream.batches_per_epoch * batch_size, limit)
    for _ in range(epochs):
        for batch in stream:
            bad.add(batch)
            bad.gather()
            bad.stop_if_too_many()
    return bad.share


@pytest.mark.parametrize(("good", "bad", "limit"), [(60, 40, 0.5), (60, 40, 0.41), (5, 95, 1.0), (99, 1, 0.011)])
def test_the_limit_is_compared_with_the_true_share(tmp_path: Path, good: int, bad: int, limit: float) -> None:
    config = DataConfig(train=str(shard(tmp_path / "a.tar", good, bad)), max_bad_fraction=limit)
    share = share_after(config, 3, 10, limit)
    assert share == pytest.approx(bad / (good + bad))
    checked = check_shards(config, workers=1, quiet=True)
    assert checked.bad_share == pytest.approx(share)
    assert checked.ok
    with pytest.raises(
        RunStopped, match=rf"At least {bad}\.00% of the samples are bad, more than .* allows: {bad} no pict"
    ):
        share_after(config, 1, 100, bad / (good + bad) - 0.005)


def test_one_bad_shard_is_no_more_than_its_share(tmp_path: Path) -> None:
    """A shuffle window that is nearly all bad is filled from elsewhere, and its samples count once."""
    names = [str(shard(tmp_path / f"{n}.tar", 48, 0)) for n in range(9)] + [str(shard(tmp_path / "bad.tar", 1, 47))]
    config = DataConfig(train=names, max_bad_fraction=0.12, shuffle_window=48)
    assert share_after(config, 1, 4, 0.12) == pytest.approx(47 / 480)


def test_samples_that_the_index_lacks_count_as_in_check(tmp_path: Path) -> None:
    twice = write_tar(tmp_path / "a.tar", [m for n in (*range(48), *range(12)) for m in sample_members(n)])
    config = DataConfig(train=str(twice), max_bad_fraction=0.25)
    share = share_after(config, 1, 12, 0.25)
    assert share == check_shards(config, workers=1, quiet=True).bad_share == 12 / 60


def test_a_source_counts_as_often_as_it_is_repeated(tmp_path: Path) -> None:
    sources = [
        SourceConfig(shards=str(shard(tmp_path / "good.tar", 30, 0)), repeat=3),
        SourceConfig(shards=str(shard(tmp_path / "bad.tar", 20, 10))),
    ]
    config = DataConfig(sources=sources, max_bad_fraction=0.1)
    share = share_after(config, 2, 12, 0.1)
    assert share == pytest.approx(check_shards(config, workers=1, quiet=True).bad_share) == pytest.approx(10 / 120)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    twice = [m for n in (*range(47), 46, 3) for m in sample_members(n)]
    config = DataConfig(train=str(write_tar(tmp_path / "a.tar", [*twice, ("b.png", b"x"), ("b.txt", b"a caption")])))
    reader = open_training_set(config)
    first, second = (BadSamples("run", reader, 48, 1.0) for _ in range(2))
    for batch in Stream(reader, 12, image=SPEC, config=config):
        first.add(batch)
    first.gather()
    second.restore(dict(first.counts), 48)
    assert second.share == first.share == check_shards(config, workers=1, quiet=True).bad_share == 2 / 49
