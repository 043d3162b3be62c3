"""The starter set as it ships, and the rules that it is built by."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmrl.data import starter
from mmrl.data.starter import build

COUNTS = {"train": 5887, "val-pictures": 211, "val-concepts": 224, "test-artist": 1465, "test-concepts": 961}


@cache
def members(shard: Path) -> list[tuple[str, str, bytes]]:
    """(key, extension, content) of each file in the tar, in its order."""
    found = []
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            content = tar.extractfile(member)
            assert content is not None, member.name
            found.append((key, extension, content.read()))
    return found


@cache
def samples(split: str) -> dict[str, dict[str, bytes]]:
    """The files of each sample by extension."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in starter.shards(split):
        for key, extension, content in members(shard):
            found.setdefault(key, {})[extension] = content
    return found


def concepts(split: str) -> set[str]:
    return {build.artist_and_concept(key)[1] for key in samples(split)}


def artists(split: str) -> set[str]:
    return {build.artist_and_concept(key)[0] for key in samples(split)}


# ------------------------------------------------------------------------------------------------ the splits


@pytest.mark.parametrize("split", COUNTS)
def test_each_split_has_its_count(split: str) -> None:
    assert len(samples(split)) == COUNTS[split]
    assert all(shard.parent == starter.folder() for shard in starter.shards(split))


def test_the_splits_are_all_there_is() -> None:
    shipped = {path for split in COUNTS for path in starter.shards(split)}
    assert set(starter.SPLITS) == set(COUNTS)
    assert set(starter.folder().glob("*.tar")) == shipped
    assert len({key for split in COUNTS for key in samples(split)}) == sum(COUNTS.values()) == 8748


def test_an_unknown_split_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, val-pictures, val-concepts, test-artist, test-concepts"):
        starter.shards("test")


def test_held_out_concepts_are_in_no_other_split() -> None:
    assert concepts("test-concepts") == build.held_out_concepts()
    for other in ("train", "val-pictures", "val-concepts", "test-artist"):
        assert not concepts("test-concepts") & concepts(other)


def test_validation_concepts_are_not_trained_on() -> None:
    assert not concepts("val-concepts") & (concepts("train") | concepts("val-pictures"))


def test_the_test_artist_is_seen_nowhere_in_training_or_validation() -> None:
    assert artists("test-artist") == {"twemoji"}
    for split in ("train", "val-pictures", "val-concepts"):
        assert "twemoji" not in artists(split)


def test_the_test_artist_draws_what_training_or_validation_shows_by_others() -> None:
    assert concepts("test-artist") == concepts("train") | concepts("val-concepts")


def test_validation_pictures_are_of_concepts_that_training_shows_twice() -> None:
    trained = [build.artist_and_concept(key)[1] for key in samples("train")]
    for key in samples("val-pictures"):
        assert trained.count(build.artist_and_concept(key)[1]) >= 2, key


def test_no_validation_picture_has_a_near_copy_by_the_artist_who_shares_its_drawings() -> None:
    assert not artists("val-pictures") & build.DRAWN_ALIKE


# ------------------------------------------------------------------------------------------------ the samples


@pytest.mark.parametrize("split", COUNTS)
def test_each_sample_is_whole_and_says_what_its_key_says(split: str) -> None:
    for key, files in samples(split).items():
        artist, concept = build.artist_and_concept(key)
        assert set(files) == {"webp", "txt", "json"}, key
        facts = json.loads(files["json"])
        name = files["txt"].decode()
        assert set(facts) == {"captions", "tags", "group", "category", "artist"}, key
        assert (facts["group"], facts["artist"]) == (concept, artist)
        with_tags = [f"{name}: {', '.join(facts['tags'])}"] if facts["tags"] else []
        assert facts["captions"] == [name, *with_tags], key


@pytest.mark.parametrize("split", COUNTS)
def test_each_picture_has_the_size_told(split: str) -> None:
    for number, (key, files) in enumerate(samples(split).items()):
        with Image.open(io.BytesIO(files["webp"])) as picture:
            assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGB", (64, 64)), key
            if number % 50 == 0:  # the rest only by their headers: decoding all takes longer
                picture.load()


def test_the_same_concept_has_the_same_words_everywhere() -> None:
    words: dict[str, str] = {}
    for split in COUNTS:
        for key, files in samples(split).items():
            facts = json.loads(files["json"])
            told = json.dumps([facts["captions"], facts["tags"], facts["category"]])
            assert words.setdefault(facts["group"], told) == told, key
    assert len(words) == 1644


