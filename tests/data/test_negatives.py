"""Hard negatives in the stream, against those that the test finds by hand in what it has written."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import drawing, encoded, write_tar
from helpers.samples import SPEC

from mmrl.data.batches import Batch
from mmrl.data.captions import caption_id
from mmrl.data.groups import group_id, own_group
from mmrl.data.sources import DataConfig, open_reader, open_training_set
from mmrl.data.stream import Stream
from mmrl.data.transforms import AugmentConfig
from mmrl.errors import InputError

# Per sample: keys of its shard, of the other shard, captions; itself, equal entries and keys that do not exist.
NAMED: list[list[str]] = [
    ["00001", "00002", "00003"], ["part-1.tar/00007", "00003"], ["a wrong caption", "00004"], [],
    ["00004", "00004", "00005"], ["00099", "part-1.tar/00099", "00000"], [],
    ["00006", "part-0.tar/00001", "another", "third", "00008"], ["00009"], ["00006", "00007", "00008", "00010"],
    ["part-0.tar/00000", "part-0.tar/00001"], ["00011"],
]  # fmt: skip
GROUPED = {2: "g", 4: "g", 7: "h"}


def captions(number: int) -> list[str]:
    return [f"caption {number}", f"other {number}"]


def write_set(folder: Path, named: Any = NAMED, bad: tuple[int, ...] = (), **more: Any) -> Path:
    for shard in range(2):
        members = []
        for number in range(shard * 6, shard * 6 + 6):
            metadata = {"captions": captions(number), "negatives": named[number], **more}
            metadata |= {"group": GROUPED[number]} if number in GROUPED else {}
            image = b"damaged" if number in bad else encoded(drawing(number)[0])
            members += [(f"{number:05}.png", image), (f"{number:05}.json", json.dumps(metadata).encode())]
        write_tar(folder / f"part-{shard}.tar", members)
    return folder


def make(folder: Path | str, rank: int = 0, world: int = 1, workers: int = 0, **settings: Any) -> Stream:
    settings = {"negatives": 2, "negatives_images": True, "max_bad_fraction": 1.0, **settings}
    config = DataConfig.model_validate({"train": str(folder), **settings})
    return Stream(
        open_training_set(config), 12 // world, seed=3, rank=rank, world_size=world, num_workers=workers,
        image=SPEC, config=config,
    )  # fmt: skip


def number_of(key: str) -> int:
    return int(key.rpartition("/")[2])


def group_of(number: int) -> int:
    return group_id(GROUPED.get(number) or own_group(f"part-{number // 6}.tar/{number:05}"))


def pixels(number: int) -> torch.Tensor:
    return torch.from_numpy(np.array(drawing(number)[0])).permute(2, 0, 1)


def wanted(number: int) -> tuple[set[int], set[str]]:
    """The samples and the captions that a sample names."""
    samples, texts = set[int](), set[str]()
    for name in NAMED[number]:
        shard, _, key = name.rpartition("/")
        inside = int(shard[5]) if shard else number // 6
        known = key in {f"{n:05}" for n in range(inside * 6, inside * 6 + 6)}
        (samples.add(int(key)) if known else texts.add(name))
    return samples - {number}, texts


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("bad", [(), (1, 7)])
def test_negatives_are_those_of_the_sample_each_at_most_once(
    tmp_path: Path, images: bool, bad: tuple[int, ...]
) -> None:
    stream, drawn = make(write_set(tmp_path, bad=bad), negatives_images=images, negatives=3), Counter[tuple[int, str]]()
    for batch in itertools.islice(stream.forever(), 30):
        some = batch.negatives
        assert some is not None
        assert some.caption is not None
        assert some.caption.tolist() == [caption_id(text) for text in some.text]
        assert some.valid_text is not None
        assert (some.image is None) == (some.valid_image is None) == (not images)
        for row, key in enumerate(batch.keys):
            number = number_of(key)
            samples, texts = wanted(number)
            samples -= {*bad} if images else set()
            seen = set[str]()
            for n in range(3 * row, 3 * row + 3):
                text, other = some.text[n], number_of(some.keys[n])
                if not some.valid_text[n]:
                    assert (text, some.group[n], other) == (batch.text[row], batch.group[row], number)
                elif text in texts:
                    assert some.group[n] == -1
                    seen.add(text)
                else:
                    assert other in samples
                    assert text in captions(other)
                    assert some.group[n] == group_of(other)
                    seen.add(str(other))
                if images and some.valid_image is not None:
                    has_image = bool(some.valid_text[n]) and text not in texts
                    assert some.valid_image[n] == has_image
                    assert torch.equal(some.image[n], pixels(other if has_image else number))
            valid = int(some.valid_text[3 * row : 3 * row + 3].sum())
            assert len(seen) == valid == min(3, len(samples) + len(texts))
            drawn.update((number, one) for one in seen)
            assert batch.group[row] == group_of(number)
    of_seven = [count for (number, _), count in drawn.items() if number == 9]
    assert not of_seven or (len(of_seven) == 4 - len({*bad} & {7}) * images and min(of_seven) > 10)


def assert_equal(one: Batch | None, other: Batch | None) -> None:
    assert one is not None
    assert other is not None
    assert (one.keys, one.text) == (other.keys, other.text)
    for name in ("image", "group", "caption", "valid_text", "valid_image"):
        assert (getattr(one, name) is None) == (getattr(other, name) is None)
        assert getattr(one, name) is None or torch.equal(getattr(one, name), getattr(other, name))


def test_ranks_workers_units_and_resumes_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"augment": AugmentConfig(rotate=20, random_resized_crop=[0.5, 1.0])}
    write_set(tmp_path, bad=(2,))
    expected = list(itertools.islice(make(tmp_path, **settings).forever(), 5))
    for world, workers in ((2, 0), (3, 0), (1, 1)):
        ranks = [
            list(itertools.islice(make(tmp_path, r, world, workers, **settings).forever(), 5)) for r in range(world)
        ]
        for step, batch in enumerate(expected):
            joined = Batch.join([one[step] for one in ranks])
            assert_equal(joined, batch)
            assert_equal(joined.negatives, batch.negatives)
    monkeypatch.setattr("mmrl.data.workers.UNIT_ROWS", 5)
    first = make(tmp_path, **settings, cache=True)
    for batch, other in zip(itertools.islice(first.forever(), 3), expected, strict=False):
        assert_equal(batch.negatives, other.negatives)
    resumed = make(tmp_path, **settings)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch, other in zip(resumed.forever(), expected[3:], strict=False):
        assert_equal(batch, other)
        assert_equal(batch.negatives, other.negatives)
    for changed in ({"negatives": 1}, {"negatives_images": False}, {"negatives": 0}):
        with pytest.raises(InputError, match="have changed since this state was saved"):
            make(tmp_path, **{**settings, **changed}).load_state_dict(first.state_dict())


def test_sets_without_negatives_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [[]] * 12, wrong=["x"])
    with pytest.raises(InputError, match="none of 12 samples has a list 'negatives' in its JSON"):
        make(folder)
    assert make(folder, negatives=0)
    batch = next(iter(make(folder, fields={"negatives": "wrong"})))
    assert batch.negatives is not None
    assert batch.negatives.text[::2] == ["x"] * 12


def test_a_sample_of_another_remote_shard_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    remote: dict[str, Any] = {"remote": {"folder": str(tmp_path / "cache")}}
    urls = [f"file://{tmp_path}/set/part-{n}.tar" for n in range(2)]
    with pytest.raises(
        InputError, match=r"part-0.tar/0000\d is in another shard of a remote set, .* mmrl mine --captions"
    ):
        list(itertools.islice(make("", train=urls, **remote).forever(), 3))
    write_set(tmp_path / "set", [["00001", "00007", "x"]] * 12)
    batch = next(iter(make("", train=urls, remote={"folder": str(tmp_path / "cache-2")})))
    assert batch.negatives is not None
    assert {number_of(key) for key in batch.negatives.keys} <= {*range(12)}


def write_mined(out: Path, folder: Path, by_caption: bool = False, layout: str | None = None) -> Path:
    """As `mmrl mine`: for each sample the next two of the set, sample 3 left out."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out.mkdir(exist_ok=True)
    files = {f"part-{shard}.tar": f"part-{shard}.tar.parquet" for shard in range(2)}
    for shard, file in enumerate(files.values()):
        rows = []
        for number in range(shard * 6, shard * 6 + 6):
            others = [(number + step) % 12 for step in (1, 2)]
            rows.append({
                "key": f"part-{shard}.tar/{number:05}",
                "negatives": [] if by_caption else [f"part-{n // 6}.tar/{n:05}" for n in others],
                "captions": [captions(n)[1] for n in others],
                "groups": [group_of(n) for n in others],
                "scores": [0.5, 0.4],
            })  # fmt: skip
        parquet.write_table(
            pyarrow.Table.from_pylist([one for one in rows if not one["key"].endswith("3")]), out / file
        )
    facts = {"format": "mmrl-negatives-1", "settings": {"captions": by_caption}, "files": files}
    (out / "mined.json").write_text(json.dumps({**facts, "layout": layout or open_reader(folder).layout}))
    return out


