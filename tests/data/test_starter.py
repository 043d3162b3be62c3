"""The shipped starter set."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from mmrl.data import starter

COUNTS = {"train": 5887, "val-pictures": 211, "val-concepts": 224, "test-artist": 1465, "test-concepts": 961}


@cache
def members(shard: Path) -> list[tuple[str, str, bytes]]:
    """(key, extension, content) of each file in the tar, in order."""
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
    """Key -> extension -> content of all samples of a split."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in starter.shards(split):
        for key, extension, content in members(shard):
            found.setdefault(key, {})[extension] = content
    return found


def artist_and_concept(key: str) -> tuple[str, str]:
    """Splits a key: "noto_v1_1f9c2" -> ("noto_v1", "1f9c2")."""
    artist, _, concept = key.rpartition("_")
    return artist, concept


def concepts(split: str) -> set[str]:
    return {artist_and_concept(key)[1] for key in samples(split)}


def artists(split: str) -> set[str]:
    return {artist_and_concept(key)[0] for key in samples(split)}


# ------------------------------------------------------------------------------------------------ the splits


@pytest.mark.parametrize("split", COUNTS)
def test_each_split_has_the_documented_number_of_samples(split: str) -> None:
    assert len(samples(split)) == COUNTS[split]
    assert all(shard.parent == starter.folder() for shard in starter.shards(split))


def test_the_shipped_tars_are_the_splits_and_no_key_occurs_twice() -> None:
    shipped = {path for split in COUNTS for path in starter.shards(split)}
    assert set(starter.SPLITS) == set(COUNTS)
    assert set(starter.folder().glob("*.tar")) == shipped
    assert len({key for split in COUNTS for key in samples(split)}) == sum(COUNTS.values()) == 8748


def test_an_unknown_split_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'test'.*train, val-pictures, val-concepts, test-artist, test-concepts"):
        starter.shards("test")


def test_held_out_concepts_are_in_no_other_split() -> None:
    assert len(concepts("test-concepts")) == 179
    for other in ("train", "val-pictures", "val-concepts", "test-artist"):
        assert not concepts("test-concepts") & concepts(other)


def test_val_concepts_are_not_in_train_or_val_pictures() -> None:
    assert not concepts("val-concepts") & (concepts("train") | concepts("val-pictures"))


def test_the_test_artist_is_not_in_train_or_val_splits() -> None:
    assert artists("test-artist") == {"twemoji"}
    for split in ("train", "val-pictures", "val-concepts"):
        assert "twemoji" not in artists(split)


def test_the_concepts_of_the_test_artist_are_those_of_train_and_val_concepts() -> None:
    assert concepts("test-artist") == concepts("train") | concepts("val-concepts")


def test_val_pictures_are_of_concepts_with_two_images_in_train() -> None:
    trained = [artist_and_concept(key)[1] for key in samples("train")]
    for key in samples("val-pictures"):
        assert trained.count(artist_and_concept(key)[1]) >= 2, key


def test_val_pictures_have_no_near_duplicates_in_train() -> None:
    assert not artists("val-pictures") & {"fluent_3d", "fluent_flat"}


# ------------------------------------------------------------------------------------------------ the samples


@pytest.mark.parametrize("split", COUNTS)
def test_each_sample_has_all_files_and_metadata_that_matches_its_key(split: str) -> None:
    for key, files in samples(split).items():
        artist, concept = artist_and_concept(key)
        assert set(files) == {"webp", "txt", "json"}, key
        facts = json.loads(files["json"])
        name = files["txt"].decode()
        assert set(facts) == {"captions", "tags", "group", "category", "artist"}, key
        assert (facts["group"], facts["artist"]) == (concept, artist)
        with_tags = [f"{name}: {', '.join(facts['tags'])}"] if facts["tags"] else []
        assert facts["captions"] == [name, *with_tags], key


@pytest.mark.parametrize("split", COUNTS)
def test_each_image_is_a_64_pixel_webp(split: str) -> None:
    for i, (key, files) in enumerate(samples(split).items()):
        with Image.open(io.BytesIO(files["webp"])) as image:
            assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64)), key
            if i % 50 == 0:  # decoding all takes too long
                image.load()


def test_a_concept_has_the_same_captions_in_all_splits() -> None:
    words: dict[str, str] = {}
    for split in COUNTS:
        for key, files in samples(split).items():
            facts = json.loads(files["json"])
            text = json.dumps([facts["captions"], facts["tags"], facts["category"]])
            assert words.setdefault(facts["group"], text) == text, key
    assert len(words) == 1644


@pytest.mark.parametrize("split", COUNTS)
def test_webdataset_reads_the_same_keys_in_the_same_order(split: str) -> None:
    read = []
    for shard in starter.shards(split):
        # Not webdataset.WebDataset, which leaves files open until garbage collection.
        with shard.open("rb") as stream:
            files = tar_file_expander([{"url": str(shard), "stream": stream}])
            read += [sample["__key__"] for sample in group_by_keys(files) if sample.keys() >= {"webp", "txt", "json"}]
    assert read == list(samples(split))


def test_the_shards_have_no_owner_and_no_time() -> None:
    for split in COUNTS:
        for shard in starter.shards(split):
            with tarfile.open(shard) as tar:
                for member in tar:
                    metadata = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
                    assert metadata == (0, 0, 0, "", "", 0o644), member.name


def test_the_training_shards_are_shuffled_and_of_equal_size() -> None:
    sizes = [len(members(shard)) // 3 for shard in starter.shards("train")]
    assert max(sizes) - min(sizes) <= 1
    for shard in starter.shards("train"):
        assert {artist_and_concept(key)[0] for key, _, _ in members(shard)} == artists("train")