@pytest.mark.parametrize("split", COUNTS)
def test_webdataset_reads_the_same_keys_in_the_same_order(split: str) -> None:
    read = []
    for shard in starter.shards(split):
        # Its reader, not webdataset.WebDataset, which leaves files open until they are collected.
        with shard.open("rb") as stream:
            files = tar_file_expander([{"url": str(shard), "stream": stream}])
            read += [sample["__key__"] for sample in group_by_keys(files) if sample.keys() >= {"webp", "txt", "json"}]
    assert read == list(samples(split))


def test_the_shards_tell_nothing_of_their_maker() -> None:
    for split in COUNTS:
        for shard in starter.shards(split):
            with tarfile.open(shard) as tar:
                for member in tar:
                    told = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
                    assert told == (0, 0, 0, "", "", 0o644), member.name


def test_the_training_shards_are_shuffled_and_about_equal() -> None:
    sizes = [len(members(shard)) // 3 for shard in starter.shards("train")]
    assert max(sizes) - min(sizes) <= 1
    for shard in starter.shards("train"):
        assert {build.artist_and_concept(key)[0] for key, _, _ in members(shard)} == artists("train")


def test_the_notice_names_every_package() -> None:
    notice = (starter.folder() / "NOTICE").read_text(encoding="utf-8")
    for package in (build.WORDS, *build.ARTISTS.values()):
        assert f"{package.name} {package.version}" in notice


# ------------------------------------------------------------------------------------------------ the build


def test_the_rule_gives_the_shipped_splits_again() -> None:
    keys = [key for split in COUNTS for key in samples(split)]
    splits = build.split_keys(reversed(keys), build.held_out_concepts())
    assert splits == {split: list(samples(split)) for split in COUNTS}


def test_a_held_out_concept_goes_to_its_test_whoever_drew_it() -> None:
    splits = build.split_keys(["noto_1f9c2", "twemoji_1f9c2", "twemoji_1f355"], {"1f9c2"})
    assert splits["test-concepts"] == ["noto_1f9c2", "twemoji_1f9c2"]
    assert splits["test-artist"] == ["twemoji_1f355"]


def test_a_validation_picture_leaves_two_others() -> None:
    key = next(iter(samples("val-pictures")))
    concept = build.artist_and_concept(key)[1]
    others = [f"fluent_3d_{concept}", f"fluent_flat_{concept}"]
    assert build.validation_picture([key, *others]) == key
    assert build.validation_picture([key, others[0]]) is None
    assert build.validation_picture(others) is None


@pytest.mark.parametrize(
    ("hexcode", "expected"),
    [("1F9C2", "1f9c2"), ("0023-FE0F-20E3", "0023-20e3"), ("1F441-FE0F-200D-1F5E8-FE0F", "1f441-200d-1f5e8")],
)
def test_code_points_lose_their_variation_selector(hexcode: str, expected: str) -> None:
    assert build.code_point(hexcode) == expected


def test_icons_are_found_by_the_names_that_other_sets_have_for_a_code_point() -> None:
    newer = build.IconSet({"icons": {}}, {"1f621": "enraged-face", "1f997": "cricket"})
    another = build.IconSet({"icons": {}}, {"1f621": "pouting-face"})
    older = build.IconSet({"icons": {"pouting-face": {}, "cricket-game": {}}, "aliases": {"cricket": {}}}, {})
    names = build.names_by_code_point([newer, another, older])
    assert build.find_icons(older, names) == {"1f621": "pouting-face"}
    assert build.find_icons(newer, names) == newer.name_of


def test_an_icon_takes_the_measures_of_its_set_where_it_has_none() -> None:
    icon_set = build.IconSet({"icons": {"slice": {"body": "<g/>", "height": 25.22}}, "width": 36, "height": 36}, {})
    svg = build.svg_of(icon_set, "slice")
    assert 'viewBox="0 0 36 25.22"' in svg
    assert "<g/></svg>" in svg


def test_a_drawing_becomes_a_picture_in_the_middle_of_a_white_square() -> None:
    drawing = Image.new("RGBA", (128, 64), "red")
    with Image.open(io.BytesIO(build.encode(drawing))) as picture:
        assert picture.size == (64, 64)
        top, middle = picture.getpixel((32, 4)), picture.getpixel((32, 32))
    assert isinstance(top, tuple)
    assert isinstance(middle, tuple)
    assert min(top) > 245
    assert middle[0] > 245
    assert max(middle[1:]) < 16