@pytest.mark.parametrize(("by_caption", "images", "repeat"), [(False, True, 1), (False, False, 2), (True, False, 1)])
def test_mined_negatives_are_used_with_their_captions(
    tmp_path: Path, by_caption: bool, images: bool, repeat: int
) -> None:
    folder = write_set(tmp_path / "set", [[]] * 12)
    mined = write_mined(tmp_path / "mined", folder, by_caption)
    sources = [{"shards": str(folder), "repeat": float(repeat)}]
    stream = make("", train=[], sources=sources, negatives_from=str(mined), negatives_images=images)
    for batch in itertools.islice(stream.forever(), 4):
        some = batch.negatives
        assert some is not None
        assert some.valid_text is not None
        for row, number in enumerate(map(number_of, batch.keys)):
            rows = slice(2 * row, 2 * row + 2)
            if number == 3:
                assert not some.valid_text[rows].any()
                continue
            others = {(number + step) % 12 for step in (1, 2)}
            assert some.valid_text[rows].all()
            assert {*some.text[rows]} == {captions(n)[1] for n in others}
            assert {*some.group[rows].tolist()} == {group_of(n) for n in others}
            if images:
                found = [next(n for n in others if captions(n)[1] == text) for text in some.text[rows]]
                assert torch.equal(some.image[rows], torch.stack([pixels(n) for n in found]))


def test_mined_negatives_of_another_set_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [[]] * 12)
    with pytest.raises(
        InputError, match=r"data.negatives_from: .*mined.json cannot be read \(.*\); give a folder that"
    ):
        make(folder, negatives_from=str(tmp_path))
    mined = write_mined(tmp_path / "mined", folder, layout="x")
    with pytest.raises(
        InputError, match=r"data.negatives_from: .*/mined is of another set than data.train; run mmrl mine"
    ):
        make(folder, negatives_from=str(mined))
    write_mined(mined, folder, by_caption=True)
    with pytest.raises(InputError, match=r"have no images to load, since they are captions only; set it to false"):
        make(folder, negatives_from=str(mined))
    write_mined(mined, folder)
    (mined / "part-1.tar.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-1.tar.parquet cannot be read \(.*\); run mmrl mine again"):
        list(make(folder, negatives_from=str(mined)))
    state = make(folder, negatives_from=str(write_mined(mined, folder))).state_dict()
    moved = mined.rename(tmp_path / "moved")
    make(folder, negatives_from=str(moved)).load_state_dict(state)
    (moved / "mined.json").write_text((moved / "mined.json").read_text() + " ")
    with pytest.raises(InputError, match="have changed since this state was saved"):
        make(folder, negatives_from=str(moved)).load_state_dict(state)
